import torch

from copgen_fast.runtime import seeds


def test_every_part_of_the_key_matters_and_nothing_else():
    derived = {seeds.derive(0, "a", 1), seeds.derive(1, "a", 1), seeds.derive(0, "b", 1), seeds.derive(0, "a", 2)}
    assert len(derived) == 4
    assert seeds.derive(0, "a", 1) in derived
    assert 0 <= seeds.derive32(0, "a") < 2**32


def test_streams_are_the_same_in_every_process():
    assert seeds.derive(0, "navigator latents", 3) == 7597238646778627392


def test_a_seeded_block_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with seeds.seeded(0, "encoder"):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with seeds.seeded(0, "encoder"):
        assert torch.equal(torch.rand(2), inside)
