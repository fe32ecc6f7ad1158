import dataclasses
import os

import pytest
import torch

from copgen_fast.errors import CorruptArtifactError, UsageError
from copgen_fast.images.codecs import CODECS
from copgen_fast.pairs.format import to_uint8
from copgen_fast.pairs.read.loader import PairDataset
from copgen_fast.pairs.verify import level_difference, verify_pairs
from copgen_fast.runtime import artifacts
from tests.helpers.pairs_fixtures import (
    CONFIG,
    IDENTITY,
    forge,
    generate,
    generate_of_class,
    shift,
    source,
    update_digest,
    write,
)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path)
    return tmp_path


def test_sound_shards_pass(folder):
    result = verify_pairs(folder, source(), IDENTITY)
    assert result["max_level_difference"] <= 1
    assert (result["shards"], result["samples"]) == (3, 10)
    assert verify_pairs(folder, source(), IDENTITY, samples=3, seed=1)["samples"] == 3


@pytest.mark.parametrize(("prior", "change"), [("own", 2e-6), ("own", 1e-3), ("truncnorm", 2e-6)])
def test_latents_that_a_generator_draws_itself_may_round_otherwise(tmp_path, prior, change):
    identity = IDENTITY | {"prior": prior}
    write(tmp_path, identity=identity)
    there = source()
    here = dataclasses.replace(there, sample=lambda seed, count: there.sample(seed, count) + change)
    if prior == "own" and change < 1e-5:
        assert verify_pairs(tmp_path, here, identity)["samples"] == 10
    else:
        with pytest.raises(CorruptArtifactError, match="z differs by"):
            verify_pairs(tmp_path, here, identity)


@pytest.mark.parametrize("codec", ["jpeg", "raw"])
def test_other_codecs_pass_and_are_judged(tmp_path, codec):
    write(tmp_path, dataclasses.replace(CONFIG, codec=codec))
    assert verify_pairs(tmp_path, source(), IDENTITY)["max_level_difference"] <= 1
    rounded = source(lambda z: generate(z) - 1e-4)
    assert verify_pairs(tmp_path, rounded, IDENTITY)["max_level_difference"] <= CODECS[codec].tolerance
    with pytest.raises(CorruptArtifactError, match=r"shard-000000\.tar: pair 00000000: its anchor image differs by"):
        verify_pairs(tmp_path, source(lambda z: generate(z) * 0.8), IDENTITY)


def test_a_conditional_generators_pairs_are_made_again_of_their_classes(tmp_path):
    conditional = source(generate_of_class, label_of=lambda index: index // 3 % 2)
    write(tmp_path, pair_source=conditional)
    pairs = PairDataset(tmp_path)
    assert [pairs.record(index)["label"] for index in range(10)] == [0, 0, 0, 1, 1, 1, 0, 0, 0, 1]
    assert [pairs[index][2] for index in (2, 3)] == [0, 1]
    z = artifacts.read_tensors(tmp_path / "shard-000001.safetensors")["z"]
    expected = to_uint8(generate_of_class(z[:1], torch.tensor([1])))[0]
    assert torch.equal(pairs[4][0], expected)
    assert verify_pairs(tmp_path, conditional, IDENTITY)["max_level_difference"] <= 1
    others = source(generate_of_class, label_of=lambda index: index % 2)
    with pytest.raises(CorruptArtifactError, match="pair 00000001: its JSON says label 0, expected 1"):
        verify_pairs(tmp_path, others, IDENTITY)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("latent", r"shard-000001\.tar: pair 00000006: z_positive differs"),
        ("image", r"shard-000001\.tar: pair 00000004: its positive image differs"),
        ("shape", r"does not hold z \[4, 4\] and z_positive \[4, 3, 4\]"),
    ],
)
def test_each_of_several_positives_is_made_again(tmp_path, wrong, message):
    several = source(positives=3)
    write(tmp_path, dataclasses.replace(CONFIG, codec="raw"), several)
    assert verify_pairs(tmp_path, several, IDENTITY)["max_level_difference"] <= 1
    path, shard = tmp_path / "shard-000001.safetensors", tmp_path / "shard-000001.tar"
    tensors = artifacts.read_tensors(path)
    if wrong == "latent":  # at the same distance from z
        tensors["z_positive"][2, 2] = 2 * tensors["z"][2] - tensors["z_positive"][2, 2]
    elif wrong == "image":  # the third positive of the next pair
        data = bytearray(shard.read_bytes())
        one, other = (data.index(f"0000000{pair}.positive3.raw".encode()) + 512 for pair in (4, 5))
        data[one : one + 192] = data[other : other + 192]
        shard.write_bytes(data)
        update_digest(tmp_path, shard.name, "")
    else:
        tensors["z_positive"] = tensors["z_positive"][:, :2].contiguous()
    artifacts.write_tensors(path, tensors)
    update_digest(tmp_path, path.name, "sidecar_")
    with pytest.raises(CorruptArtifactError, match=message):
        verify_pairs(tmp_path, several, IDENTITY)
    with pytest.raises(UsageError, match=r"positives \(3 there, 1 here\)"):
        verify_pairs(tmp_path, source(), IDENTITY)


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.safetensors"])
def test_altered_and_truncated_files_are_named(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CorruptArtifactError, match=rf"{name} is altered"):
        verify_pairs(folder, source(), IDENTITY, samples=0)
    os.truncate(folder / name, 50)
    with pytest.raises(CorruptArtifactError, match=rf"{name} is truncated"):
        verify_pairs(folder, source(), IDENTITY, samples=0)


@pytest.mark.parametrize("tensor", ["z", "z_positive"])
def test_altered_latents_with_a_forged_digest_are_caught(folder, tensor):
    path = folder / "shard-000001.safetensors"
    tensors = artifacts.read_tensors(path)
    # A rotation of the displacement's end would keep the recorded norm; here z and z_positive move together.
    for name in ("z", "z_positive") if tensor == "z" else ("z_positive",):
        tensors[name][2] += 1e-3 if tensor == "z" else 0
    if tensor == "z_positive":
        tensors[tensor][2] = 2 * tensors["z"][2] - tensors[tensor][2]
    artifacts.write_tensors(path, tensors)
    update_digest(folder, path.name, "sidecar_")
    with pytest.raises(CorruptArtifactError, match=rf"shard-000001\.tar: pair 00000006: {tensor} differs"):
        verify_pairs(folder, source(), IDENTITY)


def test_record_that_disagrees_with_latents_is_caught(folder):
    path = folder / "shard-000000.tar"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"index": 3', b'"index": 2'))
    update_digest(folder, path.name, "")
    with pytest.raises(CorruptArtifactError, match=r"pair 00000003: its JSON says index 2"):
        verify_pairs(folder, source(), IDENTITY)


def test_altered_seed_is_caught(folder):
    path = folder / "shard-000002.tar"
    path.write_bytes(path.read_bytes().replace(b'"seed": 15', b'"seed": 99'))
    update_digest(folder, path.name, "")
    with pytest.raises(CorruptArtifactError, match=r"pair 00000008: z differs by .* from what seed 99 gives"):
        verify_pairs(folder, source(), IDENTITY)


def test_other_pixels_are_caught(folder):
    other = source(lambda z: generate(z) * 0.9)
    with pytest.raises(CorruptArtifactError, match=r"shard-000000\.tar: pair 00000000: its anchor image differs by"):
        verify_pairs(folder, other, IDENTITY)


def test_rounding_within_a_level_passes(folder):
    other = source(lambda z: generate(z) - 1e-4)
    assert verify_pairs(folder, other, IDENTITY)["max_level_difference"] == 1


@pytest.mark.parametrize("level", ["half", "graph", "exact"])
def test_half_precision_may_differ_as_far_as_its_gate_lets_it(tmp_path, level):
    identity = IDENTITY | {"generator_level": level}
    write(tmp_path, identity=identity)
    near = source(lambda z: generate(z) - 7 / 127.5)
    if level == "exact":
        with pytest.raises(CorruptArtifactError, match="differs by [78] levels"):
            verify_pairs(tmp_path, near, identity)
        return
    assert 7 <= verify_pairs(tmp_path, near, identity)["max_level_difference"] <= 8
    with pytest.raises(CorruptArtifactError, match="its anchor image differs by 1[12] levels"):
        verify_pairs(tmp_path, source(lambda z: generate(z) - 11 / 127.5), identity)


def test_a_thousandth_of_half_precision_may_differ_more():
    old = torch.zeros(3, 20, 20, dtype=torch.uint8)
    again = old.clone()
    again[0, 0, 0] = 90
    assert level_difference(again, old) == 90 and level_difference(again, old, ignored=1) == 0
    again[0, 0, 1] = 80
    assert level_difference(again, old, ignored=1) == 80


def test_other_positives_are_caught(folder):
    other = source(positive=lambda z, seeds: shift(z, seeds) + 1e-3)
    with pytest.raises(CorruptArtifactError, match=r"00000000: z_positive differs by 0\.001"):
        verify_pairs(folder, other, IDENTITY)


def test_latents_of_another_shape_are_named(folder):
    path = folder / "shard-000000.safetensors"
    artifacts.write_tensors(path, {"z": torch.zeros(4, 4)})
    update_digest(folder, path.name, "sidecar_")
    with pytest.raises(CorruptArtifactError, match=r"shard-000000\.safetensors does not hold"):
        verify_pairs(folder, source(), IDENTITY)


def test_a_shard_too_many_is_named(folder):
    (folder / "shard-000003.tar").write_bytes(b"")
    (folder / "notes.txt").write_text("not a shard")
    with pytest.raises(CorruptArtifactError, match=r"holds shards that its index does not list: shard-000003\.tar: "):
        verify_pairs(folder, source(), IDENTITY)


def test_other_identity_is_refused(folder):
    with pytest.raises(UsageError, match="positive"):
        verify_pairs(folder, source(), IDENTITY | {"positive": "identity"})


def test_incomplete_folder_is_refused(folder):
    forge(folder / "index.json", lambda index: index["shards"].pop())
    with pytest.raises(UsageError, match="2 of 3 shards"):
        verify_pairs(folder, source(), IDENTITY)
    assert write(folder, CONFIG)["written"] == 2
