"""Commands that README and docs show exist, and have the options that they are shown with."""

import contextlib
import importlib
import io
import re
import shlex
from importlib.util import find_spec

import pytest

from copgen_fast import study, train
from copgen_fast.record import identity
from tests.docs.pages import PAGES, ROOT, commands, write_files

SHOWN = sorted({(page.name, command) for page in PAGES for command in commands(page)})


def help_text(module, words):
    """What a command's --help prints; the first word may choose a subcommand."""
    has_main = hasattr(importlib.import_module(module), "main")
    command = importlib.import_module(module if has_main else f"{module}.__main__").main
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        command([*words[:1], "--help"] if words and module in ("bench", "copgen_fast.convert") else ["--help"])
    return out.getvalue()


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_a_command_is_understood(page, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_files(next(path for path in PAGES if path.name == page), tmp_path)
    words = shlex.split(command.partition(" {")[0])
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    stand_ins = {"PRESET": "quickstart", "PRESET|STUDY": "quickstart", "NAME": "knn"}
    module, *words = (stand_ins.get(word, word) for word in words[words.index("-m") + 1 :])
    if module == "copgen_fast.train" and "--help" in words:
        with pytest.raises(SystemExit) as stopped:
            train.parse(words)
        assert not stopped.value.code and capsys.readouterr().out
    elif module == "copgen_fast.train":
        assert identity(train.parse(words))  # which reads the options of parts
    elif module == "copgen_fast.study" and words[:1] != ["calibrate"]:
        assert study.study_of(*study.parse(words)).arms
    elif options := [word for word in words if word.startswith("--")]:
        text = help_text(module, words)
        assert all(re.search(rf"{option}\b", text) for option in options)
    else:
        assert find_spec(module)


def test_options_in_running_text_exist(capsys):
    with pytest.raises(SystemExit):
        train.parse(["quickstart", "--help"])
    text = capsys.readouterr().out + help_text("copgen_fast.evaluate", []) + help_text("copgen_fast.study", [])
    there = set(re.findall(r"--[\w.-]+", text))
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        shown = {option for code in re.findall(r"`([^`\n]+)`", text) for option in re.findall(r"--\w+\.[\w.-]+", code)}
        assert shown <= there, page.name


def test_help_is_asked_of_every_command_shown():
    assert {"train", "evaluate", "verify", "convert", "doctor"} <= {
        match[1] for _, command in SHOWN if (match := re.search(r"-m copgen_fast\.(\w+)", command))
    }
