"""Python code that README and docs show runs, and gives what it says."""

import shlex

import pytest
import torch

from copgen_fast import study
from copgen_fast.presets import PRESETS
from copgen_fast.train import main
from tests.conftest import TINY
from tests.docs.pages import PAGES, blocks, commands, write_files

SNIPPETS = [block for page in PAGES for block in blocks(page, "python")]


def expect_views(names):
    assert names["views"].shape == (16, 3, 64, 64) and names["images"].grad.abs().sum() > 0


def expect_loss(names):
    assert 5 < names["loss"] < 15 and 0 <= names["stats"].contrastive_top1 <= 1
    assert names["anchors"].grad.shape == (4096, 128)


def expect_normalised(names):
    expected = (names["x"] * names["scale"][:, :, None, None] + names["shift"][:, :, None, None]).relu()
    torch.testing.assert_close(names["y"], expected)


def expect_encoder(names):
    assert names["encoder"](torch.rand(2, 3, 32, 32)).shape == (2, names["encoder"].feature_dim)


def expect_pairs(names):
    assert names["x"].shape == names["x_prime"].shape == (32, 3, 32, 32) and names["x"].dtype == torch.uint8


EXPECTED = {
    "Augment(get(": expect_views,
    "return_stats=True": expect_loss,
    "cond_norm(x,": expect_normalised,
    "load_state_dict(load_file": expect_encoder,
    "PairIterable(": expect_pairs,
}
"""What a snippet with these words leaves behind."""


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_a_snippet_runs(snippet, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    code = snippet.code
    if "continues" in snippet.info:
        earlier = [block for block in blocks(snippet.page, "python") if block.line < snippet.line]
        start = max(i for i, block in enumerate(earlier) if "continues" not in block.info)
        code = "\n".join([*(block.code for block in earlier[start:]), code])
    if "runs/quickstart" in code:
        # The preset's encoder, for which the tiny run's stands in.
        code = code.replace(f"width={PRESETS['quickstart'].pretrain.encoder.width})", "width=8)")
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "quickstart").symlink_to(request.getfixturevalue("finished_run"))
    torch.manual_seed(0)
    names = {"__name__": "snippet"}
    exec(compile(code, str(snippet), "exec"), names)
    for words, expect in EXPECTED.items():
        if words in code:
            expect(names)


@pytest.mark.parametrize("words", EXPECTED)
def test_results_of_snippets_are_looked_at(words):
    assert any(words in snippet.code for snippet in SNIPPETS)


FILES = [block for block in SNIPPETS if block.file]
STUDIES = [block for block in FILES if "return Study(" in block.code]
PARTS = [block for block in FILES if block not in STUDIES]


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_a_part_from_outside_the_package_runs_by_the_command_shown(part, tmp_path, monkeypatch):
    """By the tiny quickstart's sizes, with one source and one evaluation where the command names none."""
    monkeypatch.chdir(tmp_path)
    write_files(part.page, tmp_path)
    shown = next(c for c in commands(part.page) if f"./{part.file}" in c and "--help" not in c)
    options = shlex.split(shown.replace("--generator.weights FILE.pth", ""))[4:]
    for name, value in {"--pairs.positives": "identity", "--probe.evals": "knn"}.items():
        options += [] if name in options else [name, value]
    assert main([*TINY, *options, "--probe.baselines", "random", "--out", "run"]) == 0
    assert list(tmp_path.glob("run/probe/*.json")) and list(tmp_path.glob("run/pretrain/*/*/encoder.safetensors"))


@pytest.mark.parametrize("part", STUDIES, ids=str)
def test_a_study_from_outside_the_package_names_its_runs(part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_files(part.page, tmp_path)
    shown = next(c for c in commands(part.page) if f"./{part.file}" in c)
    assert study.main([*shlex.split(shown)[3:], "--print-commands"]) == 0
    assert capsys.readouterr().out.count("python -m copgen_fast.train quickstart") == 3 * 5
