"""What the README shows must run."""

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"
SECTION = re.search(r"^## Use the ops elsewhere$(.*?)^## ", README.read_text(), re.MULTILINE | re.DOTALL)[1]


def run(heading):
    """Names that the example under a heading leaves behind."""
    (code,) = re.findall(
        r"```python\n(.*?)```", SECTION.partition(f"### {heading}\n")[2].partition("\n### ")[0], re.DOTALL
    )
    torch.manual_seed(0)
    names = {}
    exec(code, names)
    return names


def test_the_augmentation_example_runs():
    names = run("Augmentation")
    assert names["views"].shape == (16, 3, 64, 64) and names["images"].grad.abs().sum() > 0


def test_the_info_nce_example_runs():
    names = run("InfoNCE")
    assert 5 < names["loss"] < 15 and 0 <= names["stats"].contrastive_top1 <= 1


def test_the_normalisation_example_runs():
    names = run("A generator's normalisation")
    expected = (names["x"] * names["scale"][:, :, None, None] + names["shift"][:, :, None, None]).relu()
    torch.testing.assert_close(names["y"], expected)
