"""What tests of the benchmarks share."""

import json

import pytest

from bench import limits
from bench.__main__ import main


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Run `python -m bench AREA` on the CPU with few samples and small limits; returns the rows of its file."""
    monkeypatch.setattr(limits, "SQUARE", {"cpu": 16})

    def run(area, *options):
        file = tmp_path / "results.json"
        quick = ("--device", "cpu", "--repeats", "5", "--min-seconds", "0", "--json", str(file))
        assert main([area, *quick, *options]) == 0
        return json.loads(file.read_text())["rows"]

    return run
