"""Rows of our implementation beside its peers; no time is asserted."""

import torch

from bench import limits, rows


def test_memory_that_is_kept_between_calls_is_not_told_by_one():
    x = torch.ones(8)
    bound = limits.copies("all", [(torch.empty(8), x)])
    columns = ("graph", "fp32", "step")
    ours = [rows.Candidate("area", f"case {kept}", *columns, lambda: x + x, bound, kept) for kept in (True, False)]
    options = rows.Options(repeats=3, min_seconds=0)
    found = list(rows.compare(ours, {"peer": lambda: x * 2}, options, torch.device("cpu"), least=3))
    assert [row.case for row in found] == ["case True", "case False"] and [row.n for row in found] == [3, 3]
    assert found[0].peak_mb is None
    assert (found[1].peak_mb is None) == (found[1].peer_peak_mb is None) == (found[0].peer_peak_mb is None)
