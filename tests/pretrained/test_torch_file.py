import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from gpt_tf.errors import DamagedFileError
from gpt_tf.pretrained.torch_file import read_checkpoint
from tests.pretrained.torch_writer import (
    Call,
    Global,
    Storage,
    parameter,
    pickled,
    save_legacy,
    save_zip,
    tensor,
)

VALUES = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
SAVERS = {"zip": save_zip, "legacy": save_legacy}


@pytest.fixture(params=SAVERS)
def save(request, tmp_path):
    """Write a checkpoint of either kind; return its path."""

    def write(value, **options):
        return SAVERS[request.param](tmp_path / "model.bin", value, **options)

    return write


def read(path):
    return {name: found.read() for name, found in read_checkpoint(path).items()}


@pytest.mark.parametrize(
    "dtype",
    [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.uint8, bool],
)
def test_tensors_of_every_type_come_back(save, dtype):
    values = (VALUES * 3).astype(dtype)
    found = read(save({"a": tensor(values)}))["a"]
    is_float = np.dtype(dtype) == ml_dtypes.bfloat16 or np.dtype(dtype).kind == "f"
    assert found.dtype == (np.float32 if is_float else dtype)
    np.testing.assert_array_equal(found, values.astype(found.dtype))


def test_views_come_back_as_what_they_show(save):
    storage = Storage(VALUES)
    found = read(
        save(
            {
                "whole": storage.view((4, 6), (6, 1)),
                "transposed": storage.view((6, 4), (1, 6)),
                "part": storage.view((2, 3), (12, 2), offset=7),
                "expanded": storage.view((3, 2), (0, 1)),
                "scalar": storage.view((), (), offset=5),
                "nothing": storage.view((0, 6), (6, 1)),
            }
        )
    )
    np.testing.assert_array_equal(found["whole"], VALUES)
    np.testing.assert_array_equal(found["transposed"], VALUES.T)
    part = VALUES.reshape(-1)[[[7, 9, 11], [19, 21, 23]]]
    np.testing.assert_array_equal(found["part"], part)
    np.testing.assert_array_equal(found["expanded"], VALUES[[0, 0, 0], :2])
    assert found["scalar"] == VALUES.reshape(-1)[5]
    assert found["nothing"].shape == (0, 6)


def test_parameters_in_an_ordered_dict_with_metadata_come_back(save):
    state = OrderedDict(a=parameter(VALUES), b=tensor(VALUES[0]))
    state._metadata = OrderedDict({"": {"version": 1}})
    found = read(save(state))
    np.testing.assert_array_equal(found["a"], VALUES)
    np.testing.assert_array_equal(found["b"], VALUES[0])


def test_what_stands_beside_the_tensors_comes_back(save):
    stated = {
        "model": {"a": tensor(VALUES)},
        "size": Call(Global("torch", "Size"), ((2, 3),)),
        "plain": [1, -70000, 2**40, 0.5, "text", True, None, (1, 2), (1, 2, 3, 4), ()],
    }
    found = read_checkpoint(save(stated))
    np.testing.assert_array_equal(found["model"]["a"].read(), VALUES)
    assert found["size"] == (2, 3)
    assert found["plain"] == stated["plain"]


def test_shapes_are_known_before_numbers_are_read(save):
    path = save({"a": tensor(VALUES)})
    found = read_checkpoint(path)["a"]
    assert found.shape == (4, 6)


# Hostile files


class Reduced:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def assert_refused(path):
    """Expect one error, little memory, and nothing executed."""
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFileError):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert not os.path.exists("executed")


CALLS = {
    "os.system": ("mkdir executed",),
    "posix.system": ("mkdir executed",),
    "builtins.eval": ("__import__('os').mkdir('executed')",),
    "builtins.exec": ("__import__('os').mkdir('executed')",),
    "__builtin__.eval": ("__import__('os').mkdir('executed')",),
    "builtins.getattr": ("a", "upper"),
    "subprocess.Popen": ("mkdir executed",),
    "numpy.core.multiarray._reconstruct": (),
    "numpy.zeros": (1 << 40,),
    "torch.load": ("a",),
    "torch.zeros": (1 << 40,),
    "torch._utils._rebuild_tensor": (),
    "torch.storage._load_from_bytes": ("a",),
    "torch.hub.load": ("a", "b"),
    "_codecs.encode": ("a", "latin1"),
    "collections.defaultdict": (),
    "collections.OrderedDict.fromkeys": ((),),
}


@pytest.mark.parametrize("name", CALLS)
def test_functions_are_refused(save, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    module, _, function = name.rpartition(".")
    call = Call(Global(module, function), CALLS[name])
    assert_refused(save({"a": tensor(VALUES), "b": call}))
    # Named only, as an argument, or by newer protocols.
    assert_refused(save({"a": Global(module, function)}))
    by_stack = f"\x8c{chr(len(module))}{module}\x8c{chr(len(function))}{function}\x93."
    assert_refused(save({}, program=b"\x80\x04" + by_stack.encode()))


def test_objects_with_reduce_are_refused(save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol in range(6):
        for value in (Reduced(), {"a": [Reduced()]}):
            assert_refused(save({}, program=pickle.dumps(value, protocol)))


NESTED = b"K\x01" + b"2\x86" * 64  # (1, 1), and a pair of that, and so on
DOUBLED = b"K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 64
PROGRAMS = {
    "memo not there": b"j\xff\xff\xff\xff.",
    "text of 4 GB": b"X\xff\xff\xff\xffa.",
    "text of an exabyte": b"\x8d" + struct.pack("<Q", 1 << 60) + b"a.",
    "bytes of 4 GB": b"B\xff\xff\xff\xffa.",
    "bytearray": b"\x96" + struct.pack("<Q", 1 << 40) + b".",
    "long of 2 GB": b"\x8b\xff\xff\xff\x7fa.",
    "persistent id as text": b"Pstorage\n.",
    "extension": b"\x82\x01.",
    "instance": b"(ios\nsystem\n.",
    "new object": b"ccollections\nOrderedDict\n)\x81.",
    "dup": NESTED + b".",
    "no value": b".",
    "two values": b"}}.",
    "empty stack": b"\x85.",
    "no mark": b"t.",
    "no list": b"}K\x01a.",
    "call of a tensor": b"}(ctorch._utils\n_rebuild_tensor_v2\n}tR.",
    "call of a storage": b"ctorch\nFloatStorage\n)R.",
    "call of a dict": b"})R.",
    "shared key": b"}" + DOUBLED + b"K\x01s.",
    "shared key of an OrderedDict": (
        b"ccollections\nOrderedDict\n](" + DOUBLED + b"K\x01\x86e\x85R."
    ),
    "shared name": DOUBLED + DOUBLED + b"\x93.",
    "shared storage": DOUBLED + b"Q.",
    "shared kind": b"(" + DOUBLED + b"K\x01K\x01K\x01K\x01tQ.",
    "shared type": b"(X\x07\0\0\0storage" + DOUBLED + b"X\x01\0\0\x000K\x01K\x01tQ.",
    "a list": b"].",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_build_no_checkpoint_are_refused(save, name):
    assert_refused(save({}, program=PROGRAMS[name]))


@pytest.mark.parametrize(
    "program",
    [b"}r\xff\xff\xff\xff.", b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"}."],
    ids=["memo", "frame"],
)
def test_large_numbers_that_say_nothing_take_no_memory(save, program):
    path = save({}, program=program)
    tracemalloc.start()
    assert read(path) == {}
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_a_tensor_whose_shape_holds_itself_again_and_again_is_refused(save):
    shape = (1, 1)
    for _ in range(64):
        shape = (shape, shape)
    assert_refused(save({"a": Storage(VALUES).view(shape, (1, 1))}))


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((4, 7), (6, 1), 0),
        ((4, 6), (6, 1), 1),
        ((1,), (1,), 24),
        ((1,), (1,), -1),
        ((2,), (-1,), 5),
        ((1 << 40,), (0,), 0),
        ((1 << 20, 1 << 20), (0, 0), 0),
        ((25,), (0,), 0),
        ((2,), (1 << 62,), 0),
        ((4, 6), (6,), 0),
        ((4, 6.0), (6, 1), 0),
        ((True,), (1,), 0),
        ((1,) * 65, (1,) * 65, 0),
        ((1,), (1 << 2000,), 0),
        (4, 1, 0),
        ((4,), (1,), None),
    ],
)
def test_views_outside_of_their_storage_are_refused(save, shape, strides, offset):
    assert_refused(save({"a": Storage(VALUES).view(shape, strides, offset)}))


@pytest.mark.parametrize("size", [0, 23, 25, 1 << 31, 1 << 62, -1, "24"])
def test_storages_of_another_size_than_declared_are_refused(save, size):
    view = Storage(VALUES, size).view((4, 6), (6, 1))
    data, _ = pickled({"a": view})
    assert_refused(save({"a": tensor(VALUES)}, program=data))


def test_a_legacy_storage_of_a_declared_terabyte_is_refused(tmp_path):
    path = save_legacy(tmp_path / "a.bin", {"a": tensor(VALUES)})
    content = path.read_bytes()
    begin = len(content) - VALUES.nbytes - 8
    path.write_bytes(
        content[:begin] + struct.pack("<q", 1 << 38) + content[begin + 8 :]
    )
    assert_refused(path)


def test_a_zip_whose_directory_declares_gigabytes_is_refused(tmp_path):
    big = Storage(VALUES, 1 << 29)
    path = save_zip(tmp_path / "a.bin", {"a": big.view((1 << 29,), (1,))})
    content = path.read_bytes()
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"archive/data/0"))
    sizes = struct.pack("<II", (1 << 31), (1 << 31))
    path.write_bytes(content[: entry + 20] + sizes + content[entry + 28 :])
    assert_refused(path)


def test_compressed_members_and_two_pickles_are_refused(tmp_path):
    value = {"a": tensor(np.zeros(10000, "float32"))}
    path = tmp_path / "a.bin"
    assert_refused(save_zip(path, value, compression=zipfile.ZIP_DEFLATED))
    assert_refused(save_zip(path, value, more={"other/data.pkl": b"}."}))
    assert_refused(save_zip(path, value, more={"archive/byteorder": b"big"}))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/none", b"")
    assert_refused(path)


def test_a_file_that_is_cut_anywhere_is_refused(save):
    path = save({"a": tensor(VALUES[:2]), "b": [parameter(VALUES[0, :2]), "text"]})
    content = path.read_bytes()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(DamagedFileError):
            read(path)


def test_a_file_with_any_byte_changed_is_read_or_refused(save):
    content = save({"a": tensor(VALUES[:2]), "b": {"c": (1, "text")}}).read_bytes()
    path = save({})
    generator = np.random.default_rng(0)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= int(generator.integers(1, 256))
        path.write_bytes(changed)
        try:
            for found in read_checkpoint(path).values():
                if hasattr(found, "read"):
                    found.read()
        except DamagedFileError:
            pass
