"""`.keras` files, opened without running what is in them.

Keras's `load_model` imports and calls whatever a file names, in its safe mode too. Here
a file decides about sizes and weights, and about nothing else: its configuration is
JSON of known keys and types, the model is built by our own constructors, and weights
are read as arrays. What is built and read is never larger than the file: no member is
compressed, and sizes are held against the file's before anything is made of them.
"""

import collections
import contextlib
import io
import os
import re
import reprlib
import zipfile

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError
from gpt_tf.models.sizes import FORM_TYPES, TYPES, count_parameters

try:
    import h5py
except ModuleNotFoundError:  # TensorFlow brings it; a configuration is read without
    h5py = None

_CONFIG, _WEIGHTS = "config.json", "model.weights.h5"
_MEMBERS = [_CONFIG, "metadata.json", _WEIGHTS]
_LARGEST_CONFIG = 1 << 20
# Keys of `get_config` and the types of their values.
_CLASSES = {
    "GPTModel": TYPES,
    "QuantizationAwareGPT": {"gpt": (dict,), "quantization": (dict,), "name": (str,)},
}
_SHOWN = reprlib.Repr()  # of what a stranger wrote, the beginning
_SHOWN.maxdict = len(TYPES)
# A GPT's layers beside its blocks: input, embedding, last normalisation and head.
_OTHER_LAYERS = 4


def open_model(path, classes: dict):
    """Open a model that gpt_tf saved.

    Args:
        path: The `.keras` file.
        classes: By the names of `GPTModel` and `QuantizationAwareGPT`, what builds
            one of the arguments in its configuration.

    Returns:
        The model with the weights that `keras.models.load_model` would give it, not
        compiled.

    Raises:
        DamagedFileError: The file is anything else.

    Example:
        >>> model = open_model("gpt.keras", {"GPTModel": GPTModel})
    """
    with _opened(path) as archive:
        kind, config = _described(archive)
        data = archive.read(_WEIGHTS)
        with h5py.File(io.BytesIO(data), "r") as stored:
            blocks = len(_inside(stored, "layers", h5py.Group)) - _OTHER_LAYERS
            sizes = config.get("gpt", config)
            if not can_hold(sizes, len(data), blocks):
                raise ValueError(f"less than the weights of {_SHOWN.repr(sizes)}")
            model = classes[kind](**config)
            for place, holder in _holders(model):
                expected = {}
                holder.save_own_variables(expected)
                if expected:
                    group = _inside(stored, place, h5py.Group)
                    holder.load_own_variables(_arrays(group, expected))
    return model


def read_config(path) -> dict:
    """Return the configuration of a model that gpt_tf saved.

    Args:
        path: The `.keras` file.

    Raises:
        DamagedFileError: The file is anything else.
    """
    with _opened(path) as archive:
        return _described(archive)[1]


def can_hold(sizes: dict, size_bytes: int, num_blocks: int) -> bool:
    """Return whether a file can hold the weights of a GPT, before it is built.

    Args:
        sizes: As `GPTModel.get_config` names them, integers.
        size_bytes: What the file holds; a weight has two bytes or more.
        num_blocks: Of how many blocks it holds weights, at most.
    """
    fits = 2 * count_parameters(sizes) <= size_bytes
    return fits and sizes["num_layers"] <= num_blocks


@contextlib.contextmanager
def _opened(path):
    """Open an archive of members that are as long as they say, for all that fails."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            names = sorted(member.filename for member in members)
            if names != _MEMBERS:
                raise ValueError(f"an archive of {_SHOWN.repr(names)}")
            if any(m.compress_type or m.file_size != m.compress_size for m in members):
                raise ValueError("compressed members")
            total = sum(member.file_size for member in members)
            if total > os.fstat(file.fileno()).st_size:
                raise ValueError(f"members of {total} bytes in a smaller file")
            yield archive
    except Exception as error:  # zipfile's, h5py's, TensorFlow's own
        raise DamagedFileError(
            f"Expected a model that gpt_tf saved in {path}. Received: "
            f"{str(error) or type(error).__name__}. Copy it again. A Keras or HDF5 "
            "file of your own is converted by `keras.models.load_model(path).save("
            "'gpt.keras')`, which runs the code that is in it."
        ) from error


def _described(archive):
    """Return the class and the configuration that an archive is of."""
    if archive.getinfo(_CONFIG).file_size > _LARGEST_CONFIG:
        raise ValueError(f"a {_CONFIG} of more than {_LARGEST_CONFIG} bytes")
    described = artifacts.parse_json(archive.read(_CONFIG))
    if not isinstance(described, dict):
        raise ValueError(f"a {_CONFIG} of {_SHOWN.repr(described)}")
    kind, module = described.get("class_name"), described.get("module")
    is_ours = kind in tuple(_CLASSES) and str(module).startswith("gpt_tf.")
    if not is_ours or described.get("registered_name") != f"gpt_tf>{kind}":
        names = [described.get(k) for k in ("module", "class_name", "registered_name")]
        raise ValueError(f"a model of the class {_SHOWN.repr(names)}")
    config = described.get("config")
    _check_types(config, _CLASSES[kind])
    if "gpt" in config:
        _check_types(config["gpt"], TYPES)
    return kind, config


def _check_types(config, types):
    stated = types.keys() | (FORM_TYPES.keys() if types is TYPES else set())
    if not isinstance(config, dict) or not types.keys() <= config.keys() <= stated:
        raise ValueError(f"a configuration of {_SHOWN.repr(config)}")
    for name, value in config.items():
        if type(value) not in {**FORM_TYPES, **types}[name]:
            raise ValueError(f"{name}={_SHOWN.repr(value)}")


def _holders(model):
    """Yield what has weights, with its place in the file: as Keras walks a model."""
    yield "vars", model
    seen = collections.Counter()
    for layer in model.layers:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(layer).__name__).lower()
        number = f"_{seen[name]}" if seen[name] else ""
        seen[name] += 1
        yield from _parts(f"layers/{name}{number}", layer)


def _parts(place, layer):
    yield f"{place}/vars", layer
    for name, part in vars(layer).items():
        if hasattr(part, "load_own_variables"):
            yield from _parts(f"{place}/{name}", part)


def _inside(group, place, kind):
    """Return what lies at a place, by hard links: others may lead out of the file."""
    for name in place.split("/"):
        link = group.id.links.get_info(name.encode())
        if link.type != h5py.h5l.TYPE_HARD:
            raise ValueError(f"a link that leads elsewhere in {group.name}")
        group = group[name]
    if not isinstance(group, kind):
        raise ValueError(f"no {kind.__name__.lower()} at {group.name}")
    return group


def _arrays(group, expected):
    """Read arrays that are like the expected ones, and lie in the file as they are."""
    if len(group) != len(expected):
        raise ValueError(f"{len(group)} arrays at {group.name}, not {len(expected)}")
    found = {}
    for name, like in expected.items():
        dataset = _inside(group, name, h5py.Dataset)
        # First, as the shape of a virtual dataset is found in other files.
        stored = dataset.id.get_create_plist()
        is_plain = stored.get_layout() == h5py.h5d.CONTIGUOUS
        if not is_plain or stored.get_external_count():
            raise ValueError(f"{dataset.name}, which is stored elsewhere or packed")
        same = (dataset.shape, dataset.dtype) == (like.shape, like.dtype)
        if not same or dataset.id.get_storage_size() != like.nbytes:
            raise ValueError(
                f"{dataset.dtype}{dataset.shape} at {dataset.name}, where the model "
                f"has {like.dtype}{like.shape}"
            )
        found[name] = dataset[...]
    return found
