"""Studies that run: shared parts, several commands, kills, failures."""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal

import pytest

from copgen_fast import study, train
from copgen_fast.runtime import artifacts
from copgen_fast.studies import _execute, _results, _settings
from tests.helpers import processes
from tests.helpers.study_runs import ARMS, ONE, TINY, found, words


def killed(arguments):
    """A study's command that is killed after its first run, while another one is running."""
    write = _results.Writer.write

    def kill(self, last=False):
        write(self, last)
        os.kill(os.getpid(), signal.SIGKILL)

    _results.Writer.write = kill
    _execute.prepare = lambda: multiprocessing.get_context("fork")  # of this process, which has imported everything
    return study.main(arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of 2 x 2 arms and 2 seeds."""
    folder = tmp_path_factory.mktemp("studies") / "tiny"
    assert study.main(words(folder)) == 0
    return folder


def test_all_runs_are_done_and_shared_parts_are_made_once(finished):
    numbers, states = found(finished)
    assert set(states.values()) == {"done"} and len(states) == 8 and len(numbers) == 8 + 2 * 4
    assert all(one["knn_top1"] > 0 for one in numbers.values())
    assert numbers["navigator digits", 0]["displacement_norm"] == numbers["navigator none", 0]["displacement_norm"] > 0
    assert numbers["identity digits", 1]["displacement_norm"] == 0
    made = sorted(path.name.rpartition("-")[0] for path in (finished / "shared").iterdir())
    assert made == [*["baselines"] * 4, *["navigator"] * 2, "pairs-identity", *["pairs-navigator"] * 2]
    for name in ("study.json", "study.html", "table.txt", "table.md", "table.tex", "table.csv"):
        assert (finished / name).exists()


def test_a_run_is_what_its_own_command_makes(finished, tmp_path, capsys):
    assert study.main([*words(finished, seeds="1"), "--print-commands"]) == 0
    printed = capsys.readouterr().out
    assert "#SBATCH --array" in printed and "--print-commands" not in printed
    line = next(line for line in printed.splitlines() if "navigator_none/seed-1" in line)
    own = tmp_path / "own"
    command = line.split()[3:]
    assert train.main([*command[: command.index("--out")], "--out", str(own)]) == 0
    encoder = "pretrain/navigator/simclr/encoder.safetensors"
    there = finished / "runs" / "navigator_none" / "seed-1"
    tensors = [artifacts.read_tensors(folder / encoder) for folder in (own, there)]
    assert artifacts.tensors_digest(tensors[0]) == artifacts.tensors_digest(tensors[1])
    before = (there / encoder).stat().st_mtime_ns
    assert train.main(command) == 0  # in the study's own folder: nothing is left to do
    assert (there / encoder).stat().st_mtime_ns == before and (there / "navigator").is_symlink()


def test_a_run_made_before_is_taken_and_evaluated_again(finished, tmp_path):
    there = finished / "runs" / "navigator_none" / "seed-1"
    folder, one = tmp_path / "study", ["--vary", "pairs.positives=navigator", "--pretrain.augmentation", "none"]
    assert study.main(words(folder, "--reuse", str(there), arms=one, seeds="1")) == 0
    assert found(folder)[0]["navigator", 1] == found(finished)[0]["navigator none", 1]
    assert [path.name.rpartition("-")[0] for path in (folder / "shared").iterdir()] == ["baselines"]
    run = folder / "runs" / "navigator" / "seed-1"
    assert (run / "pretrain" / "navigator").is_symlink() and not (run / "probe").is_symlink()


def test_a_killed_study_goes_on_to_the_same_results(finished, tmp_path):
    folder = tmp_path / "study"
    child = processes.run(killed, words(folder, seeds="0"))
    assert child.code == -signal.SIGKILL, child.stderr
    states = found(folder)[1]
    assert "done" in states.values() and "waiting" in states.values()
    assert study.main(words(folder, seeds="0")) == 0
    whole = ({run: value for run, value in of.items() if run[1] == 0} for of in found(finished))
    assert found(folder) == tuple(whole)


def test_a_stop_saves_and_the_command_says_so(tmp_path, monkeypatch, capsys):
    folder, write = tmp_path / "study", _results.Writer.write

    def stop(self, last=False):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(self, last)

    monkeypatch.setattr(_results.Writer, "write", stop)
    assert study.main(words(folder, arms=ONE, seeds="0,1")) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert "done" in found(folder)[1].values()


def test_a_folder_in_use_is_passed_over_and_looked_at_again(tmp_path, monkeypatch):
    folder, write = tmp_path / "study", _results.Writer.write
    order = []
    with contextlib.ExitStack() as held:
        held.enter_context(artifacts.folder_lock(folder / "runs" / "identity" / "seed-0"))

        def release(self, last=False):
            order.append(found(folder)[1] if order else {})
            held.close()  # the other command's end
            return write(self, last)

        monkeypatch.setattr(_results.Writer, "write", release)
        assert study.main(words(folder, arms=ONE, seeds="0,1")) == 0
    assert order[1] == {("identity", 0): "waiting", ("identity", 1): "done"}
    assert set(found(folder)[1].values()) == {"done"}


def test_a_failed_run_is_told_and_others_go_on(tmp_path, capsys):
    way, folder = tmp_path / "bad_way.py", tmp_path / "study"
    way.write_text("def build(setting):\n    raise RuntimeError('no luck')\n")
    command = words(folder, arms=["--vary", f"pairs.positives=identity,{way}"], seeds="0")
    assert study.main(command) == 1
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "failed" in line]
    assert len(lines) == 2  # the pairs, and the run that needs them
    assert all("RuntimeError: no luck" in line and ".log" in line for line in lines)
    assert "1 of 2 runs are done" in said.out and "one seed" in said.err
    assert found(folder)[1] == {("identity", 0): "done", ("bad_way", 0): "failed"}
    way.write_text("def build(setting):\n    return lambda z, seeds: z + 1\n")
    assert study.main(command) == 0  # tries again
    assert found(folder)[1]["bad_way", 0] == "done"


def test_seeds_and_arms_are_added_but_no_other_study(finished, tmp_path, capsys):
    def refused(*other):
        return study.main(words(finished, *other)), capsys.readouterr().err

    assert refused("--pretrain.lr", "1")[1].count("pretrain.lr (None there, 1 here)") == 1
    assert "of other metric" in refused("--metric", "knn_top5")[1]
    assert "of other baseline" in refused("--baseline", "identity none")[1]
    other = tmp_path / "my_study.py"
    fields = f"{_settings.parse(TINY)!r}, baseline='identity digits', metric='knn_top1'"
    other.write_text(
        "from copgen_fast.studies import Arm, Study\n"
        "def build(config):\n"
        f"    return Study('quickstart', (Arm('identity digits', {{'pairs.positives': 'navigator'}}),), {fields})\n"
    )
    assert study.main([str(other), "--out", str(finished)]) == 2
    assert "of other arm identity digits: pairs.positives" in capsys.readouterr().err
    record = json.loads((finished / "study.json").read_text())
    assert record["seeds"] == [0, 1] and len(record["arms"]) == 4
    assert study.main(["quickstart", *ARMS, *TINY, "--out", str(tmp_path)]) == 2
    assert re.search(r"holds \S+ and no study", capsys.readouterr().err)


def test_a_metric_that_no_run_gave_may_be_corrected(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "study", symlinks=True)
    record = artifacts.read_record(folder / "study.json")
    artifacts.write_record(folder / "study.json", record | {"metric": "knn_top_1"})
    assert study.main(words(folder, "--metric", "knn_top_2")) == 0
    assert "No run gave knn_top_2; there are knn_top1" in " ".join(capsys.readouterr().out.split())
    assert study.main(words(folder)) == 0
    assert (folder / "table.csv").read_text() == (finished / "table.csv").read_text()
    assert study.main(words(folder, "--metric", "knn_top_2")) == 2
    assert "of other metric" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quick"], "'quick' is neither a preset"),
        (["./none.py"], "there is no such file"),
        ([], "required"),
        (["quickstart", "--seeds", "x"], "--seeds x"),
        (["quickstart", "--baseline", "x"], "baseline 'x' is no arm"),
        (["quickstart", "--metric", "x"], "metric x: arm identity"),
        (["quickstart", "--jobs", "0"], "--jobs"),
        (["quickstart", "--study.options", "a=b"], "is a preset and has none"),
        (["quickstart", "--pretrain.epochs", "x"], "arm identity: "),
        (["quickstart", "--device", "abacus"], "arm identity: --device abacus is not usable here"),
        (
            ["quickstart", "--pretrain.data", "real", "--vary", "pairs.positives=identity,gaussian"],
            "no arm of the study",
        ),
        (["table5", "--navigator.samples", "9"], "--navigator.samples: the study's arms differ in it"),
        (["table5", "--vary", "navigator.samples=1,2"], "--vary navigator.samples: the study's arms differ in it"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(arguments, message, tmp_path, capsys):
    out = tmp_path / "study"
    assert study.main([*arguments[:1], "--out", str(out), *arguments[1:]]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not out.exists()


def test_a_study_may_be_a_file_with_options(tmp_path, capsys):
    path = tmp_path / "my_study.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "from copgen_fast.studies import Arm, Study\n"
        "@dataclass(frozen=True)\nclass Config:\n    epochs: int = 1\n"
        "def build(config):\n"
        "    arms = (Arm('a', {'pairs.positives': 'identity'}), Arm('b', {'pairs.positives': 'gaussian'}))\n"
        "    return Study('quickstart', arms, {'pretrain.epochs': str(config.epochs)}, baseline='b')\n"
    )
    assert study.main([str(path), "--study.options", "epochs=7", "--seeds", "0", "--print-commands"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    assert len(lines) == 2 and all("--pretrain.epochs 7" in line for line in lines)
    assert "runs/study-my_study/runs/b/seed-0" in lines[1]
    assert study.main([str(path), "--pairs.positives", "identity"]) == 2
    assert "the study's arms differ in it" in capsys.readouterr().err
