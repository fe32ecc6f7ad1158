"""InfoNCE over the ranks of a group against one process with the whole batch."""

import pytest
import torch

from tests.helpers import info_nce_ranks, processes
from tests.helpers.info_nce_ranks import BACKENDS, CASES, compute, embeddings


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request, tmp_path_factory):
    """Results of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    processes.run_ranks(info_nce_ranks.main, request.param, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_equals_one_process_on_the_whole_batch(ranks, case, backend):
    options = CASES[case]
    whole = compute(embeddings(options.get("several", 1)), options.get("labels"), options, None, "reference")
    parts = list(zip(*(rank[f"{case}/{backend}"] for rank in ranks), strict=True))
    world = len(ranks)

    def mean(values):
        return sum(values) / world

    # A rank has the mean loss of its rows; the gradients are those of the sum over ranks.
    loss, learned, losses, top1, bound, *gradients, of_a, of_p, of_t = parts
    close = {"rtol": 1e-6, "atol": 1e-12}
    torch.testing.assert_close(mean(loss), whole[0], **close)
    torch.testing.assert_close(mean(learned), whole[1], **close)
    sides = 1 if options.get("symmetric") is False else 1 + options.get("several", 1)
    by_side = [torch.cat([x.chunk(sides)[side] for x in losses]) for side in range(sides)]
    torch.testing.assert_close(torch.cat(by_side), whole[2], **close)
    torch.testing.assert_close(mean(top1), whole[3], **close)
    torch.testing.assert_close(mean(bound), whole[4], **close)
    for of_ranks, expected in zip((*gradients, of_a, of_p), whole[5:9], strict=True):
        torch.testing.assert_close(torch.cat(of_ranks, dim=-2) / world, expected, **close)
    torch.testing.assert_close(mean(of_t), whole[9], **close)


def test_unequal_batches_are_refused_on_every_rank(ranks):
    world = len(ranks)
    for rank in ranks:
        if world == 1:
            assert rank["unequal"] is None
        else:
            shapes = ", ".join(f"[{3 + other}, 8]" for other in range(world))
            assert rank["unequal"] == f"anchors: expected one shape on all ranks of the group, got {shapes}"
