"""RandAugment of a batch with Pillow's 8-bit operations, differentiable.

params.py       RandAugmentPolicy, what to draw; RandAugmentParams, what was drawn
functional.py   the function `rand_augment`
operator.py     a PyTorch operator over csrc/rand_augment/ on CPUs
reference.py    the definition, in PyTorch's own operators; also what runs on GPUs
"""
