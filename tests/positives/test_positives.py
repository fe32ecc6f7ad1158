from pathlib import Path

import pytest
import torch

from copgen_fast import positives, registry
from copgen_fast.config import NavigatorConfig
from copgen_fast.errors import CorruptArtifactError, UsageError
from copgen_fast.files import sha256
from copgen_fast.positives.navigator import Navigator, untrained
from copgen_fast.runtime import artifacts, latents

DIM = 24


def setting(path=Path("missing"), name="identity", options=(), **navigator):
    return positives.Setting(DIM, 0, NavigatorConfig(**navigator), path, registry.options("positives", name, options))


@pytest.fixture
def trained(tmp_path):
    path = tmp_path / "navigator.safetensors"
    torch.manual_seed(3)
    T = Navigator(DIM)
    artifacts.write_tensors(path, T.state_dict())
    return T, setting(path)


@pytest.mark.parametrize("name", registry.names("positives"))
def test_a_positive_depends_on_its_own_latent_and_seed_only(name, trained):
    positive = positives.build(name, setting(trained[1].navigator_file, name))
    seeds = list(range(10, 17))
    z = latents.sample_each("truncnorm", seeds, DIM)
    together = positive(z, seeds)
    apart = torch.cat([positive(z[i : i + 1], seeds[i : i + 1]) for i in range(len(seeds))])
    assert together.shape == z.shape and together.dtype == torch.float32
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)
    assert positive(z[:0], []).shape == (0, DIM)


def test_identity_and_navigator_are_their_formulas(trained):
    T, where = trained
    z = latents.sample("truncnorm", 0, (5, DIM))
    assert torch.equal(positives.build("identity", where)(z, range(5)), z)
    with torch.no_grad():
        assert torch.equal(positives.build("navigator", where)(z, range(5)), z + T(z))


def test_gaussian_is_truncated_noise_times_its_scale_and_not_z_again():
    z = torch.zeros(2000, DIM)
    noise = positives.build("gaussian", setting(name="gaussian"))(z, range(2000))
    assert noise.abs().max() <= 0.4
    assert noise.std().item() == pytest.approx(0.1759, abs=0.001)  # the truncated normal's, times 0.2
    assert not torch.equal(noise, 0.2 * latents.sample_each("truncnorm", range(2000), DIM))


def test_the_untrained_navigator_is_where_training_starts():
    z = latents.sample("truncnorm", 0, (5, DIM))
    with torch.no_grad():
        expected = z + untrained(DIM, NavigatorConfig(), 0)(z)
    assert torch.equal(positives.build("untrained-navigator", setting())(z, range(5)), expected)


def test_initialisation_is_the_references():
    T = untrained(120, NavigatorConfig(), 0)
    bound = 120**-0.5
    for layer in (T.walker[0], T.walker[2]):
        assert layer.weight.abs().max() <= bound and layer.weight.std().item() == pytest.approx(0.0527, abs=0.001)
    with torch.no_grad():
        norm = T(latents.sample("truncnorm", 0, (4000, 120))).norm(dim=1).mean().item()
    assert norm == pytest.approx(2.334, abs=0.25)  # the mean over seeds
    linear = untrained(120, NavigatorConfig(kind="linear"), 0)
    assert [type(layer).__name__ for layer in linear.walker] == ["Linear", "Linear"]


def test_projection_keeps_every_displacement_in_the_ball():
    free, held = Navigator(DIM), Navigator(DIM, radius=0.9)
    held.load_state_dict(free.state_dict())
    z = latents.sample("normal", 0, (200, DIM))
    norm = free(z).norm(dim=1)
    assert norm.min() < 0.9 < norm.max(), "the case must hold both kinds of rows"
    assert held(z).norm(dim=1).max() <= 0.9 + 1e-6
    inside = norm <= 0.9
    assert torch.equal(held(z)[inside], free(z)[inside])
    torch.testing.assert_close(torch.cosine_similarity(held(z), free(z)), torch.ones(200))


def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(UsageError, match="run `--stages navigator`"):
        positives.build("navigator", setting())
    with pytest.raises(UsageError, match="unknown name 'steering'"):
        positives.build("steering", setting())
    path = tmp_path / "navigator.safetensors"
    artifacts.write_tensors(path, Navigator(DIM, "linear").state_dict())
    with pytest.raises(CorruptArtifactError, match=r"navigator\.safetensors does not fit Navigator"):
        positives.build("navigator", setting(path))
    with pytest.raises(ValueError, match=r"z: expected shape \[N, 24\], got \[2, 5\]"):
        Navigator(DIM)(torch.zeros(2, 5))


def test_gaussian_takes_its_options():
    z = torch.zeros(2000, DIM)
    noise = positives.build("gaussian", setting(name="gaussian", options=["std=0.5", "prior=normal"]))(z, range(2000))
    assert noise.std().item() == pytest.approx(0.5, abs=0.01) and noise.abs().max() > 1
    with pytest.raises(UsageError, match="std: expected zero or more, got -1"):
        registry.options("positives", "gaussian", ["std=-1"])


def test_what_decides_the_positives_is_recorded(trained):
    path = trained[1].navigator_file
    assert positives.record("identity", setting()) == {}
    assert positives.record("gaussian", setting(name="gaussian", options=["std=0.5"])) == {
        "std": 0.5,
        "noise": "truncnorm",
    }
    assert positives.record("navigator", setting(path)) == {"navigator_digest": sha256(path)}
    assert positives.record("untrained-navigator", setting()) == {"navigator_seed": 0}
