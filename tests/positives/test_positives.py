import dataclasses
from pathlib import Path

import pytest
import torch

from copgen_fast import positives, registry
from copgen_fast.config import NavigatorConfig, PairsConfig, RunConfig, SteeringConfig
from copgen_fast.errors import CorruptArtifactError, UsageError
from copgen_fast.files import sha256
from copgen_fast.positives._warps import limits_of
from copgen_fast.positives.navigator import Navigator, untrained
from copgen_fast.positives.steering import Walks, draw_steps
from copgen_fast.runtime import artifacts, latents

DIM = 24
GROUPS = (4, 8, 12)


def setting(path=Path("missing"), name="identity", options=(), **navigator):
    of = registry.options("positives", name, options)
    walks = path.with_name("steering.safetensors")
    return positives.Setting(DIM, 0, NavigatorConfig(**navigator), path, of, GROUPS, SteeringConfig(), walks)


@pytest.fixture
def trained(tmp_path):
    path = tmp_path / "navigator.safetensors"
    torch.manual_seed(3)
    T = Navigator(DIM)
    artifacts.write_tensors(path, T.state_dict())
    walks = Walks(DIM, list(limits_of(SteeringConfig())), std=0.5)
    artifacts.write_tensors(path.with_name("steering.safetensors"), walks.state_dict())
    return T, setting(path)


@pytest.mark.parametrize("name", registry.names("positives"))
def test_a_positive_depends_on_its_own_latent_and_seed_only(name, trained):
    positive = positives.build(name, setting(trained[1].navigator_file, name))  # and the walks beside it
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
    with pytest.raises(UsageError, match="run `--stages steering`"):
        positives.build("steering", dataclasses.replace(setting(name="steering"), steering_file=tmp_path / "missing"))
    with pytest.raises(UsageError, match="unknown name 'stearing'"):
        positives.build("stearing", setting())
    path = tmp_path / "navigator.safetensors"
    artifacts.write_tensors(path, Navigator(DIM, "linear").state_dict())
    with pytest.raises(CorruptArtifactError, match=r"navigator\.safetensors does not fit Navigator"):
        positives.build("navigator", setting(path))
    artifacts.write_tensors(path, Navigator(DIM + 3).state_dict())
    lengths = f"for latents of length {DIM + 3}, and the generator's have length {DIM}"
    with pytest.raises(UsageError, match=rf"navigator\.safetensors is a navigator {lengths}: take the generator"):
        positives.build("navigator", setting(path))
    with pytest.raises(ValueError, match=r"z: expected shape \[N, 24\], got \[2, 5\]"):
        Navigator(DIM)(torch.zeros(2, 5))


def test_gaussian_takes_its_options():
    z = torch.zeros(2000, DIM)
    noise = positives.build("gaussian", setting(name="gaussian", options=["std=0.5", "prior=normal"]))(z, range(2000))
    assert noise.std().item() == pytest.approx(0.5, abs=0.01) and noise.abs().max() > 1
    with pytest.raises(UsageError, match="std: expected"):
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


def moved(name, of):
    """z' - z of many latents."""
    z, seeds = latents.sample("truncnorm", 0, (500, DIM)), range(500)
    return positives.build(name, of)(z, seeds) - z


def test_steering_goes_along_its_walks_by_step_sizes_from_the_pairs_seed(trained):
    of = setting(trained[1].navigator_file, "steering")
    walks = artifacts.read_tensors(of.steering_file)
    names = ("zoom", "shift_x", "shift_y", "rotate", "perspective", "red", "green", "blue")
    step = draw_steps(limits_of(SteeringConfig()), [(7, 2)])[0]
    expected = sum(step[i] * walks[f"walk.{name}"] for i, name in enumerate(names))
    z = torch.zeros(2, DIM)
    torch.testing.assert_close(positives.build("steering", of)(z, [7, 8])[0], expected)
    assert positives.record("steering", of) == {
        "steering_digest": sha256(of.steering_file),
        "step_limits": limits_of(SteeringConfig()),
    }


MOVING = ("gaussian", "steering", "untrained-navigator", "navigator")


@pytest.mark.parametrize("name", MOVING)
def test_displacements_are_scaled_to_a_distance_by_one_factor(name, trained):
    path = trained[1].navigator_file
    free, far = (moved(name, setting(path, name, o)) for o in ((), ("distance=3",)))
    assert far.norm(dim=1).mean().item() == pytest.approx(3, rel=0.05)
    factors = far.norm(dim=1) / free.norm(dim=1)
    torch.testing.assert_close(factors, factors[0].expand(500), rtol=1e-4, atol=0)
    assert torch.cosine_similarity(far, free).min() > 0.9999
    assert positives.record(name, setting(path, name, ["distance=3"]))["distance"] == 3
    assert "distance" not in positives.record(name, setting(path, name)), "records are those of earlier versions"
    with pytest.raises(UsageError, match="distance: expected .*, got 0"):
        setting(path, name, ["distance=0"])


def test_the_distance_is_exact_over_its_draws_of_the_generators_prior(trained):
    drawn, of = [], setting(trained[1].navigator_file, "navigator", ["distance=3"])

    def sample(seed, count):
        drawn.append(latents.sample("uniform", seed, (count, DIM)))
        return drawn[-1]

    positive = positives.build("navigator", dataclasses.replace(of, sample=sample))
    z = torch.cat(drawn)
    norms = (positive(z, range(len(z))) - z).double().norm(dim=1)
    assert len(z) == 4096 and norms.mean().item() == pytest.approx(3, rel=1e-6)
    of_normal = dataclasses.replace(of, sample=latents.NamedPrior("normal", DIM))
    assert not torch.equal(positives.build("navigator", of_normal)(z, range(len(z))), positive(z, range(len(z))))


@pytest.mark.parametrize("name", ["untrained-navigator", "navigator"])
def test_the_offset_that_all_latents_share_is_subtracted(name, trained):
    path = trained[1].navigator_file
    free, centered = (moved(name, setting(path, name, o)) for o in ((), ("centered=True",)))
    shared = free - centered
    torch.testing.assert_close(shared, shared[:1].expand_as(shared))
    assert free.mean(0).norm() > 0.3 > 0.1 > centered.mean(0).norm()
    far = setting(path, name, ["centered=True", "distance=3"])
    assert moved(name, far).norm(dim=1).mean().item() == pytest.approx(3, rel=0.05)
    assert positives.record(name, far).items() >= {"centered": True, "distance": 3}.items()
    assert "centered" not in positives.record(name, setting(path, name)), "records are those of earlier versions"


def test_a_distance_goes_with_groups_and_projection(trained):
    path = trained[1].navigator_file
    for name, of in (
        ("steering", setting(path, "steering", ["distance=3", "groups=0,2"])),
        ("gaussian", setting(path, "gaussian", ["distance=3", "groups=0,2"])),
        ("navigator", setting(path, "navigator", ["distance=3"], groups=(0, 2), delta=0.7, project=True)),
    ):
        dz = moved(name, of)
        assert dz.norm(dim=1).mean().item() == pytest.approx(3, rel=0.05)
        assert dz[:, 4:12].abs().max() < 1e-6


def test_what_does_not_move_has_no_distance(trained):
    path = trained[1].navigator_file
    walks = Walks(DIM, limits_of(SteeringConfig()))
    artifacts.write_tensors(path.with_name("steering.safetensors"), walks.state_dict())
    for name, options in (("steering", ()), ("gaussian", ["std=0"])):
        with pytest.raises(UsageError, match=f"options {name}.distance: as it is set, {name} does not move z"):
            positives.build(name, setting(path, name, ["distance=3", *options]))


@pytest.mark.parametrize("name", ["gaussian", "steering"])
def test_a_displacement_is_kept_to_groups_and_scaled_in_each(name, trained):
    path = trained[1].navigator_file
    whole = moved(name, setting(path, name))
    some = moved(name, setting(path, name, ["groups=2,0", "scales=0.5,3"]))
    factors = torch.tensor([3.0] * 4 + [0.0] * 8 + [0.5] * 12)
    torch.testing.assert_close(some, whole * factors, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        moved(name, setting(path, name, ["scales=1,1,2"]))[:, 12:], 2 * whole[:, 12:], atol=1e-5, rtol=0
    )
    assert positives.record(name, setting(path, name, ["groups=2"]))["groups"] == (2,)


def test_the_navigator_is_kept_to_groups_and_each_to_its_ball(trained):
    free = moved("navigator", trained[1])
    some = moved("navigator", setting(trained[1].navigator_file, groups=(0, 1)))
    torch.testing.assert_close(some[:, :12], free[:, :12])
    assert some[:, 12:].abs().max() == 0
    options = {"groups": (2, 1), "group_deltas": (0.5, 0.25)}
    held = moved("navigator", setting(trained[1].navigator_file, **options))
    assert held[:, :4].abs().max() == 0
    for part, radius in ((slice(4, 12), 0.25), (slice(12, 24), 0.5)):
        norm = free[:, part].norm(dim=1)
        assert held[:, part].norm(dim=1).max() <= radius + 1e-5
        torch.testing.assert_close(held[norm < radius][:, part], free[norm < radius][:, part])
    record = positives.record("untrained-navigator", setting(**options))
    assert record == {"navigator_seed": 0, "groups": (2, 1), "group_deltas": (0.5, 0.25)}


def test_the_near_zero_start_and_the_hidden_width_are_as_asked():
    T = untrained(120, NavigatorConfig(init="near-zero", hidden=30), 0)
    assert T.walker[0].weight.shape == (30, 120) and T.walker[2].weight.shape == (120, 30)
    for layer in (T.walker[0], T.walker[2]):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert layer.bias.abs().max() <= 0.001 and layer.bias.std() > 0
    z = latents.sample("truncnorm", 0, (100, 120))
    assert T(z).norm(dim=1).mean() < 0.1
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            T.parameters(), untrained(120, NavigatorConfig(init="near-zero", hidden=30), 0).parameters(), strict=True
        )
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"navigator": NavigatorConfig(groups=(0, 3))}, "navigator.groups: expected latent groups 0 to 2, .* got 3"),
        ({"navigator": NavigatorConfig(groups=(0, 0))}, "each once; got 0"),
        ({"navigator": NavigatorConfig(group_deltas=(1.0,))}, "navigator.group_deltas: expected 3 numbers.*; got 1"),
        ({"navigator": NavigatorConfig(groups=(1,), group_deltas=(-1.0,))}, "numbers of zero or more, got -1.0"),
        ({"steering": SteeringConfig(groups=(-1,))}, "steering.groups: expected latent groups 0 to 2, .* got -1"),
        ({"pairs": PairsConfig(("gaussian",), ("gaussian.groups=4",))}, "positive.options gaussian.groups: .* got 4"),
        ({"pairs": PairsConfig(("gaussian",), ("gaussian.scales=1,2",))}, "gaussian.scales: expected 3 .* got 2"),
    ],
)  # fmt: skip
def test_groups_that_are_not_there_are_named(changes, message):
    with pytest.raises(UsageError, match=message):
        positives.expect_groups(RunConfig(**changes), GROUPS)
    positives.expect_groups(RunConfig(), GROUPS)


def test_a_generator_without_groups_has_one():
    with pytest.raises(UsageError, match="expected latent groups only 0, as the generator has one latent group; got 1"):
        positives.expect_groups(RunConfig(navigator=NavigatorConfig(groups=(1,))), ())
    positives.expect_groups(RunConfig(navigator=NavigatorConfig(groups=(0,), group_deltas=(2.0,))), ())


SHAPE = (2, 3, 4)


def convolutional(**options):
    return untrained(DIM, NavigatorConfig(kind="conv", **options), 0, GROUPS, SHAPE)


def test_a_convolutional_navigator_is_its_formula_and_read_back(tmp_path):
    T, path = convolutional(hidden=5), tmp_path / "navigator.safetensors"
    first, last = (layer for layer in T.walker if isinstance(layer, torch.nn.Conv2d))
    assert first.weight.shape == (5, 2, 3, 3) and last.weight.shape == (2, 5, 3, 3)
    artifacts.write_tensors(path, T.state_dict())
    of = dataclasses.replace(setting(path, kind="conv", hidden=5), latent_shape=SHAPE)
    z = latents.sample("truncnorm", 0, (500, DIM))
    with torch.no_grad():
        expected = last(first(z.unflatten(1, SHAPE)).relu()).flatten(1)
    torch.testing.assert_close(moved("navigator", of), expected, rtol=1e-5, atol=1e-6)
    assert positives.record("untrained-navigator", of) == {
        "navigator_seed": 0, "navigator_kind": "conv", "navigator_hidden": 5
    }  # fmt: skip
    with pytest.raises(CorruptArtifactError, match="does not fit Navigator"):
        positives.build("navigator", setting(path))


def test_a_convolutional_navigator_takes_the_options_of_the_others():
    assert (
        sum(p.numel() for p in untrained(4 * 64 * 64, NavigatorConfig(kind="conv"), 0, (), (4, 64, 64)).parameters())
        < 5000
    )
    z = latents.sample("normal", 0, (50, DIM))
    assert convolutional(init="near-zero")(z).norm(dim=1).mean() < 0.1
    held = convolutional(groups=(1,), group_deltas=(0.1,))(z)
    assert held[:, :4].abs().max() == 0 and held[:, 12:].abs().max() == 0
    assert held.norm(dim=1).max() <= 0.1 + 1e-6 and held.norm(dim=1).min() > 0
    assert convolutional(delta=0.1, project=True)(z).norm(dim=1).max() <= 0.1 + 1e-6


def test_a_convolutional_navigator_needs_latents_that_are_images():
    with pytest.raises(
        UsageError, match=r"navigator.kind: conv needs a generator of latents \[C, h, w\], its are \[24\]"
    ):
        untrained(DIM, NavigatorConfig(kind="conv"), 0, (), (DIM,))
