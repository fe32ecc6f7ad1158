"""Conditional batch normalisation with folded statistics, and its ReLU, of a generator.

functional.py   the function `cond_norm` and its definition
operator.py     PyTorch operators over the compiled backends: csrc/cond_norm/ on CPUs, kernels/cond_norm.py on GPUs
"""
