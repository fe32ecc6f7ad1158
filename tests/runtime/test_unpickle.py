import argparse
import collections
import io
import os
import pathlib
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from copgen_fast.errors import CopgenError, CorruptArtifactError
from copgen_fast.runtime import unpickle
from copgen_fast.runtime.memory import peak_memory
from copgen_fast.runtime.unpickle import Shell, Stored


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def with_pickle(data, program=None, **records):
    """The zip file `data` with another data.pkl, and other records by their path."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(result, "w") as target:
        for record in source.infolist():
            content = source.read(record)
            if record.filename.endswith("/data.pkl") and program is not None:
                content = program if isinstance(program, bytes) else program(content)
            target.writestr(record.filename, records.pop(record.filename, content))
        for name, content in records.items():
            target.writestr(name, content)
    return result.getvalue()


def tensors(content, found):
    """Read every Stored of a nested thing; the same places of `content` must hold equal tensors."""
    if isinstance(found, Stored):
        value = found.read()
        assert value.dtype == content.dtype and torch.equal(value, torch.as_tensor(content))
    elif isinstance(found, dict):
        assert list(found) == list(content)
        for name in found:
            tensors(content[name], found[name])
    elif isinstance(found, (list, tuple)):
        for left, right in zip(content, found, strict=True):
            tensors(left, right)
    else:
        assert found == content


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("zip_format", [True, False])
def test_tensors_and_plain_data_come_back_equal(zip_format):
    base = torch.arange(24.0)
    content = {
        "dtypes": [torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype) for dtype in DTYPES],
        "views": [base.view(4, 6).t(), base[5:11], base.view(2, 3, 4)[:, 1], torch.tensor(3.0), torch.empty(0, 3)],
        "plain": {"a": 1, "b": (2.5, None, True), 3: "text", "s": {1, 2}, "big": 2**70},
        "ordered": collections.OrderedDict(x=torch.ones(2)),
        "state": nn.BatchNorm1d(3).state_dict(),
        "parameter": nn.Parameter(torch.ones(2)),
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
    }
    found = unpickle.loads(saved(content, _use_new_zipfile_serialization=zip_format), "file").tree
    tensors(content, found)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpy_arrays_come_back_equal(protocol):
    arrays = {
        name: np.array([[0, 1, 1], [1, 0, 1]], dtype=name) for name in ("f8", "f4", "f2", "i8", "i4", "i1", "u1", "b1")
    }
    arrays |= {
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "none": np.zeros((0, 2), "f4"),
        "point": np.array(3),
        "scalar": np.float32(2.5),
    }
    found = unpickle.loads(pickle.dumps({"model": arrays, "x": True}, protocol), "file").tree
    assert found["x"] is True
    for name, array in arrays.items():
        value = found["model"][name].read()
        assert value.numpy().dtype == array.dtype and np.array_equal(value.numpy(), array)
        assert found["model"][name].shape == array.shape


def test_modules_and_options_become_shells_and_run_nothing():
    module = nn.DataParallel(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU()))
    options = argparse.Namespace(lr=0.1, names=["a"])
    for zip_format in (True, False):
        data = saved({"m": module, "opt": options}, _use_new_zipfile_serialization=zip_format)
        found = unpickle.loads(data, "file").tree
        assert isinstance(found["m"], Shell) and found["m"].of == "torch.nn.parallel.data_parallel.DataParallel"
        assert found["opt"].state == {"lr": 0.1, "names": ["a"]}
        state = unpickle.state_dict(found["m"])
        assert state.keys() == module.state_dict().keys()
        assert all(torch.equal(value.read(), module.state_dict()[name]) for name, value in state.items())


# Attacks


class Reduced:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.result = (function, arguments)

    def __reduce__(self):
        return self.result


SENTINEL = "touched"

CALLS = [
    (os.system, (f"touch {SENTINEL}",), "posix.system"),
    (eval, (f"open('{SENTINEL}', 'w')",), "builtin.*eval"),
    (exec, (f"open('{SENTINEL}', 'w')",), "builtin.*exec"),
    (open, (SENTINEL, "w"), "io.open"),
    (torch.hub.load, (SENTINEL,), "torch.hub.load"),
    (__import__, ("os",), "builtin.*import"),
]
HARMLESS = [
    (pathlib.PurePosixPath, ("/data",), "pathlib.PurePosixPath"),
    (torch.load, (SENTINEL,), "torch.serialization.load"),
    (torch._utils._rebuild_qtensor, (), "torch._utils._rebuild_qtensor"),
    (np.load, (SENTINEL,), "numpy.load"),
]


def packed(content, container):
    if container.startswith("pickle"):
        return pickle.dumps(content, int(container[-1]))
    return saved(content, _use_new_zipfile_serialization=container == "zip")


@pytest.mark.parametrize("container", ["zip", "legacy", "pickle 2", "pickle 4"])
@pytest.mark.parametrize(("function", "arguments", "named"), CALLS)
def test_a_call_is_refused_by_name_and_not_made(tmp_path, monkeypatch, container, function, arguments, named):
    monkeypatch.chdir(tmp_path)
    content = {"model": 1, "x": Reduced(function, *arguments)}
    with pytest.raises(CopgenError, match=f"evil.pth was refused: it names .*{named}"):
        unpickle.loads(packed(content, container), "evil.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("container", ["zip", "legacy", "pickle 2", "pickle 4"])
@pytest.mark.parametrize(("function", "arguments", "named"), HARMLESS)
def test_what_lies_beside_tensors_is_named_and_not_made(tmp_path, monkeypatch, container, function, arguments, named):
    monkeypatch.chdir(tmp_path)
    content = {"model": np.ones(2), "x": [Reduced(function, *arguments)]}
    found = unpickle.loads(packed(content, container), "file.pth")
    assert found.unknown == (named,) and found.tree["x"][0].of == named and isinstance(found.tree["x"][0], Shell)
    assert found.tree["model"].read().tolist() == [1, 1] and not list(tmp_path.iterdir())


def program(text):
    return b"\x80\x02" + text + b"."


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"cos\nsystem\n", "os.system"),
        (b"\x8c\x02os\x8c\x06system\x93", "os.system"),
        (b"(S'true'\nios\nsystem\n", "opcode STRING"),
        (b"(ios\nsystem\n", "opcode INST"),
        (b"(cos\nsystem\no", "os.system|opcode OBJ"),
        (b"\x82\x01", "opcode EXT1"),
        (b"Pstorage\n", "opcode PERSID"),
        (b"U\x01aQ", "persistent id"),
        (b"}ctorch\nFloatStorage\n}b", "attributes for a Global"),
        (b"}ctorch._utils\n_rebuild_tensor_v2\nN}U\x0c__defaults__)s\x86b", "attributes for a Global"),
        (b"}ctorch.nn.modules.linear\nLinear\n}b", "attributes for a Global"),
        (b"ccollections\nOrderedDict\n}U\x05items)sb", "attributes for a Global"),
        (b"ctorch.nn.modules.linear\nLinear\n)\x81}R", "a call of <"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)\x81", "an object of <"),
        (b"}(K\x01u", "items of no dictionary"),
        (b"](K\x01\x90", "members of no set"),
        (b"K\x02K\x01a", "members of no list"),
        (b"}]K\x01s", "a key that is a list"),
        (b"})\x85\x85K\x01s", "a key that is a tuple"),
        (b"c_codecs\nencode\n(U\x01aU\x05rot13tR", "encoding 'rot13'"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x00N", "truncated"),
        (b"K\x010", "truncated"),
    ],
)
def test_odd_programs_are_refused(code, message):
    for data in (program(code), with_pickle(saved({"x": torch.ones(2)}), program(code))):
        with pytest.raises(CopgenError, match=message):
            unpickle.loads(data, "evil")


def bombs():
    """Small files that claim much: memory by many or large copies, work by tuples in tuples as a key."""
    yield b"U\x00" + b"0]" * 500_000
    yield b"}" * 900_000
    copies = b"c_codecs\nencode\nq\x00T" + struct.pack("<i", 10**6) + b"x" * 10**6 + b"U\x06latin1\x86q\x01"
    yield copies + b"0h\x00h\x01R" * 100_000
    yield b"]q\x00(" + b"K\x01" * 10**5 + b"ec__builtin__\nset\nq\x01" + b"h\x01h\x00\x85R" * 10**5
    yield b"}K\x01\x85" + b"q\x000h\x00h\x00\x86" * 100 + b"K\x01s"


@pytest.mark.parametrize("code", list(bombs()), ids=["lists", "dicts", "copies", "sets", "graph"])
def test_bombs_are_refused_before_they_burst(code):
    def call():
        with pytest.raises(CorruptArtifactError, match=r"take far more memory|a key that is a tuple"):
            unpickle.loads(program(code), "bomb")

    assert peak_memory(call) < 250


def test_a_graph_of_tuples_is_read_in_no_time():
    graph = program(b"K\x01\x85" + b"q\x000h\x00h\x00\x86" * 100)
    found = unpickle.tensors(unpickle.loads(graph, "graph"), "graph")
    assert found[0] is found[1]


def storage_tuple(kind=b"U\x07storage", dtype=b"ctorch\nFloatStorage\n", key=b"U\x010", count=b"K\x06"):
    return b"(" + kind + dtype + key + b"U\x03cpu" + count + b"tQ"


def rebuild(storage=None, offset=b"K\x00", size=b"K\x02K\x03\x86", stride=b"K\x03K\x01\x86"):
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + (storage or storage_tuple())
        + offset
        + size
        + stride
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


VICTIM = saved({"x": torch.arange(6.0)})


def test_the_hand_written_tensor_is_valid_as_it_stands():
    found = unpickle.loads(with_pickle(VICTIM, program(rebuild())), "file").tree
    assert torch.equal(found.read(), torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize(
    "code",
    [
        rebuild(offset=b"K\x01"),
        rebuild(offset=b"J\xff\xff\xff\xff"),
        rebuild(offset=b"\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01"),
        rebuild(size=b"K\x03K\x03\x86"),
        rebuild(size=b"J\xfe\xff\xff\xffK\x03\x86"),
        rebuild(size=b"\x88K\x03\x86"),
        rebuild(size=b"K\x06\x85"),
        rebuild(size=b"K\x07K\x01\x86", stride=b"K\x00K\x01\x86"),
        rebuild(size=b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", stride=b"K\x00K\x00\x86"),
        rebuild(stride=b"K\x04K\x01\x86"),
        rebuild(stride=b"J\xff\xff\xff\xffK\x01\x86"),
        rebuild(stride=b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"),
        rebuild(size=b"U\x02ab"),
        rebuild(storage=b"N"),
        rebuild(storage=rebuild()),
        rebuild(storage_tuple(count=b"K\x07")),
        rebuild(storage_tuple(count=b"K\x05")),
        rebuild(storage_tuple(count=b"J\xff\xff\xff\xff")),
        rebuild(storage_tuple(dtype=b"ctorch\nDoubleStorage\n")),
        rebuild(storage_tuple(dtype=b"ctorch\nfloat32\n")),
        rebuild(storage_tuple(dtype=storage_tuple())),
        rebuild(storage_tuple(kind=storage_tuple())),
        rebuild(storage_tuple(kind=b"U\x06module")),
        rebuild(storage_tuple(key=b"U\x011")),
        rebuild(storage_tuple(key=b"U\x0c../../x/data")),
        rebuild(storage_tuple(key=b"U\x0b/etc/passwd")),
        rebuild(storage_tuple(key=b"U\x030\x00x")),
        rebuild(storage_tuple(key=b"K\x00")),
        rebuild(storage_tuple(key=storage_tuple())),
        b"(" + rebuild() + rebuild(storage_tuple(dtype=b"ctorch\nIntStorage\n")) + b"t",
        rebuild() + b"}b",
        b"ctorch._utils\n_rebuild_parameter\n(N\x89NtR",
    ],
)
def test_tensors_that_do_not_lie_in_their_storage_are_refused(code):
    with pytest.raises(CorruptArtifactError, match="^evil is"):
        unpickle.loads(with_pickle(VICTIM, program(code)), "evil")


def array(shape=b"K\x03\x85", dtype=b"U\x02f4", order=b"U\x01<", raw=b"U\x0c" + b"a" * 12):
    kind = b"cnumpy\ndtype\n(" + dtype + b"K\x00K\x01tR(K\x03" + order + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    return start + b"(K\x01" + shape + kind + b"\x89" + raw + b"tb"


def test_arrays_that_do_not_fit_their_bytes_are_refused():
    assert unpickle.loads(program(array()), "file").tree.read().shape == (3,)
    wrong = [array(shape=b"K\x04\x85"), array(shape=b"J\xff\xff\xff\xff\x85"), array(dtype=b"U\x02f8"), array(raw=b"N")]
    wrong += [array(shape=b"K\x03"), array() + b"(K\x01K\x03\x85NNNtb"]
    for code in wrong:
        with pytest.raises(CorruptArtifactError, match="evil"):
            unpickle.loads(program(code), "evil")
    for odd, message in ((array(order=b"U\x01>"), "order '>'"), (array(dtype=b"U\x01O", raw=b"]"), "dtype 'O'")):
        with pytest.raises(CorruptArtifactError, match=message):
            unpickle.loads(program(odd), "file").tree.read()
    empty = unpickle.loads(program(b"cnumpy.core.multiarray\n_reconstruct\n)R"), "file").tree
    with pytest.raises(CorruptArtifactError, match="without content"):
        empty.read()


@pytest.mark.parametrize("names", [b"K\x01", b"U\x07_moduleh\x00"])
def test_modules_with_impossible_members_are_refused(names):
    linear = b"ctorch.nn.modules.linear\nLinear\n)\x81q\x00"
    members = {b"K\x01": b"}U\x08_modules}K\x01K\x02ssb", b"U\x07_moduleh\x00": b"}U\x08_modules}U\x01xh\x00ssb"}[names]
    with pytest.raises(CorruptArtifactError, match=r"without names of its modules|in two places"):
        unpickle.state_dict(unpickle.loads(program(linear + members), "file").tree)


def test_other_zip_files_are_refused():
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "hello")
    squeezed = io.BytesIO()
    with zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N." + b"0" * 10**6)
    cases = [
        (other.getvalue(), "torch.save did not write"),
        (squeezed.getvalue(), "compressed"),
        (with_pickle(VICTIM, **{"archive/constants.pkl": b""}), "TorchScript"),
        (with_pickle(VICTIM, **{"archive/byteorder": b"big"}), "big-endian"),
        (with_pickle(VICTIM, **{"archive/data/0": b"1234"}), "storage 0 is missing or not of 6"),
        (b"", "truncated"),
        (b"PK\x03\x04", "truncated"),
        (b"hello world", "refused|truncated"),
        (b"\x80\x02N.trailing", "8 bytes after its end"),
        (bytes(257) + b"ustar", "tar format"),
    ]
    for data, message in cases:
        with pytest.raises(CopgenError, match=message):
            unpickle.loads(data, "evil")


def test_a_flipped_bit_in_a_tensor_is_found():
    data = bytearray(VICTIM)
    data[VICTIM.index(torch.arange(6.0).numpy().tobytes()) + 5] ^= 4
    found = unpickle.loads(bytes(data), "file").tree
    with pytest.raises(CorruptArtifactError, match="CRC"):
        found["x"].read()


def test_a_legacy_file_whose_storages_disagree_is_refused():
    data = saved({"x": torch.arange(6.0)}, _use_new_zipfile_serialization=False)
    at = data.index(struct.pack("<q", 6) + torch.arange(6.0).numpy().tobytes())
    for wrong in (data[:-1], data[:at], data[:at] + struct.pack("<q", 7) + data[at + 8 :]):
        with pytest.raises(CorruptArtifactError, match="evil"):
            unpickle.loads(wrong, "evil")


def read_all(found, depth=0):
    """Touch whatever a file turned out to hold."""
    if isinstance(found, Stored):
        found.read().sum()
    elif isinstance(found, Shell):
        for value in unpickle.state_dict(found).values():
            value.read().sum()
    elif isinstance(found, (dict, list, tuple)) and depth < 8:
        for value in found.values() if isinstance(found, dict) else found:
            read_all(value, depth + 1)


VALID = [
    saved({"nn_walker": nn.DataParallel(nn.Sequential(nn.Linear(2, 2), nn.ReLU())), "x": torch.ones(3, 2).t()}),
    pickle.dumps({"model": {"a": np.ones((2, 3), "f4")}}, 2),
]
VALID.append(saved({"m": nn.Linear(2, 2), "x": torch.ones(3)}, _use_new_zipfile_serialization=False))
CONTENT = [zipfile.ZipFile(io.BytesIO(VALID[0])).read("archive/data.pkl"), *VALID[1:]]


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_random_damage_gives_nothing_but_clear_errors(data):
    which = data.draw(st.integers(0, len(VALID) - 1))
    inside = data.draw(st.booleans())
    content = bytearray(CONTENT[which] if inside else VALID[which])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        action = data.draw(st.sampled_from(["set", "cut", "insert", "drop"]))
        if action == "set" and content:
            content[at] = data.draw(st.integers(0, 255))
        elif action == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=6))
        elif action == "drop":
            del content[at : at + data.draw(st.integers(1, 8))]
        elif at:
            del content[at:]
    damaged = bytes(content)
    if inside and which == 0:
        damaged = with_pickle(VALID[0], damaged)
    try:
        read_all(unpickle.loads(damaged, "file").tree)
    except CopgenError as error:
        assert str(error)


def storage_in_bytes(content):
    """A pickle as pickle.dump writes it for a tensor, whose storage is `content` saved by torch.save, in bytes."""
    data = saved(content, _use_new_zipfile_serialization=False)
    storage = Reduced(torch.storage._load_from_bytes, data)
    return pickle.dumps({"x": Reduced(torch._utils._rebuild_tensor_v2, storage, 0, (3,), (1,), False, {})}, 4)


def test_tensors_of_plain_pickles_come_back_equal():
    base = torch.arange(6.0)
    content = {"parameter": nn.Parameter(base), "view": base[2:5], "half": base.half(), "empty": base[:0]}
    tensors(content, unpickle.loads(pickle.dumps(content), "file").tree)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Reduced(os.system, "touch touched"), "posix.system"),
        ([1], "hold something else"),
        (torch.ones(2, dtype=torch.uint8).untyped_storage(), "outside its storage"),
        (Reduced(torch.storage._load_from_bytes, saved([1], _use_new_zipfile_serialization=False)), "a storage in"),
    ],
)
def test_storages_in_bytes_are_read_with_the_same_care(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CopgenError, match=f"evil.pkl.*({message})"):
        unpickle.loads(storage_in_bytes(content), "evil.pkl")
    assert not list(tmp_path.iterdir())


def test_one_storage_in_bytes_is_not_loaded_a_thousand_times():
    data = saved(torch.ones(2**20).untyped_storage(), _use_new_zipfile_serialization=False)
    once = b"\x80\x02ctorch.storage\n_load_from_bytes\nq\x01B" + struct.pack("<I", len(data)) + data + b"q\x02"
    with pytest.raises(CorruptArtifactError, match="far more memory than its size"):
        unpickle.loads(once + b"\x85R" + b"h\x01h\x02\x85R" * 1000 + b".", "bomb.pkl")


def test_objects_with_their_source_become_shells(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    meta = {"type": "class", "version": 6, "module_src": "open('touched', 'w')", "class_name": "G", "state": {"a": 1}}
    name = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
    for content in (meta, {"class_name": 3}, 1):
        data = b"\x80\x02" + name + pickle.dumps(content, 2)[2:-1] + b"\x85R."
        if content is meta:
            found = unpickle.loads(data, "file.pkl")
            assert found.tree.of == "G" and found.tree.state == {"a": 1} and not found.unknown
        else:
            with pytest.raises(CorruptArtifactError, match=r"file.pkl is damaged: a persistent object without a class"):
                unpickle.loads(data, "file.pkl")
    assert not list(tmp_path.iterdir())
