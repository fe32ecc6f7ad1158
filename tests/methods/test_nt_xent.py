import pytest
import torch

from copgen_fast.methods._nt_xent import nt_xent, product_dtype
from copgen_fast.ops import backend, info_nce


def test_rows_i_and_n_plus_i_are_one_instance():
    anchors, positives = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = info_nce(anchors, positives, temperature=0.2, base_temperature=0.1)
    assert torch.equal(nt_xent(torch.cat([anchors, positives]), 0.2, 0.1), expected)


def test_half_precision_is_summed_in_float32():
    embeddings = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = nt_xent(embeddings, 0.1, None)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, nt_xent(embeddings.float(), 0.1, None))


@pytest.mark.parametrize(
    ("capability", "dtype", "dimension", "expected"),
    [
        ((7, 5), torch.float16, 128, torch.float16),
        ((7, 5), torch.float16, 513, torch.float32),  # beyond the kernel's dimensions
        ((7, 5), torch.bfloat16, 128, torch.float32),
        ((7, 0), torch.float16, 128, torch.float32),  # no kernel for Volta
        ((8, 0), torch.float16, 128, torch.float32),
        ((9, 0), torch.float64, 128, torch.float64),
    ],
)
def test_float16_embeddings_stay_as_they_are_where_turings_kernel_takes_them(
    monkeypatch, capability, dtype, dimension, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(backend, "INSTALLED", {"reference", "chunked", "triton", "cuda"})
    assert product_dtype(dtype, torch.device("cuda"), dimension) == expected
    assert product_dtype(torch.float16, torch.device("cpu"), dimension) == torch.float32


@pytest.mark.parametrize(
    ("embeddings", "error", "message"),
    [
        (torch.ones(3, 4), ValueError, "embeddings: expected anchors and as many positives, got 3 rows"),
        (torch.ones(4), ValueError, r"embeddings: expected shape \[\(1 \+ K\) N, D\], got \[4\]"),
        (torch.ones(4, 4, dtype=torch.int64), TypeError, "embeddings: expected a floating-point tensor"),
    ],
)
def test_errors_name_the_embeddings(embeddings, error, message):
    with pytest.raises(error, match=message):
        nt_xent(embeddings, 0.1, None)
