"""Batched, differentiable image augmentation.

params.py       AugmentPolicy, what to draw; AugmentParams, what was drawn
functional.py   the function `augment` and the module `Augment`
operator.py     PyTorch operators over the compiled backends: csrc/augment/ on CPUs, kernels/augment.py on GPUs
reference.py    the definition, in PyTorch's own operators
"""
