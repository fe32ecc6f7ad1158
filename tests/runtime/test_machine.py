"""Facts about the machine."""

import os

import torch

from copgen_fast.runtime import machine


def test_the_machine_is_described():
    assert machine.processor()
    assert 1 <= machine.cores() <= os.cpu_count()
    assert machine.version("torch") == torch.__version__.partition("+")[0]
    assert machine.version("no-such-package") is None
    assert machine.driver() is None or machine.driver()[0].isdigit()
