"""The navigator's two updates against a literal transcription of the reference's iteration."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from copgen_fast.config import EncoderConfig, NavigatorConfig
from copgen_fast.errors import UsageError
from copgen_fast.positives.navigator import Navigator
from copgen_fast.presets import PRESETS
from copgen_fast.runtime import artifacts
from copgen_fast.stages import Run
from copgen_fast.stages import navigator as stage
from copgen_fast.training import optimizers
from copgen_fast.training.metrics import read_rows
from tests.helpers.host_reads import HostReads
from tests.helpers.on_gpu import needs_gpu, no_waiting
from tests.helpers.pretended_gpu import pretended_gpu

DIM, N = 6, 5


class ToyGenerator(nn.Module):
    latent_dim, image_shape, latent_groups = DIM, (3, 8, 8), ()

    def __init__(self, classes=0):
        super().__init__()
        self.classes = classes
        self.linear = nn.Linear(DIM + classes, 3 * 8 * 8)
        self.requires_grad_(False)

    def forward(self, z, labels=None):
        if self.classes:
            z = torch.cat([z, nn.functional.one_hot(labels, self.classes)], 1)
        return torch.tanh(self.linear(z)).view(-1, 3, 8, 8)


def make_players(tmp_path, precision="fp32", device=torch.device("cpu"), classes=0, **options):  # noqa: B008
    torch.manual_seed(0)
    navigator = NavigatorConfig(batch=N, estimator=EncoderConfig(width=8), **options)
    config = dataclasses.replace(PRESETS["quickstart"], navigator=navigator, precision=precision, out=str(tmp_path))
    made = ToyGenerator(classes).to(device), Navigator(DIM).to(device)
    players = stage.make_players(Run(config, tmp_path, device), *made)
    batches = [stage.draw_batch(config, players.G, index, device) for index in range(2)]
    return players, batches


def parameters(module):
    return [value.detach().clone() for value in module.parameters()]


def nt_xent(embeddings):
    """The reference's loss, term by term: anchors first, temperature 0.1, scaled by 0.1 / 0.07."""
    unit = nn.functional.normalize(embeddings, dim=1)
    total = 0.0
    for i in range(2 * N):
        others = [a for a in range(2 * N) if a != i]
        logits = unit[others] @ unit[i] / 0.1
        total = total + torch.logsumexp(logits, 0) - unit[i] @ unit[(i + N) % (2 * N)] / 0.1
    return total / (2 * N) * (0.1 / 0.07)


def in_float64(players, batches):
    """Both players and the latents in float64, in which a second step does not amplify what rounding changed."""
    for module in (players.G, players.T_z, players.f):
        module.double()
    return [dataclasses.replace(batch, z=batch.z.double()) for batch in batches]


def views_of(players, batch, T_z):
    """Views of anchors and positives of the literal iteration."""
    with torch.no_grad():
        x = players.G(batch.z)
    x_prime = players.G(batch.z + T_z(batch.z))
    return torch.cat([stage.t_x(players, x, batch.params), stage.t_x(players, x_prime, batch.params_prime)])


def test_alternating_is_the_references_iteration(tmp_path):
    players, batches = make_players(tmp_path, lr=1e-2, estimator_lr=1e-2)
    batches = in_float64(players, batches)
    f, T_z = copy.deepcopy(players.f), copy.deepcopy(players.T_z)
    adam_f = torch.optim.Adam(f.parameters(), 1e-2, betas=(0.5, 0.999))
    adam_T = torch.optim.Adam(T_z.parameters(), 1e-2, betas=(0.5, 0.999))
    for batch in batches:
        stage.alternating_step(players, batch)
        views = views_of(players, batch, T_z)
        adam_f.zero_grad()
        nt_xent(f(views.detach())).backward()
        adam_f.step()
        adam_T.zero_grad()
        (-nt_xent(f(views))).backward()  # a second forward, through the updated f
        adam_T.step()
    torch.testing.assert_close(parameters(players.T_z), parameters(T_z), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(parameters(players.f), parameters(f), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(dict(players.f.named_buffers()), dict(f.named_buffers()), rtol=1e-7, atol=1e-9)


def test_simultaneous_gives_both_players_the_gradient_of_one_forward(tmp_path):
    players, batches = make_players(tmp_path, update="simultaneous")
    batch = in_float64(players, batches)[0]
    f, T_z = copy.deepcopy(players.f), copy.deepcopy(players.T_z)
    stage.simultaneous_step(players, batch)
    loss = nt_xent(f(views_of(players, batch, T_z)))
    for_f = torch.autograd.grad(loss, list(f.parameters()), retain_graph=True)
    for_T = torch.autograd.grad(loss, list(T_z.parameters()))
    torch.testing.assert_close([p.grad for p in players.f.parameters()], list(for_f), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close([p.grad for p in players.T_z.parameters()], [-g for g in for_T], rtol=1e-8, atol=1e-10)


def test_no_weight_gradient_of_the_generator_nor_of_f_in_ts_update(tmp_path, monkeypatch):
    players, (batch, _) = make_players(tmp_path)
    computed = []
    descend = optimizers.descend

    def spy(loss, scaler, *moved):
        descend(loss, scaler, *moved)
        computed.append([p.grad is not None and bool(p.grad.abs().sum() > 0) for p in players.T_z.parameters()])
        if moved == (players.adam_T,):
            assert not any(p.requires_grad for p in players.f.parameters())

    monkeypatch.setattr(optimizers, "descend", spy)
    stage.alternating_step(players, batch)
    assert computed == [[False] * 4, [True] * 4]
    assert all(p.grad is None for p in players.G.parameters())
    assert all(p.requires_grad for p in players.f.parameters())


STEPS = {"alternating": stage.alternating_step, "simultaneous": stage.simultaneous_step}


def state_of(players):
    names = ("T_z", "f", "adam_T", "adam_f", "scaler")
    return {name: getattr(players, name) for name in names}


def test_steps_draw_nothing_and_repeat_to_the_bit(tmp_path):
    for update, step in STEPS.items():
        (one, batches), (other, _) = make_players(tmp_path, update=update), make_players(tmp_path, update=update)
        for batch in batches:
            step(one, batch)
        before = torch.random.get_rng_state()
        for batch in batches:
            step(other, batch)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert all(torch.equal(a, b) for a, b in zip(parameters(one.T_z), parameters(other.T_z), strict=True))


@pytest.mark.parametrize("update", STEPS)
def test_a_scaled_loss_moves_both_players_as_the_loss_does(tmp_path, update):
    plain, batches = make_players(tmp_path, update=update, lr=1e-2, estimator_lr=1e-2)
    scaled, _ = make_players(tmp_path, update=update, lr=1e-2, estimator_lr=1e-2)
    scaled = dataclasses.replace(scaled, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16))
    in_float64(plain, batches)
    for batch in in_float64(scaled, batches):
        STEPS[update](plain, batch)
        STEPS[update](scaled, batch)
    for name in ("T_z", "f"):
        ours, theirs = (parameters(getattr(players, name)) for players in (scaled, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("update", STEPS)
def test_fp16_steps_as_fp32_does(tmp_path, update):
    # f hardly moves, as Adam's first step has the sign of gradients whatever their size, rounding's included.
    full, (batch, _) = make_players(tmp_path, update=update, estimator_lr=1e-9)
    half, _ = make_players(tmp_path, "fp16", update=update, estimator_lr=1e-9)
    assert half.scaler.is_enabled() and not full.scaler.is_enabled()
    half.scaler.load_state_dict(half.scaler.state_dict() | {"scale": 2.0**8})  # where a run would back off to
    losses = [STEPS[update](players, batch).metrics["loss_navigator"].item() for players in (full, half)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
    for name in ("T_z", "f"):
        ours, theirs = (
            torch.cat([p.grad.flatten() for p in getattr(players, name).parameters()]) for players in (half, full)
        )
        # Batch norm over five pairs makes a few percent of float16's rounding; a scale left in would make 256.
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9
        assert 0.5 < ours.norm() / theirs.norm() < 2, "gradients are unscaled"


@pytest.mark.parametrize("update", STEPS)
def test_an_overflow_moves_no_player_and_the_scale_backs_off(tmp_path, update):
    players, batches = make_players(tmp_path, "fp16", update=update, lr=1e-2, estimator_lr=1e-2)
    STEPS[update](players, batches[0])
    players.scaler.update(2.0**40)  # too large for any gradient in float16
    before = {name: copy.deepcopy(holder.state_dict()) for name, holder in state_of(players).items()}
    STEPS[update](players, batches[1])
    losses = 2 if update == "alternating" else 1
    assert players.scaler.get_scale() == 2.0 ** (40 - losses)
    for name in ("T_z", "adam_T", "adam_f"):
        torch.testing.assert_close(getattr(players, name).state_dict(), before[name], rtol=0, atol=0)
    weights = [before["f"][name] for name, _ in players.f.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(parameters(players.f), weights, strict=True))


@pytest.mark.parametrize("update", STEPS)
def test_half_a_training_goes_on_from_its_checkpoint(tmp_path, update):
    players, batches = make_players(tmp_path, "fp16", update=update, lr=1e-2, estimator_lr=1e-2)
    STEPS[update](players, batches[0])
    players.scaler.update(2.0**40)
    STEPS[update](players, batches[0])
    saved = {name: holder.state_dict() for name, holder in state_of(players).items()}
    artifacts.write_checkpoint(tmp_path / "checkpoint.pt", saved)
    other, _ = make_players(tmp_path, "fp16", update=update, lr=1e-2, estimator_lr=1e-2)
    for name, state in artifacts.read_checkpoint(tmp_path / "checkpoint.pt").items():
        state_of(other)[name].load_state_dict(state)
    assert other.scaler.get_scale() == players.scaler.get_scale() < 2.0**40
    for running in (players, other):
        running.scaler.load_state_dict(running.scaler.state_dict() | {"scale": 2.0**10})
        STEPS[update](running, batches[1])
    for name in ("T_z", "f", "adam_T", "adam_f"):
        ours, theirs = (getattr(running, name).state_dict() for running in (other, players))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("update", STEPS)
def test_a_step_never_looks_at_a_value(tmp_path, update, precision):
    players, batches = make_players(tmp_path, precision, update=update)
    STEPS[update](players, batches[0])
    with HostReads() as reads:
        STEPS[update](players, batches[1])
    assert reads.count == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real one says more: see below")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("update", STEPS)
def test_on_a_pretended_gpu_no_value_is_looked_at(tmp_path, update, precision):
    leaves = []
    with pretended_gpu(leaves):
        players, batches = make_players(tmp_path, precision, torch.device("cuda"), update=update)
        leaves += [*players.f.parameters(), *players.T_z.parameters()]
        for batch in batches:
            metrics = STEPS[update](players, batch).metrics
        assert players.scaler.is_enabled() == (precision == "fp16")
        assert metrics["loss_estimator"].device.type == "cuda"
        if precision == "fp16":  # what would raise: a scaler of an optimiser that is not fused
            adam = torch.optim.Adam(players.T_z.parameters())
            with pytest.raises(DataDependentOutputException):
                optimizers.descend(players.T_z(batch.z).sum(), players.scaler, adam)


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("update", STEPS)
def test_a_step_never_waits_for_the_gpu(tmp_path, update, precision):
    players, batches = make_players(tmp_path, precision, torch.device("cuda"), update=update)
    STEPS[update](players, batches[0])
    with no_waiting():
        STEPS[update](players, batches[1])


def test_monitored_numbers_are_their_definitions(tmp_path):
    players, (batch, _) = make_players(tmp_path)
    with torch.no_grad():
        z = batch.z
        dz = players.T_z(z)
    metrics = stage.alternating_step(players, batch).metrics
    assert metrics["displacement_norm"].item() == pytest.approx(dz.norm(dim=1).mean().item(), rel=1e-5)
    assert metrics["displacement_mean"].item() == pytest.approx(dz.mean().item(), rel=1e-4)
    assert metrics["displacement_std"].item() == pytest.approx(dz.std().item(), rel=1e-4)
    share = dz.mean(0).square().sum() / dz.square().sum(1).mean()
    assert metrics["displacement_shared"].item() == pytest.approx(share.item(), rel=1e-4)
    assert metrics["positive_std"].item() == pytest.approx((z + dz).std().item(), rel=1e-4)
    assert metrics["loss_navigator"].item() > -metrics["loss_estimator"].item(), "f was updated between the two"


@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
def test_anchors_and_positives_share_their_seeded_classes(tmp_path, monkeypatch, update):
    players, batches = make_players(tmp_path, classes=3, update=update, loss="supcon")
    _, again = make_players(tmp_path, classes=3)
    for batch, other in zip(batches, again, strict=True):
        assert batch.labels.dtype == torch.int64 and batch.labels.shape == (N,)
        assert torch.equal(batch.labels, other.labels)
        assert set(batch.labels.tolist()) <= {0, 1, 2}
    assert not torch.equal(batches[0].labels, batches[1].labels)
    seen, forward = [], ToyGenerator.forward
    monkeypatch.setattr(
        ToyGenerator, "forward", lambda self, z, labels: seen.append(labels) or forward(self, z, labels)
    )
    step = stage.alternating_step if update == "alternating" else stage.simultaneous_step
    result = step(players, batches[0])
    assert len(seen) == 2 and all(labels is batches[0].labels for labels in seen)
    assert result.metrics["loss_estimator"].isfinite()


def test_the_supervised_loss_sees_the_classes_and_the_other_does_not(tmp_path):
    losses = {}
    for loss in ("nt-xent", "supcon"):
        players, (batch, _) = make_players(tmp_path, classes=3, loss=loss)
        views = torch.rand(2 * N, 3, 8, 8, generator=torch.Generator().manual_seed(0)).chunk(2)
        by_labels = [
            stage.L_NCE(players, *views, labels).item() for labels in (batch.labels, torch.arange(N), batch.labels)
        ]
        assert by_labels[0] == pytest.approx(by_labels[2])
        losses[loss] = by_labels
    assert losses["nt-xent"][0] == pytest.approx(losses["nt-xent"][1]) == pytest.approx(losses["supcon"][1])
    assert losses["supcon"][0] != pytest.approx(losses["supcon"][1], rel=1e-3), "rows of a class are positives"


def test_the_supervised_loss_needs_classes(tmp_path):
    with pytest.raises(UsageError, match="navigator.loss: supcon needs classes, and generator digits has none"):
        run_stage(tmp_path, samples=16, loss="supcon")


def run_stage(tmp_path, **options):
    config = dataclasses.replace(
        PRESETS["quickstart"],
        navigator=dataclasses.replace(
            PRESETS["quickstart"].navigator, batch=16, grid_every=32, **{"delta": None} | options
        ),
        log_every=2,
        out=str(tmp_path),
    )
    stage.run(Run(config, tmp_path, torch.device("cpu")))
    return json.loads((tmp_path / "navigator" / "summary.json").read_text())


def test_delta_stops_the_run_as_soon_as_it_is_looked_at(tmp_path):
    summary = run_stage(tmp_path, samples=16 * 50, lr=0.02, delta=4.0)
    rows = read_rows(tmp_path / "navigator" / "metrics.jsonl")
    assert summary["steps"] == len(rows) < 50
    looked_at = [row["displacement_norm"] for row in rows if row["step"] % 2 == 1]
    assert looked_at[-1] >= 4.0 and all(norm < 4.0 for norm in looked_at[:-1])


def test_projection_holds_the_displacement_and_does_not_stop_the_run(tmp_path):
    summary = run_stage(tmp_path, samples=16 * 6, lr=0.02, delta=1.0, project=True)
    assert summary["steps"] == 6
    assert summary["displacement_norm"] <= 1.0 + 1e-5


def test_simultaneous_and_linear_run_too(tmp_path):
    assert run_stage(tmp_path, samples=32, update="simultaneous", kind="linear")["steps"] == 2


def test_a_loss_that_climbs_back_stops_the_run_and_a_resumed_one_remembers_that_it_fell():
    options = NavigatorConfig(rebound=2.5, rebound_after=300)
    curve = {0: 7.0, 100: 3.0, 200: 2.4, 300: 2.2, 400: 2.4, 500: 2.6}

    def stops(rule, start=0):
        for samples, loss in curve.items():
            if samples >= start and rule.reached({"loss_estimator": loss, "samples": samples}):
                return samples
            if samples == 400 and not start:
                saved.append(rule.state_dict())
        return None

    saved = []
    assert stops(stage.Rebound(options)) == 500
    resumed = stage.Rebound(options)
    resumed.load_state_dict(saved[0])
    assert stops(resumed, start=500) == 500
    assert stops(stage.Rebound(options), start=500) is None, "it never was below"
    assert stops(stage.Rebound(dataclasses.replace(options, rebound_after=600))) is None
    assert stops(stage.Rebound(NavigatorConfig())) is None


def test_a_rebound_ends_the_stage_and_is_in_its_checkpoint(tmp_path):
    monotone = {"samples": 16 * 8, "rebound_after": 16 * 3}
    assert run_stage(tmp_path / "high", rebound=50.0, **monotone)["steps"] == 8, "it never climbs so far"
    saved = artifacts.read_checkpoint(tmp_path / "high" / "navigator" / "checkpoint.pt")
    assert 0 < saved["state"]["rebound"]["lowest"] < 50
    run_stage(tmp_path / "none", **monotone)
    saved = artifacts.read_checkpoint(tmp_path / "none" / "navigator" / "checkpoint.pt")
    assert "rebound" not in saved["state"]


def test_distances_are_logged_for_each_latent_group(tmp_path):
    players, (batch, _) = make_players(tmp_path)
    players.G.latent_groups = (2, 4)
    with torch.no_grad():
        dz = players.T_z(batch.z)
    metrics = stage.alternating_step(players, batch).metrics
    assert metrics["displacement_norm_0"].item() == pytest.approx(dz[:, :2].norm(dim=1).mean().item(), rel=1e-5)
    assert metrics["displacement_norm_1"].item() == pytest.approx(dz[:, 2:].norm(dim=1).mean().item(), rel=1e-5)
    assert "displacement_norm_2" not in metrics
