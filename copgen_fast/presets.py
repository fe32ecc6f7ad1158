"""Whole configurations by name: the first word of the command line."""

from __future__ import annotations

from copgen_fast.config import (
    DataConfig,
    EncoderConfig,
    GeneratorConfig,
    NavigatorConfig,
    PairsConfig,
    PretrainConfig,
    RunConfig,
    SteeringConfig,
)

POSITIVES = ("identity", "gaussian", "untrained-navigator", "navigator")
_SMALL = EncoderConfig(name="resnet18", stem="half", width=16)

PRESETS: dict[str, RunConfig] = {
    "quickstart": RunConfig(
        out="runs/quickstart",
        log_every=2,  # so that delta is met closely: a step moves T_z(z) visibly at this learning rate
        navigator=NavigatorConfig(
            samples=5_120,
            batch=128,
            lr=5e-4,
            estimator_lr=1e-3,
            delta=2.0,  # 7 % farther than T_z starts, as far as the released one moved from an untrained one
            augmentation="digits",
            estimator=_SMALL,
            grid_every=1_024,
        ),
        steering=SteeringConfig(ranges="digits", samples=12_800, lr=1e-2),
        pairs=PairsConfig(positives=POSITIVES, count=4_096, shard_size=1_024),
        pretrain=PretrainConfig(encoder=_SMALL, epochs=3, batch=128, lr=0.1, augmentation="digits"),
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
}
