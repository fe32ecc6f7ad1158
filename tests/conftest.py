import pytest
import torch

TINY = """quickstart --device cpu --log-every 1 --save-every 2
    --navigator.samples 64 --navigator.batch 16 --navigator.grid-every 32
    --pairs.count 48 --pairs.shard-size 16 --pairs.batch 16
    --pretrain.epochs 2 --pretrain.batch 16""".split()
"""The quickstart in seconds: every stage and every method, too short to learn anything."""


@pytest.fixture(autouse=True)
def few_threads():
    """Tests compute little: more threads only make them wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A run folder with every stage of the tiny quickstart in it; tests only read it."""
    from copgen_fast.train import main

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main([*TINY, "--out", str(folder)]) == 0
    return folder
