import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from copgen_fast import train, verify
from copgen_fast.config import STAGES
from copgen_fast.generators.digits import EMBEDDED
from copgen_fast.pairs.read import dali
from copgen_fast.presets import PRESETS
from copgen_fast.runtime import artifacts
from copgen_fast.stages import navigator
from copgen_fast.train import main, parse
from tests.conftest import TINY
from tests.helpers import processes

ROWS = ("random", "pixels", "identity", "gaussian", "untrained-navigator", "navigator")


def fails(arguments, capsys):
    """Run a command that must fail for a fault of usage; returns its only line."""
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_one_command_makes_every_artefact(finished_run):
    for name in ROWS[2:]:
        assert (finished_run / "pairs" / name / "index.json").exists()
        assert (finished_run / "pretrain" / name / "simclr" / "encoder.safetensors").exists()
    for name in ("config.json", "generator.json", "versions.json", "report.html", "metrics.json", "metrics.jsonl"):
        assert (finished_run / name).stat().st_size > 0
    kept = sorted(path.name for path in (finished_run / "navigator" / "kept").iterdir())
    assert kept == ["0000000000.safetensors", "0000000032.safetensors", "0000000064.safetensors"]
    grids = sorted(path.name for path in (finished_run / "navigator" / "grids").iterdir())
    assert grids == ["0000000000.png", "0000000032.png", "0000000064.png"]
    assert any((finished_run / "navigator" / "tensorboard").iterdir())
    assert not list(finished_run.rglob("*.incomplete"))


def test_a_log_file_gets_short_plain_lines(tmp_path, capfd):
    assert main([*TINY, "--out", str(tmp_path / "run"), "--stages", "navigator"]) == 0
    for text in capfd.readouterr():
        assert "\r" not in text and 0 < max(map(len, text.splitlines())) < 500 and text.count("\n") < 50, (
            "a line at times, no bar"
        )


def test_metrics_have_the_promised_names(finished_run):
    metrics = json.loads((finished_run / "metrics.json").read_text())
    promised = [
        "navigator.displacement_norm",
        "navigator.loss",
        "pairs.count",
        "pairs.images_per_s",
        "pretrain.views_per_s",
    ]
    for source in ROWS:
        names = [f"probe.{source}.{name}" for name in ("linear_top1", "knn_top1", "lowshot_top1")]
        assert all(0 <= metrics[name] <= 1 for name in names)
        promised += names
    assert all(isinstance(metrics[name], (int, float)) for name in promised)
    assert metrics["pairs.count"] == 48
    assert (metrics["navigator.samples"], metrics["navigator.steps"]) == (64, 4)


def test_the_same_command_again_changes_no_result(finished_run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished_run, folder)
    assert main([*TINY, "--out", str(folder)]) == 0
    for path in finished_run.rglob("*"):
        if path.suffix in (".safetensors", ".tar", ".json", ".jsonl"):
            assert (folder / path.relative_to(finished_run)).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quikstart"], "unknown preset 'quikstart': choose from .*quickstart.*did you mean quickstart"),
        (["quickstart", "--stages", "nowhere"], "invalid choice:? 'nowhere'.*navigator.*report"),
        (["quickstart", "--navigator.learning-rate", "1"], "navigator.learning-rate"),
        (["quickstart", "--navigator.lr", "fast"], "fast"),
        (["quickstart", "--generator.name", "biggan9"], "unknown name 'biggan9' in generators: choose from"),
        (["quickstart", "--navigator.augmentation", "simklr"], "simklr"),
        (["quickstart", "--probe.evals", "astrology"], "astrology"),
        (["quickstart", "--device", "abacus"], "--device abacus is not usable here"),
        (["quickstart", "--device", "cpu", "--precision", "fp16"], "fp16 needs a CUDA device"),
        (["quickstart", "--stages", "pairs"], "run `--stages navigator` on this --out first"),
        (["quickstart", "--stages", "pretrain"], "run `--stages pairs`"),
        (["quickstart", "--stages", "probe"], "run `--stages pretrain`"),
        (["quickstart", "--stages", "report"], "run `--stages probe`"),
        (["quickstart", "--navigator.batch", "0"], "navigator.batch"),
        (["quickstart", "--pretrain.lr", "nan"], "pretrain.lr"),
        (["quickstart", "--device", "cpu", "--optimizer.impl", "apex"], "impl apex needs a CUDA device"),
        (["quickstart", "--pretrain.accumulate", "5"], "pretrain.accumulate: expected a divisor of"),
        (["cifar10"], "data set 'npz' needs --data.root: an .npz file"),
        (["cifar10", "--data.root", "/no.npz", "--stages", "probe"], "--data.root /no.npz does not exist"),
        (["quickstart", "--data.name", "digit"], "unknown data set 'digit'"),
        (["quickstart", "--method", "supcon"], "supcon needs classes, and generator digits has none"),
        (["quickstart", "--method", "simklr"], "unknown name 'simklr' in methods: choose from .*simclr, "),
        (["quickstart", "--method.options", "temprature=1"], "option 'temprature' of simclr.*choose from"),
        (["quickstart", "--method.options", "temperature=0"], "temperature: expected 0.0001 to 10000, got 0"),
        (
            ["quickstart", "--generator.name", "residual-flow", "--generator.options", "truncation=1"],
            "option 'truncation' of residual-flow.*it has none",
        ),
        (["quickstart", "--positive.options", "std=1"], "option 'std=1' .positives.: write it as NAME.field=value"),
        (["quickstart", "--evals.options", "knn.neighbours=x"], "options of knn .*neighbours.*'x'"),
        (["quickstart", "--pairs.positives", "./none.py"], "positives none.py: there is no such file"),
        (["quickstart", "--pretrain.loss", "supcon"], "--pretrain.loss has moved: write --method simclr"),
        (["quickstart", "--pairs.gaussian-std=1"], "moved: write --positive.options gaussian.std=VALUE"),
        (["quickstart", "--probe.neighbours", "5"], "moved: write --evals.options knn.neighbours=VALUE"),
        (
            "quickstart --method supcon --pairs.positives identity --stages pairs pretrain".split(),
            "supcon needs classes, and generator digits has none",
        ),
        (["quickstart", "--generator.checkpoint", "--stages", "navigator"], "generator.checkpoint: digits at level"),
    ],
)
def test_faults_of_usage_are_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    line = fails([*arguments, "--out", str(tmp_path / "run")] if arguments != ["quikstart"] else arguments, capsys)
    assert re.search(message, line), line


def test_another_runs_folder_is_refused(finished_run, tmp_path, capsys):
    line = fails([*TINY, "--seed", "3", "--out", str(finished_run)], capsys)
    assert "holds a run of another configuration: seed (0 there, 3 here)" in line
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty and holds no run" in fails([*TINY, "--out", str(tmp_path)], capsys)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_evaluations_and_their_data_may_change_until_there_is_a_result(copied_run, capsys):
    same = [*TINY, "--out", str(copied_run)]
    other = [*same, "--data.image-size", "8", "--probe.evals", "collapse", "--stages", "probe"]
    assert "data.image_size (16 there, 8 here); probe.evals" in fails(other, capsys)
    shutil.rmtree(copied_run / "probe")
    assert "pretrain.data (pairs there, real here)" in fails([*other, "--pretrain.data", "real"], capsys)
    assert main(other) == 0
    capsys.readouterr()
    assert json.loads((copied_run / "config.json").read_text())["data.image_size"] == 8
    assert "data.image_size (8 there, 16 here)" in fails(same, capsys)


def opened(arguments):
    """The run folder as a run of these arguments leaves it when a stage begins."""
    with train.open_run(parse(arguments), torch.device("cpu")) as run:
        (run.folder / "pretrain").mkdir(exist_ok=True)


OWN = "from copgen_fast.generators.digits import build\n"


def test_files_are_the_same_wherever_they_lie_if_their_content_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for place in (Path("w.safetensors"), Path("own.py"), Path("other", "w.safetensors"), Path("other", "own.py")):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(EMBEDDED.read_bytes() if place.suffix == ".safetensors" else OWN.encode())
    command = [*TINY, "--out", "run", "--generator.name", "./own.py", "--generator.weights"]
    opened([*command, "w.safetensors"])
    for weights, own in ((tmp_path / "w.safetensors", tmp_path / "own.py"), ("other/w.safetensors", "other/own.py")):
        opened([*TINY, "--out", "run", "--generator.name", str(own), "--generator.weights", str(weights)])
    Path("other", "own.py").write_text(OWN + "# another")
    line = fails(
        [*TINY, "--out", "run", "--generator.name", "other/own.py", "--generator.weights", "w.safetensors"], capsys
    )
    assert "generator.name (own.py of sha256" in line
    os.rename("w.safetensors", "gone")
    opened([*command, "w.safetensors", "--stages", "probe"])  # needs no generator
    Path("w.safetensors").write_bytes(b"other")
    assert "generator.weights.sha256 (" in fails([*command, "w.safetensors"], capsys)
    shutil.copy("gone", "w.safetensors")
    opened([*command, "w.safetensors"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "config.json: its content: expected an object, got []"),
        ("null", "expected an object, got None"),
        ("3", "expected an object, got 3"),
        ("[" * 10**5, "config.json is not valid JSON (nested too deeply)"),
        ('{"a": ' * 90 + "1" + "}" * 90, "config.json: a: expected a list, got {'a': "),
        ('{"seed": "0"}', "config.json: seed: expected an integer of 64 bits, got '0'"),
        ('{"seed": 1' + "0" * 19 + "}", "config.json: seed: expected an integer of 64 bits"),
        ('{"pairs.positives": [1]}', "config.json: pairs.positives[0]: expected text, got 1"),
        ('{"method": null}', "config.json: method: expected text, got None"),
        ('{"generator.level": "turbo"}', "config.json: generator.level: expected one of ('auto'"),
        ('{"generator.options.a": {}}', "config.json: generator.options.a: expected a list, got {}"),
        ("\ud800", "is not valid JSON ('utf-8' codec"),
    ],
)
def test_an_altered_record_of_a_run_is_named_with_its_field(tmp_path, capsys, text, message):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    for command in (lambda: main([*TINY, "--out", str(tmp_path)]), lambda: verify.main([str(tmp_path)])):
        assert command() in (1, 2)
        line = capsys.readouterr().err
        assert message in line and line.count("\n") == 1


def test_the_data_may_lie_elsewhere_each_time(copied_run):
    record = json.loads((copied_run / "config.json").read_text())
    # As older versions recorded it.
    (copied_run / "config.json").write_text(json.dumps(record | {"data.root": "/there"}))
    assert main([*TINY, "--out", str(copied_run), "--stages", "report", "--data.root", "/here"]) == 0


def test_images_pretrained_on_are_a_runs_own(tmp_path, capsys):
    real = [*TINY, "--out", str(tmp_path), "--pretrain.data", "real", "--stages", "pretrain"]
    config = parse(real)
    with train.open_run(config, torch.device("cpu")) as run:
        (run.folder / "pretrain").mkdir()
    assert "data.image_size (16 there, 32 here)" in fails([*real, "--data.image-size", "32"], capsys)


def test_dali_that_is_missing_is_said_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dali, "available", lambda: False)
    line = fails([*TINY, "--out", str(tmp_path / "run"), "--pretrain.loader", "dali"], capsys)
    assert "DALI is not installed" in line and not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused(copied_run, capsys):
    arguments = [*TINY, "--out", str(copied_run), "--stages", "report"]
    with artifacts.folder_lock(copied_run):
        assert f"{copied_run} is in use by another command" in fails(arguments, capsys)
    assert main(arguments) == 0


def test_memory_that_runs_out_is_one_line_that_says_what_to_do(tmp_path, monkeypatch, capsys):
    def full(run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 10 GiB ...")

    monkeypatch.setattr(navigator, "run", full)
    assert main([*TINY, "--out", str(tmp_path / "run")]) == 1
    line = capsys.readouterr().err.strip()
    assert line == (
        "copgen_fast: navigator: CUDA out of memory. Tried to allocate 2.00 GiB: --generator.checkpoint (where the "
        "generator has it) goes on from the last checkpoint with less; or another --out with a smaller batch"
    )
    assert set(train.SPARING) < set(STAGES)


def test_a_run_of_a_version_without_some_option_goes_on(copied_run, capsys):
    record = json.loads((copied_run / "config.json").read_text())
    assert record.pop("method") == "simclr"
    (copied_run / "config.json").write_text(json.dumps(record))
    supervised = [*TINY, "--method", "supcon", "--out", str(copied_run)]
    assert "method (simclr there, supcon here)" in fails(supervised, capsys)
    assert main([*TINY, "--out", str(copied_run), "--stages", "pairs"]) == 0


def test_a_run_keeps_the_level_of_its_generator_whatever_device_it_goes_on_with(copied_run, tmp_path):
    record = copied_run / "config.json"
    assert json.loads(record.read_text())["generator.level"] == "exact", "what auto is on the CPU"
    artifacts.write_json(record, json.loads(record.read_text()) | {"generator.level": "half"})
    assert main([*TINY, "--out", str(copied_run), "--stages", "report"]) == 0
    assert json.loads(record.read_text())["generator.level"] == "half"
    real = [*TINY, "--pretrain.data", "real", "--pretrain.epochs", "1", "--out", str(tmp_path / "real")]
    assert main([*real, "--pretrain.batch", "480", "--stages", "pretrain"]) == 0
    record = tmp_path / "real" / "config.json"
    assert json.loads(record.read_text())["generator.level"] == "auto", "no stage has drawn an image"


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ([], []),
        (["--pretrain.augmentation", "simclr"], ["pretrain"]),
        (["--navigator.augmentation", "simclr", "--pretrain.augmentation", "no-color"], ["navigator", "pretrain"]),
        (["--navigator.augmentation", "simclr", "--stages", "pairs"], []),
        (["--generator.name", "./my_gan.py", "--pretrain.augmentation", "simclr"], []),
        (["--pretrain.data", "real", "--data.name", "mnist", "--pretrain.augmentation", "simclr"], ["pretrain"]),
    ],
)
def test_digits_that_would_be_mirrored_are_warned_of(options, warned):
    lines = train.caveats(parse(["quickstart", *options]))
    assert [line.partition(".")[0] for line in lines] == warned
    assert all("mirrors images, and a mirrored digit is another sign" in line for line in lines)


def help_of(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(arguments)
    assert exit.value.code == 0
    return capsys.readouterr().out


def test_a_run_of_a_version_without_some_option_of_a_part_goes_on_with_its_default(copied_run, capsys):
    record = json.loads((copied_run / "config.json").read_text())
    assert record.pop("positive.options.gaussian.std") == 0.2
    (copied_run / "config.json").write_text(json.dumps(record))
    arguments = [*TINY, "--out", str(copied_run), "--stages", "pairs"]
    other = [*arguments, "--positive.options", "gaussian.std=0.3"]
    assert "positive.options.gaussian.std (0.2 there, 0.3 here)" in fails(other, capsys)
    assert main(arguments) == 0


def test_help_lists_presets_parts_and_fields(capsys):
    text = help_of(["--help"], capsys)
    for word in (*PRESETS, "digits", "untrained-navigator", "simclr", "supcon", "linear-augmented", "./my_part.py"):
        assert word in text
    text = help_of(["quickstart", "--help"], capsys)
    for word in ("--stages", "--navigator.update", "simultaneous", "--pairs.positives", "--method", "--method.options",
                 "--positive.options", "--evals.options", "--generator.options"):  # fmt: skip
        assert word in text


def test_help_of_a_part_lists_its_options(tmp_path, capsys):
    assert "temperature" in help_of(["--help", "simclr"], capsys)
    assert "--positive.options gaussian.FIELD=VALUE" in help_of(["--help", "gaussian"], capsys)
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\n\n@dataclass(frozen=True)\nclass Config:\n    depth: int = 7\n\n"
        "def build(weights, config): ...\n"
    )
    text = help_of(["--help", str(path)], capsys)
    assert "mine (generators)" in text and "depth INT" in text and "7" in text
    assert "no part is called 'nothing': choose from" in fails(["--help", "nothing"], capsys)


def test_dotted_fields_override_the_preset():
    config = parse(["quickstart", "--navigator.update", "simultaneous", "--pairs.positives", "identity", "navigator"])
    assert config.navigator.update == "simultaneous"
    assert config.pairs.positives == ("identity", "navigator")
    assert config.navigator.lr == PRESETS["quickstart"].navigator.lr


def test_the_module_runs_as_a_command(tmp_path):
    arguments = ["quickstart", "--stages", "report", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "copgen_fast.train", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) == 1


def killed(stage, moment, arguments):
    """Run the command until it writes a stage's file of this number."""
    calls, fsync = itertools.count(1), os.fsync

    def fsync_or_die(handle):
        if f"/run/{stage}/" in os.readlink(f"/proc/self/fd/{handle}") + "/" and next(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)  # half on its way: its temporary name is there, the real one is not
        fsync(handle)

    os.fsync = fsync_or_die
    return main(arguments)


def outcome(folder: Path) -> dict:
    files = {}
    for pattern in ("navigator/*.safetensors", "navigator/kept/*", "pairs/*/*.tar", "pairs/*/*.safetensors",
                    "pretrain/*/*/encoder.safetensors", "*/metrics.jsonl", "pretrain/*/*/metrics.jsonl"):  # fmt: skip
        files |= {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob(pattern)}
    return files


def test_killed_at_any_moment_it_ends_bit_equal(finished_run, tmp_path):
    """SIGKILL inside the navigator stage, twice; inside pairs; inside pretraining; then run to the end."""
    folder = tmp_path / "run"
    arguments = [*TINY, "--out", str(folder), "--stages", "navigator", "pairs", "pretrain"]
    for stage, moment in (("navigator", 13), ("navigator", 9), ("pairs", 17), ("pretrain", 30)):
        child = processes.run(killed, stage, moment, arguments)
        assert child.code == -signal.SIGKILL, child.stderr
        assert not (folder / "pretrain" / "navigator" / "simclr" / "encoder.safetensors").exists(), (
            "killed before the end"
        )
    assert main(arguments) == 0
    expected = outcome(finished_run)
    assert len(expected) > 30
    assert outcome(folder) == expected


def test_an_encoder_is_exported_in_torchvisions_names(finished_run):
    names = load_file(finished_run / "pretrain" / "navigator" / "simclr" / "encoder.safetensors").keys()
    assert {"conv1.weight", "bn1.running_mean", "layer4.1.bn2.weight"} <= names
    assert not any(name.startswith(("fc", "head", "encoder")) for name in names)


def test_an_encoder_with_a_weight_missing_is_not_evaluated(copied_run, capsys):
    from safetensors.torch import save_file

    shutil.rmtree(copied_run / "probe")
    path = copied_run / "pretrain" / "gaussian" / "simclr" / "encoder.safetensors"
    tensors = load_file(path)
    del tensors["layer1.0.conv1.weight"]
    save_file(tensors, path)  # as other code does, without a digest
    assert main([*TINY, "--out", str(copied_run), "--stages", "probe"]) == 1
    assert "altered or not copgen_fast's" in capsys.readouterr().err


BROKEN = """
from copgen_fast.generators.digits import DigitsGenerator

class Broken(DigitsGenerator):
    def forward(self, z, labels=None):
        return super().forward(z) + (float("nan") if len(z) > 4 else 0)  # four are drawn as it is checked

def build(weights, config):
    return Broken()
"""


def test_a_nan_from_the_generator_names_step_and_tensor(tmp_path, capsys):
    (tmp_path / "broken.py").write_text(BROKEN)
    broken = ["--generator.name", str(tmp_path / "broken.py"), "--out", str(tmp_path / "run")]
    arguments = [*TINY, *broken, "--pairs.positives", "identity"]
    assert main([*arguments, "--stages", "navigator"]) == 1
    assert "navigator: NaN or infinity in anchor images at step 0" in capsys.readouterr().err
    assert main([*arguments, "--stages", "pairs"]) == 1
    assert "NaN or infinity in sample 0" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("*.tar"))


def test_a_kill_between_the_last_shard_and_its_summary_loses_nothing(finished_run, copied_run):
    (copied_run / "pairs" / "gaussian" / "summary.json").unlink()
    assert main([*TINY, "--out", str(copied_run), "--stages", "pairs", "report"]) == 0
    name = "pairs.gaussian.displacement_norm"
    expected = json.loads((finished_run / "metrics.json").read_text())[name]
    assert json.loads((copied_run / "metrics.json").read_text())[name] == expected
