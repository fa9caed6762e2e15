"""PEFT's folders: read as PEFT defines them, written so, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

import gpt_tf
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.pretrained import adapter
from gpt_tf.pretrained.build import variables_of
from tests.oracles import numpy_families
from tests.pretrained.folders import (
    CONFIGS,
    FAMILIES,
    assert_same_logits,
    ids_of,
    random_tensors,
    write_folder,
)

pytestmark = pytest.mark.usefixtures("eagerly")
IDS = ids_of()
RANK, ALPHA = 3, 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("bases")
    for name in FAMILIES:
        write_folder(place / name, CONFIGS[name], random_tensors(CONFIGS[name]))
    return place


def products_of(config):
    """Return a base's matrices in blocks: name -> `(outputs, inputs)`, and whether
    PEFT finds them transposed."""
    is_conv1d = config["model_type"] == "gpt2"
    return is_conv1d, {
        name: tensor.shape[::-1] if is_conv1d else tensor.shape
        for name, tensor in random_tensors(config).items()
        if tensor.ndim == 2 and (".h." in name or ".layers." in name)
    }


def write_peft(folder, config, *, base="", changes=(), leave_out=()):
    """Write an adapter of random numbers as PEFT does; return what it adds."""
    generator = np.random.default_rng(5)
    is_conv1d, products = products_of(config)
    tensors, added = {}, {}
    for name, (outputs, inputs) in products.items():
        if any(part in name for part in leave_out):
            continue
        a = generator.normal(size=(RANK, inputs)).astype("float32") * 0.1
        b = generator.normal(size=(outputs, RANK)).astype("float32") * 0.1
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        delta = ALPHA / RANK * b @ a
        added[name] = delta.T if is_conv1d else delta
    folder.mkdir()
    facts = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    facts |= {"base_model_name_or_path": str(base), **dict(changes)}
    (folder / "adapter_config.json").write_text(json.dumps(facts))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return added


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_is_merged_as_peft_defines_it(folders, name, tmp_path):
    config = CONFIGS[name]
    left_out = ("k_proj", "dense_4h_to_h") if name in ("llama", "gpt_neox") else ()
    added = write_peft(
        tmp_path / "peft", config, base=folders / name, leave_out=left_out
    )
    tensors = {n: t + added.get(n, 0) for n, t in random_tensors(config).items()}
    expected = [numpy_families.forward(config, tensors, row) for row in IDS]
    model = gpt_tf.open_model(folders / name, adapter=tmp_path / "peft").model
    assert_same_logits(model(IDS), np.stack(expected))
    with pytest.raises(AssertionError):
        assert_same_logits(gpt_tf.open_model(folders / name).model(IDS), expected)
    # The folder alone names its base.
    alone = gpt_tf.open_model(tmp_path / "peft")
    assert alone.facts["format"] == "peft"
    np.testing.assert_array_equal(alone.model(IDS), model(IDS))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_is_read_as_the_same(folders, name, tmp_path):
    model = gpt_tf.open_model(folders / name).model
    generator = np.random.default_rng(7)
    adapters = {
        kernel: tuple(
            generator.normal(size=shape).astype("float32")
            for shape in ((v.shape[0], 2), (2, v.shape[1]))
        )
        for kernel, v in variables_of(model).items()
        if kernel.endswith("_kernel")
    }
    adapter.write_adapter(
        tmp_path / "peft",
        model.get_config(),
        adapters,
        alpha=5.0,
        base=str(folders / name),
        fingerprint=adapter.fingerprint_of(model),
    )
    _, products = products_of(CONFIGS[name])
    tensors = safetensors.numpy.load_file(tmp_path / "peft/adapter_model.safetensors")
    assert {key: tensor.shape for key, tensor in tensors.items()} == {
        f"base_model.model.{product.removesuffix('.weight')}.lora_{matrix}.weight": size
        for product, (outputs, inputs) in products.items()
        for matrix, size in (("A", (2, inputs)), ("B", (outputs, 2)))
    }
    merged = gpt_tf.open_model(folders / name, adapter=tmp_path / "peft").model
    for kernel, variable in variables_of(merged).items():
        before = variables_of(model)[kernel].numpy()
        if kernel in adapters:
            before = before + 2.5 * adapters[kernel][0] @ adapters[kernel][1]
        np.testing.assert_allclose(variable.numpy(), before, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 0}, "r=0"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": RANK + 1}, "lora_A"),
        ({"lora_alpha": "many"}, "lora_alpha"),
    ],
)
def test_other_adapters_are_refused_by_name(folders, changes, named, tmp_path):
    write_peft(tmp_path / "peft", CONFIGS["llama"], changes=changes)
    with pytest.raises(InputError, match=named):
        gpt_tf.open_model(folders / "llama", adapter=tmp_path / "peft")


def test_an_adapter_of_another_base_is_refused(folders, tmp_path):
    write_peft(tmp_path / "neox", CONFIGS["gpt_neox"])
    with pytest.raises(InputError, match=r"projections.*gpt_neox"):
        gpt_tf.open_model(folders / "llama", adapter=tmp_path / "neox")
    wider = {**CONFIGS["llama"], "intermediate_size": 52}
    write_peft(tmp_path / "wider", wider)
    with pytest.raises(InputError, match=r"gate_proj.*50.*52"):
        gpt_tf.open_model(folders / "llama", adapter=tmp_path / "wider")
    deeper = {**CONFIGS["llama"], "num_hidden_layers": 3}
    write_peft(tmp_path / "deeper", deeper)
    with pytest.raises(InputError, match=r"layers\.2"):
        gpt_tf.open_model(folders / "llama", adapter=tmp_path / "deeper")


def test_a_folder_that_names_no_base_or_lacks_weights_is_refused(folders, tmp_path):
    write_peft(tmp_path / "peft", CONFIGS["llama"], base=tmp_path)
    with pytest.raises(InputError, match="base_model_name_or_path"):
        gpt_tf.open_model(tmp_path / "peft")
    shutil.copytree(tmp_path / "peft", tmp_path / "cut")
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(b"\0" * 9)
    with pytest.raises(DamagedFileError):
        gpt_tf.open_model(folders / "llama", adapter=tmp_path / "cut")
    (tmp_path / "cut" / "adapter_model.safetensors").unlink()
    with pytest.raises(DamagedFileError, match="lacks"):
        gpt_tf.open_model(folders / "llama", adapter=tmp_path / "cut")
