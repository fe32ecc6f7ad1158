"""Compare settings over seeds: python -m copgen_fast.study PRESET|STUDY --seeds 0..4 --vary FIELD=a,b --out DIR.

Each run is an ordinary one of `python -m copgen_fast.train`, in a folder of DIR/runs. What runs share, as pairs or a
navigator, is made once, in DIR/shared. DIR/results.json has the numbers of all, and the tables are made of it. The same
command goes on where it was stopped; several at once, on other hosts too, share the work.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from copgen_fast import options, registry
from copgen_fast.errors import UsageError, command
from copgen_fast.options import Count
from copgen_fast.presets import PRESETS
from copgen_fast.runtime.interrupts import handle_signals
from copgen_fast.runtime.progress import progress
from copgen_fast.studies import Study, _calibrate, _execute, _grid, _plan, _results, _reuse, _settings

COMMAND = "python -m copgen_fast.study"


@dataclass(frozen=True)
class StudyConfig:
    """Run a study: its arms, once for each seed. Further words, --pretrain.epochs 3, are settings of all runs."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET|STUDY")]
    """A preset, whose settings --vary, or a study (built in, a module or a file)."""
    seeds: str = "0..4"
    """As 0..4 or 0,3,7: each arm is run once for each."""
    vary: tuple[str, ...] = ()
    """FIELD=a,b: the product of them is the arms, of a study times its own. + joins values that one run has together:
    probe.evals=linear+knn. positive.options.*.distance=1,2 is that option of whichever way an arm has."""
    options: Annotated[tuple[str, ...], tyro.conf.arg(name="study.options")] = ()
    """A study's own, as field=value; `python -m copgen_fast.train --help NAME` lists them."""
    out: Path | None = None
    """Folder of the study; None: runs/study-NAME."""
    baseline: str = ""
    """Arm that others are compared with; empty: the study's, or the first."""
    within: tuple[str, ...] = ()
    """Fields within whose values arms are compared: each with that which has its values and else the baseline's."""
    metric: str = ""
    """The number that is tested; empty: the study's, or linear_top1."""
    columns: tuple[str, ...] = ()
    """Further numbers in tables."""
    reuse: tuple[Path, ...] = ()
    """Run folders of `train`: runs of the same settings take their navigators, walks, pairs and encoders from there."""
    jobs: Count | None = None
    """Runs side by side. None: one for each GPU; on the CPU one for each two cores."""
    print_commands: bool = False
    """Print the runs' commands, and a SLURM array that shares the study out, and run nothing."""


def parse(words: list[str]) -> tuple[StudyConfig, dict[str, _settings.Value]]:
    """A command line: the study's own options, and settings of all runs."""
    own = {field.name.replace("_", "-") for field in dataclasses.fields(StudyConfig)} - {"name", "options"}
    name, rest = (words[:1], words[1:]) if words and not words[0].startswith("-") else ([], words)
    given: dict[str, list[str]] = {}
    others: list[str] = []
    rest = ["--help" if word == "-h" else word for word in rest]
    for flag, values in _settings.grouped(rest):
        if flag.replace("_", "-") in own or flag in ("study.options", "help"):
            given.setdefault(flag, []).extend(values)
        else:
            others += [f"--{flag}", *values]
    mine = [word for flag, values in given.items() for word in (f"--{flag}", *values)]
    config = options.parse(StudyConfig, [*name, *mine], COMMAND)
    return config, _settings.parse(others)


def study_of(config: StudyConfig, settings: dict[str, _settings.Value]) -> Study:
    """The study that a command asks for, with all its arms.

    Raises:
        UsageError: an unknown name, or as `_grid.expand`.
    """
    if config.name in PRESETS:
        if config.options:
            raise UsageError(f"--study.options: {config.name} is a preset and has none: leave it out")
        study = Study(config.name, (), title=config.name)
    else:
        study = _built(config)
    for name in settings:
        if any(name in map(_settings.canonical, arm.settings) for arm in study.arms):
            raise UsageError(f"--{name}: the study's arms differ in it: leave it out")
    metric = config.metric or (study.metric if study.arms else _first_metric(study, settings))
    changed = {"metric": metric, "baseline": config.baseline or study.baseline}
    if config.within:
        changed["within"] = tuple(map(_settings.canonical, config.within))
    if config.columns:
        changed["columns"] = config.columns
    study = dataclasses.replace(study, settings={**study.settings, **settings}, **changed)
    expanded = _grid.expand(study, _grid.vary(config.vary))
    for name in map(_settings.canonical, config.within):
        if len({arm.settings.get(name) for arm in expanded.arms}) < 2:
            raise UsageError(f"--within {name}: no arms differ in it: leave it out, or --vary it")
    return expanded


def _built(config: StudyConfig) -> Study:
    known = registry.names("studies")
    if config.name not in known and "." not in config.name and "/" not in config.name:
        raise UsageError(
            f"{config.name!r} is neither a preset ({', '.join(PRESETS)}) nor a study ({', '.join(known)}): "
            "choose one, or give a file (./my_study.py)"
        )
    build = registry.function("studies", config.name)
    study = build(registry.options("studies", config.name, config.options))
    if not isinstance(study, Study) or not study.arms:
        raise UsageError(f"study {config.name}: build must return a copgen_fast.studies.Study with arms")
    return study


def _first_metric(study: Study, settings: dict[str, _settings.Value]) -> str:
    evals = _settings.parts_of(study.preset, settings).evals
    if "linear" in evals or not evals:
        return study.metric
    return f"{registry.label(evals[0]).replace('-', '_')}_top1"


def commands(planned: list[_plan.Planned], words: list[str], out: Path) -> str:
    """The runs' own commands, and the lines of a SLURM array of study commands that share the work."""
    own = "\n".join(shlex.join(["python", "-m", "copgen_fast.train", *run.unit.words]) for run in planned)
    again = shlex.join([word for word in words if word != "--print-commands"])
    return (
        "# The runs as separate commands, in any order. Each makes its navigator and pairs itself.\n"
        f"{own}\n\n# Or a SLURM array of commands that share the study out: sbatch this.\n"
        "#!/bin/bash\n#SBATCH --array=0-3\n#SBATCH --gres=gpu:1\n#SBATCH --cpus-per-task=8\n"
        f"#SBATCH --output={out}/slurm-%A_%a.log\n#SBATCH --signal=B:TERM@120\n"
        f"exec {COMMAND} {again} --jobs 1"
    )


def run(study: Study, seeds: tuple[int, ...], folder: Path, jobs: int | None, reuse: tuple[Path, ...] = ()) -> int:
    """Run what is not done of a study; returns the exit code, 1 where a run failed."""
    planned = _reuse.reuse(_plan.plan(study, seeds, folder), reuse)
    units = _plan.units(planned)
    if units:
        _execute.prepare()
    _plan.validate(study, planned)
    whole, every = _results.reopen(study, seeds, folder)
    runs = {run.unit.folder for run in planned}
    device = str(study.settings.get("device", "auto"))
    writer = _results.Writer(whole, every, folder)
    label, before = f"study {study.title or study.preset}", len(runs) - sum(unit.folder in runs for unit in units)
    with progress(len(runs), label, "runs", initial=before) as bar, handle_signals():

        def tell(unit: _plan.Unit, error: str | None) -> None:
            if error:
                tqdm.write(f"copgen_fast: {unit.name} failed: {error}", file=sys.stderr)
            if unit.folder in runs:
                writer.write()
                bar.update(1)

        failed = _execute.execute(units, folder / _results.LOGS, _execute.slots(jobs, device), tell)
    print(writer.write(last=True))
    return 1 if failed else 0


@command
def main(arguments: list[str] | None = None) -> int:
    """Run a study; returns the exit code: 0, 1 where a run failed, 2 for a fault of usage, 130 when stopped."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["calibrate"]:
        return _calibrate.main(words[1:])
    config, settings = parse(words)
    study, seeds = study_of(config, settings), _grid.seeds(config.seeds)
    folder = config.out or Path("runs") / f"study-{registry.label(config.name)}"
    if config.print_commands:
        print(commands(_plan.plan(study, seeds, folder), words, folder))
        return 0
    if len(seeds) == 1:
        print("note: one seed has no spread, so there will be no interval: --seeds 0..4 gives one", file=sys.stderr)
    return run(study, seeds, folder, config.jobs, config.reuse)


if __name__ == "__main__":
    sys.exit(main())
