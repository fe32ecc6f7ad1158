"""Conditional batch normalisation with folded statistics, and its ReLU, of a generator.

functional.py   the function `cond_norm`
operator.py     PyTorch operators over the compiled backends: csrc/cond_norm/ on CPUs, kernels/cond_norm.py on GPUs
reference.py    the definition, in PyTorch's own operators
"""
