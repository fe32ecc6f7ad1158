"""`python -m bench roofline`: arithmetic on counts, and what the committed file counted."""

import json

import pytest

from bench import roofline
from bench.__main__ import main
from bench.counting import Work
from bench.limits import instructions_per_pixel
from bench.roofline import CARDS, EFFICIENCY, RESULTS

pytest.importorskip("triton")
CARD = CARDS[0]
EXECUTED = instructions_per_pixel("sm_75")["forward_kernel"]


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Work("p", False, "copy", 1, 10**9, 0, False), 1e9 / (CARD.bandwidth * EFFICIENCY["bandwidth"])),
        (Work("p", False, "mm", 1, 8, 10**12, True), 1e12 / (CARD.half * EFFICIENCY["half"])),
        (Work("p", False, "mm", 1, 8, 10**12, False), 1e12 / (CARD.single * EFFICIENCY["single"])),
        (
            Work("p", False, "forward_kernel", 1, 8, 0, False, 10**9),
            1e9 * EXECUTED / (CARD.issue * EFFICIENCY["issue"]),
        ),
        (Work("p", False, "tiny", 3, 8, 0, False), 3 * roofline.LAUNCH),
    ],
    ids=["bytes", "half", "single", "instructions", "launches"],
)
def test_an_operator_takes_the_longest_of_its_bounds(work, seconds):
    assert roofline.seconds(work, CARD) == pytest.approx(seconds)


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """The file of the command for small batches."""
    file = tmp_path_factory.mktemp("roofline") / "roofline.json"
    options = ["--navigator-batch", "2", "--pretrain-batch", "2", "--json", str(file)]
    assert main(["roofline", *options]) == 0
    return json.loads(file.read_text())


@pytest.mark.parametrize("step", ["navigator", "pretrain"])
def test_steps_launch_no_more_than_the_committed_file_says(counted, step):
    """The number may only fall: then run `python -m bench roofline --json bench/results/roofline.json`."""

    def launches(result):
        return sum(row["launches"] for row in result["rows"] if row["step"] == step)

    assert launches(counted) <= launches(json.loads(RESULTS.read_text()))


def test_the_generators_products_are_those_of_its_exact_rewrite(counted):
    """27.2 GFLOP an image by direct and transposed convolutions, of two forwards; the gradient takes as many."""
    parts = {(row["part"], row["backward"]): row for row in counted["rows"] if row["step"] == "navigator"}
    assert parts["generator", False]["half_flops"] / 4 == pytest.approx(27.2e9, rel=0.01)
    assert parts["generator", True]["half_flops"] / 2 == pytest.approx(27.2e9, rel=0.15)
    assert parts["estimator", False]["half_flops"] / 4 / 2 == pytest.approx(1.19e9, rel=0.02), "ResNet-18, two forwards"


def test_the_augmentations_instructions_are_those_of_its_pixels(counted):
    """Of two forwards of two views each, 128 px, and one backward of two launches."""
    rows = {row["backward"]: row for row in counted["rows"] if (row["step"], row["part"]) == ("navigator", "augment")}
    for architecture in ("sm_75", "sm_90"):
        each, pixels = instructions_per_pixel(architecture), 4 * 128**2
        forward = each["pivot_parts_kernel"] + each["forward_kernel"]
        assert rows[False]["instructions"][architecture] == pytest.approx(pixels * forward)
        backward = each["resized_grad_kernel"] + each["gather_kernel"]
        assert rows[True]["instructions"][architecture] == pytest.approx(pixels / 2 * backward)
    assert rows[True]["launches"] == 2


def test_a_run_takes_its_steps_times_their_number(counted):
    for step, run in counted["runs"].items():
        for card in CARDS:
            ms = sum(row["ms"][card.name] for row in counted["rows"] if row["step"] == step)
            assert run["hours"][card.name] == pytest.approx(ms / 3.6e6 * run["samples"] / run["batch"])
