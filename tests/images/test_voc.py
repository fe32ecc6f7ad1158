"""Annotated images in PASCAL VOC's folders: coordinates, flags, and one line for what is wrong with a file."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from copgen_fast.errors import UsageError
from copgen_fast.images import voc
from tests.helpers.voc_fixtures import annotation, write_image, write_list, write_set

GREY = np.full((40, 60, 3), 128, np.uint8)
BCCD = Path(os.environ.get("COPGEN_FAST_BCCD", Path(__file__).parents[3] / "shared" / "data" / "bccd"))


@pytest.fixture
def folder(tmp_path):
    """Year 2007: image a with three boxes, b with one; year 2012: image a with one more class."""
    folder = tmp_path / "VOCdevkit" / "VOC2007"
    write_image(folder, "a", GREY, [("dog", (1, 1, 60, 40), False), ("cat", (3, 4, 3, 9), True)])
    write_image(folder, "b", GREY.swapaxes(0, 1), [("dog", (10, 20, 30, 40), False)])
    write_list(folder, "trainval", ["a", "b  1"])
    write_list(folder, "test", ["b"])
    other = tmp_path / "VOCdevkit" / "VOC2012"
    write_image(other, "a", GREY, [("bird", (1, 1, 5, 5), False)])
    write_list(other, "trainval", ["a"])
    return folder


def test_boxes_count_pixels_from_zero_and_end_behind_the_last(folder, tmp_path):
    found = voc.read(tmp_path, ["2007-trainval", "2012-trainval"])
    assert found.classes == ("bird", "cat", "dog") and len(found.images) == 3 and found.left_out == ()
    first, second, third = found.images
    assert first.boxes.tolist() == [[0, 0, 60, 40], [2, 3, 3, 9]] and first.boxes.dtype == torch.float32
    assert (first.labels.tolist(), first.difficult.tolist()) == ([2, 1], [False, True])
    assert (second.height, second.width) == (60, 40) and third.labels.tolist() == [0]
    assert np.abs(first.pixels().astype(int) - 128).max() <= 2
    inside = voc.read(tmp_path / "VOCdevkit", ["2007-test"], found.classes)
    assert inside.images[0].labels.tolist() == [2], "classes are those given"


def test_an_annotation_without_a_size_takes_the_images(folder, tmp_path):
    path = folder / "Annotations" / "b.xml"
    path.write_text(path.read_text().replace("<width>40</width>", "").replace("<height>60<", "<height>0<"))
    image = voc.read(tmp_path, ["2007-test"]).images[0]
    assert (image.height, image.width) == (60, 40)


def test_boxes_without_area_or_outside_are_left_out_and_their_files_named(folder, tmp_path):
    objects = [("dog", box, False) for box in ((9, 9, 8, 20), (70, 1, 80, 9), (-5, -5, 0, 9), (5, 5, 70, 50))]
    (folder / "Annotations" / "a.xml").write_text(annotation("a", 60, 40, objects))
    found = voc.read(tmp_path, ["2007-trainval"])
    assert found.images[0].boxes.tolist() == [[4, 4, 70, 50]], "one that reaches over the edge stays"
    with pytest.warns(UserWarning, match=r"left out 3 boxes without area, or outside of their image, of \S+/a.xml$"):
        found.warn()


def broken(folder, what):
    """Break one thing; returns what the message must have in it."""
    xml, image = folder / "Annotations" / "b.xml", folder / "JPEGImages" / "b.jpg"
    if what == "no devkit":
        folder.parent.rename(folder.parent.with_name("other"))
        return "has no VOCdevkit/VOC2007 in it: unpack there"
    if what == "no list":
        (folder / "ImageSets" / "Main" / "trainval.txt").unlink()
        return "trainval.txt is missing"
    if what == "empty list":
        write_list(folder, "trainval", [])
        return "trainval.txt names no image"
    if what == "no image":
        image.unlink()
        return "JPEGImages/b.jpg missing: a list in ImageSets/Main names it"
    if what == "no annotation":
        xml.unlink()
        return "Annotations/b.xml missing"
    text = {"cut": "<annotation><object>", "nameless": annotation("b", 40, 60, [("", (1, 1, 9, 9), False)])}
    text |= {"no number": annotation("b", 40, 60, [("dog", ("x", 1, 9, 9), False)])}
    text |= {"nan": annotation("b", 40, 60, [("dog", ("nan", 1, 9, 9), False)])}
    text |= {"no box": "<annotation><object><name>dog</name></object></annotation>"}
    xml.write_text(text[what])
    return r"b.xml is no annotation of PASCAL VOC \("


@pytest.mark.parametrize(
    "what",
    [
        "no devkit",
        "no list",
        "empty list",
        "no image",
        "no annotation",
        "cut",
        "nameless",
        "no number",
        "nan",
        "no box",
    ],
)
def test_what_is_wrong_is_one_line_with_the_file(folder, tmp_path, what):
    expected = broken(folder, what)
    with pytest.raises(UsageError, match=expected) as error:
        voc.read(tmp_path, ["2007-trainval"])
    assert "\n" not in str(error.value)


def test_other_refusals(folder, tmp_path):
    with pytest.raises(UsageError, match="written as YEAR-LIST"):
        voc.read(tmp_path, ["trainval"])
    with pytest.raises(UsageError, match=r"VOC2012/\S+/a.xml: class 'bird' has no training image"):
        voc.read(tmp_path, ["2012-trainval"], ["cat", "dog"])
    (folder / "Annotations" / "b.xml").write_text(annotation("b", 60, 40, [("dog", (1, 1, 9, 9), False)]))
    with pytest.raises(UsageError, match="b.jpg is 40 x 60 pixels .* says 60 x 40"):
        voc.read(tmp_path, ["2007-test"]).images[0].pixels()
    (folder / "JPEGImages" / "b.jpg").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="b.jpg cannot be read as an image .no image of a known format"):
        voc.read(tmp_path, ["2007-test"]).images[0].pixels()


def test_boxes_of_a_made_set_hold_their_rectangles(tmp_path):
    write_set(tmp_path)
    for image in voc.read(tmp_path, ["2007-trainval"]).images:
        pixels = image.pixels().astype(int)
        for (left, top, right, bottom), label in zip(image.boxes.int().tolist(), image.labels.tolist(), strict=True):
            inside = pixels[top:bottom, left:right]
            assert abs(inside.mean() - (230, 20)[label]) < 4 and inside.std() < 12


@pytest.mark.skipif(not BCCD.exists(), reason="BCCD's blood cells are not there (COPGEN_FAST_BCCD)")
def test_a_real_set_in_this_layout():
    train, test = (voc.read(BCCD, [name]) for name in ("2007-trainval", "2007-test"))
    assert (len(train.images), len(test.images)) == (292, 72)
    assert train.classes == test.classes == ("Platelets", "RBC", "WBC")
    assert sum(len(image.boxes) for part in (train, test) for image in part.images) == 4888
    assert test.images[0].pixels().shape == (480, 640, 3)
