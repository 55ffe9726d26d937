"""4-bit matrices: bit for bit those of bitsandbytes, quantised here or stored by it."""

import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_parts_equal_the_whole, write_hf
from safetensors.numpy import load_file, save_file
from test_lora import KINDS, logps, random_adapters, shapes_made

from nca_jax import build
from nca_jax.aot import prepare_train
from nca_jax.axes import flatten_paths, nest_paths
from nca_jax.checks import UserError
from nca_jax.flags import parse_flags
from nca_jax.infra.optim import merge_trained
from nca_jax.model_config import MODELS, ModelConfig
from nca_jax.models import nf4
from nca_jax.models.decoder import Model
from nca_jax.models.formats import names
from nca_jax.models.formats.hf import open_hf, tensor_names
from nca_jax.models.lora import Lora, split_adapters
from nca_jax.params import abstract_base, open_base

DATA = Path(__file__).parent / "data"
FOLDER = DATA / "nf4_folder"  # see make_nf4_folder.py
Q = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def whole(param: names.Param) -> np.ndarray:
    return param.read(tuple(slice(None) for _ in param.shape))


def nf4_of(param: names.Param) -> names.Nf4Param:
    assert param.nf4 is not None
    return param.nf4


def on_device(quantised: names.Nf4Param) -> np.ndarray:
    codes, absmax = whole(quantised.codes), whole(quantised.absmax)
    return np.asarray(jax.jit(nf4.dequantise, static_argnums=2)(codes, absmax, jnp.float32))


# Numbers


@pytest.mark.parametrize("name", ["normal", "wide", "bf16", "midpoints", "zeros_in"])
def test_codes_absmax_and_values_are_those_of_bitsandbytes_bit_for_bit(name):
    stored = load_file(DATA / "adapters" / "nf4.safetensors")
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
            quantised = nf4_of(params[place.entry.path])
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


# Models


def quantised(config: ModelConfig) -> tuple[dict, dict]:
    """Returns a random base with kernels in nf4, and with what these stand for."""
    arrays = flatten_paths(Model(config).init(jax.random.key(0)))
    codes, values = {}, {}
    for path, param in names.of_arrays(config, jax.device_get(arrays)).items():
        values[path] = whole(param)
        if param.nf4 is None:
            codes[path] = values[path]
        else:
            values[path] = on_device(param.nf4).reshape(param.shape)
            codes[path.replace("kernel", "codes")] = whole(param.nf4.codes)
            codes[path.replace("kernel", "absmax")] = whole(param.nf4.absmax)
    return nest_paths(codes), nest_paths(values)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(MODELS["tiny"], id="dense"),
        pytest.param(MODELS["tiny_moe"], id="experts", marks=pytest.mark.slow),
        pytest.param(KINDS, id="kinds", marks=pytest.mark.long),
    ],
)
def test_a_model_of_4_bits_is_that_of_their_values_to_the_gradient_of_its_adapters(config):
    model = Model(config, Lora(4, 8.0, ("q", "o", "gate", "down")), remat="full")
    adapters, _ = split_adapters(model.init(jax.random.key(1)))
    adapters = random_adapters(adapters)

    def loss(adapters, base):
        return jnp.sum(logps(model, merge_trained(adapters, base)))

    of_codes, of_values = (jax.jit(jax.grad(loss))(adapters, x) for x in quantised(config))
    jax.tree.map(np.testing.assert_array_equal, of_codes, of_values)


def test_only_codes_are_kept_for_the_gradient_whatever_is_recomputed():
    model = Model(MODELS["tiny"], Lora(4, 8.0, ("q", "gate")), remat="none")
    adapters, _ = split_adapters(model.init(jax.random.key(1)))
    base, values = quantised(model.config)
    made = shapes_made(
        jax.make_jaxpr(jax.grad(lambda a: jnp.sum(logps(model, merge_trained(a, base)))))(adapters)
    )
    stacked = {x.shape for path, x in flatten_paths(values["layers"]).items() if "kernel" in path}
    assert not {shape for shape, _ in made} & stacked
    assert {shape[1:] for shape in stacked} <= {shape for shape, _ in made}


def test_groups_that_devices_would_cut_are_refused_by_name():
    mesh = dict(data=1, fsdp=1, tensor=1, expert=1)
    abstract = Model(MODELS["mistral_7b"]).abstract_nf4()
    nf4.check_blocks(abstract, mesh | dict(fsdp=64, tensor=8))
    said = r"attn/k/codes: 64 groups of 64 inputs over mesh.fsdp \* mesh.expert = 128 would be cut"
    with pytest.raises(UserError, match=said):
        nf4.check_blocks(abstract, mesh | dict(fsdp=32, expert=4))
    odd = dataclasses.replace(MODELS["tiny"], mlp_width=65)
    with pytest.raises(UserError, match="mlp/down/codes: nf4 wants matrices of whole blocks"):
        nf4.check_blocks(Model(odd).abstract_nf4(), mesh)


def base_of(*flags: str, smoke: str = ",smoke") -> tuple[build.Run, dict]:
    flags = ("--config.lora.rank=2", "--config.data.rows=8", *flags)
    run = build.build(parse_flags(["x", f"--config=configs/jsonl.py:files=x{smoke}", *flags])[0])
    return run, flatten_paths(open_base(run))


def test_a_base_is_in_4_bits_where_it_is_asked_for_or_is_so_in_its_file(tmp_path):
    run, base = base_of("--config.lora.base_dtype=nf4")
    abstract = flatten_paths(abstract_base(run))
    assert {k: (x.shape, x.dtype) for k, x in base.items()} == {
        k: (x.shape, x.dtype) for k, x in abstract.items()
    }
    folder = (f"--config.model.init_from={FOLDER}", "--config.model.name=", "--config.mesh.data=8")
    _, stored = base_of(*folder)
    _, params = open_hf(FOLDER)
    gate = params["layers/mlp/gate/kernel"]
    np.testing.assert_array_equal(stored["layers/mlp/gate/codes"], whole(nf4_of(gate).codes))
    _, halves = base_of(*folder, "--config.lora.base_dtype=bfloat16")
    half = whole(gate).astype(jnp.bfloat16)
    np.testing.assert_array_equal(halves["layers/mlp/gate/kernel"], half)

    def dequantise_one(tensors):
        for name in [name for name in tensors if name.startswith(f"{Q}.")]:
            del tensors[name]
        tensors[Q] = np.ones((64, 96), np.float32)

    mixed = f"--config.model.init_from={other(tmp_path, dequantise_one)}"
    with pytest.raises(UserError, match="13 of 14 matrices of its layers in 4 bits"):
        base_of(*folder, mixed)


@pytest.mark.slow
def test_devices_send_each_other_codes_not_what_they_stand_for():
    flags = ("--config.lora.base_dtype=nf4", "--config.reference.kind=base")
    run, _ = base_of(*flags, "--config.model.scan_layers", "--config.model.remat=full")
    with jax.set_mesh(run.mesh):
        step, shapes = prepare_train(run)
        text = step.lower(*shapes).compile().as_text() or ""
    sent = set(re.findall(r"= (\w+\[[\d,]+\])\S* all-gather\(", text))
    codes = {"u8[1,8,4,64]", "u8[1,8,4,32]", "u8[1,8,4,160]", "u8[1,40,2,64]"}
    assert {x for x in sent if x.startswith("u8")} == codes
    assert not {"f32[64,160]", "f32[160,64]", "f32[64,4,16]", "f32[64,2,16]"} & sent
