"""What every generator promises, whatever its network; weights that are missing or damaged."""

import pytest
import torch
from safetensors.torch import save_file

from copgen_fast import generators, registry
from copgen_fast.errors import CopgenError
from copgen_fast.generators import bigbigan, digits, residual_flow
from copgen_fast.generators.cifar10_dcgan import Cifar10DCGAN
from copgen_fast.generators.fit.fitting import one_thread
from copgen_fast.generators.resnet_gan import ResnetGAN
from copgen_fast.runtime import weights as weights_file
from tests.helpers.bigbigan_fixtures import small_bigbigan
from tests.helpers.biggan_fixtures import write_folder
from tests.helpers.stylegan2_fixtures import small_stylegan2

EMBEDDED = {"digits": digits.EMBEDDED, "residual-flow": residual_flow.EMBEDDED}
RANDOM = {
    "resnet-gan": lambda: ResnetGAN(12, 6),
    "cifar10-dcgan": Cifar10DCGAN,
    "bigbigan": lambda: small_bigbigan(2, 16, torch.float32),
    "stylegan2": lambda: small_stylegan2(8, torch.float32),
}
# What errors about weights say: where such files come from.
REMEDIES = {
    "digits": "fit.digits --out DIR",
    "residual-flow": "fit.residual_flow --out DIR",
    "resnet-gan": "fit.resnet_gan --out DIR",
    "cifar10-dcgan": "--generator.weights FILE.pth",
    "bigbigan": "",
    "stylegan2": "--generator.weights FILE",
}


@pytest.fixture(scope="module", autouse=True)
def small():
    """A BigBiGAN whose images take milliseconds, and one thread: for products this small a second only costs time."""
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr(bigbigan, "BigBiGAN", RANDOM["bigbigan"])
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights for each generator; a folder for some."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for name, make in RANDOM.items():
        torch.save(make().state_dict(), folder / f"{name}.pth")
    files = EMBEDDED | {name: folder / f"{name}.pth" for name in RANDOM}
    return files | {name: folder / name for name in ("biggan-deep", "consistency", "turbo")}


@pytest.fixture(scope="module", params=sorted({*registry.names("generators")} - {"export", "torchscript"}))
def generator(request, weights):
    if request.param == "biggan-deep":
        pytest.importorskip("pytorch_pretrained_biggan")
        write_folder(weights[request.param])
    options = []
    if request.param in ("consistency", "turbo"):
        pytest.importorskip("diffusers")
        from tests.helpers import diffusers_fixtures

        getattr(diffusers_fixtures, request.param)(weights[request.param])
        if request.param == "turbo":
            options = [f"prompts={diffusers_fixtures.prompts_file(weights[request.param])}"]
    return generators.build(request.param, weights[request.param], options)


def read_all(path):
    return {
        name: weights_file.tensor(value) for name, value in weights_file.flatten(weights_file.read(path).tree).items()
    }


def drawn(generator, n, scale=1.0):
    z = scale * torch.randn(n, generator.latent_dim, generator=torch.Generator().manual_seed(n))
    return z, torch.arange(n) % generator.classes if generator.classes else None


@pytest.mark.parametrize("n", [0, 1, 3])
def test_images_have_the_announced_shape_and_range(generator, n):
    images = generator(*drawn(generator, n, scale=3.0))
    assert images.shape == (n, *generator.image_shape)
    assert images.dtype == torch.float32 and images.abs().le(1).all()


def test_an_image_does_not_depend_on_its_batch(generator):
    z, labels = drawn(generator, 7)
    images = generator(z, labels)
    for i in (0, 3, 6):
        alone = generator(z[i : i + 1], None if labels is None else labels[i : i + 1])
        torch.testing.assert_close(alone, images[i : i + 1], rtol=0, atol=1e-4)


def test_it_is_built_frozen_and_differentiable_in_z(generator):
    assert not generator.training and not any(p.requires_grad for p in generator.parameters())
    z, labels = drawn(generator, 4)
    generator(z.requires_grad_(), labels).square().sum().backward()
    assert z.grad.isfinite().all() and z.grad.norm(dim=1).gt(0).all()


@pytest.mark.parametrize(
    ("altered", "error"),
    [
        (lambda z: z.long(), TypeError),
        (lambda z: z.double(), TypeError),
        (lambda z: z.tolist(), TypeError),
        (lambda z: z[:, 1:], ValueError),
        (lambda z: z[0], ValueError),
    ],
)
def test_other_latents_are_refused_by_name(generator, altered, error):
    z, labels = drawn(generator, 2)
    with pytest.raises(error, match="^z: expected"):
        generator(altered(z), labels)


def test_a_generator_without_classes_takes_no_labels(generator):
    if generator.classes:
        pytest.skip("it has classes")
    z, _ = drawn(generator, 2)
    assert generator.classes == 0 and torch.equal(generator(z, None), generator(z))
    for one in (generator, generators.optimize(generator)):
        with pytest.raises(ValueError, match="^labels: expected none, this generator has no classes"):
            one(z, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_weights_are_small_and_give_equal_channels(name):
    assert EMBEDDED[name].stat().st_size < 1.5e6
    images = generators.build(name)(torch.zeros(1, 64))
    assert images[:, 0].equal(images[:, 1]) and images[:, 0].equal(images[:, 2])


@pytest.mark.parametrize("name", REMEDIES)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing", "none.safetensors is (missing|not there)"),
        ("truncated", "weights.safetensors is truncated"),
        ("incomplete", "weights.safetensors .*missing {}"),
        ("foreign", "weights.safetensors .*unexpected extra"),
    ],
)
def test_weights_that_cannot_be_are_refused_with_the_remedy(weights, tmp_path, name, fault, words):
    tensors, path = read_all(weights[name]), tmp_path / "weights.safetensors"
    least = min(tensors)
    if fault == "incomplete":
        del tensors[least]
    elif fault == "foreign":
        tensors["extra"] = torch.zeros(1)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CopgenError, match=f"{words.format(least)}.*{REMEDIES[name]}"):
        generators.build(name, path.with_stem("none") if fault == "missing" else path)


@pytest.mark.parametrize("name", [name for name in REMEDIES if name not in EMBEDDED])
def test_weights_that_are_no_part_of_the_package_must_be_named(monkeypatch, name):
    monkeypatch.delenv("COPGEN_WEIGHTS", raising=False)
    remedy = REMEDIES[name] or r"BigBiGAN_x1\.pth.*--generator\.weights"
    with pytest.raises(CopgenError, match=f"generator {name} needs (its )?weights.*{remedy}"):
        generators.build(name)
