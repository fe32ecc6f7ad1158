"""Pairs written once as shards, or drawn anew while training: which of them is faster, from measured rates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from copgen_fast.config import Codec, PairsConfig, PretrainConfig
from copgen_fast.doctor.estimates import duration
from copgen_fast.images.codecs import CODECS
from copgen_fast.pairs.format import to_uint8

_IMAGES = 8  # encoded and decoded


@dataclass(frozen=True)
class Rates:
    """Seconds that a pair costs: `generate` and the encoder's `step` on the device, `encode` and `decode` on one core.

    Attributes:
        stored: bytes of a pair's images in its shard; `decoded`, in memory.
        cores: that encode and decode.
        beside: whether they do so beside the step: a GPU trains meanwhile, on the CPU all share the cores.
    """

    generate: float
    step: float
    encode: float
    decode: float
    stored: float
    decoded: float
    cores: int
    beside: bool


@dataclass(frozen=True)
class Comparison:
    """Seconds of a whole run either way, and the bytes of its shards."""

    count: int
    epochs: int
    codec: Codec
    write: float
    shards_epoch: float
    online_epoch: float
    disk: float

    @property
    def shards(self) -> float:
        """Seconds of the run on shards, with their writing."""
        return self.write + self.epochs * self.shards_epoch

    @property
    def online(self) -> float:
        """Seconds of the run on pairs drawn while training."""
        return self.epochs * self.online_epoch

    def __str__(self) -> str:
        """Three lines of text."""
        one, other = sorted((self.shards, self.online))
        names = ("shards are", "online is") if self.shards <= self.online else ("online is", "shards are")
        times = f"{other / one:.2f} times as fast" if other > 1.05 * one else "no faster by 5 %"
        ways = (
            ("shards", f"{_hours(self.write)} and {_size(self.disk)} to write them once as {self.codec}, then "),
            ("online", "no disk, "),
        )
        epochs = {"shards": self.shards_epoch, "online": self.online_epoch}
        lines = [f"    {name}: {before}{_hours(epochs[name])} an epoch" for name, before in ways]
        whole = f"{self.epochs} epochs of {self.count:,} pairs: {_hours(self.shards)} on shards, {_hours(self.online)}"
        verdict = f"  pairs, {whole} online; {names[0]} {times} (saves {_hours(other - one)})"
        return "\n".join([verdict, *lines])


def compare(rates: Rates, count: int, epochs: int, codec: Codec, cache_bytes: float) -> Comparison:
    """What a run costs either way: pairs that fit the cache are decoded once, others in each epoch."""
    encode, decode = rates.encode / rates.cores, rates.decode / rates.cores
    join = max if rates.beside else lambda *parts: sum(parts)
    passes = 1 if count * rates.decoded <= cache_bytes else epochs
    read = join(rates.step, decode) * passes + rates.step * (epochs - passes)
    return Comparison(
        count,
        epochs,
        codec,
        write=count * join(rates.generate, encode),
        shards_epoch=count * read / epochs,
        online_epoch=count * (rates.step + rates.generate),
        disk=count * rates.stored,
    )


def measured(images: Tensor, generate: float, step: float, cores: int, codec: Codec = PairsConfig.codec) -> Rates:
    """Rates with a codec, of generated images [N, 3, H, W] in [-1, 1].

    Args:
        generate, step: seconds of a pair, as measured.
    """
    pixels = to_uint8(images[:_IMAGES]).permute(0, 2, 3, 1).contiguous().cpu()
    shape, kind = (3, *pixels.shape[1:3]), CODECS[codec]
    encode, files = _median(lambda image: kind.encode(image.numpy()), pixels)
    decode, _ = _median(lambda file: kind.decode(file, shape, "sample"), files)
    stored, decoded = statistics.mean(map(len, files)), pixels[0].numel()
    return Rates(generate, step, 2 * encode, 2 * decode, 2 * stored, 2 * decoded, cores, images.device.type != "cpu")


def default_run(rates: Rates) -> Comparison:
    """The comparison for the stages' defaults."""
    pairs, pretrain = PairsConfig(), PretrainConfig()
    return compare(rates, pairs.count, pretrain.epochs, pairs.codec, pretrain.cache_gib * 2**30)


def _median(call: Callable, values: object) -> tuple[float, list]:
    """Seconds of the median call, and what the calls returned."""
    took, found = [], []
    for value in values:
        start = time.perf_counter()
        found.append(call(value))
        took.append(time.perf_counter() - start)
    return statistics.median(took), found


def _hours(seconds: float) -> str:
    return duration(seconds / 3600)


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
