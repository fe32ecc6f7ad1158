"""Three training steps of each method equal a literal loop of its published formulas, in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from copgen_fast import augmentations, methods, registry
from copgen_fast.augmentations import JigsawParams
from copgen_fast.ops import AugmentParams
from copgen_fast.runtime.distributed import ALONE
from copgen_fast.stages.pretrain import Batch, Learner, pretrain_step

N, STEPS, PEAK, SIDE = 5, 3, 0.3, 15
RATES = (0.3, 0.2, 0.1)
HEADS = ("hidden=7", "dim=6", "predictor_hidden=4")
CASES = {
    "simsiam": ("simsiam", HEADS),
    "simsiam, scheduled, joint": ("simsiam", (*HEADS, "fixed_predictor_lr=False", "joint=True")),
    "byol": ("byol", (*HEADS, "ema=0.7")),
    "moco": ("moco", ("queue=12", "ema=0.7")),
    "moco with jigsaw": ("moco", ("queue=12", "ema=0.7", "jigsaw=0.3")),
    "simclr with jigsaw": ("simclr", ("jigsaw=0.3",)),
    "nnclr": ("nnclr", (*HEADS, "queue=12")),
    "nnclr, joint": ("nnclr", (*HEADS, "queue=12", "joint=True", "base_temperature=0.07")),
    "negft": ("negft", ()),
    "negft by dimension": ("negft", ("mix=dimension", "extrapolate=True")),
    "negft in a queue": ("negft", ("negatives=queue", "queue=12", "ema=0.7")),
    "negft in a queue, both": ("negft", ("negatives=queue", "queue=12", "ema=0.7", "extrapolate=True")),
}


class Tiny(nn.Sequential):
    """An encoder with batch norm."""

    feature_dim = 6

    def __init__(self):
        super().__init__(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(1))
        self.append(nn.Linear(24, 6))


def make(name, options):
    torch.manual_seed(0)
    return methods.build(name, Tiny(), options).double()


def images(step):
    return torch.rand(2 * N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def embed(m, head, v1, v2):
    """Embeddings of both views, each with its own batch statistics, or with those of both."""
    if m.config.joint:
        return head(m.encoder(torch.cat([v1, v2]))).chunk(2)
    return [head(m.encoder(v)) for v in (v1, v2)]


class Literal:
    """A method's training written out; its modules are copies, its queue a list."""

    def __init__(self, m, options):
        self.m = m
        self.options = dict(word.split("=") for word in options)
        self.t = float(self.options.get("temperature", getattr(m.config, "temperature", 0)))
        self.ema = float(self.options.get("ema", 1))
        self.target = [copy.deepcopy(part) for part in self.trunk()]
        self.queue = [row.clone() for row in m.queue.rows] if hasattr(m, "queue") else []
        self.classes, self.at = [-1] * len(self.queue), 0
        self.momentum, self.pieces = {}, []

    def trunk(self):
        return [self.m.encoder, self.m.projector if hasattr(self.m, "projector") else self.m.head]

    def enqueue(self, rows, labels):
        for row, label in zip(rows, labels, strict=True):
            self.queue[self.at], self.classes[self.at] = row.detach(), label
            self.at = (self.at + 1) % len(self.queue)

    def follow(self, decay):
        for copied, part in zip(self.target, self.trunk(), strict=True):
            for old, new in zip(copied.parameters(), part.parameters(), strict=True):
                old.data = decay * old.data + (1 - decay) * new.data

    def of_target(self, v):
        with torch.no_grad():
            return self.target[1](self.target[0](v))

    def simsiam(self, v1, v2, labels, seed):
        z1, z2 = embed(self.m, self.m.projector, v1, v2)
        if self.m.config.joint:
            p1, p2 = self.m.predictor(torch.cat([z1, z2])).chunk(2)
        else:
            p1, p2 = self.m.predictor(z1), self.m.predictor(z2)
        return sum(-(unit(p) * unit(z.detach())).sum(1).mean() / 2 for p, z in ((p1, z2), (p2, z1)))

    def byol(self, v1, v2, labels, seed):
        p1, p2 = (self.m.predictor(z) for z in embed(self.m, self.m.projector, v1, v2))
        return sum((unit(p) - unit(self.of_target(v))).square().sum(1).mean() for p, v in ((p2, v1), (p1, v2)))

    def simclr(self, v1, v2, labels, seed):
        z = unit(self.m.head(self.m.encoder(torch.cat([v1, v2]))))
        logits = (z @ z.T / self.t).masked_fill(torch.eye(2 * N, dtype=torch.bool), -torch.inf)
        loss = F.cross_entropy(logits, torch.arange(2 * N).roll(N))
        by_pieces = F.cross_entropy(self.of_pieces() @ z[N:].T / self.t, torch.arange(N))
        return (0.7 * loss + 0.3 * by_pieces) * self.t / 0.07

    def of_pieces(self):
        """Unit embeddings of the nine pieces of each image in `self.pieces`."""
        h = self.m.branch.head(self.m.encoder(torch.cat(self.pieces)))
        rows = [torch.cat([h[9 * i + k] for k in range(9)]) for i in range(N)]
        return unit(self.m.branch.join(torch.stack(rows)))

    def moco(self, v1, v2, labels, seed):
        self.follow(self.ema)  # as published: before the forward, which changes nothing in the first step
        q, k = unit(self.m.head(self.m.encoder(v1))), unit(self.of_target(v2))
        losses = []
        for x in (q, self.of_pieces()) if self.pieces else (q,):
            logits = torch.cat([(x * k).sum(1, keepdim=True), x @ torch.stack(self.queue).T], 1) / self.t
            losses.append(F.cross_entropy(logits, torch.zeros(N, dtype=torch.int64)))
        self.enqueue(k, labels)
        return 0.7 * losses[0] + 0.3 * losses[1] if self.pieces else losses[0]

    def nnclr(self, v1, v2, labels, seed):
        z1, z2 = embed(self.m, self.m.projector, v1, v2)
        if self.m.config.joint:
            p1, p2 = self.m.predictor(torch.cat([z1, z2])).chunk(2)
        else:
            p1, p2 = self.m.predictor(z1), self.m.predictor(z2)
        total, right = 0, 0
        for z, p in ((z1, p2), (z2, p1)):
            found = [
                max(range(len(self.queue)), key=lambda j, row=row: float(row @ self.queue[j]))
                for row in unit(z).detach()
            ]
            right += sum(self.classes[j] == label for j, label in zip(found, labels, strict=True))
            logits = unit(torch.stack([self.queue[j] for j in found])) @ unit(p).T / self.t
            total = total + F.cross_entropy(logits, torch.arange(N)) / 2
        self.enqueue(unit(z1), labels)
        self.right = right / (2 * N)
        return total * (self.t / 0.07 if "base_temperature" in self.options else 1)

    def beta(self, alpha, shape, seed):
        u, w = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return 0.5 + 0.5 * torch.sqrt(1 - u ** (2 / (2 * alpha - 1))) * torch.cos(2 * math.pi * w)

    def negft(self, v1, v2, labels, seed):
        in_queue, by_dimension = "negatives" in self.options, self.options.get("mix") == "dimension"
        if in_queue:
            q = unit(self.m.head(self.m.encoder(v1)))
            k = unit(self.of_target(v2))
            bank = torch.stack(self.queue)
        else:
            q = unit(self.m.head(self.m.encoder(torch.cat([v1, v2]))))
            k = torch.cat([q[N:], q[:N]]).detach()
            bank = q.detach()
        count = len(bank) if in_queue else N
        perm = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        mix = self.beta(1.6, bank.shape if by_dimension else (1, 1), seed + 1).expand(bank.shape)
        partner = perm if in_queue else [perm[j % N] + j // N * N for j in range(2 * N)]
        mixed = [mix[j] * bank[j] + (1 - mix[j]) * bank[partner[j]] for j in range(len(bank))]
        q1, k1 = q, k
        if "extrapolate" in self.options:
            by = 1 + self.beta(2.0, q.shape if by_dimension else (1, 1), seed + 2)
            q1, k1 = by * q + (1 - by) * k, by * k + (1 - by) * q
        losses = []
        for i in range(len(q)):
            own = [] if in_queue else [j for j in range(2 * N) if i % N in (j % N, partner[j] % N)]
            logits = [q1[i] @ k1[i]] + [q[i] @ mixed[j] for j in range(len(mixed)) if j not in own]
            losses.append(F.cross_entropy(torch.stack(logits)[None] / self.t, torch.tensor([0])))
        if in_queue:
            self.enqueue(k, labels)
        return torch.stack(losses).mean() * self.t / 0.07

    def step(self, name, v, lr, k, labels, seed):
        loss = getattr(self, name)(*v.chunk(2), labels, seed)
        fixed = name == "simsiam" and "fixed_predictor_lr" not in self.options
        trained = {of: value for of, value in self.m.named_parameters() if value.requires_grad}
        gradients = torch.autograd.grad(loss, list(trained.values()))
        for (of, value), gradient in zip(trained.items(), gradients, strict=True):
            self.momentum[of] = gradient + 1e-4 * value.detach() + 0.9 * self.momentum.get(of, 0)
            value.data -= (PEAK if fixed and of.startswith("predictor") else lr) * self.momentum[of]
        if name == "byol":
            self.follow(1 - (1 - self.ema) * (math.cos(math.pi * k / STEPS) + 1) / 2)
        elif name == "negft" and "negatives" in self.options:
            self.follow(self.ema)
        return loss.detach()


def pieces(whole, params):
    """Nine pieces of 4 x 4 pixels of an image's cells of 5 x 5, shuffled."""
    found = []
    for number in params.order[0].tolist():
        y, x = (torch.tensor(divmod(number, 3)) * 5 + (2 * params.place[0, number]).long()).tolist()
        found.append(whole[:, y : y + 4, x : x + 4])
    return torch.stack(found)


@pytest.mark.parametrize("case", CASES)
def test_three_steps_are_those_of_a_literal_loop(case):
    name, options = CASES[case]
    m = make(name, options)
    literal = Literal(copy.deepcopy(m), options)
    policy = augmentations.get("none")
    sgd = torch.optim.SGD(m.param_groups(), PEAK, 0.9, weight_decay=1e-4)
    off = torch.amp.GradScaler("cpu", enabled=False)
    context = torch.autograd.set_grad_enabled
    learner = Learner(m, policy, lambda: context(torch.is_grad_enabled()), sgd, off, ALONE, 1)
    labels = torch.arange(N) % 2 if getattr(registry.load("methods", name), "USES_LABELS", False) else None
    for k in range(STEPS):
        params = AugmentParams.sample(2 * N, (SIDE, SIDE), policy)
        jigsaw = None
        if m.jigsaw:
            jigsaw = JigsawParams.sample(N, (SIDE, SIDE), policy, torch.Generator().manual_seed(k))
            whole = augmentations.make_views(images(k)[:N], jigsaw.crop, policy)
            literal.pieces = [pieces(whole[i], jigsaw[i : i + 1]) for i in range(N)]
        batch = Batch(images(k), params, RATES[k], k / STEPS, labels, 10 * k, jigsaw)
        result = pretrain_step(learner, batch)
        views = augmentations.make_views(images(k), params, policy)
        loss = literal.step(name, views, RATES[k], k, [-1] * N if labels is None else labels.tolist(), 10 * k)
        torch.testing.assert_close(result.metrics["loss"], loss, rtol=1e-10, atol=1e-12)
        if name == "nnclr":
            assert result.metrics["neighbour_accuracy"].item() == pytest.approx(literal.right)
    if name == "moco":
        literal.follow(literal.ema)
    close = {"rtol": 1e-8, "atol": 1e-11}
    for mine, theirs in zip(m.named_parameters(), literal.m.named_parameters(), strict=True):
        if mine[1].requires_grad:
            torch.testing.assert_close(*(value[1].detach() for value in (mine, theirs)), **close, msg=mine[0])
    if average := getattr(m, "target", getattr(m, "key", None)):
        for copied, layer in zip(literal.target, average.layers, strict=True):
            torch.testing.assert_close(layer.state_dict(), copied.state_dict(), **close)
    torch.testing.assert_close(m.encoder.state_dict(), literal.m.encoder.state_dict(), **close)
    if literal.queue:
        torch.testing.assert_close(m.queue.rows, torch.stack(literal.queue), **close)
        assert m.queue.labels.tolist() == literal.classes
        assert m.queue.written % len(m.queue.rows) == literal.at and m.queue.written == STEPS * N
        share = result.metrics["queue_unwritten"].item()
        assert share == 0 and m.queue.written > len(m.queue.rows), "it wraps within a batch"
