"""Opening a model: what we wrote comes back bit by bit, and nothing runs."""

import contextlib
import io
import json
import random
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

import gpt_tf
from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError
from gpt_tf.models.keras_file import open_model, read_config
from gpt_tf.models.precision import precision
from gpt_tf.quantization.config import QuantizationConfig
from gpt_tf.quantization.qat import set_activation_ranges
from gpt_tf.text.tokenizer import CharacterTokenizer
from gpt_tf.training.run_folder import load_model, save_model

SAVED = Path(__file__).parents[2] / "saved_models"

pytestmark = pytest.mark.usefixtures("eagerly")

# What we wrote


def check_is_what_keras_gives(path, windows_of):
    """Compare with Keras's own opening: class, configuration, weights, logits."""
    ours, theirs = load_model(path)[0], keras.models.load_model(path, compile=False)
    assert type(ours) is type(theirs)
    assert ours.get_config() == theirs.get_config() == read_config(path)
    assert len(ours.weights) == len(theirs.weights)
    for one, other in zip(ours.weights, theirs.weights, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    tokens, _ = windows_of(2, 8)
    np.testing.assert_array_equal(ours(tokens), theirs(tokens))
    return ours


def randomise(model):
    """Give every weight another value, the counters included."""
    generator = np.random.default_rng(4)
    for weight in model.weights:
        value = np.abs(generator.normal(1, 9, weight.shape))
        weight.assign(tf.cast(value, weight.dtype))


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.1, "tie_embeddings": False, "num_heads": 5, "name": "a/b"},
        {
            "dropout": np.float32(0.1),
            "layer_norm_epsilon": 1,
            "feedforward_dim": np.int64(7),
            "num_layers": 1,
        },
    ],
)
def test_weights_arrive_as_keras_gives_them(make_model, windows_of, tmp_path, changes):
    model = make_model(**changes)
    randomise(model)
    model.compile()  # the optimiser's state is saved, too
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "gpt.keras")
    again = check_is_what_keras_gives(tmp_path / "gpt.keras", windows_of)
    for one, other in zip(again.weights, model.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    again.weights[0].assign_add(np.full(again.weights[0].shape, 1e-3, "float32"))
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(again.weights[0], model.weights[0])


def test_a_quantisation_aware_model_arrives_with_its_ranges(make_model, tmp_path):
    model = gpt_tf.quantize_aware(
        make_model(dropout=0.1, num_layers=1), QuantizationConfig.full()
    )
    randomise(model)
    ranges = {name: (-index - 1.0, 2.0) for index, name in enumerate(model._ranges)}
    set_activation_ranges(model, ranges)
    model.freeze_ranges(7)
    model.save(tmp_path / "gpt.keras")
    again, _ = load_model(tmp_path / "gpt.keras")  # Keras takes longer
    assert again.get_config() == model.get_config()
    for one, other in zip(again.weights, model.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert gpt_tf.activation_ranges(again) == gpt_tf.activation_ranges(model)
    assert int(again._freeze_step) == 7


def test_another_precision_is_that_of_the_policy(make_model, windows_of, tmp_path):
    with precision("float16"):  # weights, too
        make_model(dropout=0.1, num_layers=1).save(tmp_path / "gpt.keras")
        again = check_is_what_keras_gives(tmp_path / "gpt.keras", windows_of)
    assert again.get_layer("block_0").compute_dtype == "float16"


def test_a_model_is_opened_under_a_strategy(make_model, windows_of, tmp_path):
    make_model(dropout=0.1, num_layers=1).save(tmp_path / "gpt.keras")
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = check_is_what_keras_gives(tmp_path / "gpt.keras", windows_of)
    assert model.distribute_strategy.num_replicas_in_sync == 2


@pytest.mark.parametrize("name", sorted(p.parent.name for p in SAVED.glob("*/*.keras")))
def test_files_of_older_versions_are_opened(windows_of, name):
    check_is_what_keras_gives(SAVED / name / "model.keras", windows_of)


# What others forged


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A model's folder, as `train` leaves it."""
    folder = tmp_path_factory.mktemp("honest") / "model"
    tokenizer = CharacterTokenizer.train(["to be or not to be"])
    model = gpt_tf.GPTModel(tokenizer.vocab_size, 8, 1, 2, 8)
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def honest_model(honest):
    """That model, built once for all weights that are read into it."""
    return load_model(honest)[0]


@pytest.fixture
def forge(honest, tmp_path):
    """Put bytes in the model's place, with a manifest that agrees with them."""

    def put(data):
        folder = tmp_path / "model"
        shutil.copytree(honest, folder, dirs_exist_ok=True)
        (folder / "model.keras").write_bytes(data)
        names = ["model.keras", "tokenizer.json"]
        artifacts.write_manifest(folder, "model", names, config={})
        return folder

    return put


@pytest.fixture
def honest_members(honest):
    return members_of(honest / "model.keras")


@pytest.fixture
def marker(tmp_path):
    """A file that appears when the attacker's code has run."""
    return tmp_path / "executed"


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(*members, method=zipfile.ZIP_STORED):
    """Return an archive of (name, bytes), names that are there already included."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members:
            if isinstance(name, str) and name in archive.NameToInfo:
                del archive.NameToInfo[name]  # which is what it warns by
            archive.writestr(name, data)
    return file.getvalue()


def with_config(members, change):
    """Return the archive with `change` made to its configuration."""
    config = json.loads(members["config.json"])
    text = json.dumps(change(config) or config).encode()
    return packed(*{**members, "config.json": text}.items())


def with_weights(members, change):
    """Return the archive with `change` made to its weights, an open HDF5 file."""
    data = io.BytesIO(members["model.weights.h5"])
    with h5py.File(data, "r+") as stored:
        change(stored)
    return packed(*{**members, "model.weights.h5": data.getvalue()}.items())


def lambda_in_hdf5(members, marker):
    """Save a model whose layer runs code, as HDF5."""
    path = marker.with_suffix(".h5")
    code = f"__import__('pathlib').Path({str(marker)!r}).touch() or x"
    layer = keras.layers.Lambda(eval(f"lambda x: {code}"))
    model = keras.Sequential([keras.Input((1,)), layer])
    with pytest.warns(UserWarning, match="HDF5"):
        model.save(path)
    data = path.read_bytes()
    path.unlink()
    marker.unlink()  # building it has run it
    return data


def described(module, kind, config, registered=None, **others):
    names = {"module": module, "class_name": kind, "registered_name": registered}
    return {**names, "config": config, **others}


def shell_command(marker):
    """Return the configuration of a model that calls `subprocess.getoutput`."""
    function = described("subprocess", "function", "getoutput", "getoutput")
    config = {"name": "f", "function": function, "function_type": "function"}
    config |= {"output_shape": None, "output_shape_type": "raw"}
    called = [[["_CONSTANT_VALUE", -1, f"touch {marker}", {}]]]
    layer = described("keras.layers", "Lambda", config, name="f", inbound_nodes=called)
    config = {"name": "m", "layers": [layer], "input_layers": []}
    config["output_layers"] = [["f", 0, 0]]
    return described("keras.src.engine.functional", "Functional", config, "Functional")


def in_sizes(**changes):
    return lambda members, marker: with_config(
        members, lambda found: found["config"].update(changes)
    )


def in_names(**changes):
    return lambda members, marker: with_config(
        members, lambda found: found.update(changes)
    )


def nested(members, marker):
    return in_sizes(dropout=shell_command(marker))(members, marker)


def nested_in_quantised(members, marker):
    kind = "QuantizationAwareGPT"
    config = {"gpt": shell_command(marker), "quantization": {}, "name": "q"}
    names = described("gpt_tf.quantization.qat", kind, config, f"gpt_tf>{kind}")
    return in_names(**names)(members, marker)


def beside_members(*others):
    return lambda members, marker: packed(*members.items(), *others)


def bomb(members, marker):
    members["model.weights.h5"] += bytes(1 << 26)
    return packed(*members.items(), method=zipfile.ZIP_DEFLATED)


def lies_about_sizes(members, marker):
    data = bytearray(packed(*members.items()))
    at = data.rindex(b"PK\x01\x02")  # of the weights, which come last
    data[at + 20 : at + 28] = (1 << 31).to_bytes(4, "little") * 2
    return bytes(data)


BLOCK = "layers/transformer_block"
PLACE = f"{BLOCK}/vars"
KERNEL = f"{PLACE}/2"


def shared_arrays(members, marker):
    """The block's arrays once more under the names of 500 others."""

    def change(stored):
        for index in range(1, 500):
            stored[f"layers/transformer_block_{index}"] = stored[BLOCK]

    members = members_of(io.BytesIO(with_weights(members, change)))
    return in_sizes(num_layers=500)(members, marker)


SIZES = {
    "num_layers": [10**30, 2, -1, 1.0, True, "1"],
    "num_heads": [0, 9],
    "vocab_size": [10**12],
    "embedding_dim": [1 << 20],
    "feedforward_dim": [None],
    "dropout": [1.0, 10**400],
    "layer_norm_epsilon": [-1],
    "name": [5],
    "trainable": [True],
}
ATTACKS = {
    # classes and functions
    "HDF5 with a Lambda": lambda_in_hdf5,
    "subprocess.getoutput": lambda members, marker: with_config(
        members, lambda _: shell_command(marker)
    ),
    "subprocess.getoutput among the sizes": nested,
    "subprocess.getoutput in a quantised model": nested_in_quantised,
    "registered elsewhere": in_names(registered_name="Custom>Evil"),
    "a module elsewhere": in_names(module="antigravity"),
    "nested modules": in_names(module={"module": "subprocess", "class_name": "Popen"}),
    "a class in a list": in_names(class_name=["GPTModel"]),
    "no configuration": in_names(config=None),
    "not an object": lambda members, marker: with_config(members, lambda _: [1]),
    # sizes
    **{
        f"{name}={value}": in_sizes(**{name: value})
        for name, values in SIZES.items()
        for value in values
    },
    "an array for many": shared_arrays,
    # the archive
    "nothing": lambda members, marker: b"",
    "a bomb": bomb,
    "sizes that lie": lies_about_sizes,
    "a name that leads out": beside_members(("../../executed", b"")),
    "two configurations": beside_members(("config.json", b"{}")),
    "a large configuration": lambda members, marker: with_config(
        members, lambda d: d.update(compile_config="x" * (1 << 21))
    ),
    "NaN in it": in_sizes(dropout=float("nan")),
    "many brackets": lambda members, marker: packed(
        *{**members, "config.json": b"[" * 100_000}.items()
    ),
    "no HDF5": lambda members, marker: packed(
        *{**members, "model.weights.h5": b"\x89HDF\r\n\x1a\n"}.items()
    ),
    "altered bytes": lambda members, marker: packed(*members.items()).replace(
        b"block", b"clock", 1
    ),
}


def kernel(make):
    """Put something else in the place of a kernel."""

    def change(stored):
        like = stored[KERNEL][...]
        del stored[KERNEL]
        make(stored, like)

    return change


def virtual(stored, like):
    layout = h5py.VirtualLayout(like.shape, like.dtype)
    layout[...] = h5py.VirtualSource("/etc/hostname", "x", like.shape)
    stored.create_virtual_dataset(KERNEL, layout)


def stored_outside(stored, like):
    outside = [("/etc/hostname", 0, h5py.h5f.UNLIMITED)]
    stored.create_dataset(KERNEL, like.shape, like.dtype, external=outside)


FORGED_WEIGHTS = {
    "an external link": kernel(
        lambda h5, _: h5.update({KERNEL: h5py.ExternalLink("/etc/hostname", "/x")})
    ),
    "a soft link": kernel(
        lambda h5, k: h5.update({"k": k, KERNEL: h5py.SoftLink("/k")})
    ),
    "a virtual dataset": kernel(virtual),
    "external storage": kernel(stored_outside),
    "nothing stored": kernel(lambda h5, k: h5.create_dataset(KERNEL, k.shape, k.dtype)),
    "another shape": kernel(lambda h5, k: h5.update({KERNEL: k.T})),
    "another type": kernel(lambda h5, k: h5.update({KERNEL: k.astype("float64")})),
    "packed": kernel(
        lambda h5, k: h5.create_dataset(KERNEL, data=k, compression="gzip")
    ),
    "a group for an array": kernel(lambda h5, _: h5.create_group(KERNEL)),
    "no kernel": kernel(lambda h5, _: None),
    "an array more": kernel(lambda h5, k: h5.update({KERNEL: k, f"{PLACE}/x": k})),
    "an array for a group": lambda h5: (
        h5.pop("layers"),
        h5.update(layers=np.zeros(9)),
    ),
}


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_an_honest_archive_packed_anew_is_opened(forge, honest, honest_members):
    again, tokenizer = load_model(forge(packed(*honest_members.items())))
    assert tokenizer is not None
    for one, other in zip(
        again.get_weights(), load_model(honest)[0].get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    # A compile configuration is not looked at.
    forced = in_names(compile_config=shell_command(honest))
    load_model(forge(forced(honest_members, None)))


@contextlib.contextmanager
def refused_in_little_memory():
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFileError, match=r"model\.keras"):
            yield
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ATTACKS)
def test_a_forged_archive_is_refused_and_nothing_runs(
    forge, honest_members, marker, tmp_path, name
):
    folder = forge(ATTACKS[name](honest_members, marker))
    before = tree(tmp_path)
    with refused_in_little_memory():
        load_model(folder)
    assert tree(tmp_path) == before
    assert not marker.exists()


@pytest.mark.parametrize("name", FORGED_WEIGHTS)
def test_forged_weights_are_refused(forge, honest_model, honest_members, name):
    folder = forge(with_weights(honest_members, FORGED_WEIGHTS[name]))
    with refused_in_little_memory():
        open_model(folder / "model.keras", {"GPTModel": lambda **_: honest_model})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_corrupt_weights_are_refused_or_numbers(
    honest_model, honest_members, tmp_path, seed
):
    """500 times, with right checksums: HDF5 neither crashes nor hangs."""
    generator = random.Random(seed)
    path, refused = tmp_path / "gpt.keras", 0
    for _ in range(500):
        data = bytearray(honest_members["model.weights.h5"])
        for _ in range(generator.choice([1, 2, 4, 16, 64])):
            at, other = (generator.randrange(len(data) - 8) for _ in "12")
            size = generator.choice([1, 2, 4, 8])
            number = generator.choice([0, 2**64 - 1, 2**63 - 1, len(data), other])
            written = number.to_bytes(8, "little")
            if generator.random() < 0.5:
                written = data[other : other + 8]
            data[at : at + size] = written[:size]
        members = honest_members | {"model.weights.h5": bytes(data)}
        path.write_bytes(packed(*members.items()))
        try:
            open_model(path, {"GPTModel": lambda **_: honest_model})
        except DamagedFileError:
            refused += 1
    assert 0 < refused < 500


@pytest.mark.parametrize("name", ["HDF5 with a Lambda", "subprocess.getoutput"])
def test_the_same_files_run_code_where_keras_opens_them(
    forge, honest_members, marker, name
):
    folder = forge(ATTACKS[name](honest_members, marker))
    with pytest.raises(Exception):  # noqa: B017  the model is of no use
        keras.models.load_model(folder / "model.keras", compile=False).weights[99]
    assert marker.exists()


def test_hdf5_is_refused_with_the_way_to_convert_it(make_model, windows_of, tmp_path):
    path = tmp_path / "gpt.h5"
    with pytest.warns(UserWarning, match="HDF5"):
        make_model(num_layers=1).save(path)
    with pytest.raises(DamagedFileError, match=r"load_model.*save"):
        load_model(path)
    keras.models.load_model(path).save(tmp_path / "gpt.keras")
    check_is_what_keras_gives(tmp_path / "gpt.keras", windows_of)
