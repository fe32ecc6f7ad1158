"""BigGAN-deep by the package's own modules, its rewritings, and the folder of its weights."""

import json
import socket
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from copgen_fast import generators
from copgen_fast.errors import UsageError
from copgen_fast.generators import biggan_deep, optimize
from copgen_fast.generators.biggan_deep import BigGANDeep
from tests.helpers.biggan_fixtures import TINY, random_network, write_folder
from tests.helpers.biggan_fixtures import small_biggan_deep as make
from tests.helpers.on_gpu import needs_gpu

package = pytest.importorskip("pytorch_pretrained_biggan")


def inputs(generator, count=3, seed=1):
    random = torch.Generator().manual_seed(seed)
    dtype = generator.network.embeddings.weight.dtype
    z = torch.randn(count, generator.latent_dim, generator=random, dtype=torch.float64).to(dtype)
    return z, torch.arange(count) % generator.classes


@pytest.fixture(scope="module")
def published():
    return make(truncation=0.405)


# The published form.


@pytest.mark.parametrize("truncation", [1.0, 0.4, 0.02])
def test_it_is_the_packages_own_call(truncation):
    network = random_network().double().eval()
    z, labels = (
        torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        torch.tensor([4, 0, 2]),
    )
    with torch.no_grad():
        one_hot = torch.nn.functional.one_hot(labels, 5).double()
        expected = network(truncation * z, one_hot, truncation)
    generator = make(truncation=truncation)
    assert (generator.latent_dim, generator.image_shape, generator.classes) == (6, (3, 32, 32), 5)
    images = generator(z, labels)
    assert images.shape == (3, 3, 32, 32) and images.abs().max() < 1 and images.std() > 0.05
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-12)


def test_the_class_and_the_truncation_matter(published):
    z, labels = inputs(published)
    assert (published(z, labels) - published(z, (labels + 1) % 5)).abs().amax((1, 2, 3)).min() > 0.01
    assert (published(z, labels) - make()(0.405 * z, labels)).abs().amax((1, 2, 3)).min() > 0.01, "statistics, too"


def packages_statistics(table, truncation):
    """The mean that the package's normalisation subtracts, read off its output at zero."""
    norm = package.model.BigGANBatchNorm(table.shape[1], n_stats=len(table), conditional=False)
    norm.weight.data.fill_(1)
    norm.bias.data.fill_(0)
    norm.running_means.copy_(table)
    norm.eps = 1e-30  # torch 2.11 takes no 0
    return -norm(torch.zeros(1, table.shape[1], 1, 1), truncation).flatten().detach()


def test_the_package_swaps_the_weights_between_two_rows_and_we_do_not():
    table = torch.arange(51.0)[:, None] ** 2
    ours, theirs = (of(table, 0.405).item() for of in (biggan_deep.statistics, packages_statistics))
    assert ours == pytest.approx(0.75 * 20**2 + 0.25 * 21**2)
    assert theirs == pytest.approx(0.25 * 20**2 + 0.75 * 21**2)
    wrong = []
    for row in range(1, 51):
        assert biggan_deep.statistics(table, row / 50).item() == pytest.approx(row**2, rel=1e-6)
        if packages_statistics(table, row / 50).item() != pytest.approx(row**2, rel=1e-6):
            wrong.append(row)
    assert wrong == [7, 14, 28, 29, 47], "by rounding: 0.14, 0.28, 0.56, 0.58, 0.94"


@pytest.mark.parametrize("truncation", [0, -0.1, 1.01, float("nan")])
def test_truncations_out_of_range_are_refused(truncation):
    with pytest.raises(ValueError, match="truncation: expected more than 0 and at most 1"):
        make(truncation=truncation)


def layers(more):
    """Of the published networks, by what each has after 128's first block."""
    return [(False, 16, 16), (True, 16, 16), (False, 16, 16), *more]


END = [(True, 8, 4), (False, 4, 4), (True, 4, 2), (False, 2, 2), (True, 2, 1)]
TO_128 = [(True, 16, 8), (False, 8, 8), *END]
TO_256 = [(True, 16, 8), (False, 8, 8), (True, 8, 8), (False, 8, 8), *END]


@pytest.mark.parametrize(
    ("side", "more", "tensors", "numbers"),
    [
        (128, TO_128, 506, 50_388_609),
        (256, TO_256, 602, 55_880_833),
        (512, [*TO_256, (False, 1, 1), (True, 1, 1)], 698, 56_163_905),
    ],
)
def test_every_size_is_what_its_layers_say(side, more, tensors, numbers):
    """The package knows 128's layers alone: the others stand for what the weights' config.json says."""
    with torch.device("meta"):
        network = package.BigGAN(package.BigGANConfig(output_dim=side, layers=layers(more)))
        generator = BigGANDeep(network)
    if side == 128:
        assert package.BigGANConfig().layers == layers(more)
    assert len(network.state_dict()) == tensors
    assert (generator.latent_dim, generator.classes, generator.image_shape) == (128, 1000, (3, side, side))
    assert sum(p.numel() for p in network.parameters()) == numbers


# The rewritings.


@settings(max_examples=8, deadline=None)
@given(
    layers=st.sampled_from(
        [
            [[True, 16, 8], [False, 8, 4], [False, 4, 2], [True, 2, 1]],
            [[False, 16, 16], [True, 16, 8], [True, 8, 4], [False, 4, 2], [False, 2, 1]],
        ]
    ),
    position=st.integers(0, 5),
    count=st.integers(0, 2),
)
def test_other_networks_in_float32(layers, position, count):
    generator = make(torch.float32, layers=layers, attention_layer_position=position)
    rewritten = optimize(generator)
    z, labels = inputs(generator, count)
    torch.testing.assert_close(rewritten(z, labels), generator(z, labels), rtol=0, atol=1e-5)
    assert rewritten(z, labels).shape == (count, *generator.image_shape)


def test_only_the_channels_of_the_image_are_computed(published):
    rewritten = optimize(published)
    assert rewritten.last.weight().shape == (3, 4, 3, 3)
    assert published.network.generator.conv_to_rgb.out_channels == 4


@needs_gpu
def test_a_graph_takes_labels(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    generator = make(torch.float32).cuda()
    graph = optimize(generator, "graph", batch=3, dtype=torch.float32)
    z, labels = (value.cuda() for value in inputs(generator))
    for shifted in (labels, (labels + 1) % 5):
        torch.testing.assert_close(graph(z, shifted), generator(z, shifted), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="labels: expected int64"):
        graph(z)


@pytest.mark.parametrize("rewritten", [False, True])
def test_labels_are_checked(published, rewritten):
    generator = optimize(published) if rewritten else published
    z, labels = inputs(published)
    with pytest.raises(ValueError, match=r"^labels: expected int64 \[3\] in 0 \.\. 4, got none"):
        generator(z)
    with pytest.raises(TypeError, match="^labels: expected torch.int64, got torch.int32"):
        generator(z, labels.int())
    with pytest.raises(TypeError, match="^labels: expected a torch.Tensor, got list"):
        generator(z, [0, 1, 2])
    with pytest.raises(ValueError, match=r"^labels: expected shape \[3\], got \[2\]"):
        generator(z, labels[:2])
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match=r"^labels: expected 0 \.\. 4, got values from"):
            generator(z, torch.tensor([0, wrong, 1]))


# The folder of weights.


@pytest.fixture
def offline(monkeypatch):
    """Any use of the network is a failure, and so is any of the package's downloads."""

    def refuse(*arguments, **options):
        raise AssertionError(f"the network was used: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("requests.get", "requests.head", "boto3.resource"):
        monkeypatch.setattr(name, refuse)
    for module in (package.file_utils, package.model):
        monkeypatch.setattr(module, "cached_path", refuse)


@pytest.mark.parametrize("form", ["zip", "as in 2019", "safetensors"])
def test_weights_may_be_in_any_safe_form(tmp_path, offline, form):
    folder = write_folder(tmp_path / "model", seed=4)
    path, state = folder / "pytorch_model.bin", random_network(5).state_dict()
    if form == "safetensors":
        path.unlink()
        save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    generator, expected = generators.build("biggan-deep", folder), make(torch.float32, seed=5)
    assert torch.equal(generator(*inputs(generator)), expected(*inputs(expected)))
    assert generator.weights_file == (folder / "model.safetensors" if form == "safetensors" else path)


@pytest.mark.parametrize("found_by", ["argument", "variable"])
def test_weights_are_read_from_a_folder_without_the_network(tmp_path, monkeypatch, offline, found_by):
    folder = write_folder(tmp_path / "biggan-deep-128", seed=4)
    if found_by == "variable":
        monkeypatch.setenv("COPGEN_WEIGHTS", str(tmp_path))
    generator = generators.build("biggan-deep", folder if found_by == "argument" else None)
    expected = make(torch.float32, seed=4)
    assert torch.equal(generator(*inputs(generator)), expected(*inputs(expected)))
    assert not any(p.requires_grad for p in generator.parameters()) and not generator.training


def test_nothing_is_downloaded_where_weights_are_missing(tmp_path, monkeypatch, offline):
    monkeypatch.delenv("COPGEN_WEIGHTS", raising=False)
    with pytest.raises(
        UsageError, match=r"biggan-deep needs weights.*config\.json.*--generator\.weights.*nothing is down"
    ):
        generators.build("biggan-deep")
    for known_to_the_package in ("biggan-deep-128", "biggan-deep-256"):
        with pytest.raises(UsageError, match="is not there"):
            generators.build("biggan-deep", known_to_the_package)
    folder = write_folder(tmp_path / "model")
    for name in ("config.json", "pytorch_model.bin"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(UsageError, match=rf"(config\.json is not there|holds no .*{name}): give a folder with"):
            generators.build("biggan-deep", folder)
        (folder / name).write_bytes(kept)


def test_unfitting_weights_are_explained(tmp_path, offline):
    folder = write_folder(tmp_path / "model")
    path = folder / "pytorch_model.bin"
    whole, state = path.read_bytes(), random_network().state_dict()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"pytorch_model\.bin is truncated"):
        generators.build("biggan-deep", folder)
    del state["generator.layers.0.conv_0.weight_v"]
    torch.save(state, path)
    with pytest.raises(UsageError, match=r"pytorch_model\.bin does not fit BigGAN: 1 faults: missing .*weight_v"):
        generators.build("biggan-deep", folder)
    torch.save(["text"], path)
    with pytest.raises(UsageError, match=r"pytorch_model\.bin holds a list without tensors"):
        generators.build("biggan-deep", folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"layers": 3}',
        '{"layers": [[true, 16]]}',
        json.dumps(TINY | {"n_stats": 1}),
        '{"channel_width": "8"}',
    ],
)
def test_a_config_that_describes_no_network_is_named(tmp_path, offline, text):
    folder = write_folder(tmp_path / "model")
    (folder / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json describes no BigGAN-deep"):
        generators.build("biggan-deep", folder)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_pretrained_biggan", None)
    with pytest.raises(UsageError, match=r"pytorch-pretrained-biggan: pip install 'copgen_fast\[biggan\]'"):
        generators.build("biggan-deep", write_folder_of_bytes(tmp_path))


def write_folder_of_bytes(folder):
    for name in ("config.json", "pytorch_model.bin"):
        (folder / name).write_bytes(b"")
    return folder


def test_a_truncation_out_of_range_is_a_fault_of_usage(tmp_path):
    with pytest.raises(UsageError, match=r"truncation: expected 0.001 to 1, got 1.5"):
        generators.build("biggan-deep", write_folder(tmp_path / "model"), ["truncation=1.5"])


@pytest.mark.parametrize("truncation", [None, 0.5])
def test_the_truncation_is_part_of_the_setting(tmp_path, truncation):
    folder, options = write_folder(tmp_path / "model"), (f"truncation={truncation}",) if truncation else ()
    config = generators.GeneratorConfig(name="biggan-deep", weights=str(folder), options=options)
    generator = generators.load(config, torch.device("cpu"))
    assert generator.record["options"] == ({"truncation": truncation} if truncation else {})
    expected = make(torch.float32, truncation or 1.0)
    torch.testing.assert_close(generator(*inputs(expected)), expected(*inputs(expected)), rtol=0, atol=1e-5)
