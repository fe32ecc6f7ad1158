"""python -m copgen_fast.ops: which backends the ops have here."""

from copgen_fast.ops.backend import support_table

print(support_table())
