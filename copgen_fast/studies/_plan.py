"""A study's runs as ordinary commands of `copgen_fast.train`, and the parts of them that are made once for several.

A shared part is a run folder, too: of the run's settings it has those that decide the part, and its one stage. Its
name ends with a digest of them. Runs get links to it and find that stage done.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from copgen_fast import augmentations, generators, registry, train
from copgen_fast.config import RunConfig
from copgen_fast.errors import CopgenError, UsageError
from copgen_fast.record import defaults, identity
from copgen_fast.runtime import devices
from copgen_fast.stages import Run
from copgen_fast.studies import Arm, Study
from copgen_fast.studies._grid import folder_of
from copgen_fast.studies._settings import Parts, Value, applicable, parts_of, words

Picked = dict[str, Value]
"""Settings, by dotted name."""

_HOW = ("device", "timeout", "save_every")
"""How a run runs, rather than what it computes."""
_GENERATOR = ("generator.",)
_TRAINING = ("optimizer.", "precision", "compile", "bn", "log_every")
_NAVIGATOR = (*_GENERATOR, *_TRAINING, "navigator.", "seed")
_STEERING = (*_GENERATOR, *_TRAINING, "steering.", "seed")
_START = tuple(f"navigator.{name}" for name in ("kind", "hidden", "init", "groups", "group_deltas", "project"))
_CALIBRATION = ("pairs.", "method", "method.options.", "pretrain.")
"""What decides a navigator beside its own settings where its delta is found by an encoder of identity pairs."""
_WAYS: dict[str, tuple[str, ...]] = {
    "identity": (),
    "gaussian": (),
    "untrained-navigator": ("seed", *_START),
    "navigator": _NAVIGATOR,
    "steering": _STEERING,
}
"""What decides pairs beside the generator and the settings of pairs, by the way of making them; of others all this."""
_BASELINES = ("data.", "probe.", "evals.options.", "pretrain.encoder.", "bn", "seed")


@dataclass(frozen=True)
class Unit:
    """One command of `copgen_fast.train`: a run, or a part that runs share.

    Attributes:
        name: for messages.
        folder: the run folder.
        words: the command's, from the preset on.
        config: what they say.
        results: files that are there once it is done.
        links: shared parts in its folder: where, and the unit that makes each.
    """

    name: str
    folder: Path
    words: tuple[str, ...]
    config: RunConfig
    results: tuple[Path, ...]
    links: tuple[tuple[str, Unit], ...] = ()

    @property
    def done(self) -> bool:
        return all(path.exists() for path in self.results)

    @property
    def needs(self) -> tuple[Unit, ...]:
        """Units whose results it links."""
        return tuple(unit for _, unit in self.links)


@dataclass(frozen=True)
class Planned:
    """A run of the study.

    Attributes:
        source: what its encoder is pretrained on, as `Run.sources` has it.
        baselines: the evaluation of an untrained encoder and raw pixels that it compares with; None: there is none.
    """

    arm: str
    seed: int
    source: str
    unit: Unit
    baselines: Unit | None


def plan(study: Study, seeds: tuple[int, ...], folder: Path) -> list[Planned]:
    """Every run of a study that `_grid.expand` made, in the order in which they run: seed by seed.

    Raises:
        UsageError: settings that `copgen_fast.train` refuses; the message names the arm.
    """
    _decided.cache_clear()  # files of weights and parts may have changed
    return [_planned(study, arm, seed, folder) for seed in seeds for arm in study.arms]


def _planned(study: Study, arm: Arm, seed: int, folder: Path) -> Planned:
    settings = applicable(study.preset, {**study.settings, **arm.settings})
    try:
        config = _parsed(study.preset, settings)
        maker = _Maker(study.preset, settings, seed, parts_of(study.preset, settings), config, folder / "shared")
        links, stages = maker.links()
        own = folder / "runs" / folder_of(arm.name) / f"seed-{seed}"
        given = settings | {"seed": str(seed), "probe.baselines": (), "stages": stages}
        alone = dataclasses.replace(config.probe, baselines=())
        config = dataclasses.replace(config, seed=seed, probe=alone, stages=stages, out=str(own))
        command = (*words(study.preset, given), "--out", str(own))
        unit = Unit(f"{arm.name}, seed {seed}", own, command, config, (), links)
        (source,) = of_folder(unit).sources
        unit = dataclasses.replace(unit, results=(of_folder(unit).probe_file(source),))
        return Planned(arm.name, seed, source, unit, maker.baselines())
    except UsageError as error:
        raise UsageError(f"arm {arm.name}: {error}") from error


def _parsed(preset: str, settings: Mapping[str, Value]) -> RunConfig:
    """The configuration that settings say. Commands that differ in their seed alone are parsed once, as it takes long.

    Raises:
        UsageError: an unknown name, or a value that does not fit.
    """
    settings = dict(settings)
    seed = settings.pop("seed", None)
    config = _parse(tuple(words(preset, settings)))
    return config if seed is None else dataclasses.replace(config, seed=int(seed))


@functools.lru_cache(maxsize=4096)
def _parse(command: tuple[str, ...]) -> RunConfig:
    return train.parse(list(command))


def _digest(config: RunConfig) -> str:
    """What tells the results of a configuration from those of others, as 12 hex digits."""
    values = [_decided(dataclasses.replace(config, seed=0)), config.seed]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


@functools.lru_cache(maxsize=4096)
def _decided(config: RunConfig) -> dict[str, object]:
    """What of a configuration decides its results and is not the default; it reads weights and files of parts."""
    default = defaults(config)
    return {name: value for name, value in identity(config).items() if default.get(name) != value}


def of_folder(unit: Unit) -> Run:
    """A unit's run, to find its files."""
    return Run(unit.config, unit.folder, torch.device("cpu"))


@dataclass(frozen=True)
class _Maker:
    """Makes the units that one run shares with others.

    Attributes:
        settings: the run's, but for its seed.
        config: what they say.
        shared: folder of all shared parts.
    """

    preset: str
    settings: Picked
    seed: int
    parts: Parts
    config: RunConfig
    shared: Path

    def links(self) -> tuple[tuple[tuple[str, Unit], ...], tuple[str, ...]]:
        """What the run links, and its stages."""
        if self.parts.real:
            return (), ("pretrain", "probe")
        (way,) = self.parts.positives
        links = self.learned(way)
        stages = (*(where for where, _ in links), "pairs", "pretrain", "probe")
        if self.config.pretrain.data == "pairs":
            links += ((f"pairs/{registry.label(way)}", self.pairs(way)),)
        return links, stages

    def learned(self, way: str) -> tuple[tuple[str, Unit], ...]:
        """What pairs of a way are made with: the navigator's or the steering stage."""
        if way == "steering":
            return (("steering", self.unit("steering", _STEERING, {"pairs.positives": ("steering",)})),)
        options = self.config.navigator
        found = options.delta == "auto"
        if way in ("identity", "gaussian") or (way == "untrained-navigator" and not (found and options.project)):
            return ()
        # A way of the user's own may read the navigator, too.
        return (("navigator", self.unit("navigator", (*_NAVIGATOR, *(_CALIBRATION if found else ())))),)

    def pairs(self, way: str) -> Unit:
        """The pairs of one way."""
        decide = _WAYS.get(way, (*_NAVIGATOR, "steering."))
        if self.config.navigator.project:
            decide = (*decide, "navigator.delta")
        links = self.learned(way)
        if links and self.config.navigator.delta == "auto":
            decide = (*decide, *_CALIBRATION)
        unit = self.unit("pairs", (*_GENERATOR, "pairs.", "positive.options.", *decide), title=registry.label(way))
        return dataclasses.replace(unit, links=links)

    def baselines(self) -> Unit | None:
        """The evaluation of an untrained encoder and raw pixels, equal for all runs of this encoder, data and seed."""
        shareable = tuple(name for name in self.parts.evals if not _needs_pairs(name))
        if not self.config.probe.baselines or not shareable:
            return None
        evals = {"probe.evals": shareable, "probe.baselines_only": "True"}
        same = {"pretrain.augmentation": _of_equal_normalization(self.config.pretrain.augmentation)}
        return self.unit("probe", _BASELINES, evals | same, "baselines")

    def unit(self, stage: str, decide: tuple[str, ...], other: Picked | None = None, title: str = "") -> Unit:
        """The unit of one stage.

        Args:
            decide: names of settings, or beginnings of them that end with a dot.
            other: further settings.
            title: in its name.
        """
        whole = self.settings | {"seed": str(self.seed)}
        picked = {name: value for name, value in whole.items() if _is_one_of(name, (*_HOW, *decide))}
        picked = applicable(self.preset, picked | (other or {})) | {"stages": (stage,)}
        config = _parsed(self.preset, picked)
        name = "-".join(filter(None, ["" if stage == "probe" else stage, title, _digest(config)]))
        folder = self.shared / name
        command = (*words(self.preset, picked), "--out", str(folder))
        unit = Unit(name, folder, command, dataclasses.replace(config, out=str(folder)), ())
        run = of_folder(unit)
        results = {
            "navigator": lambda: [run.navigator_file],
            "steering": lambda: [run.steering_file],
            "pairs": lambda: [run.pairs_folder(way) / "summary.json" for way in config.pairs.positives],
            "probe": lambda: [run.probe_file(name) for name in config.probe.baselines],
        }[stage]()
        return dataclasses.replace(unit, results=tuple(results))


def _is_one_of(name: str, decide: tuple[str, ...]) -> bool:
    return any(name.startswith(one) if one.endswith(".") else name == one for one in decide)


@functools.cache
def _needs_pairs(evaluation: str) -> bool:
    return getattr(registry.load("evals", evaluation), "NEEDS_PAIRS", False)


def _of_equal_normalization(policy: str) -> str:
    """The first policy with the same mean and standard deviation, which is all of it that evaluations use."""
    wanted = augmentations.get(policy)
    return next(
        name for name, other in augmentations.POLICIES.items() if (other.mean, other.std) == (wanted.mean, wanted.std)
    )


def link(links: tuple[tuple[str, Unit], ...], run: Run) -> None:
    """Make the links of a unit's folder; what the run has made itself stays, and links that lead nowhere go."""
    for path in run.folder.glob("*/*"):
        if path.is_symlink() and not path.exists():
            path.unlink()
    for where, unit in links:
        path = run.folder / where
        target = os.path.relpath(unit.folder / where, path.parent)
        if path.is_symlink() and os.readlink(path) != target:
            path.unlink()
        if not path.is_symlink() and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(target)


def validate(study: Study, planned: list[Planned]) -> None:
    """Check, before anything runs, what the runs that are not done need: their device, settings, weights and data.

    Raises:
        UsageError: the first fault, with the arm's name.
    """
    _expect_metric(study)
    checked: set[object] = set()
    for run in planned:
        if run.unit.done or run.arm in checked:
            continue
        checked.add(run.arm)
        config = run.unit.config
        data = config.data, config.probe
        stages = [stage for stage in config.stages if stage != "probe" or data not in checked]
        checked.add(data)  # real images are opened once for all arms that read the same
        try:
            if config.device not in ("auto", "cuda") or not torch.cuda.is_available():  # a GPU is left to the runs
                devices.resolve(config.device, config.precision)
            train.validate(dataclasses.replace(config, stages=tuple(stages)))
            if config.generator not in checked and any(not unit.done for unit in run.unit.needs):
                checked.add(config.generator)
                _expect_generator(config)
        except UsageError as error:
            raise UsageError(f"arm {run.arm}: {error}") from error


def _expect_generator(config: RunConfig) -> None:
    """Raises UsageError where the generator can't be built, as its weights are missing, say."""
    options = config.generator
    try:
        generators.build(options.name, options.weights, options.options)
    except UsageError:
        raise
    except CopgenError as error:
        raise UsageError(str(error)) from error


_OTHERS = ("displacement_norm", "pretrain_loss", "mi_lower_bound", "seconds")


def _expect_metric(study: Study) -> None:
    """Raises UsageError where no evaluation of an arm's gives the number that the study tests."""
    for arm in study.arms:
        evals = parts_of(study.preset, {**study.settings, **arm.settings}).evals
        own = any("." in name or "/" in name for name in evals)
        prefixes = tuple(f"{registry.label(name).replace('-', '_')}_" for name in evals)
        if not own and not study.metric.startswith((*prefixes, *_OTHERS)):
            raise UsageError(
                f"metric {study.metric}: arm {arm.name} has evaluations {', '.join(evals)}, and none gives a number of "
                "this name: choose another --metric, or other --probe.evals"
            )


def units(planned: list[Planned]) -> list[Unit]:
    """What is to be run: the runs that are not done, and before each what it needs that is not done either."""
    found: dict[Path, Unit] = {}

    def add(unit: Unit) -> None:
        if not unit.done and unit.folder not in found:
            for need in unit.needs:
                add(need)
            found[unit.folder] = unit

    for run in planned:
        add(run.unit)
        if run.baselines is not None:
            add(run.baselines)
    return list(found.values())
