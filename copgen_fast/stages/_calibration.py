"""How far positives may go, without labels: does an encoder of identity pairs still see the anchor in them?

    phi    an encoder pretrained on identity pairs of the same generator
    s dz   displacements of a way, all scaled so that E||s dz|| is each of a grid of distances

At each distance, of phi(G(z)) and phi(G(z + s dz)): how often both are in the same of k clusters, how often the anchor
is the nearest among unrelated images, and the rank of the pair's distance among distances to those. What the
augmentation alone does to one image, which pretraining calls the same, is the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copgen_fast import augmentations, evals, positives, registry
from copgen_fast.config import NavigatorConfig, RunConfig
from copgen_fast.errors import UsageError
from copgen_fast.files import sha256
from copgen_fast.ops import AugmentParams
from copgen_fast.options import Range, check_ranges
from copgen_fast.pairs.format import levels
from copgen_fast.pairs.write.source import PairSource
from copgen_fast.positives.navigator import untrained
from copgen_fast.runtime import artifacts, devices, seeds
from copgen_fast.stages import pretrain, probe
from copgen_fast.stages._draws import draw_labels, draw_latents
from copgen_fast.stages.run import Run

GRID = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Distances in parts of E||z||, by default."""
GALLERY = 1000
"""Unrelated images among which an anchor is looked for."""
RESAMPLES = 500
"""Bootstrap samples of the anchors."""


@dataclass(frozen=True)
class Calibration:
    """How distances are calibrated."""

    anchors: Annotated[int, Range(10, 10**6)] = 1000
    """Pairs at each distance."""
    unrelated: Annotated[int, Range(10, 10**6)] = 4000
    """Images to which k-means is fitted; among the first 1,000 of them, anchors are looked for."""
    clusters: tuple[Annotated[int, Range(2, 10**5)], ...] = (10, 50, 200)
    """Numbers k of clusters; a distance must suit each of them."""
    distances: tuple[Annotated[float, Range(1e-6, 1e6)], ...] = ()
    """E||dz|| to try, instead of 0.05 to 1 times E||z||."""
    groups: bool = False
    """Also move in each latent group of the generator alone."""
    keep: Annotated[float, Range(0.01, 1)] = 0.9
    """The proposal is the largest distance up to which pairs share a cluster at least this many times as often as two
    augmented views of one image do."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.clusters or max(self.clusters) > self.unrelated:
            raise UsageError(f"clusters: expected at least one number, of at most {self.unrelated} (--unrelated)")


class Same(NamedTuple):
    """What phi says of N pairs.

    Attributes:
        cluster: bool [K, N], whether both are in one cluster, for each number of clusters.
        found: bool [N], whether the anchor is nearer to the positive than all unrelated images.
        rank: float [N], share of the unrelated images that are nearer to the anchor than the positive is.
    """

    cluster: Tensor
    found: Tensor
    rank: Tensor

    def means(self, clusters: Sequence[int]) -> dict[str, Any]:
        """Over the pairs, as plain numbers; of clusters by their number."""
        rates = self.cluster.double().mean(1).tolist()
        agreement = {str(k): rate for k, rate in zip(clusters, rates, strict=True)}
        return {
            "agreement": agreement,
            "retrieval_top1": self.found.double().mean().item(),
            "rank": self.rank.mean().item(),
        }


def compare(h: Tensor, h_prime: Tensor, unrelated: Tensor, centres: Sequence[Tensor]) -> Same:
    """Compare features of anchors and positives, [N, D] each.

    Args:
        unrelated: [M, D].
        centres: [k, D] of each clustering.
    """
    clusters = [torch.cdist(h, c).argmin(1) == torch.cdist(h_prime, c).argmin(1) for c in centres]
    own = (h - h_prime).norm(dim=1)
    found = own < torch.cdist(h_prime, unrelated).amin(1)
    rank = (torch.cdist(h, unrelated) < own[:, None]).double().mean(1)
    return Same(torch.stack(clusters), found, rank)


class Proposal(NamedTuple):
    """A distance, and what to say of it: empty where the grid holds it between two distances."""

    distance: float
    note: str = ""


def propose(distances: Sequence[float], ratios: Sequence[float], at_zero: float, keep: float) -> Proposal:
    """The distance at which the ratio first falls below `keep`, linear between the distances of the grid.

    Args:
        distances: increasing.
        ratios: of the agreement at each to the reference.
        at_zero: of the agreement at distance 0, which is 1.
    """
    before, high = 0.0, at_zero
    for distance, ratio in zip(distances, ratios, strict=True):
        if ratio < keep:
            found = before + (distance - before) * (high - keep) / (high - ratio)
            return Proposal(found, "" if before else f"less than the smallest distance tried, {distance:.3g}")
        before, high = distance, ratio
    return Proposal(before, f"at least, as no distance tried is too far: try more than {before:.3g}")


def smallest(
    distances: Sequence[float], rates: np.ndarray, reference: np.ndarray, keep: float
) -> tuple[Proposal, list[Proposal]]:
    """The proposal that suits all clusterings, and that of each.

    Args:
        rates: [G, K] at each distance of each clustering.
        reference: [K].
    """
    reference = np.maximum(reference, 1e-12)
    each = [propose(distances, rates[:, k] / r, 1 / r, keep) for k, r in enumerate(reference)]
    return min(each), each


def proposals(distances: Sequence[float], pairs: Sequence[Same], reference: Same, keep: float) -> dict[str, Any]:
    """The proposed distance, those of each clustering, and the 95 % interval by resampling anchors."""
    agree = torch.stack([same.cluster for same in pairs]).numpy().astype(float)  # [G, K, N]
    views = reference.cluster.numpy().astype(float)
    best, each = smallest(distances, agree.mean(2), views.mean(1), keep)
    count = agree.shape[2]
    weights = np.random.RandomState(0).multinomial(count, np.full(count, 1 / count), RESAMPLES) / count
    resampled, references = agree @ weights.T, views @ weights.T
    found = [smallest(distances, resampled[:, :, i], references[:, i], keep)[0].distance for i in range(RESAMPLES)]
    low, high = np.percentile(found, (2.5, 97.5)).tolist()
    return {
        "proposal": best.distance,
        "interval": [low, high],
        "note": best.note,
        "proposal_by_clusters": [proposal.distance for proposal in each],
    }


def identity_encoder(run: Run) -> Run:
    """The run in whose folder the encoder of identity pairs lies: this one, or one in RUN/calibration, where it is
    pretrained as the run's encoders are, on pairs drawn meanwhile. All processes call it.
    """
    config, augmentation = run.config, augmentation_of(run.config)
    usable = config.pretrain.augmentation == augmentation and "identity" in run.sources
    if usable and run.encoder_file("identity").exists():
        return run
    pairs = dataclasses.replace(config.pairs, positives=("identity",), options=(), positives_per_anchor=1)
    given = {"data": "online", "loader": "auto", "shuffle_shards": None, "augmentation": augmentation}
    options = dataclasses.replace(config.pretrain, **given)
    config = dataclasses.replace(config, pairs=pairs, pretrain=options, stages=("pretrain",))
    own = Run(config, run.calibration_folder, run.device, run.ranks)
    pretrain.run(own)
    return own


def augmentation_of(config: RunConfig) -> str:
    """The augmentation of identity pairs: pretraining's or, where that has none, the navigator's.

    Raises:
        UsageError: none either, so that both views of a pair would be equal, and nothing be learned from them.
    """
    for name in (config.pretrain.augmentation, config.navigator.augmentation):
        if name != "none":
            return name
    raise UsageError(
        "augmentation: distances are calibrated by an encoder of augmented identity pairs, and both "
        "--pretrain.augmentation and --navigator.augmentation are none: give one, or a number for --navigator.delta"
    )


def displacements(run: Run, G: nn.Module, z: Tensor) -> dict[str, Tensor]:
    """dz [N, L] of every way of the run that moves latents z."""
    drawn = [seeds.derive32(run.config.seed, "calibration", number) for number in range(len(z))]
    found = {}
    for name, options in positives.options(run.config.pairs).items():
        dz = positives.build(name, run.setting(G, options))(z, drawn) - z
        if dz.any():
            found[registry.label(name)] = dz
    if not found:
        raise UsageError("pairs.positives: none of them moves z, so that there is no distance to choose")
    return found


def by_group(moves: Mapping[str, Tensor], latent_groups: Sequence[int]) -> dict[str, Tensor]:
    """The parts of displacements in each latent group, which move nothing else."""
    found = {}
    for name, dz in moves.items():
        for group, part in enumerate(dz.split(list(latent_groups), dim=1)):
            start = sum(latent_groups[:group])
            found[f"{name}, group {group}"] = F.pad(part, (start, dz.shape[1] - start - part.shape[1]))
    return {name: dz for name, dz in found.items() if dz.any()}


def calibrate(
    run: Run, options: Calibration, G: nn.Module, encoder_run: Run, z: Tensor, moves: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Curves over distances of every way, and the distance proposed for it; plain values for a record.

    Args:
        encoder_run: see `identity_encoder`.
        z: anchors [N, L], on the CPU.
        moves: dz [N, L], by way.
    """
    seed, phi = run.config.seed, Phi(encoder_run, G)
    labels = draw_labels(G, len(z), run.device, seed, "calibration labels")
    others = draw_anchors(run, G, options.unrelated, "calibration unrelated")
    unrelated = phi(others, draw_labels(G, len(others), run.device, seed, "calibration unrelated labels"))
    centres = [centres_of(unrelated, k, seed) for k in options.clusters]

    def compared(h: Tensor, h_prime: Tensor) -> Same:
        run.ranks.mark("the calibration of distances")
        return compare(h, h_prime, unrelated[:GALLERY], centres)

    h = phi(z, labels)
    reference = compared(*(phi(z, labels, seeds.generator(seed, "calibration views", i)) for i in range(2)))
    chance = compared(h, h.roll(1, 0))
    norm, found = z.norm(dim=1).mean().item(), {}
    for name, dz in moves.items():
        own = dz.norm(dim=1).mean().item()
        grid = options.distances or [part * norm for part in GRID]
        distances = sorted([own, *(d for d in grid if abs(d - own) > 0.02 * own)])
        pairs = [compared(h, phi(z + distance / own * dz, labels)) for distance in distances]
        curve = [{"distance": d} | pair.means(options.clusters) for d, pair in zip(distances, pairs, strict=True)]
        found[name] = {"distance": own, **proposals(distances, pairs, reference, options.keep), "curve": curve}
    path = encoder_run.encoder_file("identity")
    return {
        **registry.as_record(options),
        "prior_norm": norm,
        "augmentation": encoder_run.config.pretrain.augmentation,
        "encoder": str(path.relative_to(run.folder)),
        "encoder_sha256": sha256(path),
        "generator_digest": G.record["digest"],
        "reference": reference.means(options.clusters),
        "chance": chance.means(options.clusters),
        "ways": found,
    }


def draw_anchors(run: Run, G: nn.Module, count: int, name: str = "calibration anchors") -> Tensor:
    """Latents [count, L] of the prior, on the CPU."""
    return draw_latents(G, seeds.derive32(run.config.seed, name), count, torch.device("cpu"))


def find_delta(run: Run, G: nn.Module) -> NavigatorConfig:
    """The navigator's configuration; `auto` becomes the distance proposed for the untrained T_z's displacements.

    It is found once and kept in RUN/navigator/delta.json. All processes call it.
    """
    config, ranks = run.config.navigator, run.ranks
    if config.delta != "auto":
        return config
    if ranks.barrier("the calibration", str(run.delta_file.exists()))[0] == "False":  # rank 0's word, as it writes it
        encoder_run = identity_encoder(run)
        if ranks.first:
            options = Calibration()
            z = draw_anchors(run, G, options.anchors)
            free = dataclasses.replace(config, delta=None, project=False)
            T_z = untrained(G.latent_dim, free, run.config.seed, G.latent_groups, G.latent_shape)
            with torch.no_grad():
                moves = {"untrained-navigator": T_z(z)}
            record = calibrate(run, options, G, encoder_run, z, moves)
            found = record["ways"]["untrained-navigator"]
            artifacts.write_record(run.delta_file, {"delta": found["proposal"], "calibration": record})
            tell(found, config.project)
        ranks.barrier("the calibration's end", while_alive=True)
    return run.navigator


def tell(found: Mapping[str, Any], projected: bool) -> None:
    """Print the delta that was found, and warn where no distance is too far, and where T_z starts beyond it."""
    delta, (low, high), start = found["proposal"], found["interval"], found["distance"]
    print(f"navigator.delta: {delta:.3g} by calibration (95 % {low:.3g} to {high:.3g})", flush=True)
    if found["note"]:
        print(
            f"warning: navigator.delta: {found['note']}; an encoder that learned little tells little, see "
            "--pretrain.epochs and --pairs.count",
            flush=True,
        )
    if start >= delta and not projected:
        print(
            f"warning: navigator.delta: T_z starts at E||T_z(z)|| {start:.3g}, so that training ends at once: "
            "--navigator.init near-zero starts at 0, --navigator.project holds it within delta",
            flush=True,
        )


class Phi:
    """Normalised features of generated images, [N, D] float64 on the CPU, by the encoder of identity pairs."""

    def __init__(self, run: Run, G: nn.Module) -> None:
        config = run.config
        self.batch, self.device, self.size = config.pairs.batch, run.device, config.pairs.size
        self.policy = augmentations.get(config.pretrain.augmentation)
        self.frozen = evals.freeze(probe.open_encoder(run, "identity"), run)
        same = positives.build("identity", run.setting(G, None))
        self.source = PairSource(G, same, G.latent_dim, G.sample, run.device, size=self.size)

    @torch.no_grad()
    def __call__(self, z: Tensor, labels: Tensor | None, views: torch.Generator | None = None) -> Tensor:
        """Features of G(z), or, with a source of random numbers, of one augmented view of each image."""
        found, params = [], None
        if views is not None:
            size = self.source.generator.image_shape[1:] if self.size is None else (self.size, self.size)
            params = AugmentParams.sample(len(z), size, self.policy, generator=views)
        for start in range(0, len(z), self.batch):
            rows = slice(start, start + self.batch)
            images = self.source.images(z[rows], None if labels is None else labels[rows])
            pixels = levels(images).to(torch.uint8)  # as pairs are stored
            if params is None:
                found.append(self.frozen.features(pixels))
            else:
                moved = devices.send(params[rows], self.device)
                found.append(self.frozen.encode(augmentations.make_views(pixels, moved, self.policy)).cpu())
        return F.normalize(torch.cat(found).double())


def centres_of(features: Tensor, count: int, seed: int) -> Tensor:
    """Centres [count, D] of k-means clusters of features [N, D]."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # sums of several threads come in any order
        fitted = KMeans(count, n_init=3, random_state=seed & 0xFFFFFFFF).fit(features.numpy())
    return torch.from_numpy(fitted.cluster_centers_)
