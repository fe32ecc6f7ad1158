"""Metrics of a training run: a JSON line a step, and TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path

from copgen_fast.runtime import artifacts

Row = dict[str, float]


def read_rows(path: Path, before_step: int | None = None) -> list[Row]:
    """Rows of metrics.jsonl, before `before_step`; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if before_step is None or row["step"] < before_step:
            rows.append(row)
    return rows


class MetricLog:
    """Writer of `folder`/metrics.jsonl and of TensorBoard files beside it.

    Args:
        start: step from which a run resumes; rows from it on are dropped, as they will be written again.
    """

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        lines = "".join(json.dumps(row) + "\n" for row in read_rows(path, start))
        artifacts.write_bytes(path, lines.encode())
        self._path = path
        self._file = open(path, "a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def write(self, rows: list[Row]) -> None:
        """Append rows in order and force them to disk; TensorBoard gets the last of them."""
        with artifacts.explain_full_disk(self._path):
            self._file.writelines(json.dumps(row) + "\n" for row in rows)
            self._file.flush()
            os.fsync(self._file.fileno())
        last = rows[-1]
        for name in last.keys() - {"step", "samples"}:
            self._board.add_scalar(name, last[name], int(last["samples"]))

    def close(self) -> None:
        self._file.close()
        self._board.close()
