"""4-bit matrices: bit for bit those of bitsandbytes, quantised here or stored by it."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_parts_equal_the_whole, write_hf
from safetensors.numpy import load_file, save_file

from nca_jax.checks import UserError
from nca_jax.models import nf4
from nca_jax.models.formats import names
from nca_jax.models.formats.hf import open_hf, tensor_names

DATA = Path(__file__).parent / "data"
FOLDER = DATA / "nf4_folder"  # see make_nf4_folder.py
Q = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def whole(param: names.Param) -> np.ndarray:
    return param.read(tuple(slice(None) for _ in param.shape))


def on_device(quantised: names.Nf4Param) -> np.ndarray:
    codes, absmax = whole(quantised.codes), whole(quantised.absmax)
    return np.asarray(jax.jit(nf4.dequantise, static_argnums=2)(codes, absmax, jnp.float32))


# Numbers


@pytest.mark.parametrize("name", ["normal", "wide", "bf16", "midpoints", "zeros_in"])
def test_codes_absmax_and_values_are_those_of_bitsandbytes_bit_for_bit(name):
    stored = load_file(DATA / "nf4.safetensors")
    weight = stored[f"{name}.weight"]
    absmax = nf4.block_absmax(weight)
    codes = nf4.quantise(weight, absmax)
    np.testing.assert_array_equal(absmax, stored[f"{name}.absmax"])
    high, low = codes.reshape(-1, 2).T
    np.testing.assert_array_equal(high << 4 | low, stored[f"{name}.codes"])
    height, width = weight.shape
    for group in (64, 16):
        packed = nf4.pack(codes, group).T.reshape(width // group, group // 2, height)
        of_groups = nf4.of_groups(absmax, weight.shape, group).T[:, None]
        values = nf4.dequantise(jnp.asarray(packed), jnp.asarray(of_groups), jnp.float32)
        np.testing.assert_array_equal(values.T, stored[f"{name}.dequantised"])


# Folders


@pytest.mark.parametrize("model_type", ["mistral", "qwen3", "mixtral"])
def test_a_kernel_is_quantised_as_the_tensors_of_its_file_are_however_it_is_cut(
    tmp_path, model_type
):
    tensors = write_hf(tmp_path, model_type)
    config, params = open_hf(tmp_path)
    quantised = {path: param.nf4 for path, param in params.items() if param.nf4}
    assert {path.split("/")[-2] for path in quantised} == {*"qkvo", "gate", "up", "down"}
    for name, held in names.places(config, tensor_names(model_type)).items():
        for entry, index in held:
            if entry.path not in quantised:
                continue
            absmax = nf4.block_absmax(tensors[name])
            values = nf4.CODE[nf4.quantise(tensors[name], absmax)].reshape(-1, nf4.BLOCK)
            values = (values * absmax[:, None]).reshape(tensors[name].shape)
            np.testing.assert_array_equal(on_device(quantised[entry.path])[index].T, values)
            assert quantised[entry.path].num_stored == 0
    for number, param in quantised.items():
        assert_parts_equal_the_whole({f"{number} codes": param.codes, "absmax": param.absmax})


def test_a_folder_that_bitsandbytes_quantised_twice_has_its_values_and_stays_as_it_is():
    digests = json.loads((FOLDER / "digests.json").read_text())
    config, params = open_hf(FOLDER)
    for name, held in names.places(config, tensor_names("mistral")).items():
        (place,) = held
        value = names.read_tensor(config, params, held)
        assert (name in digests) == (params[place.entry.path].nf4 is not None)
        if name in digests:
            assert hashlib.sha256(value.tobytes()).hexdigest() == digests[name]
            quantised = params[place.entry.path].nf4
            assert quantised.num_stored == quantised.num_tensors == config.num_layers
            np.testing.assert_array_equal(on_device(quantised)[place.index].T, value)
            assert_parts_equal_the_whole({"codes": quantised.codes, "absmax": quantised.absmax})


def other(folder: Path, change) -> Path:
    """Copies FOLDER with other tensors."""
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def with_state(**changes):
    def change(tensors):
        state = json.loads(tensors[STATE].tobytes()) | changes
        tensors[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    return change


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x: x.update({f"{Q}.quant_state.bitsandbytes__fp4": x.pop(STATE)}), "fp4"),
        (lambda x: x.update({f"{Q}.SCB": np.ones(64, np.float32)}), "8 bits"),
        (with_state(blocksize=128), "blocksize of 64"),
        (with_state(shape=[64, -96]), "a shape"),
        (with_state(shape=[64, 95]), "even width"),
        (with_state(nested_offset=None), "nested_offset"),
        (with_state(nested_blocksize=1 << 40), "nested_blocksize"),
        (lambda x: x.pop(f"{Q}.absmax"), f"{Q}.absmax of 96 U8"),
        (lambda x: x.update({Q: x[Q][:-1]}), f"{Q} of 3072 U8"),
        (lambda x: x.update({f"{Q}.quant_map": x[f"{Q}.quant_map"] / 2}), "quant_map"),
        (lambda x: x.update({STATE: x[STATE][1:]}), "a shape"),
        (lambda x: x.pop(STATE), "is U8"),
    ],
)
def test_what_is_quantised_otherwise_is_refused_by_name(tmp_path, change, said):
    with pytest.raises(UserError, match="(?s)q_proj.*" + said.replace("[", r"\[")):
        open_hf(other(tmp_path, change))
