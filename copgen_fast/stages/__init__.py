"""The stages of a run: navigator, steering -> pairs -> pretrain -> probe -> report. Each reads only earlier files.

COP-Gen (Li et al. 2022) in twelve lines; T_z the navigator, G the frozen generator, f the estimator, then the encoder:

    navigator   repeat   z ~ prior;  dz = T_z(z)                           paper Section 3.3
                         x = G(z);  x_prime = G(z + dz)
                         v = t_x(x);  v_prime = t_x'(x_prime)              a random augmentation each
                         f   minimises  L_NCE(f(v), f(v_prime))            Eq. 6
                         T_z maximises  L_NCE(f(v), f(v_prime))
                until    E||dz|| >= delta, or enough latents               Eq. 5
    steering    for the positives of the same name: walks in z that transform images (Section 4.1's baseline)
    pairs       write    (G(z), G(z + dz)) as uint8, once for every way of making positives
    pretrain    repeat   v = t_x(x);  v_prime = t_x'(x_prime)
                         a new f minimises the method's loss of v, v_prime Eq. 1 for SimCLR
    probe       freeze f and evaluate it on real labelled images
    report      one page of pictures, curves and numbers
"""

from __future__ import annotations

from copgen_fast.stages.run import Run

__all__ = ["Run"]
