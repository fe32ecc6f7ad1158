"""3 x 3 convolutions with a padding of 1, and their gradients, in fewer multiplications.

functional.py   the function `conv3x3` and the layer `Conv3x3`
operator.py     PyTorch operators over the compiled backend, csrc/tiles/ on CPUs
reference.py    the definition, PyTorch's own convolution
"""
