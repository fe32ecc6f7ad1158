import pytest
import torch

from copgen_fast import generators
from copgen_fast.errors import CorruptArtifactError, UsageError
from copgen_fast.generators.cifar10_dcgan import Cifar10DCGAN
from copgen_fast.runtime import artifacts


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "dcgan.pth"
    torch.save(Cifar10DCGAN().state_dict(), path)
    return path


def test_a_plain_state_dict_gives_images_in_range(weights):
    generator = generators.build("cifar10-dcgan", weights)
    z = torch.randn(3, 64, requires_grad=True)
    images = generator(z)
    assert images.shape == (3, 3, 32, 32) and images.abs().max() <= 1
    images.sum().backward()
    assert z.grad.abs().sum() > 0
    torch.testing.assert_close(images[:1], generator(z[:1]))
    assert generator(z[:0]).shape == (0, 3, 32, 32)


def test_what_is_wrong_with_the_weights_is_said(weights, tmp_path):
    with pytest.raises(UsageError, match=r"needs its weights.*--generator.weights FILE.pth"):
        generators.build("cifar10-dcgan")
    with pytest.raises(UsageError, match="nothing.pth: no such file"):
        generators.build("cifar10-dcgan", tmp_path / "nothing.pth")
    state = artifacts.read_checkpoint(weights)
    state["up9.0.weight"] = state.pop("up4.0.weight")
    torch.save(state, weights)
    with pytest.raises(CorruptArtifactError, match="missing up4.0.weight; unexpected up9.0.weight"):
        generators.build("cifar10-dcgan", weights)
