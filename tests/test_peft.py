"""PEFT folders: reading back what was written is the identity, and what is not served is named."""

import dataclasses
import json
import random
import re

import ml_dtypes
import numpy as np
import pytest
from helpers import CONFIGS, assert_parts_equal_the_whole, read_all, write_hf
from safetensors.numpy import load_file, save_file

from nca_jax.checks import UserError
from nca_jax.models.formats import hf, names, peft, pretrained
from nca_jax.models.formats.merge import merge
from nca_jax.models.lora import Lora

LORA = Lora(4, 8.0, ("q", "k", "v", "o", "gate", "up", "down"))
LAYER = "base_model.model.model.layers.{}."


def is_target(path: str, lora: Lora) -> bool:
    return path.endswith("/kernel") and path.split("/")[-2] in lora.targets


def random_adapters(config, lora: Lora, size: float = 1.0) -> dict[str, names.Param]:
    """float32 values of all 24 bits, of the shapes that the interface of adapters has."""
    rng, sizes, found = np.random.default_rng(0), names.axis_sizes(config) | {"r": lora.rank}, {}
    for entry in names.entries(config):
        if is_target(entry.path, lora):
            outs, ins = entry.tensor_axes.split()
            axes = {"a": entry.stacked + ins + "r", "b": entry.stacked + "r" + outs}
            for part, letters in (
                axes | ({"m": entry.stacked + outs} if lora.dora else {})
            ).items():
                value = rng.normal(0, size, [sizes[x] for x in letters]).astype(np.float32)
                path = entry.path.replace("/kernel", f"/lora/{part}")
                found[path] = names.Param(value.shape, value.__getitem__)
    return found


def write(folder, model_type="mistral", lora=LORA, *, change=None, drop=(), extra=None):
    """Writes a folder; `change` goes to adapter_config.json, `extra` to the tensors."""
    config = CONFIGS[model_type]
    peft.write_peft(folder, config, lora, random_adapters(config, lora), base="some/model")
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    file.write_text(json.dumps(json.loads(file.read_text()) | (change or {})))
    tensors = load_file(weights) | (extra or {})
    save_file({name: x for name, x in tensors.items() if name not in drop}, weights)
    return tensors


@pytest.mark.parametrize("model_type", [name for name in CONFIGS if name != "phi3"])
@pytest.mark.parametrize(
    "lora",
    [
        LORA,
        dataclasses.replace(LORA, rank=3, alpha=0.5, targets=("v", "o"), rslora=True),
        dataclasses.replace(LORA, targets=("o", "router"), dora=True),
    ],
    ids=["all", "rslora", "dora"],
)
def test_written_then_read_is_the_identity(tmp_path, model_type, lora):
    config = CONFIGS[model_type]
    lora = dataclasses.replace(
        lora, targets=tuple(x for x in lora.targets if x != "router" or config.num_experts)
    )
    params = random_adapters(config, lora)
    peft.write_peft(tmp_path, config, lora, params, base="some/model@v1")
    found = peft.open_peft(tmp_path, config)
    assert (found.lora, found.base) == (lora, "some/model@v1")
    expected, read = read_all(params), read_all(found.params)
    assert read.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(read[path], value, err_msg=path)
    assert_parts_equal_the_whole(found.params)


def test_adapters_on_parts_of_one_tensor_are_not_written(tmp_path):
    config = CONFIGS["phi3"]
    with pytest.raises(UserError, match="on q, k, v, gate, up cannot be written .* phi3 has them"):
        peft.write_peft(tmp_path, config, LORA, random_adapters(config, LORA))


def test_the_tensors_have_pefts_names_and_are_transposed(tmp_path):
    tensors = write(tmp_path)
    params = read_all(random_adapters(CONFIGS["mistral"], LORA))
    a, b = params["layers/attn/o/lora/a"][1], params["layers/attn/o/lora/b"][1]
    prefix = LAYER.format(1) + "self_attn.o_proj."
    np.testing.assert_array_equal(tensors[prefix + "lora_A.weight"], a.reshape(24, 4).T)  # N H, r
    np.testing.assert_array_equal(tensors[prefix + "lora_B.weight"], b.T)


def test_half_precision_is_read_as_float32(tmp_path):
    tensors = write(tmp_path)
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    save_file(half, tmp_path / "adapter_model.safetensors")
    path = "layers/mlp/up/lora/b"
    expected = read_all(random_adapters(CONFIGS["mistral"], LORA))[path].astype(ml_dtypes.bfloat16)
    found = read_all(peft.open_peft(tmp_path, CONFIGS["mistral"]).params)[path]
    np.testing.assert_array_equal(found, expected.astype(np.float32))


# What target_modules may be

QV = dataclasses.replace(LORA, targets=("q", "v"))
FULL = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(3) for name in "qv"]


@pytest.mark.parametrize(
    "modules",
    [["v_proj", "q_proj"], ["self_attn.q_proj", "v_proj"], FULL, r".*\.(q|v)_proj", "all-linear"],
    ids=str,
)
def test_modules_are_named_by_their_ends_in_full_or_by_an_expression(tmp_path, modules):
    write(tmp_path, lora=QV, change={"target_modules": modules})
    assert peft.open_peft(tmp_path, CONFIGS["mistral"]).lora == QV


def test_an_expression_that_would_run_for_ever_is_not_run(tmp_path):
    write(tmp_path, lora=QV, change={"target_modules": "(.*.*.*.*.*.*.*)*x" * 99})
    assert peft.open_peft(tmp_path, CONFIGS["mistral"]).lora == QV


def test_the_releases_names_are_of_a_mixtures_attention_alone(tmp_path):
    ends = [f"{name}_proj" for name in (*"qkvo", "gate", "up", "down")]
    attention = dataclasses.replace(LORA, targets=("q", "k", "v", "o"))
    write(tmp_path, "mixtral", attention, change={"target_modules": ends})
    assert peft.open_peft(tmp_path, CONFIGS["mixtral"]).lora == attention


# What is not served

BLOCK = {"model.layers.0.mlp": [0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be one of 'LORA', not 'IA3'"),
        ({"task_type": "SEQ_CLS"}, "task_type must be one of 'CAUSAL_LM', or null, not 'SEQ_CLS'"),
        (
            {"modules_to_save": ["lm_head"]},
            r"modules_to_save \['lm_head'\] is not supported; merge",
        ),
        ({"layers_to_transform": [0]}, r"layers_to_transform \[0\] is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication .* is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern {'q_proj': 2} is not supported"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern {'q_proj': 2} is not supported"),
        ({"target_parameters": ["w"], "target_modules": None}, "target_parameters .* is not supp"),
        ({"exclude_modules": "k_proj"}, "exclude_modules 'k_proj' is not supported"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices .* is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True is not supported"),
        ({"lora_bias": True}, "lora_bias True is not supported"),
        ({"use_qalora": True}, "use_qalora True is not supported"),
        ({"of_a_later_version": {"a": BLOCK}}, "of_a_later_version .* is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"r": 0}, "r must be a positive integer"),
        ({"r": 4.0}, "r must be a positive integer"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number above 0"),
        ({"use_rslora": 1}, "use_rslora must be True or False"),
        ({"target_modules": None}, "target_modules must be a string or a list of names, not None"),
        ({"target_modules": [1]}, "target_modules must be a string or a list of names"),
        ({"target_modules": []}, "unexpected"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path must be a string, or null"),
        ({"r": 3}, r"lora_A.weight \(wanted \(3, 32\), found \(4, 32\)\)"),
        ({"use_dora": True}, "21 missing: .*lora_magnitude_vector"),
        ({"target_modules": ["q_proj"]}, "unexpected: .*gate_proj.lora_A"),
        ({"target_modules": [f"{x}_proj" for x in "qkvo"] + ["lm_head"]}, "unexpected"),
    ],
    ids=str,
)
def test_what_is_not_served_is_refused_by_name(tmp_path, change, message):
    write(tmp_path, change=change)
    with pytest.raises(UserError, match=message):
        peft.open_peft(tmp_path, CONFIGS["mistral"])


def test_tensors_that_are_missing_unexpected_or_of_no_float_are_refused(tmp_path):
    config, lost = CONFIGS["mistral"], LAYER.format(1) + "mlp.up_proj.lora_B.weight"
    write(tmp_path, drop=[lost])
    with pytest.raises(UserError, match=f"1 missing: {re.escape(lost)}"):
        peft.open_peft(tmp_path, config)
    head = "base_model.model.lm_head.lora_A.weight"
    write(tmp_path, extra={head: np.zeros((4, 32), np.float32)})
    with pytest.raises(UserError, match=f"1 unexpected: {re.escape(head)}"):
        peft.open_peft(tmp_path, config)
    write(tmp_path, extra={lost: np.zeros((10, 4), np.int8)})
    with pytest.raises(UserError, match=f"{re.escape(lost)} .* is I8; wanted one of F32"):
        peft.open_peft(tmp_path, config)


def test_a_pickle_is_never_read(tmp_path):
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="has no adapter_model.safetensors.* unpickling runs code"):
        peft.open_peft(tmp_path, CONFIGS["mistral"])


def test_any_value_in_any_field_is_an_adapter_or_one_line(tmp_path):
    rng = random.Random(0)
    junk = [None, True, 0, 1, -1, 4, 8.0, 2**40, 10**400, float("nan"), 1e999, "", "q_proj",
            "x" * 999, [], [1], ["q_proj"], [[]], {}, {"a": {}}]  # fmt: skip
    fields = [*peft.FIELDS, *peft.UNREAD, "modules_to_save", "rank_pattern"]
    write(tmp_path)
    file = tmp_path / "adapter_config.json"
    raw, refused = json.loads(file.read_text()), 0
    for _ in range(200):
        change = {rng.choice(fields): rng.choice(junk) for _ in range(rng.randint(1, 3))}
        file.write_text(json.dumps(raw | change))
        try:
            hash(peft.open_peft(tmp_path, CONFIGS["mistral"]).lora)
        except UserError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
    assert 100 < refused < 200


# Merging


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_merging_adds_the_scaled_product(model_type, dora):
    config = CONFIGS[model_type]
    lora = dataclasses.replace(LORA, rslora=True, dora=dora)
    rng = np.random.default_rng(1)
    values = {
        path: rng.normal(size=shape).astype(np.float32)
        for path, shape in names.param_shapes(config).items()
    }
    base = {path: names.Param(x.shape, x.__getitem__) for path, x in values.items()}
    adapters = random_adapters(config, lora)
    merged = merge(base, lora, adapters)
    assert_parts_equal_the_whole_nearly(merged)
    read, parts = read_all(merged), read_all(adapters)
    for entry in names.entries(config):
        path, lead = entry.path.removesuffix("/kernel"), len(entry.stacked)
        expected = values[entry.path].astype(np.float64)
        if is_target(entry.path, lora):
            a, b = parts[f"{path}/lora/a"], parts[f"{path}/lora/b"]
            ins = a.ndim - lead - 1
            for place in np.ndindex(*a.shape[:lead]):
                expected[place] += 8 / 2 * np.tensordot(a[place].astype(float), b[place], 1)
                if dora:
                    axes = tuple(range(ins))
                    length = np.linalg.norm(
                        expected[place].reshape(-1, *b.shape[lead + 1 :]), axis=0
                    )
                    assert length.shape == expected[place].shape[len(axes) :]
                    expected[place] *= parts[f"{path}/lora/m"][place] / length
        np.testing.assert_allclose(read[entry.path], expected, rtol=1e-5, atol=1e-5)


def assert_parts_equal_the_whole_nearly(params: dict) -> None:
    """Products of parts may sum in another order."""
    for path, param in params.items():
        whole = param.read(tuple(slice(None) for _ in param.shape))
        for axis, size in enumerate(param.shape):
            index = tuple(slice(size // 2) if a == axis else slice(None) for a in range(whole.ndim))
            np.testing.assert_allclose(param.read(index), whole[index], 1e-5, 1e-5, err_msg=path)


# A folder of adapters stands for its model


def write_adapted(tmp_path, **change):
    """Writes a model and adapters of it; returns the folder of the adapters."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    base.mkdir(exist_ok=True)
    write_hf(base)
    write(folder, change={"base_model_name_or_path": str(base), "revision": None} | change)
    return folder


def test_a_folder_of_adapters_is_opened_as_its_model_with_them_merged(tmp_path):
    folder = write_adapted(tmp_path)
    config, found = pretrained.open_pretrained(str(folder))
    base_config, base = hf.open_hf(tmp_path / "base")
    assert config == base_config
    expected = merge(base, LORA, random_adapters(config, LORA))
    for path, value in read_all(expected).items():
        np.testing.assert_array_equal(read_all({path: found[path]})[path], value, err_msg=path)
    assert pretrained.open_pretrained(str(folder))[1] is found
    write_hf(tmp_path / "base")
    assert pretrained.open_pretrained(str(folder))[1] is not found
    assert pretrained.resolve_base(str(folder)) == tmp_path / "base"


def test_the_tokenizer_of_adapters_is_their_own_or_their_models(tmp_path):
    folder = write_adapted(tmp_path)
    with pytest.raises(UserError, match="base has no tokenizer"):
        pretrained.load_tokenizer(str(folder))
    for place in (tmp_path / "base", folder):
        (place / "tokenizer.json").write_text("{")
        with pytest.raises(UserError, match=f"Cannot load the tokenizer in {place}"):
            pretrained.load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "does not say of which model .*config.lora.init_from"),
        ("./absent", "adapter is an adapter of './absent', which is not found: .* no folder"),
        ("adapter", "which is an adapter too, not a model"),
    ],
)
def test_adapters_whose_model_is_not_there_are_one_line(tmp_path, monkeypatch, base, message):
    monkeypatch.chdir(tmp_path)
    folder = write_adapted(tmp_path, base_model_name_or_path=base)
    with pytest.raises(UserError, match=message):
        pretrained.open_pretrained(str(folder))
