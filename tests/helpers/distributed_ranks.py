"""What each of several processes computes; test_distributed.py starts them."""

import contextlib
import dataclasses
import os
import signal
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from copgen_fast import methods, train
from copgen_fast.config import EncoderConfig, MethodConfig, NavigatorConfig, PretrainConfig, SteeringConfig
from copgen_fast.encoders import ContrastiveModel
from copgen_fast.errors import CopgenError
from copgen_fast.ops.info_nce import functional
from copgen_fast.pairs.online import OnlinePairs
from copgen_fast.pairs.read.batch import as_batch
from copgen_fast.positives._warps import limits_of
from copgen_fast.positives.navigator import Navigator
from copgen_fast.positives.steering import Walks
from copgen_fast.presets import PRESETS
from copgen_fast.runtime import distributed, interrupts, seeds
from copgen_fast.runtime.heartbeat import Heartbeat
from copgen_fast.stages import Run, navigator, pretrain, steering
from copgen_fast.training import grad_cache, loop, optimizers, sync_bn
from copgen_fast.training.grad_sync import data_parallel, no_sync
from copgen_fast.training.loop import Plan, StepResult
from tests.helpers import waves

N, DIM, STEPS = 8, 6, 3
CPU = torch.device("cpu")
SMALL = EncoderConfig(name="resnet18", stem="half", width=8)
# Learning rates so small that Adam's steps don't make a difference of rounding a different loss.
TINY = """quickstart --device cpu --log-every 1 --save-every 2 --stages navigator pairs pretrain
    --navigator.lr 1e-6 --navigator.estimator-lr 1e-6 --pretrain.lr 1e-4
    --navigator.samples 64 --navigator.batch 16 --navigator.grid-every 32 --navigator.delta None
    --pairs.positives navigator --pairs.count 48 --pairs.shard-size 8 --pairs.batch 8
    --pretrain.epochs 2 --pretrain.batch 16 --timeout 60""".split()

ONLINE = [*TINY, "--generator.name", waves.__file__, "--pairs.positives", "gaussian", "--pretrain.data", "online"]


class ToyGenerator(nn.Module):
    latent_dim, image_shape, classes, latent_groups = DIM, (3, 16, 16), 0, ()

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, 3 * 16 * 16)
        self.requires_grad_(False)

    def forward(self, z, labels=None):
        return torch.tanh(self.linear(z)).view(-1, 3, 16, 16)


@contextlib.contextmanager
def default_dtype(dtype):
    """Build modules in `dtype`, as DistributedDataParallel fixes it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run_of(ranks, bn="sync"):
    config = dataclasses.replace(
        PRESETS["quickstart"],
        bn=bn,
        navigator=NavigatorConfig(batch=N, estimator=SMALL, lr=1e-3, estimator_lr=1e-3, augmentation="digits"),
        steering=SteeringConfig(batch=N),
        pretrain=PretrainConfig(batch=N, encoder=SMALL, lr=0.3, augmentation="digits"),
    )
    return Run(config, Path("."), CPU, ranks)


def columns(results, ranks):
    """Logged numbers of all steps, as the loop takes them from all ranks."""
    rows = torch.tensor([[value.item() for value in result.metrics.values()] for result in results]).double()
    return ranks.gathered(rows[None]).mean(0)


def play(ranks, update, bn="sync"):
    """Navigator training in float64: curve and final weights."""
    run = run_of(ranks, bn)
    torch.manual_seed(0)
    with default_dtype(torch.float64):
        players = navigator.make_players(run, ToyGenerator().double(), Navigator(DIM).double())
    results = []
    for index in range(STEPS):
        batch = navigator.draw_batch(run.config, players.G, index, CPU, ranks)
        results.append(update(players, dataclasses.replace(batch, z=batch.z.double())))
    return columns(results, ranks), {
        "T_z." + k: v for k, v in players.T_z.state_dict().items()
    } | players.f.state_dict()


def steer(ranks):
    """Learning of walks in float64: curve and final walks."""
    run, G, limits = run_of(ranks), ToyGenerator().double(), limits_of(SteeringConfig())
    torch.manual_seed(0)
    learner = steering.make_learner(run, G, Walks(DIM, limits, std=0.1).double())
    results = []
    for index in range(STEPS):
        batch = steering.draw_batch(run.config, G, limits, index, CPU, ranks)
        tensors = {name: value.double() for name, value in vars(batch).items() if value is not None}
        results.append(steering.steering_step(learner, steering.Batch(**tensors)))
    return columns(results, ranks), learner.walks.state_dict()


HEADS = ("hidden=8", "dim=6", "predictor_hidden=4")
METHODS = {
    "simsiam": ("simsiam", HEADS),
    "byol": ("byol", HEADS),
    "moco": ("moco", ("queue=12", "ema=0.7")),
    "nnclr": ("nnclr", (*HEADS, "queue=12")),
    "simclr with jigsaw": ("simclr", ("jigsaw=0.5",)),
    "moco with jigsaw": ("moco", ("queue=12", "ema=0.7", "jigsaw=0.5")),
    "negft": ("negft", ("mix=dimension", "extrapolate=True")),
    "negft in a queue": ("negft", ("negatives=queue", "queue=12", "ema=0.7", "mix=dimension", "extrapolate=True")),
}


def learn(ranks, method="simclr", words=(), several=1, **options):
    """Pretraining in float64, on `several` positives of each anchor: curve and final weights."""
    config = run_of(ranks).config
    config = dataclasses.replace(
        config, method=MethodConfig(method, words), pretrain=dataclasses.replace(config.pretrain, **options)
    )
    with default_dtype(torch.float64):
        learner = pretrain.make_learner(config, CPU, ranks, positives=several)
    results, rows = [], ranks.rows(N)
    for index in range(STEPS):
        shape = (1 + several, N, 3, 16, 16)
        images = torch.rand(shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        pairs = as_batch(images[:, rows], torch.arange(N)[rows] % 3)
        labelled = pretrain.takes_labels(method)
        batch = pretrain.make_batch(config, index, pairs, 0.05, CPU, ranks, labelled=labelled)
        results.append(pretrain.pretrain_step(learner, batch))
    return columns(results, ranks), learner.method.state_dict()


def online(ranks, folder):
    """Pretraining on pairs that it draws: numbers and images of this rank's pairs in each step."""
    drawn, generate = [], OnlinePairs.generate

    def seen(pairs, numbers, latents):
        batch = generate(pairs, numbers, latents)
        drawn.append((torch.tensor(numbers), batch.images))
        return batch

    config = train.parse([*ONLINE, "--stages", "pretrain", "--out", str(folder / "online")])
    with mock.patch.object(OnlinePairs, "generate", seen), train.open_run(config, CPU, ranks) as run:
        pretrain.run(run)
    return drawn


def small_model():
    with seeds.seeded(0, "encoder"):
        return ContrastiveModel(SMALL).double()


def gradients(ranks):
    """Of the whole batch's loss, by name, in float64."""
    model = sync_bn.convert_sync_bn(small_model(), "sync", ranks, CPU)
    called = data_parallel(model, ranks)
    views = torch.randn(2 * N, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    methods.nt_xent(called(views[ranks.joint_rows(N)]), 0.1, 0.07, group=ranks.group).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def normalized_head(ranks):
    """A head with batch norm over rows: outputs, gradients of the whole batch's loss, running statistics."""
    with seeds.seeded(0, "head"):
        layers = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 4), nn.BatchNorm1d(4, affine=False)
    head = sync_bn.convert_sync_bn(nn.Sequential(*layers).double(), "sync", ranks, CPU)
    called = data_parallel(head, ranks)
    x = 3 + torch.randn(2 * N, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs = called(x[ranks.joint_rows(N)])
    methods.nt_xent(outputs, 0.1, 0.07, group=ranks.group).backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    return {"outputs": outputs.detach(), "gradients": gradients, "statistics": dict(head.named_buffers())}


class Tupled(nn.Module):
    """A model whose output is a tuple, as a method's is."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, views):
        return (self.model(views),)


def accumulated(ranks):
    """Of the whole batch's loss, by name, in float64, taken in two parts by each rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 8)).double()
    called, scaler = data_parallel(Tupled(model), ranks), torch.amp.GradScaler("cpu", enabled=False)
    views = torch.randn(2 * N, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(outputs):
        return methods.nt_xent(*outputs, 0.1, 0.07, group=ranks.group)

    own = views[ranks.joint_rows(N)]
    parts = min(2, N // ranks.world)
    grad_cache.backward(called, own, loss, scaler, parts=parts, no_sync=partial(no_sync, called))
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def overflow(ranks):
    """Loss scaling when one rank's gradient overflows: the weight after the step, and the scale."""
    layer = nn.Linear(1, 3, bias=False)
    nn.init.ones_(layer.weight)
    called = data_parallel(layer, ranks)
    sgd, scaler = torch.optim.SGD(layer.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    factor = float("inf") if ranks.rank == ranks.world - 1 else 1.0
    optimizers.descend(called(torch.full((1, 1), factor)).sum(), scaler, sgd)
    return layer.weight.detach().flatten(), scaler.get_scale()


class Problem:
    """Least squares; each rank sees its rows of the batch."""

    def __init__(self, ranks, folder):
        torch.manual_seed(0)
        self.ranks, self.model = ranks, data_parallel(nn.Linear(3, 1), ranks)
        self.sgd = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.plan = Plan("test", Path(folder), steps=20, batch=4, log_every=5, save_every=5)
        self.before = lambda index: None

    def data(self, index):
        self.before(index)
        return torch.randn(4, 3, generator=torch.Generator().manual_seed(index))[self.ranks.rows(4)]

    def step(self, index, x):
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        return StepResult({"loss": loss}, {"inputs": x})

    def run(self):
        """What it ended with: a message, or the summary."""
        state = {"model": self.model, "sgd": self.sgd}
        try:
            with interrupts.handle_signals():
                return loop.run(self.step, self.data, state, self.plan, ranks=self.ranks)
        except CopgenError as error:
            return f"{type(error).__name__}: {error}"


def faults(ranks, folder):
    """How a run ends on each rank when the last one is asked to stop, meets a NaN, or sees another folder."""
    last = ranks.rank == ranks.world - 1
    stopped = Problem(ranks, folder / "problem")
    stopped.before = lambda index: os.kill(os.getpid(), signal.SIGTERM) if last and index == 6 else None
    nan = Problem(ranks, folder / "nan")
    draw = nan.data
    nan.data = lambda index: draw(index) * (float("nan") if last and index == 7 else 1.0)
    elsewhere = Problem(ranks, folder / ("problem" if last else "elsewhere"))
    return {
        "stopped": stopped.run(),
        "weights": stopped.model.state_dict(),
        "nan": nan.run(),
        "elsewhere": elsewhere.run(),
        "resumed": Problem(ranks, folder / "problem").run()["steps"],
    }


@mock.patch.object(functional, "expect_equal_batches", None)  # trainers must not call it: it waits for the device
def everything(ranks, folder):
    alternating, simultaneous = navigator.alternating_step, navigator.simultaneous_step
    return {
        "alternating": play(ranks, alternating),
        "simultaneous": play(ranks, simultaneous),
        "steering": steer(ranks),
        "per-rank": play(ranks, alternating, bn="per-rank"),
        "pretrain": learn(ranks),
        "supervised, checkpointed": learn(ranks, "supcon", checkpoint=True),
        "several positives": learn(ranks, several=3),
        "several positives of classes": learn(ranks, "supcon", several=2),
        "one of several positives": learn(ranks, "negft", several=3),
        **{name: learn(ranks, *of) for name, of in METHODS.items()},
        "gradients": gradients(ranks),
        "head": normalized_head(ranks),
        "gradients, in parts": accumulated(ranks),
        "overflow": overflow(ranks),
        "online": online(ranks, folder),
        **faults(ranks, folder),
    }


def when_at(location, act):
    """Do something when the run comes to a location for the first time."""
    mark, locations = Heartbeat.mark, {location}

    def seen(self, here, watchdog=False):
        mark(self, here, watchdog)
        if here in locations:
            locations.remove(here)
            act()

    Heartbeat.mark = seen


def stop_half_way(folder):
    """The command with SIGTERM for rank 1 in the navigator's third step: its exit code."""
    if os.environ["RANK"] == "1":
        when_at("step 2 of navigator", lambda: os.kill(os.getpid(), signal.SIGTERM))
    return train.main([*TINY, "--out", str(folder / "stopped")])


def rank_main(rank, world, ports, folder):
    """Each run meets at a port of its own: a store that ends may still be heard at the one before."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0]}
    codes = []
    if world == 2:
        codes.append(train.main([*TINY, "--out", str(folder / "run")]))
        os.environ["MASTER_PORT"] = ports[1]
        codes.append(stop_half_way(folder))
        os.environ["MASTER_PORT"] = ports[2]
    with distributed.joined(CPU, 60.0) as ranks:
        results = everything(ranks, folder)
    torch.save(results | {"exit codes": codes}, folder / f"{rank}.pt")
