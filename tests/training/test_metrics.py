import errno
import json
import os

import pytest

from copgen_fast.errors import CopgenError
from copgen_fast.training.metrics import MetricLog, read_rows


def rows(first, last):
    return [{"step": step, "samples": 2 * step, "loss": step / 3} for step in range(first, last)]


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path):
    for folder, parts in (("whole", [(0, 0, 9)]), ("resumed", [(0, 0, 7), (4, 4, 6), (5, 5, 9)])):
        for start, first, last in parts:
            log = MetricLog(tmp_path / folder, start)
            log.write(rows(first, last))
            log.close()
    whole, resumed = (tmp_path / name / "metrics.jsonl" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()
    assert read_rows(whole) == rows(0, 9)


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(rows(0, 1)[0]) + "\n" + '{"step": 1, "sam')
    assert read_rows(path) == rows(0, 1)
    MetricLog(tmp_path, 1).close()
    assert path.read_text() == json.dumps(rows(0, 1)[0]) + "\n"


def test_a_missing_log_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_a_full_disk_is_explained(tmp_path, monkeypatch):
    log = MetricLog(tmp_path, 0)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CopgenError, match=r"disk full while writing .*metrics\.jsonl"):
        log.write(rows(0, 1))
    log.close()
