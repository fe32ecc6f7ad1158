"""The command `python -m bench`: its options, its file of results and its messages; no time is asserted."""

import itertools
import json
from dataclasses import fields

import pytest
import torch

from bench.__main__ import AREAS, main
from bench.areas import augment as area
from bench.rows import Row


@pytest.fixture
def tiny(monkeypatch):
    """One case of four small images, in both directions."""
    monkeypatch.setattr(area, "CASES", (area.Case("simclr", 4, 16), area.Case("simclr", 4, 16, uint8=True)))
    return ["--device", "cpu", "--repeats", "5", "--min-seconds", "0"]


def test_results_are_kept_while_they_come(tiny, tmp_path, monkeypatch):
    file, kept = tmp_path / "results.json", []

    def cut_short(options):
        for row in itertools.islice(measured(options), 2):
            yield row
            kept.append(len(json.loads(file.read_text())["rows"]))
        raise KeyboardInterrupt

    measured = area.rows
    monkeypatch.setattr(area, "rows", cut_short)
    assert main(["augment", *tiny, "--only", "uint8", "--json", str(file)]) == 130
    assert kept == [1, 2]


def test_the_command_writes_rows_of_the_schema(tiny, tmp_path, capsys):
    file = tmp_path / "results.json"
    assert main(["augment", *tiny, "--threads", str(torch.get_num_threads()), "--json", str(file), "--ablate"]) == 0
    content = json.loads(file.read_text())
    assert set(content) == {"machine", "versions", "commit", "rows"}
    assert content["versions"]["torch"] == torch.__version__.partition("+")[0]
    cases = {row["case"] for row in content["rows"]}
    printed = capsys.readouterr().out
    assert all(f"{case} " in printed for case in cases)
    assert cases >= {"simclr B=4 16px", "simclr B=4 16px, uint8 channels_last", "simclr B=4 16px, without hue"}
    for row in content["rows"]:
        assert set(row) == {field.name for field in fields(Row)}
        assert row["area"] == "augment" and row["device"] == "cpu" and row["n"] >= 5
        assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"])
        assert row["of_limit"] == pytest.approx(row["limit_ms"] / row["ours_ms"])
    assert {row["direction"] for row in content["rows"]} == {"forward", "forward+backward"}


def test_only_narrows_the_cases(tiny, capsys):
    assert main(["augment", *tiny, "--only", "uint8"]) == 0
    assert "simclr B=4 16px  " not in capsys.readouterr().out
    assert main(["augment", *tiny, "--ablate", "--only", "without"]) == 0
    assert capsys.readouterr().out.count("simclr") == len(area.ABLATIONS)
    assert main(["augment", *tiny, "--only", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err


def test_unknown_areas_are_refused_by_name(capsys):
    assert main(["augmnt"]) == 2
    said = capsys.readouterr().err
    assert "choose from add_upsampled, augment, codecs, " in said and "rand_augment, all, compare, check" in said
    assert "info_nce" in AREAS and not any(name.startswith("_") for name in AREAS)
