"""Hugging Face folders: the name table, configs, and what is refused."""

import json
import os
import re

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from helpers import CONFIGS, DENSE, assert_parts_equal_the_whole, read_all, write_hf
from safetensors.numpy import load_file, save_file

from nca_jax.checks import UserError
from nca_jax.model_config import MODELS
from nca_jax.models.families import FAMILIES
from nca_jax.models.formats import hf, hf_export, names, pretrained


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_folder_reads_back_through_the_inverse_of_the_table(tmp_path, model_type):
    config = CONFIGS[model_type]
    tensors = write_hf(tmp_path, model_type)
    found, params = hf.open_hf(tmp_path)
    assert found == config
    assert {k: p.shape for k, p in params.items()} == names.param_shapes(config)
    values = read_all(params)
    parts, naming = {}, hf.tensor_names(model_type)
    for entry in names.entries(config):
        value = values[entry.path]
        assert value.dtype == np.float32
        for place in np.ndindex(value.shape[: len(entry.stacked)]):
            name = naming[entry.path].format(**dict(zip(entry.stacked, place, strict=True)))
            parts.setdefault(name, []).append(names.to_tensor(entry, config, value[place]))
    assert parts.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(np.concatenate(parts[name]), tensor, err_msg=name)


def test_kernels_are_transposed_and_split_into_heads(tmp_path):
    tensors = write_hf(tmp_path)
    values = read_all(hf.open_hf(tmp_path)[1])
    layer, width = "model.layers.1.", DENSE.head_dim
    for kernel, head in (("q", 3), ("k", 1), ("v", 1)):
        rows = tensors[f"{layer}self_attn.{kernel}_proj.weight"][head * width :][:width]
        value = values[f"layers/attn/{kernel}/kernel"][1, :, head]
        np.testing.assert_array_equal(value, rows.T)
    columns = tensors[layer + "self_attn.o_proj.weight"][:, 2 * width : 3 * width]
    np.testing.assert_array_equal(values["layers/attn/o/kernel"][1, 2], columns.T)
    down = tensors[layer + "mlp.down_proj.weight"]
    np.testing.assert_array_equal(values["layers/mlp/down/kernel"][1], down.T)


def test_experts_have_mixtrals_names(tmp_path):
    tensors = write_hf(tmp_path, "mixtral")
    values = read_all(hf.open_hf(tmp_path)[1])
    expert = "model.layers.1.block_sparse_moe.experts.2."
    for kernel, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        value = values[f"layers/moe/{kernel}/kernel"][1, 2]
        np.testing.assert_array_equal(value, tensors[f"{expert}{name}.weight"].T)


def test_padded_vocabulary_is_zero(tmp_path):
    write_hf(tmp_path)
    config, params = hf.open_hf(tmp_path)
    values = read_all(params)
    assert (config.vocab_size, config.padded_vocab) == (130, 256)
    assert not values["embed/table"][130:].any() and values["embed/table"][129].any()
    assert not values["head/kernel"][:, 130:].any() and values["head/kernel"][:, 129].any()


@pytest.mark.parametrize("model_type", ["qwen2", "mixtral"])
def test_a_part_of_a_folder_equals_the_slice_of_the_whole(tmp_path, model_type):
    write_hf(tmp_path, model_type)
    params = hf.open_hf(tmp_path)[1]
    assert_parts_equal_the_whole(params)
    padding = params["embed/table"].read((slice(192, 256), slice(0, 5)))
    assert padding.shape == (64, 5) and not padding.any()


def test_only_the_layers_asked_for_are_fetched():
    fetched = []

    def fetch(name, index):
        fetched.append((name, index))
        return np.ones([s.stop - s.start for s in index], np.float32)

    dtypes = dict.fromkeys(names.tensor_shapes(DENSE, names.HF), np.dtype(np.float32))
    params = names.open_params(DENSE, names.HF, fetch, dtypes)
    assert not fetched
    one_layer = (slice(1, 2), slice(8, 16), slice(2, 4), slice(None))
    assert params["layers/attn/q/kernel"].read(one_layer).shape == (1, 8, 2, 6)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert fetched == [(name, (slice(12, 24), slice(8, 16)))]


def test_tensors_of_one_name_lie_one_below_the_other(tmp_path, monkeypatch):
    """As families store them that fuse q, k and v, or gate and up."""
    qkv = "model.layers.{L}.self_attn.qkv_proj.weight"
    gate_up = "model.layers.{L}.mlp.gate_up_proj.weight"
    fused = {f"layers/attn/{x}/kernel": qkv for x in "qkv"}
    fused |= {f"layers/mlp/{x}/kernel": gate_up for x in ("gate", "up")}
    apart = write_hf(tmp_path)
    expected = read_all(hf.open_hf(tmp_path)[1])
    monkeypatch.setitem(FAMILIES, "mistral", FAMILIES["mistral"]._replace(tensors=fused))

    config, out = CONFIGS["mistral"], tmp_path / "fused"
    whole = {path: names.Param(x.shape, x.__getitem__) for path, x in expected.items()}
    hf_export.write_hf(out, config, whole)
    tensors = load_file(out / "model.safetensors")
    for name, parts in (("self_attn.qkv", ("q", "k", "v")), ("mlp.gate_up", ("gate", "up"))):
        of_parts = [f"model.layers.1.{name.split('.')[0]}.{part}_proj.weight" for part in parts]
        stacked = np.concatenate([apart[part] for part in of_parts])
        np.testing.assert_array_equal(tensors[f"model.layers.1.{name}_proj.weight"], stacked)
        assert not set(of_parts) & set(tensors)
    found = hf.open_hf(out)[1]
    for path, value in read_all(found).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
    assert_parts_equal_the_whole(found)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_give_float32(tmp_path, dtype):
    tensors = write_hf(tmp_path, dtype=dtype)
    value = read_all(hf.open_hf(tmp_path)[1])["layers/mlp/up/kernel"]
    assert value.dtype == np.float32
    expected = tensors["model.layers.2.mlp.up_proj.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(value[2], expected)


def shard(folder, tensors: dict) -> None:
    """Moves the tensors to two files with an index."""
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": list(tensors)[::2], "b.safetensors": list(tensors)[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_sharded_folder_equals_the_whole_file(tmp_path):
    tensors = write_hf(tmp_path)
    whole = read_all(hf.open_hf(tmp_path)[1])
    shard(tmp_path, tensors)
    sharded = read_all(hf.open_hf(tmp_path)[1])
    assert list(whole) == list(sharded)
    for path in whole:
        np.testing.assert_array_equal(whole[path], sharded[path])
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match="1 absent files: b.safetensors"):
        hf.open_hf(tmp_path)


@pytest.mark.parametrize("name", ["../a.safetensors", "..", "sub/a.safetensors", "{}/a", "", 3, []])
def test_an_index_that_names_another_place_is_refused_by_name(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    shard(folder, write_hf(folder))
    (folder / "sub").mkdir()
    for place in (tmp_path, folder / "sub"):
        os.link(folder / "a.safetensors", place / "a.safetensors")
    name = name.format(tmp_path) if isinstance(name, str) else name
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": name}}))
    with pytest.raises(UserError, match=re.escape(f"index.json names {name!r}; wanted names of")):
        hf.open_hf(folder)


def test_a_stored_tied_head_and_rope_frequencies_are_ignored(tmp_path):
    embedding = write_hf(tmp_path, "llama")["model.embed_tokens.weight"]
    extra = {
        "lm_head.weight": embedding,
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32),
    }
    write_hf(tmp_path, "llama", extra=extra)
    config, params = hf.open_hf(tmp_path)
    assert config.tied_head and "head/kernel" not in params


def test_tensors_that_do_not_fit_are_all_named_at_once(tmp_path):
    write_hf(
        tmp_path,
        extra={"model.norm.weight": np.ones(31, np.float32), "odd": np.ones(1, np.float32)},
        drop={"lm_head.weight", "model.layers.2.mlp.up_proj.weight"},
    )
    with pytest.raises(UserError) as error:
        hf.open_hf(tmp_path)
    for part in (
        "2 missing: lm_head.weight, model.layers.2.mlp.up_proj.weight",
        "1 of another shape: model.norm.weight (wanted (32,), found (31,))",
        "1 unexpected: odd",
    ):
        assert part in str(error.value)


def test_an_integer_tensor_is_refused(tmp_path):
    write_hf(tmp_path, extra={"model.norm.weight": np.ones(32, np.int8)})
    with pytest.raises(UserError, match="model.norm.weight .* is I8; wanted one of F32"):
        hf.open_hf(tmp_path)


def test_pickled_weights_are_refused_with_advice(tmp_path):
    write_hf(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="convert them"):
        hf.open_hf(tmp_path)


def test_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        hf.open_hf(tmp_path)
    write_hf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="Cannot read .*model.safetensors"):
        hf.open_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="Cannot read .*config.json"):
        hf.open_hf(tmp_path)


@pytest.mark.parametrize("shape_differs", [False, True])
def test_a_folder_that_was_written_again_is_opened_again(tmp_path, shape_differs):
    """Its config, its shapes and its values are the new ones; else it is opened once."""
    write_hf(tmp_path, "mistral")
    before, params = pretrained.open_pretrained(str(tmp_path))
    assert pretrained.open_pretrained(str(tmp_path))[1] is params
    old = read_all(params)["norm/scale"]

    change = {"intermediate_size": 12} if shape_differs else {"rope_theta": 5e5}
    wider = {f"model.layers.{i}.mlp.{name}_proj.weight": np.ones((12, 32), np.float32)
             for i in range(3) for name in ("gate", "up")}  # fmt: skip
    wider |= {f"model.layers.{i}.mlp.down_proj.weight": np.ones((32, 12), np.float32)
              for i in range(3)}  # fmt: skip
    new = {"model.norm.weight": old + 1} | (wider if shape_differs else {})
    write_hf(tmp_path, "mistral", change=change, extra=new)
    after, params = pretrained.open_pretrained(str(tmp_path))
    assert after != before and params["layers/mlp/up/kernel"].shape[2] == after.mlp_width
    np.testing.assert_array_equal(read_all(params)["norm/scale"], old + 1)


def test_the_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("outgoing traffic\nis disabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="'some/model' .* outgoing traffic$"):
        pretrained.resolve("some/model")


@pytest.mark.parametrize("where", ["/no/such/folder", "./absent", "absent.gguf", "a/b/c", ""])
def test_a_path_that_is_not_there_never_asks_the_hub(monkeypatch, where):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match="no folder"):
        pretrained.resolve(where)


def test_the_byte_tokenizer_needs_no_files_and_fits_the_tiny_model():
    tokenizer = pretrained.load_tokenizer("byte")
    assert len(tokenizer) == MODELS["tiny"].vocab_size == 259
    assert tokenizer("é", add_special_tokens=False).input_ids == [198, 172]
    assert (tokenizer.eos_token_id,) == MODELS["tiny"].eos_ids
