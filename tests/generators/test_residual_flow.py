import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.svm import SVC

from copgen_fast import generators
from copgen_fast.errors import CopgenError, UsageError
from copgen_fast.generators import _flow_layers, residual_flow
from copgen_fast.generators._flow_layers import BOUND, Estimator, Residual, ResidualFlow, SpectralLinear
from copgen_fast.generators.fit.fitting import one_thread
from copgen_fast.generators.residual_flow import ResidualFlowGenerator
from copgen_fast.images import sets
from copgen_fast.runtime import latents, seeds

# The embedded weights: float32 round trips of 256 latents, and the bits of the held-out scans.
LATENT_MAX, SCAN_MAX, HELD_OUT_BITS = 1e-4, 1e-4, 2.15


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Matrices this small gain nothing from a second thread, and lose much on a busy machine."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def generator():
    return generators.build("residual-flow")


@pytest.fixture(scope="module")
def real():
    """Held-out scans, dequantised: [360, 8, 8]."""
    images = sets.digits(image_size=8).test_images[:, 0]
    return (images.double() * 16 / 255).round()


@pytest.fixture
def small():
    """A generator of 3x3 scans with weights far from their start, norms at their bound."""
    with seeds.seeded("small flow"):
        model = ResidualFlowGenerator(side=3, levels=17, blocks=3, width=16, depth=3, temperature=0.7)
        for block in model.flow.blocks:
            for layer in block.layers:
                layer.weight.data.normal_(0, 2)
        for norm in model.flow.norms:
            norm.shift.data.normal_(0, 0.3)
            norm.log_scale.data.normal_(0, 0.3)
        model.flow.rotation.copy_(torch.linalg.qr(torch.randn(9, 9)).Q)
    model.flow.iterate_norms(1e-12)
    model = model.double()
    # In float32 its determinant is 1 up to 1e-7 or 2e-7, by processor; the log-density takes it for 1.
    model.flow.rotation.copy_(torch.linalg.qr(model.flow.rotation).Q)
    return model.eval().requires_grad_(False)


def normal(seed, *size):
    return latents.sample("normal", seed, size).double()


# --- the blocks -------------------------------------------------------------------------------------------------


def test_power_iteration_finds_the_norm_and_the_matrix_keeps_the_bound():
    with seeds.seeded("layer"):
        layer = SpectralLinear(20, 30)
        layer.weight.data.normal_(0, 1)
    layer.iterate(1e-9)
    exact = torch.linalg.matrix_norm(layer.weight.detach(), 2)
    torch.testing.assert_close(torch.dot(layer.u, layer.weight @ layer.v).detach(), exact, rtol=1e-5, atol=0)
    assert torch.linalg.matrix_norm(layer.matrix().detach(), 2).item() == pytest.approx(BOUND, rel=1e-5)
    layer.weight.data.mul_(0.5 / exact)
    assert torch.equal(layer.matrix(), layer.weight)  # a smaller one is left as it is


def test_folding_changes_no_function_and_holds_without_iterating():
    with seeds.seeded("layer"):
        layer = SpectralLinear(20, 30)
        layer.weight.data.normal_(0, 1)
    layer.iterate(1e-9)
    before = layer.matrix().detach().clone()
    layer.fold()
    torch.testing.assert_close(layer.matrix().detach(), before, rtol=1e-4, atol=1e-6)
    assert torch.linalg.matrix_norm(layer.weight.detach().double(), 2) <= BOUND


def test_slopes_products_and_jacobian_are_those_of_autograd(small):
    g = small.flow.blocks[0].contraction()
    x, w = normal(1, 5, 9), normal(2, 5, 9)
    value, slopes = g.linearise(x)
    assert torch.equal(value, g(x))
    exact = torch.func.vmap(torch.func.jacrev(lambda row: g(row[None])[0]))(x)
    torch.testing.assert_close(g.jacobian(slopes), exact)
    torch.testing.assert_close(g.pull(slopes, w), torch.einsum("ni,nij->nj", w, exact))


def test_no_slope_of_lipswish_reaches_one():
    x = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    for beta in (0.1, 1.0, 10.0):
        gate = torch.sigmoid(beta * x)
        assert (gate * (1 + beta * x * (1 - gate)) / _flow_layers.LIPSWISH).abs().max() < 1


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_block_inverts_to_rounding(depth):
    with seeds.seeded("block"):
        block = Residual(6, 12, depth).double()
    for layer in block.layers:
        layer.weight.data.mul_(3)
        layer.iterate(1e-12)
    y = normal(3, 40, 6) * 5
    torch.testing.assert_close(block(block.inverse(y)), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(block.inverse(block(y)), y, rtol=0, atol=1e-12)


def test_an_expanding_block_is_an_error_and_no_picture():
    with seeds.seeded("block"):
        block = Residual(4, 4, 1)
    block.layers[0].weight.data.copy_(-3 * torch.eye(4))
    block.layers[0].u.zero_()  # hides the norm from `matrix`
    with pytest.raises(CopgenError, match="inverse of a residual block did not converge in 1000 iterations for 2 of 3"):
        block.inverse(torch.tensor([[1.0] * 4, [2.0] * 4, [math.nan] * 4]))


def test_the_inverse_has_the_weights_gradient_too(small):
    block = small.flow.blocks[1]
    names, values = zip(*block.named_parameters(), strict=True)
    y = normal(4, 2, 9)

    def inverse(*weights):
        """`Residual.inverse` at the given weights."""
        for name, weight in zip(names, weights, strict=True):
            owner, _, leaf = name.rpartition(".")
            module = block.get_submodule(owner)
            module._parameters[leaf] = weight
        return block.inverse(y)

    torch.manual_seed(0)
    assert torch.autograd.gradcheck(
        inverse, [value.detach().clone().requires_grad_() for value in values], fast_mode=True
    )


# --- log-determinants -------------------------------------------------------------------------------------------


def test_the_exact_log_determinant_is_that_of_the_whole_jacobian(small):
    scans = small.scan(normal(5, 4, 9))
    x = small.logits(scans)[0]
    z, log_det = small.flow.with_log_det(x)
    torch.testing.assert_close(z, small.flow(x))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: small.flow(row[None])[0]))(x)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet)
    # And with the logit: the density is the Gaussian's times that of scan -> temperature z.
    whole = torch.func.vmap(torch.func.jacrev(lambda scan: small.flow(logit(small, scan[None]))[0]))(scans)
    expected = torch.linalg.slogdet(whole.flatten(2)).logabsdet - 0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
    torch.testing.assert_close(small.log_density(scans), expected)


def logit(model, scans):
    fractions = ((scans.flatten(1) + 1) * (model.levels - 1) + 1) / (2 * model.levels)
    return torch.logit(residual_flow.MARGIN + (1 - 2 * residual_flow.MARGIN) * fractions)


@pytest.mark.parametrize("exact", [0, 3])
def test_the_estimator_is_unbiased_in_value_and_gradient(exact):
    """400 numbers of terms and 64 vectors for each: within 4 standard errors of the exact ones."""
    with seeds.seeded("estimated block"):
        block = Residual(5, 8, 2).double()
    block.layers[0].weight.data.mul_(0.75)  # Lip(g)^2 = 0.53 is below keep: the variance is finite
    block.layers[1].weight.data.mul_(0.99)
    for layer in block.layers:
        layer.iterate(1e-12)
    x = normal(6, 1, 5)
    weight = block.layers[0].weight
    expected = block.with_log_det(x)[1]
    (expected_gradient,) = torch.autograd.grad(expected.sum(), weight)
    estimator = Estimator(seeds.generator("estimator"), exact=exact, keep=0.7)
    values, gradients = [], []
    for _ in range(400):
        value = block.with_log_det(x.expand(64, 5), estimator)[1].mean()
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, weight)[0])
    for samples, wanted in ((values, expected.detach()[0]), (gradients, expected_gradient)):
        samples = torch.stack(samples)
        error = samples.std(0) / len(samples) ** 0.5
        assert ((samples.mean(0) - wanted).abs() <= 4 * error).all()
        assert error.max() < 0.01


def test_bits_per_dim_are_those_of_the_density_of_levels(small):
    """Neighbouring levels are 2 / 16 apart, and the noise keeps every scan within its own level."""
    scans = small.scan(normal(5, 4, 9))
    per_level = small.log_density(scans) + 9 * math.log(2 / 16)
    torch.testing.assert_close(small.bits_per_dim(scans), -per_level / (9 * math.log(2)))
    levels = torch.randint(17, (200, 3, 3), generator=torch.Generator().manual_seed(0))
    noisy = small.dequantise(levels, torch.Generator().manual_seed(1))
    assert torch.equal(((noisy + 1) * 8 + 0.5).floor().long(), levels)


# --- the generator ----------------------------------------------------------------------------------------------


def test_gradient_by_z_is_right(small):
    z = normal(7, 3, 9).requires_grad_()
    assert torch.autograd.gradcheck(small.scan, z)
    assert torch.autograd.gradcheck(small, z, fast_mode=True)


def test_a_gradients_own_gradient_is_refused(small):
    z = normal(7, 3, 9).requires_grad_()
    with pytest.raises(NotImplementedError, match="inverse of a residual block has no second derivatives"):
        torch.autograd.grad(small.scan(z).sum(), z, create_graph=True)


def test_round_trips_of_the_embedded_weights(generator):
    z = latents.sample("truncnorm", 1, (256, 64))
    error = generator.round_trip_error(z)
    assert error["latent_max"] < LATENT_MAX and error["scan_max"] < SCAN_MAX
    assert error["latent_mean"] < error["latent_max"] and error["scan_mean"] < error["scan_max"]
    double = copy.deepcopy(generator).double().round_trip_error(z.double())
    assert double["latent_max"] < 1e-10 and double["scan_max"] < 1e-11


def test_real_scans_come_back(generator, real):
    model = copy.deepcopy(generator).double()
    scans = model.dequantise(real, torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.scan(model.inverse(scans)), scans, rtol=0, atol=1e-10)
    scans = scans.float().clamp(-1.06, 1.06)
    torch.testing.assert_close(generator.scan(generator.inverse(scans)), scans, rtol=0, atol=SCAN_MAX)


def test_the_embedded_flow_codes_held_out_digits(generator, real):
    scans = generator.dequantise(real, torch.Generator().manual_seed(0))
    assert generator.bits_per_dim(scans).mean() < HELD_OUT_BITS


def test_every_block_keeps_its_lipschitz_bound_after_training(generator):
    x = latents.sample("normal", 2, (50, 64)) * 2
    for block in generator.flow.blocks:
        g = block.contraction()
        bound = block.lipschitz()
        assert bound <= BOUND ** len(block.layers)
        jacobian = torch.func.vmap(torch.func.jacrev(lambda row, g=g: g(row[None])[0]))(x)
        assert torch.linalg.matrix_norm(jacobian, 2).max() <= bound


def test_an_image_does_not_depend_on_its_batch(generator):
    z = latents.sample("truncnorm", 3, (64, 64))
    z[5] = math.nan
    z[6] *= 1e6  # needs other numbers of iterations
    z.requires_grad_()
    images = generator(z)
    (together,) = torch.autograd.grad(images.square().sum(), z)
    assert images[5].isnan().all() and images[6].isfinite().all()
    for i in (0, 31, 63):
        torch.testing.assert_close(generator(z[i : i + 1]), images[i : i + 1], rtol=0, atol=1e-4)
        alone = z[i : i + 1].detach().requires_grad_()
        generator(alone).square().sum().backward()
        torch.testing.assert_close(alone.grad, together[i : i + 1], rtol=1e-3, atol=1e-3)
    assert torch.equal(generator(z.roll(1, 0)).roll(-1, 0)[:5], images[:5])


def test_scans_show_digits(generator):
    """Nearer to some real scan than to the mean one; samples of a Gaussian with the real covariance are not."""
    train = sets.digits(image_size=8).train_images[:, 0].flatten(1).float() / 127.5 - 1
    scans = generator.scan(latents.sample("truncnorm", 4, (500, 64))).flatten(1)
    nearest = torch.cdist(scans, train).min(dim=1).values.median()
    assert nearest < 0.85 * (scans - train.mean(0)).norm(dim=1).median()
    assert scans.std(0).norm() > 0.7 * train.std(0).norm()


def test_samples_show_every_class_and_teach_a_classifier_to_read_real_digits(generator):
    """Fitted to samples alone, named by a classifier of real scans, and tested on held-out ones."""
    images = sets.digits(image_size=8)
    train, test = (split[:, 0].flatten(1).float() / 127.5 - 1 for split in (images.train_images, images.test_images))
    scans = generator.scan(latents.sample("truncnorm", 6, (2000, 64))).flatten(1)
    classes = SVC(C=10).fit(train, images.train_labels).predict(scans)
    assert torch.bincount(torch.from_numpy(classes), minlength=10).min() > 0.03 * 2000
    assert SVC(C=10).fit(scans, classes).score(test, images.test_labels) >= 0.9


def test_other_scans_are_refused_by_name(generator):
    with pytest.raises(ValueError, match=r"^scans: expected shape \[N, 8, 8\]"):
        generator.inverse(torch.zeros(2, 64))
    with pytest.raises(TypeError, match="^scans: expected torch.float32"):
        generator.log_density(torch.zeros(2, 8, 8, dtype=torch.uint8))
    for outside in (1.2, -2.0, math.nan):
        with pytest.raises(ValueError, match=r"^scans: expected values in \[-1, 1\]"):
            generator.inverse(torch.full((1, 8, 8), outside))


# --- its weights ------------------------------------------------------------------------------------------------


def expand(tensors):
    tensors["flow.blocks.0.layers.0.weight"] *= 3
    tensors["flow.blocks.0.layers.0.u"] *= 0


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda tensors: tensors.pop("layout"), "no `layout` of 5 integers"),
        (lambda tensors: tensors.update(layout=torch.tensor([8, 17, 8, 1000, 2])), "layout .* needs more"),
        (lambda tensors: tensors.update(layout=torch.tensor([0, 17, 8, 192, 2])), "layout: side: expected 2 to 32"),
        (lambda tensors: tensors["temperature"].zero_(), "temperature is 0"),
        (lambda tensors: tensors["flow.rotation"].mul_(2), "flow.rotation is not orthogonal"),
        (lambda tensors: tensors["flow.norms.1.shift"].fill_(torch.nan), "flow.norms.1.shift is not finite"),
        (expand, "block 0 is not surely invertible, its Lipschitz bound is 2.8"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, fault, words):
    tensors = load_file(residual_flow.EMBEDDED)
    fault(tensors)
    path = tmp_path / "odd.safetensors"
    save_file(tensors, path)
    with pytest.raises(UsageError, match=f"odd.safetensors.*{words}.*fit.residual_flow"):
        generators.build("residual-flow", path)


def test_rows_of_infinity_stay_alone():
    with seeds.seeded("block"):
        flow = ResidualFlow(4, 2, 8, 2)
    z = torch.zeros(2, 4)
    z[0] = math.inf
    x = flow.inverse(z)
    assert not x[0].isfinite().any() and x[1].isfinite().all()


def test_half_precision_is_refused_where_an_operation_lacks_it(generator):
    with pytest.raises(UsageError, match="ResidualFlowGenerator can't compute in torch.bfloat16, .*: take level exact"):
        generators.optimize(generator, "half")
