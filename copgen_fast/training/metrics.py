"""Metrics of a training run: a JSON line a step, and TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path

from copgen_fast import schema
from copgen_fast.errors import CopgenError, CorruptArtifactError
from copgen_fast.files import read_bytes
from copgen_fast.runtime import artifacts

Row = dict[str, float]


def read_rows(path: Path, before_step: int | None = None) -> list[Row]:
    """Rows of metrics.jsonl, before `before_step`; a last line cut short by a kill is left out.

    Raises:
        CorruptArtifactError: another line is altered.
    """
    if not path.exists():
        return []
    rows, lines = [], read_bytes(path).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = schema.check(schema.parse(line), dict[str, float | str])
            schema.check(row.get("step"), int, "step")
        except ValueError as error:
            if number == len(lines):
                break
            raise CorruptArtifactError(
                f"{path}: line {number}: {error}: remove this line and those after it, which are written again where "
                "the run goes on from before them"
            ) from error
        if before_step is None or row["step"] < before_step:
            rows.append(row)
    return rows


def last_row(path: Path) -> Row:
    """The last row of metrics.jsonl; CorruptArtifactError where there is none."""
    if rows := read_rows(path):
        return rows[-1]
    raise CorruptArtifactError(f"{path} holds no row, though its run is finished: delete that folder to run it again")


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
        self._file = open(path, "a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def write(self, rows: list[Row]) -> None:
        """Append rows in order and force them to disk; TensorBoard gets the last of them.

        Raises:
            CopgenError: the file was deleted, or the disk is full.
        """
        if not self._path.exists():
            raise CopgenError(
                f"{self._path} was deleted or moved while it was written: delete what is left of its run, or move it "
                "back, and run the same command again"
            )
        with artifacts.explain_disk(self._path):
            self._file.writelines(json.dumps(row) + "\n" for row in rows)
            self._file.flush()
            os.fsync(self._file.fileno())
        last = rows[-1]
        for name in last.keys() - {"step", "samples"}:
            self._board.add_scalar(name, last[name], int(last["samples"]))

    def close(self) -> None:
        self._file.close()
        self._board.close()
