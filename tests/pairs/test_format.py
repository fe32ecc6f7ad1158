import io
import re
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copgen_fast.errors import CorruptArtifactError, NonFiniteError, UsageError
from copgen_fast.pairs import format
from copgen_fast.runtime.tars import add_member
from tests.helpers.pairs_fixtures import CONFIG, forge, write


@pytest.mark.parametrize(
    ("value", "level"),
    [(-1, 0), (-1.5, 0), (0, 128), (-1e-3, 127), (1, 255), (2, 255), (0.9999, 255), (0.9921, 254), (-1 + 1 / 128, 1)],
)
def test_quantisation_floors_at_256_levels(value, level):
    assert format.to_uint8(torch.full((1, 3, 1, 1), float(value))).unique().tolist() == [level]


@settings(deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=30))
def test_quantisation_is_the_references(values):
    images = torch.tensor(values).view(-1, 1, 1, 1).repeat(1, 3, 1, 1)
    expected = np.clip((images.numpy() + 1) / 2 * 256, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(format.to_uint8(images).numpy(), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_quantisation_names_the_first_bad_sample(bad):
    images = torch.zeros(4, 3, 2, 2)
    images[2:, 1, 0, 1] = bad
    with pytest.raises(NonFiniteError, match="^images: .*sample 2$"):
        format.to_uint8(images)


def test_quantisation_rejects_other_tensors():
    with pytest.raises(TypeError, match="images"):
        format.to_uint8(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images.*\[N, 3, H, W\]"):
        format.to_uint8(torch.zeros(3, 2, 2))


def test_half_images_quantise_in_float32():
    assert format.to_uint8(torch.full((1, 3, 1, 1), 0.5, dtype=torch.float16)).unique().tolist() == [192]


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 60))
def test_plan_covers_every_pair_once(count, shard_size):
    spans = format.plan(count, shard_size)
    assert [i for span in spans for i in range(span.first, span.first + span.count)] == list(range(count))
    assert all(span.count == shard_size for span in spans[:-1])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 1500), min_size=3, max_size=12))
def test_member_table_agrees_with_tarfile(tmp_path_factory, sizes):
    sizes = sizes[: len(sizes) // 3 * 3]
    path = tmp_path_factory.mktemp("tar") / "shard-000000.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row, size in enumerate(sizes):
            add_member(tar, f"{format.key(5 + row // 3)}.{format.members('jpeg')[row % 3]}", b"x" * size)
    with tarfile.open(path) as tar:
        expected = [[member.offset_data, member.size] for member in tar]
    assert format.member_table(path, 5, len(sizes) // 3, "jpeg").reshape(-1, 2).tolist() == expected


@pytest.mark.parametrize("data", [b"", b"\0" * 10240, b"junk" * 1000])
def test_member_table_names_a_shard_of_something_else(tmp_path, data):
    path = tmp_path / "shard-000000.tar"
    path.write_bytes(data)
    with pytest.raises(CorruptArtifactError, match="shard-000000.tar"):
        format.member_table(path, 0, 1, "png")


@pytest.mark.parametrize("size", [b"77777777777", b"-0000000001"])
def test_a_member_that_claims_more_than_the_shard_holds_is_named(tmp_path, size):
    """As many bytes would be asked for when it is read."""
    write(tmp_path)
    path = tmp_path / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[124:135] = size
    path.write_bytes(data)
    with pytest.raises(CorruptArtifactError, match=r"00000000.anchor.png claims .* bytes"):
        format.member_table(path, 0, 4, "png")


def test_shards_are_plain_webdataset(tmp_path):
    write(tmp_path)
    keys = []
    for number, size in enumerate((4, 4, 2)):
        groups = {}
        with tarfile.open(tmp_path / f"shard-{number:06d}.tar") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                groups.setdefault(key, []).append(extension)
                assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)
        assert len(groups) == size
        assert all(extensions == ["anchor.png", "positive.png", "json"] for extensions in groups.values())
        keys += groups
    assert keys == [f"{i:08d}" for i in range(CONFIG.count)]


def test_index_faults_are_named(tmp_path):
    with pytest.raises(UsageError, match="--stages pairs"):
        format.read_index(tmp_path)
    write(tmp_path)
    path = tmp_path / "index.json"
    good = path.read_text()
    forge(path, lambda index: index.update(format=4))
    with pytest.raises(UsageError, match="format"):
        format.read_index(tmp_path)
    for bad, message in (
        ("[]", "its content: expected an object, got []"),
        ("{", "is not valid JSON"),
        ("[" * 10**5, "nested too deeply"),
        (good.replace('"first": 4', '"first": 5'), "is altered: its content is not that of the record_sha256 in it"),
    ):
        path.write_text(bad)
        with pytest.raises(CorruptArtifactError, match=rf"index\.json.*{re.escape(message)}"):
            format.read_index(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["shards"][1].update(first=5), "shards that don't fit count and shard_size"),
        (lambda index: index.pop("count"), "count is missing"),
        (lambda index: index.update(counts=3), "'counts' is no field"),
        (lambda index: index.update(codec="gif"), "codec: expected one of"),
        (lambda index: index.update(count="10"), "count: expected an integer of 64 bits, got '10'"),
        (lambda index: index.update(count=2**62, shard_size=1), "too many shards"),
        (lambda index: index.update(shard_size=0), "shard_size: expected 1 or more"),
        (lambda index: index.update(count=True), "count: expected an integer"),
        (lambda index: index.update(image_shape=[3, 8]), "image_shape: expected a list of 3"),
        (lambda index: index.update(image_shape=[3, 65000, 65000]), "image_shape: expected .3, height, width"),
        (lambda index: index.update(identity=[]), r"identity: expected an object, got \[\]"),
        (lambda index: index["shards"][0].update(sha256=None), r"shards\[0\].sha256: expected text, got None"),
        (lambda index: index.update(shards={}), "shards: expected a list"),
        (lambda index: index.update(displacement_mean="far"), "displacement_mean: expected a number, got 'far'"),
        (lambda index: index.pop("format"), "format is missing"),
    ],
)
def test_fields_of_an_index_that_cannot_be_are_named(tmp_path, change, message):
    write(tmp_path)
    forge(tmp_path / "index.json", change)
    with pytest.raises(CorruptArtifactError, match=rf"index\.json.*{message}.*: delete it"):
        format.read_index(tmp_path)


def test_folders_of_format_1_hold_png(tmp_path):
    write(tmp_path)
    index = format.read_index(tmp_path)
    forge(tmp_path / "index.json", lambda values: values.update(format=1) or values.pop("codec"))
    assert format.read_index(tmp_path) == index and index.codec == "png"
    assert write(tmp_path)["written"] == 0


def test_add_member_needs_no_file(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        add_member(tar, "a.json", b"{}")
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        assert tar.extractfile("a.json").read() == b"{}"
