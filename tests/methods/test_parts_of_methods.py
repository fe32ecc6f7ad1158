"""What methods are made of: heads, queue, moving average, mixing; and which options go with a run."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import NNMemoryBankModule, heads
from scipy import stats
from torch import nn

from copgen_fast import methods
from copgen_fast.errors import UsageError
from copgen_fast.methods import Setting, negft
from copgen_fast.methods._collapse import embedding_std
from copgen_fast.methods._ema import Ema, rising
from copgen_fast.methods._heads import cosine, mlp
from copgen_fast.methods._queue import Queue
from copgen_fast.ops import info_nce


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: mlp(6, 7, 7, 5, last="norm without weights"), lambda: heads.SimSiamProjectionHead(6, 7, 5)),
        (lambda: mlp(6, 7, 5), lambda: heads.SimSiamPredictionHead(6, 7, 5)),
        (lambda: mlp(6, 7, 5), lambda: heads.BYOLProjectionHead(6, 7, 5)),
        (lambda: mlp(6, 7, 5), lambda: heads.BYOLPredictionHead(6, 7, 5)),
        (lambda: mlp(6, 7, 7, 5, last="norm"), lambda: heads.NNCLRProjectionHead(6, 7, 5)),
        (lambda: mlp(6, 7, 5), lambda: heads.NNCLRPredictionHead(6, 7, 5)),
    ],
)
def test_heads_are_lightlys(ours, theirs):
    mine, other, x = ours().double(), theirs().double(), drawn(8, 6)
    mine.load_state_dict(other.layers.state_dict())
    assert [type(layer) for layer in mine] == [type(layer) for layer in other.layers]
    torch.testing.assert_close(mine(x), other(x), rtol=0, atol=0)


def test_losses_are_lightlys():
    z, p = drawn(2, 8, 6, seed=1)
    theirs = NegativeCosineSimilarity()
    torch.testing.assert_close(-cosine(p, z), theirs(p, z), rtol=1e-12, atol=0)
    queue = F.normalize(drawn(12, 6, seed=2), dim=1)
    moco = NTXentLoss(temperature=0.2, memory_bank_size=(12, 6)).double()
    moco.memory_bank.bank = queue.clone()
    expected = moco(z, p)
    ours = info_nce(z, p, temperature=0.2, symmetric=False, negatives=queue, in_batch=False)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_neighbours_are_those_of_lightlys_memory_bank_and_of_no_whole_matrix():
    queue, bank = Queue(300, 6), NNMemoryBankModule((300, 6))
    bank.bank = queue.rows.clone()
    for seed in range(3):
        z = drawn(8, 6, seed=seed, dtype=torch.float32)
        expected = bank(z, update=True)
        torch.testing.assert_close(queue.rows[queue.nearest(F.normalize(z, dim=1))], expected)
        queue.offer(z, None, None)
        queue.take_in()
        # lightly keeps embeddings as they come and normalises them at each look-up.
        bank.bank = F.normalize(bank.bank, dim=1)
    many = Queue(1 << 16, 256)
    with torch.profiler.profile(profile_memory=True) as profile:
        found = many.nearest(F.normalize(drawn(500, 256, dtype=torch.float32), dim=1))
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 64 * 2**20, "the matrix has 131 MB"
    assert found.max() > len(many.rows) // 2, "parts count from the start"


def test_the_queue_wraps_within_a_batch_and_says_what_was_never_written():
    queue = Queue(7, 3).double()
    assert queue.unwritten() == 1
    seen = []
    for seed in range(4):
        rows = drawn(3, 3, seed=seed)
        queue.offer(rows, torch.full((3,), seed), None)
        before = queue.rows.clone()
        seen += list(zip(F.normalize(rows, dim=1), [seed] * 3, strict=True))
        assert torch.equal(queue.rows, before), "the loss still needs it"
        queue.take_in()
        assert queue.unwritten().item() == pytest.approx(max(0, 1 - len(seen) / 7))
    for number in range(5, 12):  # the last seven of twelve
        torch.testing.assert_close(queue.rows[number % 7], seen[number][0])
        assert queue.labels[number % 7] == seen[number][1]
    other = Queue(7, 3).double()
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.rows, queue.rows) and other.written == 12


def test_the_moving_average_follows_parameters_and_has_buffers_of_its_own():
    layer = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    average = Ema(layer)
    before = copy.deepcopy(layer)
    with torch.no_grad():
        layer[0].weight.add_(1.0)
    layer(drawn(5, 3))
    average.update(0.75, layer)
    torch.testing.assert_close(average.layers[0][0].weight, before[0].weight + 0.25)
    assert torch.equal(average.layers[0][1].running_mean, before[1].running_mean)
    average(drawn(5, 3, seed=1))
    assert not torch.equal(average.layers[0][1].running_mean, before[1].running_mean)
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert [rising(0.9, progress) for progress in (0, 0.5, 1)] == pytest.approx([0.9, 0.95, 1.0])


@pytest.mark.parametrize("alpha", [0.75, 1.6, 2.0])
def test_mixing_weights_have_their_beta_distribution(alpha):
    mixing = negft.Mixing(negft.Config(alpha=alpha, mix="dimension"))
    ends = torch.stack([torch.ones(2000), torch.zeros(2000)]).double()
    weights = mixing.mixed(ends, torch.tensor([1, 0]))[0]
    assert stats.kstest(weights.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.01
    mixing.seed = 7
    assert not torch.equal(mixing.mixed(ends, torch.tensor([1, 0]))[0], weights)


def test_the_std_of_embeddings_tells_collapse():
    directions = drawn(4000, 32)
    assert embedding_std(directions).item() == pytest.approx(1, abs=0.02)
    assert embedding_std(10 + 0.01 * directions).item() < methods.COLLAPSED
    assert embedding_std(torch.ones(4, 3)).item() == pytest.approx(0, abs=1e-3)
    unit = F.normalize(directions, dim=1)
    expected = unit.std(0, correction=0).mean() * math.sqrt(32)
    torch.testing.assert_close(embedding_std(directions), expected)


RUN = Setting(pairs=4096, batch=128)


@pytest.mark.parametrize("method", ["moco", "nnclr", "negft"])
def test_a_queue_without_a_size_takes_a_quarter_of_a_small_data_set(method):
    words = ("negatives=queue",) if method == "negft" else ()
    assert methods.configure(method, words, RUN).queue == 1024
    assert methods.configure(method, words, Setting(10_000, 128)).queue == 2048
    assert methods.configure(method, words, Setting(130_000, 128)).queue == 16_384
    assert methods.configure(method, words, Setting(1_300_000, 128)).queue == 65_536
    assert methods.configure(method, words, Setting(300, 128)).queue == 128, "what a step writes"
    assert methods.configure(method, (*words, "queue=1000"), RUN).queue == 1000, "no multiple of the batch"


@pytest.mark.parametrize(
    ("method", "words", "setting", "message"),
    [
        ("nnclr", ["queue=5000"], RUN, "--method nnclr: a queue of 5000 rows is larger than the data set of 4096"),
        ("moco", ["queue=100"], RUN, "a queue of 100 rows is shorter than the 128 that each step writes"),
        ("moco", ["queue=200", "symmetric=True"], RUN, "a queue of 200 rows is shorter than the 256"),
        ("negft", ["negatives=queue", "queue=5000"], RUN, "a queue of 5000 rows is larger"),
        ("negft", [], Setting(100, 2), "two pairs have no others to mix"),
        ("simsiam", ["predictor_hidden=0"], RUN, "predictor_hidden: expected 1 or more, got 0"),
        ("byol", ["predictor_hidden=0"], RUN, "predictor_hidden: expected 1 or more, got 0"),
        ("byol", ["ema=1.5"], RUN, "ema: expected 0 to 1, got 1.5"),
        ("moco", ["temperature=0"], RUN, "temperature: expected 0.0001 to 10000, got 0"),
        ("nnclr", ["queue=0"], RUN, "queue: expected 1 or more, got 0"),
        ("negft", ["alpha=0.5"], RUN, "alpha: expected 0.51 to 100, got 0.5"),
    ],
)
def test_options_that_do_not_go_with_the_run_are_refused(method, words, setting, message):
    with pytest.raises(UsageError, match=message):
        methods.configure(method, tuple(words), setting)
