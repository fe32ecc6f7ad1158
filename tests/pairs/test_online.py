"""Pairs generated while training are those that shards would hold."""

import dataclasses
import threading

import pytest
import torch

from copgen_fast.config import PretrainConfig
from copgen_fast.errors import CopgenError, NonFiniteError
from copgen_fast.pairs.online import OnlineBatches, OnlinePairs
from copgen_fast.pairs.read.loader import PairBatches, PairDataset, Sampler, open_batches
from tests.helpers.on_gpu import needs_gpu
from tests.helpers.pairs_fixtures import CONFIG, WEIGHT, generate, source, write

CPU = torch.device("cpu")


def exact(z, labels=None):
    """Images whose bits do not depend on the batch: sums in one order, no matrix product."""
    images = sum(z[:, k, None] * WEIGHT[k].to(z.device) for k in range(z.shape[1]))
    images = images if labels is None else images + labels[:, None] / 8
    return (images / 4).clamp(-1, 1).view(-1, 3, 8, 8)


def online(of, **options):
    return OnlinePairs(of, CONFIG.count, CONFIG.start_seed, CONFIG.samples_per_class, **options)


def same(one, other):
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("positives", [1, 3])
@pytest.mark.parametrize("classes", [0, 3])
def test_pairs_and_batches_are_those_of_the_shards_to_the_bit(tmp_path, positives, classes):
    of = source(exact, label_of=(lambda index: index // 2 % classes) if classes else None, positives=positives)
    write(tmp_path, CONFIG, of)
    stored, drawn = PairDataset(tmp_path), online(of)
    assert len(drawn) == len(stored) and drawn.positives == stored.positives
    for number in range(10):
        assert same(drawn[number][:2], stored[number][:2]) and drawn[number][2] == stored[number][2]
    for rank in range(2):
        options = PretrainConfig(batch=4, workers=0)
        shards, generated = (open_batches(x, options, 5, CPU, rank, 2) for x in (stored, drawn))
        assert isinstance(shards, PairBatches) and isinstance(generated, OnlineBatches)
        for step in (0, 1, 2, 5, 1):  # within an epoch, in a later one, and after a jump
            one, other = shards(step), generated(step)
            assert same(one, other) and same([one.images], [other.images])
            assert [x.stride() for x in one] == [x.stride() for x in other]
            assert other.images.data_ptr() == other.anchors.data_ptr(), "one tensor, as it was generated"


def test_anchors_and_positives_take_one_forward():
    sizes = []

    def counted(z):
        sizes.append(len(z))
        return exact(z)

    OnlineBatches(online(source(counted, positives=2)), Sampler(10, 4, 0), CPU)(0)
    assert sizes == [3 * 4]


def test_endless_pairs_go_on_with_each_epoch_and_none_comes_twice():
    fixed, endless = (OnlineBatches(online(source(exact), endless=e), Sampler(10, 5, 0), CPU) for e in (False, True))
    assert all(same(fixed(step), endless(step)) for step in range(2))
    later = dataclasses.replace(online(source(exact)), count=30)
    for step in (2, 5):
        epoch = step // 2
        numbers = [10 * epoch + index for index in endless.sampler.indices(step)]
        assert same(endless(step), later.draw(numbers))
    images = torch.cat([endless(step).images.flatten(1) for step in range(6)])
    assert len(images.unique(dim=0)) == len(images) == 60
    assert len(torch.cat([fixed(step).images.flatten(1) for step in range(6)]).unique(dim=0)) == 20


@pytest.mark.parametrize(("value", "error"), [(float("nan"), NonFiniteError), (40.0, CopgenError)])
@pytest.mark.parametrize(("row", "name"), [(2, "anchors"), (6, "positives")])
def test_bad_images_are_named_by_their_pair(value, error, row, name):
    def bad(z):
        images = generate(z)
        images[row, 1, 0, 0] = value
        return images

    batches = OnlineBatches(online(source(bad)), Sampler(10, 4, 0), CPU)
    with pytest.raises(error, match=rf"images of {name}: .* in sample {batches.sampler.indices(0)[2]}\b"):
        batches(0)


def test_a_latent_that_is_not_finite_is_named_by_its_pair():
    def bad(z, seeds):
        return torch.stack([row / (seed != CONFIG.start_seed + 7) for row, seed in zip(z, seeds, strict=True)])

    with pytest.raises(NonFiniteError, match="z_positive: NaN or infinity in sample 7"):
        online(source(exact, bad)).draw([3, 7, 1])


@needs_gpu
def test_a_generators_own_sample_is_called_by_the_steps_thread():
    threads, of = set(), dataclasses.replace(source(exact), device=torch.device("cuda"))

    def sample(seed, count):
        threads.add(threading.get_ident())
        return of.sample(seed, count)

    OnlineBatches(online(dataclasses.replace(of, sample=sample)), Sampler(10, 5, 0, steps=6), of.device)(0)
    assert threads == {threading.get_ident()}


@needs_gpu
@pytest.mark.parametrize("prefetched", [True, False])
def test_a_gpu_generates_the_batch_after_the_requested_one_meanwhile(prefetched):
    device, steps = torch.device("cuda"), []

    def counted(z):
        steps.append(len(z))
        return exact(z)

    of = dataclasses.replace(source(counted, positives=2), device=device)
    batches = OnlineBatches(online(of), Sampler(10, 5, 0, steps=6), device, prefetched)
    on_cpu = OnlineBatches(online(source(exact, positives=2)), Sampler(10, 5, 0), CPU)
    for step in range(6):
        made, expected = batches(step), on_cpu(step)
        assert (made.images.cpu().int() - expected.images.int()).abs().max() <= 1, "rounding"
        assert torch.equal(made.labels.cpu(), expected.labels) and made.images.device.type == "cuda"
    assert len(steps) == 6, "none beyond the last"
