import pytest
import torch

from copgen_fast.losses import nt_xent
from copgen_fast.ops import info_nce


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
    ("embeddings", "error", "message"),
    [
        (torch.ones(3, 4), ValueError, "embeddings: expected anchors and as many positives, got 3 rows"),
        (torch.ones(4), ValueError, r"embeddings: expected shape \[2N, D\], got \[4\]"),
        (torch.ones(4, 4, dtype=torch.int64), TypeError, "embeddings: expected a floating-point tensor"),
    ],
)
def test_errors_name_the_embeddings(embeddings, error, message):
    with pytest.raises(error, match=message):
        nt_xent(embeddings, 0.1, None)
