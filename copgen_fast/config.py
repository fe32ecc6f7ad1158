"""One frozen dataclass per stage, presets as data. The command line and config.json are made from these."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

Stage = Literal["navigator", "pairs", "pretrain", "probe", "report"]
Positive = Literal["identity", "gaussian", "untrained-navigator", "navigator"]
STAGES: tuple[Stage, ...] = ("navigator", "pairs", "pretrain", "probe", "report")


@dataclass(frozen=True)
class GeneratorConfig:
    """The frozen pretrained generator G: z -> image."""

    name: str = "digits"
    """Registered generator: a file in copgen_fast/generators."""
    weights: str | None = None
    """File of its weights; None takes those embedded in the package, where there are any."""
    prior: Literal["truncnorm", "normal"] = "truncnorm"
    """Latent prior: truncated to [-2, 2] as the reference code, or N(0, I) as the paper."""


@dataclass(frozen=True)
class EncoderConfig:
    """A torchvision ResNet and the projection head D-D-128."""

    name: Literal["resnet18", "resnet50"] = "resnet18"
    stem: Literal["imagenet", "cifar", "half"] = "cifar"
    """First layers: 7x7 stride 2 + max pool; 3x3 stride 1 (for 32 px); 3x3 stride 2 (for 32 px, 4x cheaper)."""
    width: int = 64
    """Channels of the first stage; 64 is torchvision's."""


@dataclass(frozen=True)
class NavigatorConfig:
    """Adversarial training of the navigator T against the estimator f (paper Eq. 6)."""

    kind: Literal["nonlinear", "linear"] = "nonlinear"
    """Two affine layers, with or without the ReLU between them."""
    samples: int = 200_000
    """Stop after this many latents."""
    batch: int = 176
    update: Literal["alternating", "simultaneous"] = "alternating"
    """alternating: the paper's, f first, then T through the updated f. simultaneous: one forward with
    gradient reversal updates both; faster, and not the paper's."""
    lr: float = 1e-5
    """Adam learning rate of T."""
    estimator_lr: float = 3e-5
    """Adam learning rate of f."""
    temperature: float = 0.1
    base_temperature: float | None = 0.07
    """The loss is multiplied by temperature / base_temperature, as in the reference; None: by 1."""
    delta: float | None = None
    """Stop once E||T(z)|| reaches this distance (paper Eq. 5); None: stop by samples only."""
    project: bool = False
    """Also project every T(z) onto the ball of radius delta, so that no sample leaves it."""
    augmentation: str = "simclr"
    """Policy of copgen_fast.augmentations for both branches."""
    estimator: EncoderConfig = field(default_factory=EncoderConfig)
    grid_every: int = 20_000
    """Samples between pictures of anchors over positives, and between kept navigators (one at 0 too)."""


@dataclass(frozen=True)
class PairsConfig:
    """Offline positives: (G(z), G(z')) written once as tar shards."""

    positives: tuple[Positive, ...] = ("navigator",)
    """Ways to make positives; each gets its own folder of shards."""
    count: int = 130_000
    """Pairs per way."""
    shard_size: int = 1000
    """Pairs per tar file."""
    batch: int = 256
    start_seed: int = 0
    """Pair i is drawn from seed start_seed + i, whatever the batch size or number of workers."""
    samples_per_class: int = 1300
    """Pair i carries pseudo-class i // samples_per_class (the reference's layout; the latents don't depend on it)."""
    gaussian_std: float = 0.2
    """Scale of the gaussian way's displacement."""
    gaussian_prior: Literal["truncnorm", "normal"] = "truncnorm"
    workers: int = 2
    """Threads that encode PNG files."""


@dataclass(frozen=True)
class PretrainConfig:
    """Contrastive pretraining of the encoder, one run per way of making positives."""

    data: Literal["pairs", "real"] = "pairs"
    """pairs: generated shards. real: two views of each image of --data (the SimCLR baseline), named `real`."""
    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(name="resnet50"))
    epochs: int = 100
    batch: int = 224
    lr: float = 0.03
    """SGD learning rate per 256 pairs: the rate used is lr x batch / 256."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "reference"] = "cosine"
    """cosine: per step, down to lr / 1000. reference: the same curve set once per epoch, counted from 1."""
    temperature: float = 0.1
    base_temperature: float | None = 0.07
    augmentation: str = "simclr"
    cache_gib: float = 4.0
    """Decoded pairs are kept in memory up to this size; beyond it, loader processes decode them."""
    workers: int = 2
    """Loader processes when the pairs are not kept in memory."""


@dataclass(frozen=True)
class DataConfig:
    """Real labelled images, for probing and for the real-image baseline."""

    name: str = "digits"
    """`digits` (embedded in scikit-learn), a torchvision data set (cifar10, cifar100, mnist, ...), `folder`
    (ROOT/train/CLASS/*, ROOT/test/CLASS/*) or `npz`."""
    root: str | None = None
    """Folder of the data set, or the .npz file. Nothing is ever downloaded."""
    image_size: int = 32
    """Images are resized to this many pixels a side."""


@dataclass(frozen=True)
class ProbeConfig:
    """Evaluation of frozen encoders on real images."""

    evals: tuple[str, ...] = ("linear", "lowshot", "knn", "collapse")
    """Registered evaluations: files in copgen_fast/evals. `linear-augmented` is the reference's protocol."""
    baselines: tuple[Literal["random", "pixels"], ...] = ("random", "pixels")
    """Also judge an untrained encoder and raw pixels."""
    batch: int = 256
    neighbours: int = 20
    shots: int = 10
    """Labels per class of the low-shot probe."""
    draws: int = 5
    """Fixed draws of those labels; their mean and spread are reported."""
    epochs: int = 60
    """Epochs of linear-augmented."""
    lr: float = 2.0
    """Learning rate of linear-augmented per 256 images (the reference: 2.0 for encoders trained on generated
    images, 0.3 for real ones)."""
    augmentation: str = "no-color"
    """Policy of linear-augmented's training crops."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    stages: tuple[Stage, ...] = STAGES
    """Stages to run, in this order; each reads only what the ones before it wrote."""
    out: str = "runs/default"
    """Run folder. Running the same command again resumes it."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Arithmetic of encoders (autocast); fp16 needs a CUDA device."""
    log_every: int = 10
    """Steps between looks at the monitored numbers: the only moments at which the host waits for the device."""
    save_every: int = 200
    """Steps between checkpoints."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    navigator: NavigatorConfig = field(default_factory=NavigatorConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)


PRESETS: dict[str, RunConfig] = {}

# What may differ between two invocations on one run folder: where and how much of it runs, not what it computes.
_INVOCATION = ("stages", "out", "device")


def identity(config: RunConfig) -> dict:
    """The part of a configuration that decides the results, as plain JSON values."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    return {name: value for name, value in values.items() if name not in _INVOCATION}


def differences(one: dict, other: dict, prefix: str = "") -> list[str]:
    """Dotted names at which two `identity` dictionaries differ, with both values."""
    found: list[str] = []
    for name in sorted(one.keys() | other.keys()):
        left, right = one.get(name), other.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{prefix}{name}.")
        elif left != right:
            found.append(f"{prefix}{name} ({left} there, {right} here)")
    return found
