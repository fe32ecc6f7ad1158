"""The configuration of a run: one frozen dataclass a stage. Command line and config.json follow them.

Options of a part (generator, positives, method, evaluation) are declared beside its code; here they are words of the
form "field=value".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

import tyro

from copgen_fast import registry
from copgen_fast.options import Count, CountOrZero, LearningRate, Place, Range, Seed, Temperature, out_of_range

Stage = Literal["navigator", "steering", "pairs", "pretrain", "probe", "report"]
Prior = Literal["truncnorm", "normal", "uniform", "sphere"]
Codec = Literal["png", "jpeg", "raw"]
OnCorrupt = Literal["stop", "skip"]
BatchNorm = Literal["sync", "per-rank"]
PairLoader = Literal["auto", "dali", "plain"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Options = tuple[str, ...]
Side = Annotated[int, Range(8, 4096)]


@dataclass(frozen=True)
class GeneratorConfig:
    """The frozen pretrained generator G: z -> image."""

    name: Annotated[str, tyro.conf.arg(aliases=("--generator",))] = "digits"
    """A built-in generator, a module (my_package.my_gan) or a file (./my_gan.py)."""
    options: Options = ()
    """Its options, as field=value; `--help NAME` lists them."""
    weights: Place | None = None
    """File of its weights (biggan-deep, consistency, turbo: folder); None takes those embedded in the package."""
    level: Literal["auto", "published", "exact", "half", "graph"] = "auto"
    """auto: half on a GPU, but exact where half changes images visibly, and on the CPU; the choice is recorded. exact:
    rewritten to be fast, equal up to rounding, where the generator has such a form. half: that in half precision,
    refused where images change visibly. graph: half, and pairs are drawn by a CUDA graph. published: as it was
    trained."""
    checkpoint: bool = False
    """Compute each block's activations again in the navigator's backward rather than keep them: less memory, one
    more forward. For bigbigan, biggan-deep, stylegan2, consistency and turbo."""
    prior: Prior | None = None
    """Latent prior. truncnorm: N(0, I) truncated to [-2, 2], as the reference code. normal: N(0, I), as the paper.
    uniform: in [-1, 1]. sphere: N(0, I) scaled to the norm sqrt(L). None: the generator's, truncnorm where it names
    none."""


@dataclass(frozen=True)
class EncoderConfig:
    """A torchvision ResNet and the projection head D-D-128."""

    name: Literal["resnet18", "resnet50"] = "resnet18"
    stem: Literal["imagenet", "cifar", "half"] = "cifar"
    """First layers: 7x7 stride 2 + max pool; 3x3 stride 1 (for 32 px); 3x3 stride 2 (for 32 px, 4x cheaper)."""
    width: Annotated[int, Range(1, 4096)] = 64
    """Channels of the first stage; 64 is torchvision's."""


@dataclass(frozen=True)
class NavigatorConfig:
    """Adversarial training of the navigator T_z against the estimator f (paper Eq. 6)."""

    kind: Literal["nonlinear", "linear", "conv"] = "nonlinear"
    """Two affine layers, with or without the ReLU between them. conv: two 3 x 3 convolutions with a ReLU between them,
    for latents [C, h, w], whose affine layers would be too large."""
    hidden: Count | None = None
    """Width between the layers; None: the latent's (the reference code's is that / reduction_ratio), conv: 64."""
    init: Literal["default", "near-zero"] = "default"
    """default: PyTorch's, as the reference code, which moves z at once. near-zero: weights N(0, 0.01), biases
    U(-0.001, 0.001), so that the distance grows from 0 (Serez et al. 2025)."""
    groups: tuple[CountOrZero, ...] = ()
    """Move only these of the generator's latent groups, counted from 0; (): all."""
    group_deltas: tuple[Annotated[float, Range(1e-6, 1e6)], ...] = ()
    """Radii of the balls that T_z(z) is projected onto, one for each of `groups` in their order, or for each of all
    groups if none are chosen."""
    samples: Count = 200_000
    """Stop after this many latents."""
    batch: Count = 176
    """Latents a step: a joint batch of twice as many views."""
    update: Literal["alternating", "simultaneous"] = "alternating"
    """alternating: the paper's, f first, then T_z through the updated f. simultaneous: one forward with gradient
    reversal updates both; faster, and not the paper's."""
    graph: bool = False
    """Replay the whole step as one CUDA graph; without a GPU, or for another optimiser than torch's fused one, the
    run says so and goes on without."""
    lr: LearningRate = 1e-5
    """Adam learning rate of T_z."""
    estimator_lr: LearningRate = 3e-5
    """Adam learning rate of f."""
    loss: Literal["nt-xent", "supcon"] = "nt-xent"
    """supcon: supervised by a conditional generator's classes, all of a class being positives of each other."""
    temperature: Temperature = 0.1
    """Temperature of NT-Xent."""
    base_temperature: Temperature | None = 0.07
    """The loss is multiplied by temperature / base_temperature, as in the reference code; None: by 1."""
    delta: Annotated[float, Range(1e-6, 1e6)] | Literal["auto"] | None = None
    """Stop once E||T_z(z)|| reaches this distance (paper Eq. 5); None: stop by samples only. auto: the distance up
    to which an encoder, pretrained on identity pairs first, keeps pairs in one cluster (navigator/delta.json)."""
    project: bool = False
    """Also project every T_z(z) onto the ball of radius delta, so that no sample leaves it."""
    rebound: Annotated[float, Range(-1e6, 1e6)] | None = None
    """Also stop once f's loss, having been below this value, climbs back to it: f no longer keeps up."""
    rebound_after: CountOrZero = 100_000
    """Latents before which `rebound` does not stop."""
    augmentation: str = "simclr"
    """Policy of copgen_fast.augmentations for both branches."""
    view_size: Side | None = None
    """Pixels a side of the views that f sees, resized in the augmentation; None: the generator's."""
    estimator: EncoderConfig = field(default_factory=EncoderConfig)
    """The mutual information estimator f."""
    grid_every: Count = 20_000
    """Samples between pictures of anchors over positives, and between kept navigators (one at 0 too)."""


@dataclass(frozen=True)
class SteeringConfig:
    """Learning of linear walks in z that transform images (Jahanian et al. 2020), for positives `steering`."""

    ranges: Literal["photographs", "digits"] = "photographs"
    """Which transformations, and how far. photographs: GenRep's, without brightness. digits: zoom, shifts, rotate and
    brightness, as far as a centred grey object stays in the image."""
    transformations: tuple[str, ...] = ()
    """Other ones, of zoom, shift_x, shift_y, rotate, perspective, red, green, blue and brightness."""
    limits: Options = ()
    """Other ranges, as NAME=LIMIT: zoom by 1 / LIMIT to LIMIT; shifts up to LIMIT of a side; rotate and perspective up
    to LIMIT degrees; colours up to LIMIT (images are in [-1, 1])."""
    samples: Count = 160_000
    """Latents."""
    batch: Count = 32
    lr: LearningRate = 1e-3
    """Adam learning rate."""
    init: Literal["zero", "normal"] = "zero"
    """Where walks start. normal: N(0, 0.1) a coordinate as published, which short walks hardly leave."""
    groups: tuple[CountOrZero, ...] = ()
    """Walk only in these of the generator's latent groups, counted from 0; (): in all."""


@dataclass(frozen=True)
class PairsConfig:
    """Offline positives: (G(z), G(z')) written once as tar shards."""

    positives: tuple[str, ...] = ("navigator",)
    """Ways to make positives (built in, a module or a file); each gets a folder of shards."""
    options: Annotated[Options, tyro.conf.arg(name="positive.options", prefix_name=False)] = ()
    """Their options, as NAME.field=value; `--help NAME` lists them."""
    count: Count = 130_000
    """Pairs per way."""
    endless: bool = False
    """For --pretrain.data online: `count` new pairs in each epoch, so that none comes twice."""
    positives_per_anchor: Annotated[int, Range(1, 1000)] = 1
    """K positives of each anchor, drawn apart. simclr and supcon compare all views of an anchor with each other; other
    methods take one of the K in each step, drawn at random."""
    shard_size: Count = 1000
    """Pairs per tar file."""
    batch: Count = 256
    """Images generated at once."""
    start_seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Pair i is drawn from seed start_seed + i, whatever the batch size or number of workers."""
    samples_per_class: Count = 1300
    """Pair i carries pseudo-class i // samples_per_class (the reference's layout; the latents don't depend on it)."""
    size: Side | None = None
    """Pixels a side of stored images, resized on the device with antialiasing; None: the generator's."""
    codec: Codec = "png"
    """How images are stored. png: lossless. jpeg: quality 95, colour at full resolution. raw: uint8, uncompressed."""
    workers: CountOrZero = 2
    """Threads that encode images; 0: the main one does."""
    part: CountOrZero = 0
    """Of `parts`: write only shards whose number modulo `parts` is `part`, so that several processes or hosts share
    the work, into one --out on a shared disk or several; see `python -m copgen_fast.pairs.merge --help`."""
    parts: Count = 1


@dataclass(frozen=True)
class MethodConfig:
    """The self-supervised method: what pretraining minimises."""

    name: Annotated[str, tyro.conf.arg(name="method", prefix_name=False)] = "simclr"
    """A built-in method, a module or a file. supcon is supervised by the classes of a conditional generator's pairs, or
    of real images."""
    options: Options = ()
    """Its options, as field=value; `--help NAME` lists them."""


@dataclass(frozen=True)
class PretrainConfig:
    """Pretraining of the encoder by --method, one run per way of making positives."""

    data: Literal["pairs", "online", "real"] = "pairs"
    """pairs: generated shards. online: the same pairs, generated while training, without shards. real: two views of
    each image of --data (the SimCLR baseline), named `real`."""
    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(name="resnet50"))
    epochs: Count = 100
    batch: Count = 224
    """Pairs a step; an epoch's last pairs that do not fill one are left out."""
    accumulate: Count = 1
    """Parts of a batch whose activations are kept one at a time; the loss compares the whole batch all the same.
    Costs one more forward, and batch normalisation takes its statistics within a part."""
    checkpoint: bool = False
    """Compute the activations of the encoder's stages again in the backward rather than keep them."""
    graph: bool = False
    """Replay the step as one CUDA graph, without what the method does after it; where that can't be, as without a GPU,
    on several processes or for `negft`, the run says so and goes on without."""
    optimizer: Literal["sgd", "lars"] = "sgd"
    """lars: steps scaled to each weight's norm, for larger learning rates (BYOL's: 0.2 to 0.45); fused, not by apex."""
    lr: LearningRate = 0.03
    """Learning rate per 256 pairs: the rate used is lr x batch / 256."""
    warmup: Annotated[float, Range(0, 0.5)] = 0.0
    """Share of the steps in which the learning rate rises to it."""
    momentum: Annotated[float, Range(0, 1)] = 0.9
    weight_decay: Annotated[float, Range(0, 1e3)] = 1e-4
    schedule: Literal["cosine", "reference"] = "cosine"
    """cosine: per step, down to lr / 1000. reference: the same curve set once per epoch, counted from 1."""
    augmentation: str = "simclr"
    """Policy of copgen_fast.augmentations; its mean and std also normalise images in probes."""
    cache_gib: Annotated[float, Range(0, 1e6)] = 4.0
    """Decoded pairs are kept in memory up to this size; beyond it, they are decoded anew each epoch."""
    workers: CountOrZero = 2
    """Threads that load pairs ahead of the step; 0: the step itself loads them. Small images (below 64 x 64 pixels)
    take one thread at most, and on a CPU the step itself, which is faster."""
    loader: PairLoader = "auto"
    """What loads shards; the batches are the same, but for JPEG that a GPU decodes, in its own rounding. auto: NVIDIA
    DALI where it is installed, the device is a GPU and the pairs don't fit the cache. plain: PyTorch and Pillow. Packed
    real images are shards, too, where they were packed at --data.image-size."""
    shuffle_shards: Count | None = None
    """None: an epoch is one permutation of all pairs, read at random (for SSDs). W: shards come in random order and
    W of them at a time are shuffled together, each read whole (for disks and network stores; 2 W shards in memory)."""
    on_corrupt: OnCorrupt = "stop"
    """A pair that can't be decoded stops the run, or is skipped: counted, and the next pair takes its place."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How optimisers are computed: the same updates up to rounding."""

    impl: Literal["auto", "foreach", "fused", "apex"] = "auto"
    """auto: torch's fused kernels. foreach: torch's lists of operations. apex: NVIDIA's apex, where it is installed."""


@dataclass(frozen=True)
class DataConfig:
    """Real labelled images, for probing and for the real-image baseline."""

    name: str = "digits"
    """`digits` (embedded in scikit-learn), a torchvision data set (cifar10, cifar100, mnist, ...), `folder`
    (ROOT/train/CLASS/*, and ROOT/test/CLASS/* or else val), `packed` (`python -m copgen_fast.images.pack`) or `npz`."""
    root: Place | None = None
    """Folder of the data set, or the .npz file. Nothing is ever downloaded."""
    image_size: Annotated[int, Range(1, 4096)] = 32
    """Images are resized to this many pixels a side."""
    on_corrupt: OnCorrupt = "stop"
    """Images that can't be decoded stop the run, which lists them, or are left out and counted (skip)."""


@dataclass(frozen=True)
class ProbeConfig:
    """Evaluation of frozen encoders on real images."""

    evals: tuple[str, ...] = ("linear", "lowshot", "knn", "collapse")
    """Evaluations (built in, a module or a file). `linear-augmented` is the reference code's protocol."""
    options: Annotated[Options, tyro.conf.arg(name="evals.options", prefix_name=False)] = ()
    """Their options, as NAME.field=value; `--help NAME` lists them."""
    baselines: tuple[Literal["random", "pixels"], ...] = ("random", "pixels")
    """Also evaluate an untrained encoder and raw pixels."""
    baselines_only: bool = False
    """Evaluate those alone, which need no pretraining: for --stages probe."""
    batch: Count = 256
    """Images encoded at once."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Arithmetic of the frozen encoder (autocast); bf16 and fp16 are faster on GPUs, bf16 also on CPUs that have it,
    and round its features."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    stages: tuple[Stage, ...] = STAGES
    """Stages to run, in this order; each reads only what the ones before it wrote."""
    out: Place = "runs/default"
    """Run folder. Running the same command again resumes it."""
    seed: Seed = 0
    """Fixes everything random; together with the rest of the configuration, the results."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Arithmetic of encoders (autocast). auto: bf16 on GPUs from sm_80 on, fp16 on Turing and Volta, else fp32; the
    choice is recorded. fp16 scales losses and needs a CUDA device."""
    compile: bool = False
    """torch.compile for estimator and encoder: a minute or more at the start, for faster steps."""
    bn: BatchNorm = "sync"
    """Batch norm in training on several GPUs: over the whole batch, so that their number does not change results, or
    over each one's rows, as the reference code's DataParallel has it."""
    timeout: Annotated[float, Range(1, 1e7)] = 600.0
    """Seconds that processes wait for one of them before they stop and name it. A step that takes 1.5 times as long
    counts as stuck, the first with --compile too."""
    log_every: Count = 10
    """Steps between looks at the monitored numbers: the only moments at which the host waits for the device."""
    save_every: Count = 200
    """Steps between checkpoints."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    navigator: NavigatorConfig = field(default_factory=NavigatorConfig)
    steering: SteeringConfig = field(default_factory=SteeringConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)


def faults(config: RunConfig, processes: int = 1) -> list[str]:
    """What is wrong with a configuration by itself, a line each; empty when nothing is."""
    found = _pretrain_faults(config) if "pretrain" in config.stages else []
    reserved = {"real", "random", "pixels"} & {registry.label(name) for name in config.pairs.positives}
    found += [f"pairs.positives: {name!r} means something else here: rename the file" for name in sorted(reserved)]
    given = {"pairs.positives": config.pairs.positives, "probe.evals": config.probe.evals}
    found += [f"{name}: expected at least one" for name, value in given.items() if not value]
    if config.probe.baselines_only and (set(config.stages) != {"probe"} or not config.probe.baselines):
        found.append("probe.baselines_only: goes with --stages probe, and with baselines")
    found += out_of_range(config) + _batch_faults(config, processes)
    if config.pairs.endless and config.pretrain.data != "online":
        found.append("pairs.endless: new pairs in each epoch go with --pretrain.data online only")
    if config.navigator.project and config.navigator.delta is None:
        found.append("navigator.project: needs a radius, give --navigator.delta too")
    if config.navigator.delta == "auto" and "navigator" in config.stages and config.pretrain.batch > config.pairs.count:
        found.append(
            f"navigator.delta: auto pretrains an encoder on {config.pairs.count} identity pairs (--pairs.count) in "
            f"batches of {config.pretrain.batch} (--pretrain.batch): make the batch smaller, or give a number"
        )
    if config.navigator.project and config.navigator.group_deltas:
        found.append("navigator.group_deltas: does not go with navigator.project, which holds all groups together")
    if set(config.stages) == {"steering"} and "steering" not in config.pairs.positives:
        found.append("stages: steering learns walks for positives `steering`: add it to --pairs.positives")
    if config.pretrain.batch % max(1, config.pretrain.accumulate):
        found.append(
            f"pretrain.accumulate: expected a divisor of pretrain.batch {config.pretrain.batch}, "
            f"got {config.pretrain.accumulate}"
        )
    if config.compile and config.pretrain.checkpoint:
        found.append("compile: does not go with pretrain.checkpoint; torch.compile chooses itself what to keep")
    if config.pairs.part >= config.pairs.parts:
        found.append(f"pairs.part: expected less than pairs.parts, got {config.pairs.part} of {config.pairs.parts}")
    if config.pairs.parts > 1 and set(config.stages) != {"pairs"}:
        found.append("pairs.parts: every part would run the other stages too: give --stages pairs")
    if (first := config.pairs.start_seed) + pairs_drawn(config) > 2**32:
        found.append(f"pairs.start_seed: seeds must stay below 2**32, got up to {first} + {pairs_drawn(config)} pairs")
    return found


def pairs_drawn(config: RunConfig) -> int:
    """Different pairs of each way that a run draws."""
    return config.pairs.count * (config.pretrain.epochs if config.pairs.endless else 1)


def _batch_faults(config: RunConfig, processes: int) -> list[str]:
    """Batches with too few pairs for a contrastive loss, or for batch norm's statistics."""
    found = []
    replicas = processes if config.bn == "per-rank" else 1
    for stage, parts in (("navigator", 1), ("pretrain", config.pretrain.accumulate)):
        batch = getattr(config, stage).batch
        if batch == 1:
            found.append(f"{stage}.batch: a pair alone has no negatives, and training would do nothing: take 2 or more")
        elif 0 < batch < 2 * parts * replicas:
            by = f"{stage}.accumulate {parts}" if parts > 1 else f"--bn per-rank on {processes} processes"
            found.append(
                f"{stage}.batch: {by} leaves batch norm the statistics of one pair: take {2 * parts * replicas} or more"
            )
    return found


def _pretrain_faults(config: RunConfig) -> list[str]:
    """What else would be found only once the pairs are made."""
    options, found = config.pretrain, []
    if options.data != "real" and options.batch > config.pairs.count:
        found.append(f"pretrain.batch: expected at most pairs.count {config.pairs.count}, got {options.batch}")
    if options.loader == "dali" and options.data == "online":
        found.append("pretrain.loader: dali reads shards, and online pairs are in none: choose plain")
    if options.loader == "dali" and options.data == "real" and config.data.name != "packed":
        found.append(
            f"pretrain.loader: dali reads shards, and images of data set {config.data.name} are in none: pack them by "
            "`python -m copgen_fast.images.pack`, or choose plain"
        )
    if options.shuffle_shards is not None and options.data != "pairs":
        images = {"real": "real images", "online": "online pairs"}[options.data]
        found.append(f"pretrain.shuffle_shards: {images} are in no shards of pairs: leave it out")
    return found


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    """Nested settings by dotted names."""
    found: dict[str, object] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
