"""The area augment of `python -m bench`: its limit and its ablation; no time is asserted."""

from dataclasses import replace

import torch

from bench.areas import augment as area
from bench.harness import Timing
from copgen_fast.augmentations import get
from copgen_fast.ops import AugmentParams


def test_the_limit_is_the_bytes_to_move():
    images = 200 * 3 * 8 * 8 * 4
    for direction, moved, copied in (("forward", 2, 1), ("forward+backward", 5, 2)):
        case = area.Case("none", 200, 8)
        measurement = area.Measurement(case, direction, torch.device("cpu"), area.Options())
        assert measurement.bytes_to_move() == moved * images
        words, _ = measurement.limit().read(Timing(1, 1, 5))
        assert f"{copied * images / 1e6:.1f} MB read" in words


def test_instructions_are_counted_for_jittered_views_and_the_crops_gradients():
    counts = {"pivot_parts_kernel": 1, "forward_kernel": 10, "resized_grad_kernel": 100, "gather_kernel": 1000}
    forward, both = (
        area.Measurement(area.Case("simclr", 8, 8), direction, torch.device("cpu"), area.Options())
        for direction in area.DIRECTIONS
    )
    jittered = int(forward.params.jitter.sum()) * 64
    assert 0 < jittered < 8 * 64 and forward.instructions_to_issue(counts) == 11 * jittered
    assert both.instructions_to_issue(counts) == 111 * jittered + 1000 * both.cropped()


def test_ablations_leave_the_rest_as_it_was():
    policy = get("simclr")
    for lost in area.ABLATIONS.values():
        params, other = (
            AugmentParams.sample(8, (16, 16), one, generator=torch.Generator().manual_seed(3))
            for one in (policy, replace(policy, **lost))
        )
        assert torch.equal(params.flip, other.flip) and torch.equal(params.order, other.order)
