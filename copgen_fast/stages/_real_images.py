"""Checks of the real images that stages will read, before any of them runs."""

from __future__ import annotations

from copgen_fast import evals, methods
from copgen_fast.config import RunConfig
from copgen_fast.errors import UsageError
from copgen_fast.images import sets
from copgen_fast.images.real_pairs import real_pairs
from copgen_fast.images.views import Centre
from copgen_fast.pairs.read.loader import expect_for_dali
from copgen_fast.stages.run import expect_comparable


def check(config: RunConfig, probed_here: bool = True) -> None:
    """Check labels, counts and the first images; those that no stage needs may be missing.

    Args:
        probed_here: whether this process will evaluate encoders.

    Raises:
        UsageError: images are missing or unreadable, or not as pretraining or an evaluation needs them.
    """
    if "pretrain" in config.stages and config.pretrain.data == "real":
        _check_pretraining(config)
    if "probe" in config.stages and probed_here:
        evals.expect_data(config)


def _check_pretraining(config: RunConfig) -> None:
    method = config.method.name
    supervised = methods.needs_labels(method)
    data = sets.open_set(config.data, ("train",), supervised)
    if supervised:
        data.expect_classes(f"--method {method}")
        labels = data.splits["train"].labels
        expect_comparable(method, len(labels.unique()), len(labels))
    data.expect_decodable()
    if config.pretrain.loader == "dali":
        expect_for_dali(real_pairs(data.splits["train"], Centre(config.data.image_size)))
    count = data.splits["train"].count
    if count < config.pretrain.batch:
        raise UsageError(f"pretrain.batch: expected at most the {count} training images, got {config.pretrain.batch}")
    methods.configure(method, config.method.options, methods.Setting(count, config.pretrain.batch))
