"""The seven transfer sets: their parts, the rule that draws them, and what is said of folders that aren't whole."""

import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copgen_fast.config import DataConfig
from copgen_fast.errors import UsageError
from copgen_fast.images import sets, transfer_sets
from copgen_fast.images.views import Centre
from tests.helpers import transfer_layouts
from tests.helpers.transfer_layouts import COUNTS, NAMES

EXPECTED = [
    "inline_skate/image_0022.jpg",
    "inline_skate/image_0025.jpg",
    "metronome/image_0012.jpg",
    "metronome/image_0023.jpg",
]

pytestmark = pytest.mark.filterwarnings("ignore:.*not comparable")


@pytest.fixture(autouse=True)
def trusted(monkeypatch):
    transfer_layouts.trust(monkeypatch)


def opened(root, name):
    return sets.open_set(DataConfig(name, str(root), image_size=8))


def paths(split):
    return [os.path.basename(os.path.dirname(path)) + "/" + os.path.basename(path) for path, _ in split.items]


@pytest.mark.parametrize("name", NAMES)
def test_each_set_has_its_two_parts(tmp_path, name):
    transfer_layouts.write(tmp_path, name)
    data = opened(tmp_path, name)
    data.expect_classes()
    assert tuple(split.count for split in data.splits.values()) == COUNTS[name]
    assert all(split.labels.unique().tolist() == [0, 1, 2] for split in data.splits.values())
    batch = next(data.stream("test", Centre(8)))
    assert batch.images[batch.labels == 1].float().mean((0, 2, 3)).argmax() == 1


def test_validation_parts_are_those_that_the_sets_name(tmp_path):
    for name in ("flowers102", "sun397", "food101"):
        transfer_layouts.write(tmp_path, name)
    assert opened(tmp_path, "flowers102").validation.tolist() == list(range(6, 12))
    assert opened(tmp_path, "food101").validation is None
    sun = opened(tmp_path, "sun397")
    assert sun.splits["train"].labels[sun.validation].tolist() == [0, 1, 2]
    assert sun.splits["train"].classes == ("ant", "bee", "cat/indoor")


@pytest.mark.parametrize(("name", "classes"), [("caltech101", 3), ("caltech101-background", 4)])
def test_caltech_has_thirty_images_a_class_with_and_without_its_background(tmp_path, name, classes):
    transfer_layouts.write(tmp_path, "caltech101")
    (tmp_path / "caltech101" / "101_ObjectCategories" / "ant" / ".DS_Store").touch()
    with pytest.warns(UserWarning, match="images whose split has the digest"):
        data = opened(tmp_path, name)
    assert data.splits["train"].labels.bincount().tolist() == [30] * classes
    assert data.splits["test"].labels.bincount().tolist() == [2] * classes
    assert len(data.digest) == 64 and not set(paths(data.splits["train"])) & set(paths(data.splits["test"]))


def test_the_split_depends_on_names_alone(tmp_path):
    """Not on the folder, nor on the order in which the file system lists it."""
    transfer_layouts.write(tmp_path / "one", "sun397")
    one = opened(tmp_path / "one", "sun397")
    files = sorted((tmp_path / "one").rglob("*.*"), reverse=True)
    for file in files:
        target = tmp_path / "two" / file.relative_to(tmp_path / "one")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    two = opened(tmp_path / "two", "sun397")
    assert one.digest == two.digest
    assert [paths(split) for split in one.splits.values()] == [paths(split) for split in two.splits.values()]


@settings(max_examples=25)
@given(st.lists(st.integers(10, 40), min_size=1, max_size=4), st.integers(0, 3), st.randoms())
def test_draws_are_a_function_of_names(counts, seed, random):
    names = [f"{label}/{number}" for label, count in enumerate(counts) for number in range(count)]
    labels = [int(name.split("/")[0]) for name in names]
    classes = [str(label) for label in range(len(counts))]
    parts = transfer_sets.draw(names, labels, classes, "SUN397", seed)
    for label, count in enumerate(counts):
        mine = [part for part, of in zip(parts, labels, strict=True) if of == label]
        assert (mine.count("train"), mine.count("val")) == (7 * count // 10, count // 10)
    order = random.sample(range(len(names)), len(names))
    again = transfer_sets.draw([names[i] for i in order], [labels[i] for i in order], classes, "SUN397", seed)
    assert again == [parts[i] for i in order]
    assert transfer_sets.digest([names[i] for i in order], again) == transfer_sets.digest(names, parts)


def test_the_split_of_published_names_is_the_committed_one():
    """Two classes whose files are known: what is committed as a rule must not change."""
    names = [f"{name}/image_{number:04d}.jpg" for name in ("inline_skate", "metronome") for number in range(1, 33)]
    parts = transfer_sets.draw(names, [0] * 32 + [1] * 32, ["inline_skate", "metronome"], "Caltech101")
    assert [name for name, part in zip(names, parts, strict=True) if part == "test"] == EXPECTED


def test_official_lists_of_sun397(tmp_path):
    transfer_layouts.write(tmp_path, "sun397")
    with pytest.raises(UsageError, match=r"Training_01.txt is missing: unpack SUN397's Partitions"):
        opened(tmp_path, "sun397-01")
    (tmp_path / "SUN397" / "Training_01.txt").write_text(
        "/a/ant/sun_1.jpg\n/b/bee/sun_0.jpg\n/c/cat/indoor/sun_3.jpg\n"
    )
    (tmp_path / "SUN397" / "Testing_01.txt").write_text("/a/ant/sun_2.jpg\n/c/cat/indoor/sun_1.jpg\n")
    data = opened(tmp_path, "sun397-01")
    assert paths(data.splits["train"]) == ["ant/sun_1.jpg", "bee/sun_0.jpg", "indoor/sun_3.jpg"]
    assert paths(data.splits["test"]) == ["ant/sun_2.jpg", "indoor/sun_1.jpg"] and data.validation is None
    (tmp_path / "SUN397" / "a" / "ant" / "sun_2.jpg").unlink()
    with pytest.raises(UsageError, match="names 1 missing files, such as .*sun_2.jpg"):
        opened(tmp_path, "sun397-01")


def test_folders_that_are_not_whole(tmp_path):
    for name in ("caltech101", "sun397"):
        with pytest.raises(UsageError, match=r"put there what torchvision.datasets.\w+\(.*download=True\) would"):
            opened(tmp_path, name)
        transfer_layouts.write(tmp_path, name)
    assert not (tmp_path / "caltech101" / "caltech101").exists()
    (tmp_path / "SUN397" / "d" / "dog").mkdir(parents=True)
    transfer_layouts.jpeg(tmp_path / "SUN397" / "d" / "dog" / "sun_1.jpg", 0, 0)
    with pytest.raises(UsageError, match="sun_1.jpg is of no class in .*ClassName.txt"):
        opened(tmp_path, "sun397")
    for number in range(1, 4):
        (tmp_path / "caltech101" / "101_ObjectCategories" / "bee" / f"image_{number:04d}.jpg").unlink()
    with pytest.raises(UsageError, match="class bee has 29 images, and Caltech101 trains on 30"):
        opened(tmp_path, "caltech101")
    (tmp_path / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"lacks caltech101/101_ObjectCategories/BACKGROUND_Google/, or files of it"):
        opened(tmp_path, "caltech101-background")


def test_rules_are_those_of_the_published_protocols():
    assert [name for name in NAMES if not transfer_sets.rules(name).crop] == ["cifar10", "cifar100", "sun397"]
    per_class = [name for name in NAMES if transfer_sets.rules(name).metric == "mean_per_class"]
    assert per_class == ["oxfordiiitpet", "caltech101", "flowers102"]
    assert not transfer_sets.rules("sun397").merged and transfer_sets.rules("folder") == transfer_sets.Rules()
