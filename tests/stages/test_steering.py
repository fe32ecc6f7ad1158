"""The steering stage against a literal loop, on a generator whose latent holds transformations, resumed, and shown."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torchvision.transforms.functional as F
from safetensors import safe_open
from torch import nn

from copgen_fast.config import PairsConfig, SteeringConfig
from copgen_fast.files import sha256
from copgen_fast.positives._warps import limits_of
from copgen_fast.positives.steering import unlearned
from copgen_fast.presets import PRESETS
from copgen_fast.runtime import artifacts
from copgen_fast.stages import Run
from copgen_fast.stages import steering as stage
from copgen_fast.train import main
from tests.conftest import TINY

CPU = torch.device("cpu")
SIDE = 16


class Blob(nn.Module):
    """A spot 2 z_0 pixels right of the centre, on a ground as bright as z_1 / 2; z_2 to z_4 do nothing."""

    latent_dim, image_shape, classes, latent_groups = 5, (3, SIDE, SIDE), 0, (2, 3)

    def forward(self, z, labels=None):
        x = torch.arange(SIDE, dtype=z.dtype) - (SIDE - 1) / 2
        spot = torch.exp(-((x - 2 * z[:, :1]) ** 2)[:, None] / 8 - x[:, None] ** 2 / 8)
        return (spot + z[:, 1, None, None] / 2)[:, None].expand(-1, 3, -1, -1)


def run_of(folder=Path("."), **options):
    pairs = PairsConfig(positives=("steering",))
    steering = SteeringConfig(**{"ranges": "digits"} | options)
    config = dataclasses.replace(PRESETS["quickstart"], steering=steering, pairs=pairs, log_every=1, save_every=1)
    return Run(config, folder, CPU)


def learner_of(run, dtype=torch.float32):
    walks = unlearned(5, (2, 3), run.config.steering, 0).to(dtype)
    return stage.make_learner(run, Blob(), walks)


def test_three_steps_are_a_literal_loop_in_float64(monkeypatch):
    """Sample by sample: colour, rotation, zoom and shift by torchvision; Adam as PyTorch's."""
    run = run_of(batch=4, init="normal", limits=("shift_x=0.3",))
    limits = limits_of(run.config.steering)
    learner, G = learner_of(run, torch.float64), Blob()
    w = {name: walk.detach().clone().requires_grad_() for name, walk in learner.walks.walk.items()}
    adam = torch.optim.Adam(w.values(), 1e-3)
    for index in range(3):
        drawn = stage.draw_batch(run.config, G, limits, index, CPU)
        z = drawn.z.double()
        uniform = torch.rand(4, 9, generator=stage.seeds.generator(0, "steering amounts", index), dtype=torch.float64)
        result = stage.steering_step(learner, stage.make_batch(z, None, uniform, limits, (SIDE, SIDE)))
        total, count = 0.0, 0.0
        for i, u in enumerate(uniform):
            zoom = 0.5 + 0.5 * 2 * u[0] if u[0] < 0.5 else 1 + (2 * u[0] - 1)
            shift_x, shift_y, degrees, bright = (
                limit * (2 * u[k] - 1) for k, limit in ((1, 0.3), (2, 0.15), (3, 30), (8, 0.5))
            )
            x = G(z[i : i + 1])
            how = {"angle": -degrees.item(), "translate": [SIDE * shift_x.item(), SIDE * shift_y.item()]}
            how |= {"scale": 1 / zoom.item(), "shear": [0.0], "interpolation": F.InterpolationMode.BILINEAR}
            t, m = F.affine(x + bright, **how), F.affine(torch.ones_like(x), **how) > 1 - 1e-9
            steps = {"zoom": math.log(zoom), "shift_x": shift_x / 0.3, "shift_y": shift_y / 0.15}
            steps |= {"rotate": degrees / 30, "brightness": bright}
            x_prime = G(z[i] + sum(steps[name] * w[name] for name in w)[None])
            total, count = total + ((x_prime - t.detach()) * m).square().sum(), count + m.sum()
        adam.zero_grad()
        (total / count).backward()
        adam.step()
        assert result.metrics["loss"].item() == pytest.approx((total / count).item(), rel=1e-9)
    for name, walk in learner.walks.walk.items():
        torch.testing.assert_close(walk.detach(), w[name].detach(), rtol=1e-9, atol=1e-12)


def test_a_scaled_loss_moves_walks_as_the_loss_does_and_an_overflow_does_not():
    """Loss scaling, which a generator in float16 needs."""
    run = run_of(batch=4, init="normal")
    plain, scaled = learner_of(run, torch.float64), learner_of(run, torch.float64)
    scaled = dataclasses.replace(scaled, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16))
    limits = limits_of(run.config.steering)
    uniform = torch.rand(4, 9, generator=stage.seeds.generator("scaled"), dtype=torch.float64)
    batch = stage.make_batch(torch.zeros(4, 5, dtype=torch.float64), None, uniform, limits, (SIDE, SIDE))
    for learner in (plain, scaled):
        stage.steering_step(learner, batch)
    torch.testing.assert_close(scaled.walks.state_dict(), plain.walks.state_dict())
    scaled.scaler.update(float("inf"))
    stage.steering_step(scaled, batch)
    torch.testing.assert_close(scaled.walks.state_dict(), plain.walks.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_in_half_precision_give_nearly_the_same_gradient(monkeypatch, dtype):
    run, forward = run_of(batch=4), Blob.forward
    batch = stage.draw_batch(run.config, Blob(), limits_of(run.config.steering), 0, CPU)
    gradients = []
    for half in (False, True):
        if half:
            monkeypatch.setattr(Blob, "forward", lambda self, z, labels: forward(self, z, labels).to(dtype))
        learner = learner_of(run)
        assert stage.steering_step(learner, batch).metrics["loss"].dtype == torch.float32
        gradients.append(torch.cat([walk.grad for walk in learner.walks.walk.values()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


def test_no_gradient_goes_through_the_target(monkeypatch):
    learner, run = learner_of(run_of(batch=4)), run_of(batch=4)
    asked, forward = [], Blob.forward
    monkeypatch.setattr(
        Blob, "forward", lambda self, z, labels: asked.append(torch.is_grad_enabled()) or forward(self, z, labels)
    )
    before = torch.random.get_rng_state()
    stage.steering_step(learner, stage.draw_batch(run.config, Blob(), limits_of(run.config.steering), 0, CPU))
    assert asked == [False, True], "the image, then the steered one"
    assert torch.equal(torch.random.get_rng_state(), before), "a step draws nothing"
    assert all(walk.grad.abs().sum() > 0 for walk in learner.walks.walk.values()), "also at zero"


def test_walks_find_the_coordinates_that_hold_their_transformation():
    run = run_of(transformations=("brightness", "shift_x"), lr=0.05)
    limits, learner = limits_of(run.config.steering), learner_of(run)
    for index in range(150):
        stage.steering_step(learner, stage.draw_batch(run.config, learner.G, limits, index, CPU))
    # A shift by 0.15 of 16 pixels is 2.4 / 2 in z_0; brightness by 1 is 2 in z_1.
    expected = {"shift_x": [1.2, 0.0, 0.0, 0.0, 0.0], "brightness": [0.0, 2.0, 0.0, 0.0, 0.0]}
    for name, w in expected.items():  # FIX
        torch.testing.assert_close(
            learner.walks.walk[name].detach(), torch.tensor(w, dtype=torch.float32), rtol=0, atol=0.1
        )
    found = stage.measure(run, learner.G, learner.walks, limits)
    assert (
        found["displacement_norm_0"] == pytest.approx(found["displacement_norm"]) and not found["displacement_norm_1"]
    )
    for name in ("shift_x", "brightness", "all"):
        assert found["transformations"][name]["ratio"] < 0.1
    assert found["transformations"]["brightness"]["norm"] == pytest.approx(2, abs=0.1)
    assert found["transformations"]["brightness"]["energy"] == pytest.approx([1, 0], abs=0.01)


def test_walks_kept_to_a_group_do_not_leave_it():
    run = run_of(batch=4, groups=(1,), init="normal", lr=0.1)
    learner = learner_of(run)
    for index in range(2):
        stage.steering_step(learner, stage.draw_batch(run.config, Blob(), limits_of(run.config.steering), index, CPU))
    for walk in learner.walks.state_dict().values():
        assert walk[:2].abs().sum() == 0 and walk[2:].abs().sum() > 0
    started = unlearned(5000, (), SteeringConfig(init="normal"), 0).walk["zoom"]
    assert started.std().item() == pytest.approx(0.1, rel=0.05)


def test_a_stage_that_stops_at_any_step_ends_in_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "MEASURED", 16)
    whole, parts = (run_of(tmp_path / name, batch=8, samples=8 * 6) for name in ("whole", "parts"))
    stage.run(whole)
    step = stage.steering_step
    for after in (2, 3):
        left = iter(range(after))
        monkeypatch.setattr(stage, "steering_step", lambda *values, left=left: (next(left), step(*values))[1])
        with pytest.raises(StopIteration):
            stage.run(parts)
    monkeypatch.setattr(stage, "steering_step", step)
    stage.run(parts)
    for name in ("steering/steering.safetensors", "steering/metrics.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with safe_open(whole.steering_file, "pt") as file:
        record = json.loads(file.metadata()["copgen_fast"])
    assert record["limits"] == "zoom=2 shift_x=0.15 shift_y=0.15 rotate=30 brightness=0.5"
    assert len(record["generator_digest"]) == len(record["sha256"]) == 64
    monkeypatch.setattr(stage, "measure", None)
    stage.run(whole)  # what is there is not learned again


GROUPED = """
import torch
from tests.stages.test_steering import Blob

class Visible(Blob):
    def forward(self, z, labels=None):
        return super().forward(z).clamp(-1, 1)

def build(weights, config):
    return Visible()
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steered")
    (folder / "grouped.py").write_text(GROUPED)
    return [
        *(*TINY, "--out", str(folder / "run"), "--generator.name", str(folder / "grouped.py")),
        *("--pairs.positives", "steering", "gaussian", "navigator", "--steering.samples", "64", "--steering.lr", "0.1"),
        *("--navigator.groups", "0", "--navigator.group-deltas", "0.5", "--navigator.init", "near-zero"),
        *("--navigator.hidden", "3", "--positive.options", "gaussian.groups=1", "steering.distance=1.5"),
        *("--probe.evals", "collapse", "--probe.baselines", "random", "--data.image-size", str(SIDE)),
    ]


@pytest.fixture(scope="module")
def finished(arguments):
    assert main(arguments) == 0
    return Path(arguments[arguments.index("--out") + 1])


def test_one_command_learns_walks_and_makes_pairs_by_groups(finished):
    moved = {}
    for name in ("steering", "gaussian", "navigator"):
        shards = [artifacts.read_tensors(path) for path in sorted((finished / "pairs" / name).glob("*.safetensors"))]
        moved[name] = torch.cat([shard["z_positive"] - shard["z"] for shard in shards])
    assert moved["steering"].norm(dim=1).mean().item() == pytest.approx(1.5, rel=0.3)
    assert moved["gaussian"][:, :2].abs().max() == 0 and moved["gaussian"][:, 2:].abs().min() > 0
    assert moved["navigator"][:, 2:].abs().max() == 0 and 0 < moved["navigator"].norm(dim=1).max() < 0.1
    index = json.loads((finished / "pairs" / "steering" / "index.json").read_text())["identity"]
    assert index["steering_digest"] == sha256(finished / "steering" / "steering.safetensors")
    assert index["distance"] == 1.5 and index["step_limits"]["zoom"] == 2.0
    summary = json.loads((finished / "pairs" / "gaussian" / "summary.json").read_text())
    assert summary["displacement_norm_0"] == 0
    assert summary["displacement_norm_1"] == pytest.approx(summary["displacement_mean"], rel=1e-5)


def test_the_report_tells_what_each_walk_does(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert 0 < metrics["steering.all.ratio"] < 1.5 and metrics["steering.zoom.norm"] > 0
    assert metrics["pairs.gaussian.displacement_norm_1"] > metrics["pairs.gaussian.displacement_norm_0"] == 0
    page = (finished / "report.html").read_text()
    for words in ("Mean distance of z&#39; from z in each latent group", "energy in group 1 %", "steering loss",
                  "Walks: transformed images above", "navigator: E||dz|| by latent group"):  # fmt: skip
        assert words in page, words
    assert len(re.findall(r'alt="(?:zoom|shift_x|shift_y|rotate|brightness)"', page)) == 5


def fault(arguments, capsys):
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steering.transformations", "shear"], "steering.transformations: unknown or repeated 'shear'"),
        (["--steering.limits", "zoom=0.5"], "steering.limits: zoom: expected more than 1"),
        (["--steering.groups", "2"], "steering.groups: expected latent groups 0 to 1, each once; got 2"),
        (["--navigator.groups", "0", "5"], "navigator.groups: expected latent groups 0 to 1, each once; got 5"),
        (["--navigator.group-deltas", "1", "2", "3"], "navigator.group_deltas: expected 1 numbers"),
        (["--navigator.project", "--navigator.delta", "1"], "navigator.group_deltas: does not go with"),
        (["--positive.options", "steering.scales=1"], "steering.scales: expected 2 numbers, one for each group; got 1"),
        (["--positive.options", "steering.distance=-1"], "distance: expected 1e-06 to 1e+06, got -1"),
        (["--navigator.hidden", "0"], "navigator.hidden: expected"),
        (["--steering.batch", "0"], "steering.batch: expected"),
        (["--stages", "steering", "--pairs.positives", "identity"], "stages: steering learns walks for positives"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_anything_is_written(options, message, arguments, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    assert message in fault([*arguments, *out, *options], capsys)
    assert not (tmp_path / "run").exists()
