import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copgen_fast.errors import CopgenError, NonFiniteError
from copgen_fast.pairs.format import to_uint8
from copgen_fast.pairs.write.pinned import PinnedBuffers
from tests.helpers.on_gpu import needs_gpu, no_waiting
from tests.helpers.pairs_fixtures import CONFIG, contents, generate, source, write

CPU = torch.device("cpu")


def images(*shape, seed=0):
    return 3 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1.5


def expected(*batch):
    return torch.stack([to_uint8(images).permute(0, 2, 3, 1) for images in batch]).numpy()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_buffers_hold_what_quantisation_gives(pairs, height, width):
    buffers = PinnedBuffers(2, CPU)
    batches = [[images(n, 3, height, width, seed=seed) for seed in (n, n + 9)] for n in (pairs, -(-pairs // 2))]
    filled = [buffers.put(*batch, first=0) for batch in batches]
    for batch, one in zip(batches, filled, strict=True):
        np.testing.assert_array_equal(buffers.pixels(one), expected(*batch))
    buffers.free(filled[0])
    again = buffers.put(*batches[1], first=7)
    assert again.buffer == filled[0].buffer
    for one in (again, filled[1]):
        np.testing.assert_array_equal(buffers.pixels(one), expected(*batches[1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("side", "name"), [(0, "anchors"), (1, "positives")])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_bad_images_are_named(bad, side, name, device):
    buffers = PinnedBuffers(1, torch.device(device))
    batch = [images(4, 3, 9, 9).to(device), images(4, 3, 9, 9).to(device)]
    batch[side][2:, 1, 0, 1] = bad
    with pytest.raises(NonFiniteError, match=f"^images of {name}: .*sample 102$"):
        buffers.pixels(buffers.put(*batch, first=100))


def test_images_of_another_scale_are_named():
    buffers = PinnedBuffers(1, CPU)
    batch = [images(4, 3, 9, 9), images(4, 3, 9, 9)]
    batch[1][2] = 127.5 * (batch[1][2] + 1)
    with pytest.raises(CopgenError, match=r"images of positives: expected values in \[-1, 1\], .* sample 102: scale"):
        buffers.pixels(buffers.put(*batch, first=100))


@needs_gpu
def test_a_gpu_is_not_waited_for():
    """Copies to memory that is not page-locked would wait as well."""
    device = torch.device("cuda")
    buffers = PinnedBuffers(2, device)
    batches = [[images(3, 3, 16, 16, seed=seed).to(device) for seed in (i, i + 9)] for i in range(2)]
    buffers.free(buffers.put(*batches[0], first=0))
    with no_waiting():
        filled = [buffers.put(*batch, first=0) for batch in batches]
    for batch, one in zip(batches, filled, strict=True):
        np.testing.assert_array_equal(buffers.pixels(one), expected(*(images.cpu() for images in batch)))


@needs_gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_writes_the_same_bytes(tmp_path, workers):
    """Images that were made on the CPU, so that they are the same; all that follows is on the GPU."""
    write(tmp_path / "cpu")
    on_gpu = dataclasses.replace(source(lambda z: generate(z.cpu()).cuda()), device=torch.device("cuda"))
    write(tmp_path / "gpu", dataclasses.replace(CONFIG, workers=workers), on_gpu)
    assert contents(tmp_path / "gpu") == contents(tmp_path / "cpu")
