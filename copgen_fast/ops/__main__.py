"""python -m copgen_fast.ops: the ops' backends on this machine."""

from copgen_fast.ops.backend import support_table

print(support_table())
