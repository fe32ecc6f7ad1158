import copy
import hashlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.svm import SVC

from copgen_fast import generators
from copgen_fast.config import GeneratorConfig
from copgen_fast.errors import CopgenError, UsageError
from copgen_fast.generators import digits
from copgen_fast.images import sets
from copgen_fast.runtime import latents


@pytest.fixture(scope="module")
def generator():
    return generators.build("digits")


@pytest.fixture(scope="module")
def real():
    """Real scans as 64 numbers in [-1, 1], by the same downsampling as `as_scans`, and a classifier of them."""
    images = sets.digits()
    train = as_scans(images.train_images.float() / 127.5 - 1)
    test = as_scans(images.test_images.float() / 127.5 - 1)
    classifier = SVC(C=10).fit(train, images.train_labels)
    assert classifier.score(test, images.test_labels) >= 0.97
    return train, test, images.test_labels, classifier


def as_scans(images):
    return torch.nn.functional.avg_pool2d(images[:, :1], 4).flatten(1).numpy()


@pytest.fixture(scope="module")
def samples(generator):
    z = latents.sample("truncnorm", 1, (3000, 64))
    return z, generator(z)


def test_the_weights_file_is_printed_with_its_sha256_and_recorded(tmp_path, capsys):
    record = generators.load(GeneratorConfig(name="digits"), torch.device("cpu")).record
    assert capsys.readouterr().out == "", "nothing to say of what is part of the package"
    assert record["name"] == "digits" and record["weights"] == "embedded"
    copied = tmp_path / "copy.safetensors"
    shutil.copy(digits.EMBEDDED, copied)
    for level in ("published", "exact", "half"):
        config = GeneratorConfig(name="digits", weights=str(copied), level=level)
        found = generators.load(config, torch.device("cpu")).record
        difference = found.pop("difference", None)
        assert found == record | {"weights": str(copied)} and (difference is not None) == (level == "half")
        sha256 = hashlib.sha256(copied.read_bytes()).hexdigest()
        first, *others = capsys.readouterr().out.splitlines()
        assert first == f"generator digits: {copied}, sha256 {sha256}"
        if level == "half":
            assert 0 < difference["mean"] < difference["tail"] and sum(difference["shares"]) == pytest.approx(1)
            assert others[0].startswith(
                f"generator digits: torch.bfloat16 differs by mean {difference['mean']:.3f} lev"
            )
        assert len(others) == (level == "half")
    assert record["sha256"] == sha256 and record["digest"] == generators.digest(generators.build("digits"))


def test_an_option_that_a_generator_does_not_have_is_refused():
    with pytest.raises(UsageError, match="option 'truncation' of residual-flow .* does not exist: it has none"):
        generators.load(GeneratorConfig(name="residual-flow", options=("truncation=0.5",)), torch.device("cpu"))


def test_groups_of_the_digits_latents_change_no_image(generator):
    grouped = generators.build("digits", options=("groups=32,32",))
    z = latents.sample("truncnorm", 3, (2, 64))
    assert (generator.latent_groups, grouped.latent_groups) == ((), (32, 32))
    assert torch.equal(grouped(z), generator(z)) and generators.digest(grouped) == generators.digest(generator)
    with pytest.raises(UsageError, match="sizes that sum to latent_dim 64"):
        generators.build("digits", options=("groups=32,31",))


def test_the_gradient_is_that_of_the_image(generator):
    double = copy.deepcopy(generator).double()
    z, direction = latents.sample("truncnorm", 3, (2, 5, 64)).double()
    weights = latents.sample("normal", 4, (5, 3, 32, 32)).double()
    z.requires_grad_()
    (gradient,) = torch.autograd.grad((double(z) * weights).sum(), z)
    change = (double(z + 1e-5 * direction) - double(z - 1e-5 * direction)) * weights
    torch.testing.assert_close((gradient * direction).sum(), change.detach().sum() / 2e-5, rtol=1e-5, atol=0)


def test_upsampling_is_that_of_the_real_images(generator):
    """Random scans through the generator's matrix against sets.resize, which made the real images."""
    scans = torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = generator.upsampling @ scans @ generator.upsampling.T
    torch.testing.assert_close(ours, sets.resize(scans.unsqueeze(1), 32).squeeze(1), rtol=0, atol=1e-5)


def test_soft_limit_keeps_the_middle_bounds_the_rest_and_stays_smooth():
    values = torch.linspace(-1.6, 1.6, 3201, dtype=torch.float64).requires_grad_()
    limited = digits.soft_limit(values)
    middle = values.abs() <= 0.95
    assert torch.equal(limited[middle], values[middle])
    assert limited.abs().max() <= 1
    (slope,) = torch.autograd.grad(limited.sum(), values)
    assert slope.gt(0).all()
    assert slope.diff().abs().max() < 0.03  # no jump in the slope at the knee
    assert digits.soft_limit(torch.tensor([-50.0, 50.0])).tolist() == [-1.0, 1.0]


def test_digest_is_stable_and_sees_every_change(generator):
    reference = generators.digest(generator)
    assert len(reference) == 64
    assert generators.digest(generators.build("digits")) == reference
    seen = {reference, generators.digest(copy.deepcopy(generator).half())}
    for name in ("inward.bias", "outward.weight"):
        changed = copy.deepcopy(generator)
        changed.state_dict()[name].view(-1)[0] += 1e-3
        seen.add(generators.digest(changed))
    assert len(seen) == 4


def test_a_weights_file_stands_in_for_the_embedded_one(generator, tmp_path):
    tensors = load_file(digits.EMBEDDED)
    tensors["outward.bias"] += 1
    save_file(tensors, tmp_path / "mine.safetensors")
    other = generators.build("digits", str(tmp_path / "mine.safetensors"))
    assert torch.equal(other.outward.bias, generator.outward.bias + 1)


def test_an_unknown_generator_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match="unknown name 'digit' in generators: choose from.*digits"):
        generators.build("digit")


def test_samples_show_every_class_about_equally(samples, real):
    classes = real[-1].predict(as_scans(samples[1]))
    shares = torch.bincount(torch.from_numpy(classes), minlength=10) / len(classes)
    assert shares.min() > 0.04 and shares.max() < 0.20, shares


def test_samples_teach_a_classifier_to_read_real_digits(samples, real):
    """Fitted to samples alone and tested on held-out scans: fails for blurred, collapsed or mislabelled classes."""
    _, test, labels, classifier = real
    scans = as_scans(samples[1])
    student = SVC(C=10).fit(scans, classifier.predict(scans))
    assert student.score(test, labels) >= 0.9


def test_samples_vary_and_are_not_copies_of_training_scans(samples, real):
    train, test, _, _ = real
    train, test, scans = torch.from_numpy(train), torch.from_numpy(test), torch.from_numpy(as_scans(samples[1]))
    to_train = torch.cdist(scans, train).min(dim=1).values
    real_to_train = torch.cdist(test, train).min(dim=1).values
    assert to_train.median() > 0.8 * real_to_train.median()
    among = torch.cdist(scans, scans).fill_diagonal_(torch.inf).min(dim=1).values
    assert among.median() > 0.5 * real_to_train.median()


@pytest.mark.parametrize(("distance", "least"), [(0.5, 0.88), (1.5, 0.72), (2.0, 0.66)])
def test_near_latents_keep_the_class_and_change_the_image(generator, samples, real, distance, least):
    z, images = samples
    step = torch.nn.functional.normalize(latents.sample("normal", 9, tuple(z.shape)), dim=1) * distance
    moved = generator(z + step)
    before, after = as_scans(images), as_scans(moved)
    agreement = (real[-1].predict(before) == real[-1].predict(after)).mean()
    assert agreement >= least
    assert (moved - images).abs().mean() > 0.02 * distance


def test_checkpoints_of_a_generator_without_them_are_refused():
    with pytest.raises(UsageError, match="generator.checkpoint: digits at level exact has no such form: leave it out"):
        generators.load(GeneratorConfig(checkpoint=True), torch.device("cpu"))


def test_a_graph_without_a_gpu_is_refused():
    with pytest.raises(UsageError, match="generator.level: graph needs a GPU, and the run is on cpu"):
        generators.load(GeneratorConfig(level="graph"), torch.device("cpu"), batch=4)


@pytest.mark.parametrize(
    ("device", "fault", "level", "said"),
    [
        ("cpu", None, "exact", ""),
        ("cuda", None, "half", "level half"),
        ("cuda", CopgenError("torch.float16 changes the images too much"), "exact", "too much"),
        ("cuda", UsageError("it can't compute in torch.float16"), "exact", "can't compute"),
    ],
)
def test_by_itself_a_gpu_takes_half_precision_where_that_changes_nothing(
    monkeypatch, capsys, device, fault, level, said
):
    def load(config, device):
        if fault is not None and config.level == "half":
            raise fault

    monkeypatch.setattr(generators, "load", load)
    assert generators.resolve_level(GeneratorConfig(), torch.device(device)).level == level
    assert said in capsys.readouterr().out
    assert generators.resolve_level(GeneratorConfig(level="published"), torch.device(device)).level == "published"


def test_what_keeps_a_generator_from_loading_at_all_is_not_taken_for_a_fault_of_half_precision(tmp_path):
    config = GeneratorConfig(weights=str(tmp_path / "none.safetensors"))
    with pytest.raises(UsageError, match="none.safetensors"):
        generators.resolve_level(config, torch.device("cuda"))
