"""Whole configurations by name: the first word of the command line."""

from __future__ import annotations

from dataclasses import replace

from copgen_fast.config import (
    DataConfig,
    EncoderConfig,
    GeneratorConfig,
    NavigatorConfig,
    PairsConfig,
    PretrainConfig,
    ProbeConfig,
    RunConfig,
    SteeringConfig,
)

POSITIVES = ("identity", "gaussian", "untrained-navigator", "navigator")
_SMALL = EncoderConfig(name="resnet18", stem="half", width=16)


def _imagenet(name: str, pairs: int, epochs: int) -> RunConfig:
    """The setting of the paper (Li et al. 2022, section 4), or of its public code where the text is silent.

    Options to give: --generator.weights, and --data.root. Baselines are other --pairs.positives, and --pretrain.data
    real with --evals.options linear-augmented.lr=0.3.
    """
    return RunConfig(
        out=f"runs/{name}",
        generator=GeneratorConfig(name="bigbigan", prior="truncnorm"),
        navigator=NavigatorConfig(
            samples=200_000,
            batch=176,
            lr=1e-5,
            estimator_lr=3e-5,
            temperature=0.1,
            augmentation="simclr",
            estimator=EncoderConfig(name="resnet18", stem="imagenet"),
        ),
        pairs=PairsConfig(positives=("navigator",), count=pairs),
        pretrain=PretrainConfig(
            encoder=EncoderConfig(name="resnet50", stem="imagenet"),
            epochs=epochs,
            batch=224,
            lr=0.03,
            momentum=0.9,
            weight_decay=1e-4,
            schedule="reference",
            augmentation="simclr",
        ),
        data=DataConfig(name="packed", image_size=128),
        probe=ProbeConfig(
            evals=("linear-augmented",),
            options=("linear-augmented.epochs=60", "linear-augmented.lr=2.0"),
            baselines=(),
            batch=224,
        ),
    )


PRESETS: dict[str, RunConfig] = {
    # Small enough for a laptop: the digits are scans of 8 x 8 pixels, of which 16 lose nothing. Without augmentation in
    # pretraining, as with it no way of making positives differs from identity beyond the spread over seeds; and with
    # ImageNet's stem, whose random features tell digits apart less well, so that more is left to learn.
    "quickstart": RunConfig(
        out="runs/quickstart",
        log_every=2,  # so that delta is met closely: a step moves T_z(z) visibly at this learning rate
        navigator=NavigatorConfig(
            samples=5_120,
            batch=64,
            lr=2e-3,
            estimator_lr=1e-3,
            delta=2.0,  # 7 % farther than T_z starts, as far as the released one moved from an untrained one
            augmentation="digits",
            view_size=16,
            estimator=_SMALL,
            grid_every=256,
        ),
        steering=SteeringConfig(ranges="digits", samples=12_800, lr=1e-2),
        pairs=PairsConfig(
            positives=("identity", "gaussian", "navigator", "steering"),
            # As far as the trained T_z.
            options=("gaussian.std=0.286", "steering.distance=2.0"),
            count=2_048,
            shard_size=512,
            size=16,
        ),
        pretrain=PretrainConfig(
            encoder=replace(_SMALL, stem="imagenet"), epochs=6, batch=128, lr=0.1, augmentation="none"
        ),
        data=DataConfig(image_size=16),
    ),
    "cifar10": RunConfig(
        out="runs/cifar10",
        log_every=2,
        generator=GeneratorConfig(name="cifar10-dcgan", prior="normal"),
        navigator=NavigatorConfig(
            samples=12_800, batch=128, lr=5e-4, estimator_lr=1e-3, delta=2.2, estimator=_SMALL, grid_every=1_024
        ),
        pairs=PairsConfig(positives=POSITIVES, count=10_000),
        pretrain=PretrainConfig(encoder=_SMALL, epochs=12, batch=128, lr=0.1),
        data=DataConfig(name="npz"),
    ),
    # 1.3 million pairs for 100 epochs (section 4.1), and the ablations' 130,000 for 200 (section 4.3).
    "imagenet1k": _imagenet("imagenet1k", pairs=1_300_000, epochs=100),
    "imagenet100": _imagenet("imagenet100", pairs=130_000, epochs=200),
}
