"""Kernels compiled by Triton and run by the PTX interpreter, compared with the ops' references; prints JSON.

    python -m tests.kernels.ptx_cases TRITON_CACHE

Cases are tests of tests/kernels/ at sizes of which most kernels are in the cache that they share. A process of its own,
as Triton in the tests' is its own interpreter.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest import mock


def cases(target: int) -> dict[str, Callable[[], None]]:
    """By op and what is particular."""
    import torch

    from tests.helpers.info_nce_rows import rectangular, square
    from tests.kernels import test_add_upsampled, test_augment, test_cond_norm, test_epilogue, test_info_nce

    half, single = torch.float16, torch.float32
    pictures, drawn, augmented = test_augment.pictures, test_augment.drawn, test_augment.assert_same
    normalized, losses, gradients = (
        test_cond_norm.assert_same,
        test_info_nce.check_losses,
        test_info_nce.check_gradients,
    )
    added, last = test_add_upsampled.assert_same, torch.channels_last
    return {
        "augment of uint8": partial(test_augment.test_dtypes, torch.uint8),
        "augment of float16 to fewer pixels": partial(test_augment.test_dtypes_down, half),
        "augment to 97 pixels": lambda: augmented(pictures(1, 3, 5), drawn(1, (3, 5)), (1, 97)),
        "augment of 97 pixels": lambda: augmented(pictures(1, 97, 3), drawn(1, (97, 3), seed=1), (3, 5)),
        "augment, straight through": lambda: augmented(
            pictures(2, 9, 8), drawn(4, (9, 8)), (7, 7), clamp="straight_through"
        ),
        "augment of slices": partial(test_augment.test_layouts_of_the_images, lambda x: x[:, :, ::2, 1:]),
        "augment with blur": test_augment.test_a_policy_with_blur,
        "augment with bad rows": test_augment.test_bad_rows_are_nan_and_have_no_gradient,
        "cond_norm, odd": lambda: normalized(test_cond_norm.drawn((2, 3, 5, 7), single, last), True),
        "cond_norm, large": lambda: normalized(test_cond_norm.drawn((1, 192, 64, 64), half, last)),
        "add_upsampled, odd": lambda: added(test_add_upsampled.drawn((1, 97, 3, 5), single, last)),
        "add_upsampled, large": lambda: added(test_add_upsampled.drawn((1, 96, 32, 32), half, last), True),
        "epilogue, symmetric": partial(test_epilogue.test_a_chunk_read_once_gives_the_same, "symmetric", 0.1),
        "epilogue of a rank": partial(test_epilogue.test_a_chunk_read_once_gives_the_same, "a rank's rows", 0.01),
        "l2_normalize": partial(test_info_nce.test_l2_normalize, 17, 128, half, half, "rows"),
        "info_nce gradients": lambda: gradients(rectangular(20, 100, 128, 0.1, half)),
        "info_nce gradients by factors": lambda: gradients(square(70, 128, 0.1, half), factors_from=1),
        "info_nce gradients without a bound": lambda: gradients(rectangular(20, 100, 128, 0.1, single, bounded=False)),
        "info_nce by triangles": lambda: losses(square(97, 128, 0.1, single), triangle_from=1),
        "info_nce of split columns": lambda: losses(
            rectangular(20, 300, 16, 0.1, half, 200, 10, True, bounded=False), nearest=True, split_from=1
        ),
    }


def matrix_cases(target: int) -> dict[str, Callable[[], None]]:
    """Those of GPUs with instructions for matrices and asynchronous copies: an sm_80, and an sm_120 for all newer ones
    but sm_90, whose wgmma isn't interpreted. Of several tiles with masks and without, as each has loops of its own."""
    import torch

    from tests.helpers.info_nce_rows import rectangular, square
    from tests.kernels import test_info_nce

    half, single = torch.float16, torch.float32
    losses, gradients = test_info_nce.check_losses, test_info_nce.check_gradients
    return {
        f"info_nce on sm_{target}": lambda: losses(rectangular(20, 200, 128, 0.1, single, 40, 10, True), nearest=True),
        f"info_nce on sm_{target}, half": lambda: losses(rectangular(20, 460, 128, 0.1, half)),
        f"info_nce on sm_{target}, triangles": lambda: losses(square(200, 128, 0.1, half), triangle_from=1),
        f"info_nce on sm_{target}, gradients": lambda: gradients(rectangular(20, 200, 128, 0.1, single)),
        f"info_nce on sm_{target}, half gradients": lambda: gradients(rectangular(20, 460, 128, 0.1, half)),
    }


def unnoticed(call: Callable[[], None]) -> tuple[int, list[str]]:
    """The barriers of the InfoNCE gradients that a call runs, and those of them whose absence nothing tells."""
    from tests.helpers.ptx import driver
    from tests.helpers.ptx.run import FaultError

    barriers, absent, same = [], None, []

    def without(text, name):
        kernel = parse(text, name)
        barriers[:] = [x for block in kernel.blocks for x in block if x.opcode[0] == "bar"]
        return replace(kernel, blocks=[[x for x in block if x is not absent] for block in kernel.blocks])

    parse = driver.parse
    with mock.patch.object(driver, "parse", without):
        call()
        for number, absent in enumerate(tuple(barriers)):
            try:
                call()
                same.append(f"barrier {number} {absent}")
            except FaultError:
                pass
    return len(barriers), same


def outside_the_filter() -> list[tuple[int, str, str]]:
    """Lengths, and what running kernels that weigh the pixels within a filter ends in: the old form, and today's.

    Their tensor has no pixel but those whose weight is above 0 in exact arithmetic.
    """
    import torch

    from tests.helpers.ptx.run import FaultError
    from tests.helpers.triangle_kernel import weighed

    found = []
    for length in range(3, 32, 2):
        # The only output pixel is as wide as all; pixels (-length - 1) / 2 and (3 length - 1) / 2 are at its reach.
        first, count = (1 - length) // 2, 2 * length - 1
        ends = []
        for old in (True, False):
            try:
                weighed[(1,)](torch.ones(count), torch.ones(1), length, first, OLD=old, num_warps=1)
                ends.append("")
            except FaultError as error:
                ends.append(str(error))
        found.append((length, *ends))
    return found


def main(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    from tests.helpers.ptx import driver

    results, launched, barriers = {}, set(), {}
    for target, made in ((75, cases), (80, matrix_cases), (120, matrix_cases)):
        with driver.interpreting(target, launched):
            for name, call in made(target).items():
                try:
                    call()
                    results[name] = ""
                except Exception:
                    results[name] = traceback.format_exc()
            if target == 75:
                outside = outside_the_filter()
            if target <= 80:
                gradients = made(target)["info_nce gradients" if target == 75 else "info_nce on sm_80, gradients"]
                barriers[f"sm_{target}"] = unnoticed(gradients)
    found = {"results": results, "kernels": sorted(launched), "outside": outside, "barriers": barriers}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
