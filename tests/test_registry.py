import pytest

from copgen_fast import registry
from copgen_fast.errors import UsageError


def test_a_folder_is_a_registry():
    assert registry.names("copgen_fast.positives") == ["gaussian", "identity", "navigator", "untrained-navigator"]
    module = registry.load("copgen_fast.positives", "untrained-navigator")
    assert module.__name__ == "copgen_fast.positives.untrained_navigator"


@pytest.mark.parametrize("name", ["", "steering", "__init__", "os.path", "../errors"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(UsageError, match="in positives: choose from gaussian, identity"):
        registry.load("copgen_fast.positives", name)
