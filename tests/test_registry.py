import re

import pytest

from copgen_fast import registry
from copgen_fast.errors import UsageError

PART = '''
from dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    """Options of the part."""

    std: float = 0.2
    """Scale of the noise."""
    sizes: tuple[int, ...] = (1, 2)
    fancy: bool = False
    top: float | None = None
'''


@pytest.fixture
def part(tmp_path):
    path = tmp_path / "my_part.py"
    path.write_text(PART)
    return str(path)


def test_a_folder_lists_its_parts():
    assert registry.names("positives") == ("gaussian", "identity", "navigator", "steering", "untrained-navigator")
    assert "digits" in registry.names("generators") and "fit" not in registry.names("generators")
    module = registry.load("positives", "untrained-navigator")
    assert module.__name__ == "copgen_fast.positives.untrained_navigator"


@pytest.mark.parametrize("name", ["", "stearing", "__init__", "."])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(UsageError, match="in positives: choose from gaussian, identity"):
        registry.load("positives", name)


def test_a_file_and_a_module_of_the_users_own_are_imported(part, monkeypatch, tmp_path):
    first = registry.load("positives", part)
    assert registry.load("positives", part) is first and registry.label(part) == "my_part"
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "my_gan.py").write_text(PART)
    assert registry.load("generators", "my_package.my_gan").Config().sizes == (1, 2)
    assert registry.label("my_package.my_gan") == "my_gan"


def test_a_file_that_changed_is_read_anew(part):
    before = registry.load("positives", part).Config().std
    with open(part, "a") as file:
        file.write("    other: int = 3\n")
    assert before == 0.2 and registry.load("positives", part).Config().other == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.py", None, "there is no such file"),
        ("bad.py", "import nothing_of_this_name", "fails with ModuleNotFoundError: .*nothing_of_this_name"),
        ("odd.py", "1 / 0", "fails with ZeroDivisionError"),
        (
            "script.py",
            "import sys\nsys.exit(2)",
            r"fails with SystemExit: 2 \(line 2 of script.py\)",
        ),
        ("wrong.py", "class Config:\n    pass\n", "Config must be a dataclass"),
        (
            "bare.py",
            "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Config:\n    width: int\n",
            "bare.py: its Config must give width a default",
        ),
    ],
)
def test_a_file_that_is_no_part_is_refused(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        registry.options("methods", str(tmp_path / name))


@pytest.mark.parametrize("kind", registry.KINDS)
def test_a_part_without_its_function_is_told_which(tmp_path, kind):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UsageError, match=re.escape(f"empty.py has no function {registry.FUNCTIONS[kind]}")):
        registry.function(kind, str(tmp_path / "empty.py"))


def test_a_module_that_fails_is_refused():
    with pytest.raises(UsageError, match="methods no_such.module: importing it fails"):
        registry.load("methods", "no_such.module")


def test_options_are_read_by_the_parts_own_dataclass(part):
    assert registry.options("positives", part, ["sizes="]).sizes == ()
    given = registry.options("positives", part, ["std=.5", "sizes=3,4,5", "fancy=True", "top=2"])
    assert (given.std, given.sizes, given.fancy, given.top) == (0.5, (3, 4, 5), True, 2.0)
    assert registry.options("positives", part) == registry.config_class("positives", part)()
    assert registry.options("positives", "identity") == registry.NoOptions()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("std=x", "options of my_part .*--std.*'x'"),
        ("stdd=1", "option 'stdd' of my_part .*choose from fancy, sizes, std, top"),
        ("std", "write it as field=value"),
        ("fancy=perhaps", "--fancy"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(part, word, message):
    with pytest.raises(UsageError, match=message) as error:
        registry.options("positives", part, [word])
    assert "\n" not in str(error.value)


def test_an_option_of_a_part_without_any_is_refused():
    with pytest.raises(UsageError, match=re.escape("option 'std' of identity (positives) does not exist: it has none")):
        registry.options("positives", "identity", ["std=1"])


def test_help_lists_every_option_with_its_default_and_explanation(part):
    text = registry.describe("positives", part)
    assert "--positive.options my_part.FIELD=VALUE" in text
    assert "std FLOAT" in text and "Scale of the noise. (default: 0.2)" in text and "sizes" in text
    assert "no options" in registry.describe("positives", "identity")
