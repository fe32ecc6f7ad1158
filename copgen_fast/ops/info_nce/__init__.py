"""InfoNCE, symmetric (NT-Xent) or one-sided, with labels, a queue of negatives and process groups.

functional.py     the function `info_nce` and the module `InfoNCELoss`
rows.py           every form of the loss, row by row, from row losses and terms that are linear in the rows
operator.py       row losses and their gradients as PyTorch operators: csrc/info_nce/, kernels/info_nce.py
small_batch.py    losses of a small batch on the CPU, which keep the matrix for their backward
chunked.py        the same in PyTorch's operators, some rows at a time
others.py         log-sum-exp over a queue less the entries made of a row's own pair
group.py          row losses against all ranks' columns
l2_normalize.py, sum_by_label.py   operators beside them
reference.py      the definition, with the whole matrix of similarities
"""
