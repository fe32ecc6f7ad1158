"""Addition of a shortcut that is upsampled by nearest 2 x, and of a bias: the end of a generator's residual block.

functional.py   the function `add_upsampled`
operator.py     PyTorch operators over the compiled backend, kernels/add_upsampled.py on GPUs
reference.py    the definition, in PyTorch's own operators, also in place: the fastest on CPUs
"""
