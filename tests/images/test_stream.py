"""Batches of images decoded in threads: as one by one, in order, without those that can't be decoded."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from copgen_fast.images.split import ArraySplit, ItemSplit
from copgen_fast.images.stream import in_order, shuffled, stream
from copgen_fast.images.views import Centre, Squash
from copgen_fast.runtime.threads import alone


@pytest.fixture
def files(tmp_path):
    """Forty files of different sizes, of which number 7 and 33 are damaged."""
    paths = []
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number % 5, 24, 3), np.uint8)
        paths.append(tmp_path / f"{number:02d}.png")
        Image.fromarray(pixels).save(paths[-1])
    for number in (7, 33):
        paths[number].write_bytes(b"damaged")
    return ItemSplit([(str(path), number % 3) for number, path in enumerate(paths)], None, "files")


def test_batches_hold_what_reading_one_by_one_gives(files):
    batches = list(stream(files, Centre(16), in_order(40, 18), workers=2))
    assert [len(batch.images) for batch in batches] == [17, 17, 4], "damaged ones are left out"
    assert [fault.where for batch in batches for fault in batch.faults] == [files.items[i][0] for i in (7, 33)]
    for batch in batches:
        for image, label, index in zip(batch.images, batch.labels, batch.indices.tolist(), strict=True):
            expected, number = files.read(index, Centre(16))
            assert image.equal(expected) and label == number == index % 3


def test_an_array_is_streamed_at_its_own_size():
    images = torch.randint(0, 256, (5, 3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = ArraySplit(5, torch.arange(5), lambda size: images)
    (batch,) = stream(split, Squash(12), in_order(5, 8))
    assert batch.images.shape == (5, 3, 12, 12) and batch.labels.tolist() == list(range(5))


def test_operators_run_alone_in_the_threads_that_decode(files):
    counts, before = [], torch.get_num_threads()

    class Noted:
        def read(self, index, view):
            counts.append(torch.get_num_threads())
            return files.read(0, view)

    torch.set_num_threads(3)
    try:
        list(stream(Noted(), Centre(4), in_order(40, 10), workers=2))
        another = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        another.start()
        another.join()
        assert counts == 40 * [1] + [3] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_threads_that_begin_together_leave_others_as_many_as_before():
    before, counts = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        for _ in range(60):
            together = [threading.Thread(target=alone) for _ in range(4)]
            for thread in together:
                thread.start()
            for thread in together:
                thread.join()
            another = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
            another.start()
            another.join()
        assert counts == 60 * [3]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("on_gpu", "ahead"), [(True, 2), (False, 0)])
def test_batches_are_decoded_before_they_are_used_only_beside_a_gpu(files, monkeypatch, on_gpu, ahead):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    taken, lock = [], threading.Lock()

    class Counted:
        def read(self, index, view):
            with lock:
                taken.append(index)
            return files.read(0, view)

    batches = stream(Counted(), Centre(4), in_order(400, 10), workers=2)
    for used in range(1, 5):
        next(batches)
        assert len(taken) <= 10 * (used + ahead)
    batches.close()


def test_an_error_of_a_thread_reaches_the_caller():
    class Broken:
        def read(self, index, view):
            raise MemoryError("none left")

    with pytest.raises(MemoryError, match="none left"):
        list(stream(Broken(), Centre(4), in_order(4, 2)))


def test_a_shuffled_order_is_a_permutation():
    batches = list(shuffled(10, 4, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.cat(batches).sort().values.equal(torch.arange(10))
    assert [len(batch) for batch in shuffled(10, 4, torch.Generator().manual_seed(0), drop_last=True)] == [4, 4]
