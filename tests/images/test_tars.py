"""WebDataset tars made by others: PAX and GNU headers, folders inside, labels of three kinds."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from copgen_fast.config import DataConfig
from copgen_fast.errors import UsageError
from copgen_fast.images import pack, sets, tars
from copgen_fast.images.views import Centre


def picture(level, format="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.full((12, 9, 3), level, np.uint8)).save(file, format)
    return file.getvalue()


def write(path, members, format=tarfile.GNU_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(data)
            if format == tarfile.PAX_FORMAT:
                info.pax_headers = {"comment": "by others"}
            tar.addfile(info, None if data is None else io.BytesIO(data))


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize(
    ("label", "ending"), [("{}", "cls"), ("{}", "txt"), ('{{"label": {}}}', "json"), ("{}", "json")]
)
def test_images_and_labels_of_any_headers(tmp_path, format, label, ending):
    long = "n" * (60 if format == tarfile.USTAR_FORMAT else 150)
    members = [("./", None), (f"./{long}/", None)]
    for number in range(4):
        members.append((f"./{long}/x{number}.PNG", picture(60 * number)))
        members.append((f"./{long}/x{number}.{ending}", label.format(number % 2).encode()))
    write(tmp_path / "set-train-0.tar", members[:6], format)
    write(tmp_path / "set-train-1.tar", members[6:], format)
    split = tars.open_splits(tmp_path, ["train"])["train"]
    assert split.labels.tolist() == [0, 1, 0, 1] and split.classes is None
    for number in range(4):
        image, found = split.read(number, Centre(8))
        assert (image == 60 * number).all() and found == number % 2
        assert split.where(number).endswith(f"{long}/x{number}.PNG")


def test_names_of_classes_are_numbered_in_order_over_all_splits(tmp_path):
    files = {"a.jpg": picture(9, "JPEG"), "a.cls": b"zebra", "b.webp": picture(9, "WEBP"), "b.cls": b"ant"}
    write(tmp_path / "train/0.tar", files.items())
    write(tmp_path / "test/0.tar", [("a.jpeg", picture(9, "JPEG")), ("a.json", b'{"class_name": "zebra"}')])
    found = tars.open_splits(tmp_path, sets.SPLITS)
    assert found["train"].labels.tolist() == [1, 0] and found["test"].labels.tolist() == [1]
    assert found["train"].classes == ("ant", "zebra")


def test_tars_are_packed_with_their_names(tmp_path):
    files = {"x/a.png": picture(100), "x/b.png": b"broken", "x/c.png": picture(50)}
    files |= {"x/a.cls": b"0", "x/b.cls": b"1", "x/c.cls": b"1"}
    for split in sets.SPLITS:
        write(tmp_path / "source" / split / "0.tar", files.items())
    index = pack.pack(pack.PackConfig(tmp_path / "source", tmp_path / "out", size=8, codec="raw"))
    assert index.splits["train"].count == 2 and "x/b.png" in index.splits["train"].left_out[0]
    split = sets.open_set(DataConfig("packed", str(tmp_path / "out"), 8)).splits["train"]
    assert split.places.name_of(1) == "train/0.tar: x/c.png" and split.labels.tolist() == [0, 1]
    assert (split.read(1, Centre(8))[0] == 50).all()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"")], r"0\.tar: a\.png has no label beside it: expected a\.cls, \.json or \.txt"),
        ([("a.png", b""), ("a.jpg", b""), ("a.cls", b"0")], r"a\.jpg comes after a\.png, of the same sample"),
        ([("a.png", b""), ("a.json", b"{")], r"a\.json is no valid JSON"),
        ([("a.png", b""), ("a.json", b'{"caption": "x"}')], r"a\.json holds no label"),
        ([("a.png", b""), ("a.cls", b" ")], r"a\.cls holds no label"),
        ([("a.gif", b""), ("a.cls", b"0")], "no images"),
    ],
)
def test_what_is_missing_is_one_line(tmp_path, members, message):
    write(tmp_path / "train/0.tar", members)
    with pytest.raises(UsageError, match=message) as caught:
        tars.open_splits(tmp_path, ["train"])
    assert "\n" not in str(caught.value)


def test_damaged_and_missing_tars_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"holds no tars of split 'train': expected train/\*\.tar"):
        tars.open_splits(tmp_path, ["train"])
    (tmp_path / "train").mkdir()
    (tmp_path / "train/0.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UsageError, match=r"0\.tar is truncated or no tar file"):
        tars.open_splits(tmp_path, ["train"])


def test_validation_tars_are_tested_on_where_there_are_no_test_tars(tmp_path):
    for name, level in (("imagenet1k-train-0000.tar", 10), ("imagenet1k-validation-00.tar", 90)):
        write(tmp_path / "tars" / name, [("a.png", picture(level)), ("a.cls", b"0")])
    with pytest.warns(UserWarning, match="has no test, so val is taken as test"):
        pack.pack(pack.PackConfig(tmp_path / "tars", tmp_path / "out", size=8, codec="png", workers=1))
    data = sets.open_set(DataConfig("packed", str(tmp_path / "out"), 8))
    assert [int(data.splits[name].read(0, Centre(8))[0].max()) for name in sets.SPLITS] == [10, 90]
