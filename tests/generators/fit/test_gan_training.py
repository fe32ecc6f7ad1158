import copy

import pytest
import torch

from copgen_fast import augmentations
from copgen_fast.errors import UsageError
from copgen_fast.generators.fit import gan_training
from copgen_fast.generators.resnet_gan import ResnetGAN


def images(n, seed=0):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make_players(policy="none", decay=0.5, width=8, lr=1e-3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        G, D = ResnetGAN(12, width), gan_training.Discriminator(width)
    draw = gan_training.augmentation(policy)
    return gan_training.Players(
        G,
        D,
        copy.deepcopy(G).requires_grad_(False),
        *(torch.optim.Adam(player.parameters(), lr, (0.0, 0.9)) for player in (G, D)),
        lambda x, index, k: draw(x, torch.Generator().manual_seed(10 * index + k)),
        decay,
    )


def batch(index=0, n=8, k=1):
    z = torch.randn(k + 1, n, 12, generator=torch.Generator().manual_seed(index))
    return images(k * n, index).unflatten(0, (k, n)), z


@pytest.fixture(scope="module")
def trained():
    players = make_players("gan")
    before = copy.deepcopy((players.G.state_dict(), players.D.state_dict()))
    for index in range(6):
        result = gan_training.step(players, index, batch(index, k=2))
    return players, before, result


def test_hinge_losses_are_their_formulas():
    real, fake = torch.tensor([-1.0, 0.5, 3.0]), torch.tensor([-2.0, -0.5, 1.0])
    assert gan_training.hinge_discriminator(real, fake).item() == pytest.approx((2 + 0.5 + 0) / 3 + (0 + 0.5 + 2) / 3)
    assert gan_training.hinge_generator(fake).item() == pytest.approx(0.5)
    perfect = gan_training.hinge_discriminator(torch.ones(2), -torch.ones(2))
    assert perfect.item() == 0


def test_the_discriminators_spectral_norms_are_about_one(trained):
    """Every layer's, at the start and after steps that changed the weights: by full singular value decompositions."""
    for discriminator in (make_players().D, trained[0].D):
        layers = [layer for layer in discriminator.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
        assert len(layers) == 11  # two a block, two shortcuts, the last linear
        for layer in layers:
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.1)


def test_a_score_is_one_number_an_image_and_its_own():
    discriminator = make_players().D.eval()
    scores = discriminator(images(5))
    assert scores.shape == (5,)
    torch.testing.assert_close(discriminator(images(5)[3:4]), scores[3:4])


def test_a_step_trains_both_players(trained):
    players, (before_G, before_D), result = trained
    for module, before in ((players.G, before_G), (players.D, before_D)):
        for name, value in module.named_parameters():
            assert not torch.equal(value, before[name]), name
    assert set(result.metrics) == {"loss_discriminator", "loss_generator", "score_real", "score_fake"}
    assert all(torch.isfinite(value) for value in result.metrics.values())


def test_each_network_descends_its_own_loss_with_the_other_left_alone():
    players = make_players()
    reals, z = batch(n=16)
    fake = players.G(z[1]).detach()
    before_G = copy.deepcopy(players.G.state_dict())
    losses = []
    for _ in range(2):
        losses.append(gan_training.hinge_discriminator(players.D(reals[0]), players.D(fake)))
        gan_training.descend(losses[-1], players.D, players.adam_D)
    assert losses[1] < losses[0]
    for name, value in players.G.state_dict().items():
        assert torch.equal(value, before_G[name])
    before_D = [value.clone() for value in players.D.parameters()]
    players.D.eval()
    losses = []
    for _ in range(2):
        losses.append(gan_training.hinge_generator(players.D(players.G(z[1]))))
        gan_training.descend(losses[-1], players.G, players.adam_G)
    assert losses[1] < losses[0]
    assert all(torch.equal(value, old) for value, old in zip(players.D.parameters(), before_D, strict=True))


def test_the_average_follows_by_its_formula():
    players = make_players(decay=0.3)
    start = copy.deepcopy(players.average.state_dict())
    gan_training.step(players, 0, batch())
    for name, value in players.average.named_parameters():  # (1 + 0) / (10 + 0) = 0.1 is the lower of the two
        torch.testing.assert_close(value, 0.1 * start[name] + 0.9 * players.G.state_dict()[name])
    start = copy.deepcopy(players.average.state_dict())
    gan_training.step(players, 100, batch(1))
    for name, value in players.average.named_parameters():
        torch.testing.assert_close(value, 0.3 * start[name] + 0.7 * players.G.state_dict()[name])


def test_batch_norms_hold_the_statistics_of_the_averages_own_images(trained):
    players = trained[0]
    weights = copy.deepcopy(players.average.state_dict())
    model = gan_training.with_statistics(players.average, "normal", 0)
    assert not model.training
    for name, value in players.average.state_dict().items():
        assert torch.equal(value, weights[name])  # the average itself is left alone
    for name, value in model.named_parameters():
        assert torch.equal(value, weights[name])
    seen = {}
    model.norm.register_forward_hook(lambda module, inputs, output: seen.update(output=output))
    model(torch.randn(512, 12, generator=torch.Generator().manual_seed(3)))
    assert seen["output"].mean((0, 2, 3)).sub(model.norm.bias).abs().max() < 0.1
    assert seen["output"].std((0, 2, 3)).div(model.norm.weight).sub(1).abs().max() < 0.1


@pytest.mark.parametrize("policy", [*gan_training.POLICIES, *augmentations.POLICIES])
def test_gradients_flow_through_every_policy_to_every_image(policy):
    x = (0.5 * images(6)).requires_grad_()
    views = gan_training.augmentation(policy)(x, torch.Generator().manual_seed(0))
    assert views.shape == x.shape and views.detach().abs().max() <= 1 + 1e-5
    views.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.flatten(1).norm(dim=1).gt(0).all()


def test_no_augmentation_changes_nothing():
    x = images(4)
    torch.testing.assert_close(gan_training.augmentation("none")(x, torch.Generator()), x, rtol=0, atol=1e-6)


def test_shifts_are_whole_pixels_over_grey_in_all_directions():
    x = images(64)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    shifts = set()
    for view, image in zip(
        gan_training.augmentation("gan-shift")(x, torch.Generator().manual_seed(1)), padded, strict=True
    ):
        windows = image.unfold(1, 32, 1).unfold(2, 32, 1)  # [3, 9, 9, 32, 32]
        errors = (windows - view[:, None, None]).abs().amax((0, 3, 4))
        assert errors.min() < 1e-5
        shifts.add(divmod(errors.argmin().item(), 9))
    assert {row for row, _ in shifts} == {column for _, column in shifts} == set(range(9))


def test_the_digits_policy_never_mirrors():
    assert gan_training.POLICIES["gan-digits"].flip == 0 < gan_training.POLICIES["gan"].flip


def test_an_unknown_policy_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match="--augmentation: unknown policy 'gna': choose from gan, gan-digits.*simclr"):
        gan_training.augmentation("gna")
