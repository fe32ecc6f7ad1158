"""What the README shows must run."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"
SECTION = re.search(r"^## Use the ops elsewhere$(.*?)^## ", README.read_text(), re.MULTILINE | re.DOTALL)[1]


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL))
def test_the_ops_example_runs(code):
    torch.manual_seed(0)
    names = {}
    exec(code, names)
    assert names["views"].shape == (16, 3, 64, 64) and names["images"].grad.abs().sum() > 0
