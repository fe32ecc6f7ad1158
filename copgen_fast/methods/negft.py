"""Negatives mixed of two by interpolation (Zhu et al. 2021, feature transformation), in SimCLR's batch or MoCo's queue.

Optionally positives are extrapolated away from each other, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from copgen_fast.encoders import Encoder
from copgen_fast.methods import Method, Setting, moco, simclr
from copgen_fast.methods._heads import full
from copgen_fast.methods._queue import fitted
from copgen_fast.ops import info_nce
from copgen_fast.ops.info_nce.group import all_gather
from copgen_fast.options import Count, Range, Temperature, check_ranges
from copgen_fast.runtime.devices import send


@dataclass(frozen=True)
class Config:
    """Options of feature transformation."""

    negatives: Literal["batch", "queue"] = "batch"
    """batch: SimCLR's, mixed of the views of two other pairs. queue: MoCo's, with its moving average encoder."""
    temperature: Temperature = 0.1
    """Temperature of InfoNCE."""
    base_temperature: Temperature | None = 0.07
    """The loss is multiplied by temperature / base_temperature, as SimCLR's is here; None: by 1."""
    alpha: Annotated[float, Range(0.51, 100)] = 1.6
    """A mix is lambda x + (1 - lambda) y, lambda from Beta(alpha, alpha)."""
    mix: Literal["step", "dimension"] = "step"
    """step: one lambda a step. dimension: one for each number of each embedding."""
    extrapolate: bool = False
    """Compare lambda q + (1 - lambda) k with lambda k + (1 - lambda) q, lambda from 1 + Beta, for positives q and k."""
    extrapolation_alpha: Annotated[float, Range(0.51, 100)] = 2.0
    """The Beta distribution's alpha for positives."""
    queue: Count | None = None
    """Rows of the queue, where there is one; None: 65536, or the largest power of two in a quarter of a smaller data
    set."""
    ema: Annotated[float, Range(0, 1)] = 0.999
    """Decay of the moving average encoder, where there is one."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def for_run(self, setting: Setting) -> Config:
        if self.negatives == "queue":
            return fitted(self, setting, setting.batch)
        if setting.batch < 3:
            raise ValueError("two pairs have no others to mix: choose a --pretrain.batch of 3 or more")
        return self


class Mixing:
    """The two transformations, drawn from a step's seed: the same on all ranks."""

    def __init__(self, config: Config) -> None:
        self.config, self.seed = config, 0

    def mixed(self, rows: Tensor, permutation: Tensor, places: Tensor | None = None) -> Tensor:
        """lambda x_j + (1 - lambda) x_perm(j) of rows x [K, D], which keep the length that this gives.

        Args:
            places: of the rows in the order in which one process has them, which numbers are drawn in.
        """
        weights = self._beta(self.config.alpha, (len(rows), rows.shape[1]), rows, 1, places)
        return torch.lerp(rows[permutation], rows, weights)

    def permutation(self, count: int, device: torch.device) -> Tensor:
        return send(torch.randperm(count, generator=self._generator(0)), device)

    def loss(
        self,
        rows: Tensor,
        positives: Tensor,
        negatives: Tensor,
        places: Tensor,
        count: int,
        ids: Tensor | None = None,
    ) -> Tensor:
        """InfoNCE of unit rows [M, D] against their positives and the mixed negatives.

        Args:
            places: of the rows among the `count` of all ranks, in the order in which one process has them.
            ids: of the rows that a negative [K, D] was made of, integers [K, E]; it is not compared with these.
        """
        if self.config.extrapolate:
            # One more dimension carries the positives' similarity, so that the fused loss takes it as it is.
            similarity = self._extrapolated(rows, positives, places, count)[:, None]
            rows = torch.cat([rows, similarity], 1)
            positives = F.pad(torch.zeros_like(positives), (0, 1), value=1.0)
            negatives = F.pad(negatives, (0, 1))
        return info_nce(
            rows,
            positives,
            negatives=negatives,
            negative_ids=ids,
            temperature=self.config.temperature,
            base_temperature=self.config.base_temperature,
            symmetric=False,
            in_batch=False,
            normalize=False,
        )

    def _extrapolated(self, q: Tensor, k: Tensor, places: Tensor, count: int) -> Tensor:
        by = 1 + self._beta(self.config.extrapolation_alpha, (count, q.shape[1]), q, 2, places)
        return (torch.lerp(k, q, by) * torch.lerp(q, k, by)).sum(1)

    def _beta(self, alpha: float, shape: tuple[int, int], like: Tensor, stream: int, places: Tensor | None) -> Tensor:
        """A number, or one for each of `shape`, from Beta(alpha, alpha), of two uniform ones each (Ulrich 1984)."""
        by_step = self.config.mix == "step"
        drawn = torch.rand(2, *((1, 1) if by_step else shape), dtype=like.dtype, generator=self._generator(stream))
        radius, angle = send(drawn, like.device)
        numbers = (1 + (1 - radius ** (2 / (2 * alpha - 1))).sqrt() * (2 * math.pi * angle).cos()) / 2
        return numbers if by_step or places is None else numbers[places]

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + stream)


class InBatch(simclr.SimCLR):
    """SimCLR whose negatives are mixes of the views of two pairs: neither is the row's own."""

    def __init__(self, encoder: Encoder, config: Config) -> None:
        super().__init__(encoder, simclr.Config(config.temperature, config.base_temperature))
        self.mixing = Mixing(config)

    def before_step(self, seed: int) -> None:
        self.mixing.seed = seed

    def loss(
        self,
        online: tuple[Tensor, ...],
        targets: tuple[Tensor, ...],
        labels: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """-log softmax of each row's other view against all mixed views; neither takes a gradient."""
        rows = F.normalize(full(online[0]), dim=1)
        n, everyone = len(rows) // 2, rows.detach() if group is None else all_gather(rows, group)
        pairs, first = len(everyone) // 2, 0 if group is None else dist.get_rank(group) * len(rows)
        # Rows come in the order rank, view, pair; permuting pairs keeps the view.
        pair = torch.arange(pairs, device=rows.device)
        place = pair // n * 2 * n + pair % n
        place = torch.stack([place, place + n])  # [view, pair]
        of_row = torch.empty(2 * pairs, dtype=torch.int64, device=rows.device)
        of_row[place.flatten()] = torch.arange(2 * pairs, device=rows.device)  # view x pairs + pair
        view, pair = of_row // pairs, of_row % pairs
        partner = self.mixing.permutation(pairs, rows.device)[pair]
        mixed = self.mixing.mixed(everyone, place[view, partner], of_row)
        ids = torch.cat([place[:, pair], place[:, partner]]).T - first
        own = of_row[first : first + len(rows)]
        # Positives are constant, as MoCo's keys are: pulled at both ends and pushed at one, all rows would become one.
        return self.mixing.loss(rows, rows.roll(n, 0).detach(), mixed, own, 2 * pairs, ids)


class InQueue(moco.MoCo):
    """MoCo whose negatives are mixes of two of the queue's rows; the queue keeps them as they came."""

    def __init__(self, encoder: Encoder, config: Config) -> None:
        super().__init__(encoder, moco.Config(config.temperature, config.queue, config.ema))
        self.mixing = Mixing(config)

    def before_step(self, seed: int) -> None:
        self.mixing.seed = seed

    def contrast(self, q: Tensor, k: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        rows = self.queue.rows.to(q.dtype)
        mixed = self.mixing.mixed(rows, self.mixing.permutation(len(rows), rows.device))
        rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        places = torch.arange(rank * len(q), (rank + 1) * len(q), device=q.device)
        return self.mixing.loss(q, k, mixed, places, world * len(q))


def build(encoder: Encoder, config: Config) -> Method:
    return InBatch(encoder, config) if config.negatives == "batch" else InQueue(encoder, config)
