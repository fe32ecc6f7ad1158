"""The seam of self-supervised methods: what pretraining calls, in which order, with what."""

import pytest
import torch
from torch import nn

from copgen_fast import augmentations, methods, registry
from copgen_fast.config import EncoderConfig
from copgen_fast.encoders import ContrastiveModel, Encoder
from copgen_fast.errors import UsageError
from copgen_fast.ops import AugmentParams, info_nce
from copgen_fast.runtime import seeds
from copgen_fast.runtime.distributed import ALONE
from copgen_fast.stages.pretrain import Batch, Learner, pretrain_step, set_learning_rate

SMALL = EncoderConfig("resnet18", "half", 16)


def build(name="simclr", *options):
    with seeds.seeded(0, "encoder"):
        return methods.build(name, Encoder(SMALL), options)


def views(pairs=4):
    return torch.randn(2 * pairs, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_simclr_is_nt_xent_of_encoder_and_head():
    m, v = build("simclr", "temperature=0.2", "base_temperature=None"), views()
    with seeds.seeded(0, "encoder"):
        f = ContrastiveModel(SMALL)
    (online,) = m(v)
    torch.testing.assert_close(online, f(v), rtol=0, atol=0)
    torch.testing.assert_close(
        m.loss((online,), m.targets(v), None, None), methods.nt_xent(online, 0.2, None), rtol=0, atol=0
    )
    assert m.targets(v) == () and list(m.state_dict()) == list(f.state_dict())


@pytest.mark.parametrize("base_temperature", ["None", "0.1"])
def test_simclr_logs_the_bound_on_mutual_information(base_temperature):
    m, embeddings = build("simclr", "temperature=0.2", f"base_temperature={base_temperature}"), torch.randn(8, 5)
    assert m.metrics() == {}
    m.loss((embeddings,), (), None, None)
    _, stats = info_nce(*embeddings.chunk(2), temperature=0.2, return_stats=True)
    torch.testing.assert_close(m.metrics(), {"mi_lower_bound": stats.mi_lower_bound})
    m = build("supcon")
    m.loss((embeddings,), (), torch.tensor([0, 0, 1, 1]), None)
    assert m.metrics() == {}, "with classes K is another in each row"


@pytest.mark.parametrize("name", ["simclr", "supcon"])
def test_a_pair_alone_is_refused(name):
    m = build(name)
    with pytest.raises(ValueError, match="one pair alone has no negatives"):
        m.loss(m(views(1)), (), torch.zeros(1, dtype=torch.int64), None)


def test_supcon_takes_rows_of_a_class_as_positives():
    assert methods.needs_labels("supcon") and not methods.needs_labels("simclr")
    m, labels = build("supcon"), torch.tensor([0, 1, 0, 1])
    online = m(views())
    expected = methods.nt_xent(online[0], 0.1, 0.07, labels)
    torch.testing.assert_close(m.loss(online, (), labels, None), expected, rtol=0, atol=0)
    assert m.loss(online, (), labels, None) != m.loss(online, (), torch.arange(4), None)


@pytest.mark.parametrize("word", ["temperature=0", "temperature=-1", "temperature=inf", "base_temperature=0"])
def test_options_out_of_range_are_refused(word):
    with pytest.raises(UsageError, match="expected"):
        registry.options("methods", "simclr", [word])


class Recorded(methods.Method):
    """A method that writes down how it is called."""

    def __init__(self, calls):
        super().__init__()
        self.encoder, self.predictor = nn.Linear(3 * 16 * 16, 4), nn.Linear(4, 4)
        self.calls = calls

    def forward(self, v):
        self.calls.append("forward" if torch.is_grad_enabled() else "forward without gradient")
        h = self.encoder(v.flatten(1))
        return h, self.predictor(h)

    def targets(self, v):
        assert not torch.is_grad_enabled()
        self.calls.append("targets")
        return (self.encoder(v.flatten(1)),)

    def loss(self, online, targets, labels, group):
        self.calls.append("loss")
        assert not targets[0].requires_grad and labels is None and group is None
        return (online[1] - targets[0]).square().mean()

    def after_step(self, online, targets, progress):
        assert not any(x.requires_grad for x in (*online, *targets))
        self.calls.append(("after_step", progress, self.encoder.weight.detach().clone()))

    def param_groups(self):
        return [
            {"params": list(self.encoder.parameters())},
            {"params": list(self.predictor.parameters()), "scheduled": False},
        ]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_calls_targets_forward_loss_and_then_after_step(parts):
    calls, policy = [], augmentations.get("none")
    torch.manual_seed(0)
    m = Recorded(calls)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    params = AugmentParams.sample(8, (16, 16), policy, generator=torch.Generator().manual_seed(3))
    sgd = torch.optim.SGD(m.param_groups(), 0.5)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    context = torch.autograd.set_grad_enabled
    learner = Learner(m, policy, lambda: context(torch.is_grad_enabled()), sgd, scaler, ALONE, parts)
    result = pretrain_step(learner, Batch(images, params, lr=0.25, progress=0.5))
    forwards = ["forward"] if parts == 1 else ["forward without gradient"] * 2 + ["loss"] + ["forward"] * 2
    assert calls[:-1] == ["targets", *forwards, *(["loss"] if parts == 1 else [])]
    name, progress, weight = calls[-1]
    assert (name, progress) == ("after_step", 0.5) and torch.equal(weight, m.encoder.weight), "the step was made"
    assert [group["lr"] for group in sgd.param_groups] == [0.25, 0.5], "a group may keep its rate"
    assert set(result.watched) == {"views", "output 0 of the method", "output 1 of the method"}


def test_the_learning_rate_of_unscheduled_groups_stays():
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    sgd = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "scheduled": False}], 0.5)
    set_learning_rate(sgd, 0.1)
    assert [group["lr"] for group in sgd.param_groups] == [0.1, 0.5]
