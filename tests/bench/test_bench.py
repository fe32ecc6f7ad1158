"""The harness, the command and the peers of `python -m bench`; no time is asserted."""

import itertools
import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from bench import harness, limits, machine, rows
from bench.__main__ import main
from bench.areas import augment as area
from bench.baselines import augment as baselines
from bench.baselines import info_nce as losses
from bench.harness import Row, Timing, interleaved
from copgen_fast.augmentations import get
from copgen_fast.errors import CopgenError
from copgen_fast.ops import AugmentParams, AugmentPolicy, augment

BLURRED = AugmentPolicy(
    crop_scale=(0.2, 1.0),
    flip=0.5,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    jitter=0.8,
    gray=0.2,
    blur=0.5,
    solarize=0.3,
)
POLICIES = pytest.mark.parametrize("policy", [get("simclr"), get("no-color"), BLURRED], ids=["simclr", "flip", "blur"])


@pytest.fixture
def tiny(monkeypatch):
    """One case of four small images, in both directions."""
    monkeypatch.setattr(area, "CASES", (area.Case("simclr", 4, 16), area.Case("simclr", 4, 16, uint8=True)))
    return ["--device", "cpu", "--repeats", "5", "--min-seconds", "0"]


def drawn(n, side, policy, order=None):
    """Images, and parameters of the same order for all where one is given."""
    generator = torch.Generator().manual_seed(3)
    params = AugmentParams.sample(n, (side, side), policy, generator=generator)
    if order is not None:
        params.order[:] = torch.tensor(order)
    return torch.rand(n, 3, side, side, generator=generator), params


def ours(images, params, policy):
    return augment(images, params, images.shape[2], mean=policy.mean, std=policy.std)


class FakeClock:
    """Time that passes only when `spend` says so."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.now)

    def spend(self, name, durations):
        durations = iter(durations)

        def call():
            self.log.append(name)
            self.now += next(durations)

        return call


def test_candidates_alternate_and_medians_are_of_their_own_samples(monkeypatch):
    clock = FakeClock(monkeypatch)
    # Two calls to warm up, then the samples.
    a = clock.spend("a", [9, 0.1, *(0.1, 0.2, 0.3, 0.4, 5.0)])
    b = clock.spend("b", [9, 0.2, *(0.2,) * 5])
    times = interleaved({"a": a, "b": b}, 5, 0.01)
    assert clock.log == ["a", "a", "b", "b", *"ab", *"ba", *"ab", *"ba", *"ab"]
    assert times["a"].ms == pytest.approx(300)
    assert times["a"].spread == pytest.approx(1.32 / 0.18)  # interpolated between 0.4 and 5, and 0.1 and 0.2
    assert (times["b"].ms, times["b"].spread) == (pytest.approx(200), pytest.approx(1))


def test_quick_calls_fill_a_sample_and_slow_ones_sit_out(monkeypatch):
    clock = FakeClock(monkeypatch)
    quick = clock.spend("quick", iter(lambda: 0.001, None))
    slow = clock.spend("slow", iter(lambda: 1.0, None))
    times = interleaved({"quick": quick, "slow": slow}, 20, 0.01)
    assert (times["quick"].n, times["slow"].n) == (20, 5)
    assert clock.log.count("quick") == 2 + 20 * 10
    assert clock.log.count("slow") == 2 + 5
    first, last = (i for i in (clock.log.index("slow", 5), len(clock.log) - 1 - clock.log[::-1].index("slow")))
    assert last - first > 100, "the slow samples are spread over the rounds"


def test_one_slow_warm_up_is_enough_and_few_samples_can_be_asked_for(monkeypatch):
    clock = FakeClock(monkeypatch)
    step = clock.spend("step", [11, 2, 3, 4])
    assert interleaved({"step": step}, 30, 0.01, least=3)["step"] == Timing(3000, pytest.approx(3.6 / 2.4), 3)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried ..."), CopgenError("refused")])
def test_what_does_not_fit_or_refuses_is_left_out_with_a_line(capsys, error):
    def fails():
        raise error

    times = interleaved({"a": lambda: None, "too large": fails}, 5, 0)
    assert set(times) == {"a"}
    said = capsys.readouterr().out
    assert "left out: too large" in said and "Tried" not in said


@pytest.mark.parametrize("package", ["kornia", "lightly"])
def test_peers_of_a_missing_package_are_left_out_with_a_line(monkeypatch, capsys, package):
    real = machine.version
    for module in (package, "lightly.loss" if package == "lightly" else "kornia.augmentation"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(baselines, "version", lambda name: None if name == package else real(name))
    policy = get("simclr")
    _, params = drawn(2, 16, policy)
    found = [baselines.fixed_peers(policy, 16, params), baselines.drawing_peers(policy, 16), losses.peers(0.1)]
    assert all(found) and not any(package in name for peers in found for name in peers)
    said = capsys.readouterr().out
    assert f"left out: {package}" in said and "pip install" in said


def test_memory_that_is_kept_between_calls_is_not_told_by_one():
    x = torch.ones(8)
    bound = limits.copies("all", [(torch.empty(8), x)])
    subject = rows.Subject("area", "graph", "fp32", "step")
    ours = [rows.Ours(subject, f"case {kept}", lambda: x + x, bound, kept) for kept in (True, False)]
    options = area.Options(repeats=3, min_seconds=0)
    found = list(rows.compare_all(ours, {"peer": lambda: x * 2}, options, torch.device("cpu"), least=3))
    assert [row.case for row in found] == ["case True", "case False"] and [row.n for row in found] == [3, 3]
    assert found[0].peak_mb is None
    assert (found[1].peak_mb is None) == (found[1].peer_peak_mb is None) == (found[0].peer_peak_mb is None)


def test_results_are_kept_while_they_come(tiny, tmp_path, monkeypatch):
    file, kept = tmp_path / "results.json", []

    def cut_short(options):
        for row in itertools.islice(measured(options), 2):
            yield row
            kept.append(len(json.loads(file.read_text())["rows"]))
        raise KeyboardInterrupt

    measured = area.rows
    monkeypatch.setattr(area, "rows", cut_short)
    with pytest.raises(KeyboardInterrupt):
        main(["augment", *tiny, "--only", "uint8", "--json", str(file)])
    assert kept == [1, 2]


def test_garbage_collection_is_off_only_while_timing():
    seen = []
    interleaved({"a": lambda: seen.append(harness.gc.isenabled())}, 5, 0)
    assert not any(seen[2:])
    assert harness.gc.isenabled()


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
    assert "choose from augment, info_nce, " in said and "navigator, pretrain, all, compare, check" in said


def results(path, **changed):
    row = {"area": "augment", "case": "c", "device": "cpu", "precision": "fp32", "direction": "forward"}
    row |= {"backend": "cpp", "ours_ms": 10.0, "ours_spread": 1.1, "peer": "p"} | changed
    path.write_text(json.dumps({"rows": [row, row | {"peer": "q"}]}))
    return str(path)


def test_compare_prints_ratios_and_marks_changes_beyond_the_spread(tmp_path, capsys):
    before = results(tmp_path / "a.json")
    assert main(["compare", before, results(tmp_path / "b.json", ours_ms=5.0, backend="triton")]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert "augment c, fp32, forward" in line and "2.00x *" in line and "cpp -> triton" in line
    assert main(["compare", before, results(tmp_path / "b.json", ours_ms=9.5)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "1.05x" in lines[1] and "*" not in lines[1]


def test_compare_refuses_what_it_cannot_compare(tmp_path, capsys):
    before = results(tmp_path / "a.json")
    assert main(["compare", before]) == 2
    assert main(["compare", before, str(tmp_path / "none.json")]) == 2
    assert main(["compare", before, results(tmp_path / "b.json", device="card")]) == 2
    assert "no row in common" in capsys.readouterr().err


def test_compare_keeps_backends_of_one_case_apart(tmp_path, capsys):
    row = json.loads(Path(results(tmp_path / "a.json")).read_text())["rows"][0]
    file = tmp_path / "b.json"
    file.write_text(json.dumps({"rows": [row, row | {"backend": "graph", "ours_ms": 5.0}]}))
    assert main(["compare", str(file), str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "c, cpp" in lines[1] and "c, graph" in lines[2]


@POLICIES
def test_the_torchvision_loop_makes_our_views(policy):
    images, params = drawn(24, 40, policy)
    loop = baselines.torchvision_fixed(policy, 40, params)
    torch.testing.assert_close(loop(images), ours(images, params, policy), rtol=0, atol=1e-4)
    quantised = (images * 255).byte()
    torch.testing.assert_close(loop(quantised), ours(quantised, params, policy), rtol=0, atol=1e-4)


@POLICIES
def test_kornia_makes_our_views_where_the_order_is_one(policy):
    images, params = drawn(24, 40, policy, order=(2, 0, 3, 1))
    if policy.solarize:  # the luminance weights differ in the fourth digit: enough to cross the threshold
        params.solarize[:] = torch.inf
    views = baselines.kornia_fixed(policy, 40, params)(images)
    torch.testing.assert_close(views, ours(images, params, policy), rtol=0, atol=5e-3)


@POLICIES
def test_the_batch_peer_applies_one_samples_parameters_to_all(policy):
    images, params = drawn(6, 40, policy)
    i = int(params.jitter.int().argmax())
    views = baselines.torchvision_batch_fixed(policy, 40, params)(images)
    torch.testing.assert_close(views[i], ours(images, params, policy)[i], rtol=0, atol=1e-4)


@POLICIES
def test_peers_that_draw_agree_in_distribution(policy):
    images = torch.linspace(0, 1, 20).expand(300, 3, 20, 20) * torch.tensor([1.0, 0.7, 0.3])[:, None, None]
    torch.manual_seed(0)
    params = AugmentParams.sample(300, (20, 20), policy)
    expected = ours(images, params, policy)
    for name, peer in baselines.drawing_peers(policy, 20).items():
        views = peer(images)
        assert views.shape == expected.shape and views.isfinite().all(), name
        if "one draw for all" not in name:
            assert (views.mean((0, 2, 3)) - expected.mean((0, 2, 3))).abs().max() < 0.2, name
            assert (views.std((0, 2, 3)) / expected.std((0, 2, 3)) - 1).abs().max() < 0.15, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_peers_are_differentiable_in_the_precision_of_the_images(dtype):
    policy = get("simclr")
    images, params = drawn(4, 24, policy)
    for name, peer in baselines.fixed_peers(policy, 24, params).items():
        if " v2 " not in name:
            leaf = images.to(dtype).requires_grad_()
            views = peer(leaf)
            assert views.dtype == dtype, name
            views.float().sum().backward()
            assert leaf.grad.abs().sum() > 0, name


def test_limits_count_what_must_move(monkeypatch):
    images = 200 * 3 * 8 * 8 * 4
    for direction, moved, copied in (("forward", 2, 1), ("forward+backward", 5, 2)):
        case = area.Case("none", 200, 8)
        measurement = area._Measurement(case, direction, torch.device("cpu"), area.Options())
        assert measurement.bytes_to_move() == moved * images
        words, _ = measurement.limit().read(Timing(1, 1, 5))
        assert f"{copied * images / 1e6:.1f} MB read" in words
    monkeypatch.setattr(limits, "_COPIED", 1000)
    bound = limits.device_copy("all", 500, torch.device("cpu"))
    bound.call()
    words, milliseconds = bound.read(Timing(8.0, 1, 5))
    assert milliseconds == pytest.approx(2)  # a quarter of the 2000 bytes that were copied in 8 ms
    assert "estimate" in words
    monkeypatch.setattr(limits, "_SQUARE", {"cpu": 10})
    bound = limits.matrix_products("all", 1000, torch.float32, torch.device("cpu"))
    bound.call()
    words, milliseconds = bound.read(Timing(8.0, 1, 5))
    assert milliseconds == pytest.approx(4)  # half of the 2 * 10^3 operations that took 8 ms
    assert "estimate" in words


def test_ablations_leave_the_rest_as_it_was():
    policy = get("simclr")
    for lost in area.ABLATIONS.values():
        _, params = drawn(8, 16, policy)
        _, other = drawn(8, 16, replace(policy, **lost))
        assert torch.equal(params.flip, other.flip) and torch.equal(params.order, other.order)
