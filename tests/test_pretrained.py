"""Checkpoints: the name table, Hugging Face folders, GGUF files, and what is refused."""

import dataclasses
import json

import gguf
import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from nca_jax.checks import UserError
from nca_jax.model_config import MODELS, ModelConfig, RopeScaling
from nca_jax.models import hf, names, pretrained
from nca_jax.models.gguf import SPLITTERS, gguf_tokenizer, open_gguf

DENSE = ModelConfig(
    vocab_size=130, num_layers=3, width=32, num_heads=4, num_kv_heads=2, head_dim=6,
    mlp_width=10, norm_eps=1e-6, max_position=64, bos_id=1, eos_ids=(2,),
)  # fmt: skip
CONFIGS = {
    "llama": dataclasses.replace(DENSE, tied_head=True),
    "mistral": dataclasses.replace(DENSE, sliding_window=7),
    "qwen2": dataclasses.replace(DENSE, qkv_bias=True),
    "qwen3": dataclasses.replace(DENSE, qk_norm=True),
    "mixtral": dataclasses.replace(DENSE, num_experts=3, experts_per_token=2),
}


def hf_json(model_type: str, config: ModelConfig) -> dict:
    """config.json of `config`."""
    return {
        "model_type": model_type, "vocab_size": config.vocab_size, "hidden_size": config.width,
        "intermediate_size": config.mlp_width, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "rms_norm_eps": config.norm_eps, "rope_theta": 10000.0,
        "max_position_embeddings": config.max_position, "hidden_act": "silu",
        "tie_word_embeddings": config.tied_head, "sliding_window": config.sliding_window or None,
        "num_local_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token,
        "bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids),
    }  # fmt: skip


def random_tensors(config: ModelConfig, file_format: str, dtype=np.float32) -> dict:
    """Every tensor of a checkpoint, each value exact in bfloat16."""
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(-127, 128, shape).astype(dtype)
        for name, shape in names.tensor_shapes(config, file_format).items()
    }


def write_hf(folder, model_type="mistral", *, dtype=np.float32, change=None, extra=None, drop=()):
    """Writes a folder and returns its tensors; `change` goes to config.json, `extra` to weights."""
    config = CONFIGS[model_type]
    (folder / "config.json").write_text(json.dumps(hf_json(model_type, config) | (change or {})))
    tensors = random_tensors(config, "hf", dtype) | (extra or {})
    tensors = {name: tensor for name, tensor in tensors.items() if name not in drop}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def read_all(params: dict) -> dict:
    return {k: p.read(tuple(slice(None) for _ in p.shape)) for k, p in params.items()}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_folder_reads_back_through_the_inverse_of_the_table(tmp_path, model_type):
    config = CONFIGS[model_type]
    tensors = write_hf(tmp_path, model_type)
    found, params = hf.open_hf(tmp_path)
    assert found == config
    assert {k: p.shape for k, p in params.items()} == names.param_shapes(config)
    values = read_all(params)
    seen = set()
    for row in names.rows(config):
        value = values[row.path]
        assert value.dtype == np.float32
        for place in np.ndindex(value.shape[: len(row.stacked)]):
            name = row.hf.format(**dict(zip(row.stacked, place, strict=True)))
            np.testing.assert_array_equal(
                names.to_tensor(row, config, value[place]), tensors[name], err_msg=name
            )
            seen.add(name)
    assert seen == set(tensors)


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


def assert_parts_equal_the_whole(params: dict) -> None:
    """Every axis of every parameter is cut in 2, each half read by itself."""
    for path, param in params.items():
        whole = param.read(tuple(slice(None) for _ in param.shape))
        for axis, size in enumerate(param.shape):
            for half in (slice(0, size // 2), slice(size // 2, size)):
                index = tuple(half if a == axis else slice(None) for a in range(whole.ndim))
                np.testing.assert_array_equal(param.read(index), whole[index], err_msg=path)
        corner = tuple(slice(n // 3, max(n // 3 + 1, 2 * n // 3)) for n in param.shape)
        np.testing.assert_array_equal(param.read(corner), whole[corner], err_msg=path)


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

    params = names.open_params(DENSE, "hf", fetch)
    assert not fetched
    one_layer = (slice(1, 2), slice(8, 16), slice(2, 4), slice(None))
    assert params["layers/attn/q/kernel"].read(one_layer).shape == (1, 8, 2, 6)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert fetched == [(name, (slice(12, 24), slice(8, 16)))]


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


def test_a_stored_tied_head_and_rope_frequencies_are_ignored(tmp_path):
    shape = (DENSE.vocab_size, DENSE.width)
    extra = {
        "lm_head.weight": np.ones(shape, np.float32),
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


def read_config(folder, base="llama", /, drop=(), **change) -> ModelConfig:
    raw = hf_json(base, CONFIGS[base]) | change
    raw = {key: value for key, value in raw.items() if key not in drop}
    (folder / "config.json").write_text(json.dumps(raw))
    return hf.read_config(folder)


LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}},
        {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}},
    ],
)
def test_old_and_new_rope_fields_agree(tmp_path, change):
    config = read_config(tmp_path, **change)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("llama", {"model_type": "gpt2"}, "model_type 'gpt2'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias True"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("llama", {"mlp_bias": True}, "mlp_bias True"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic"}}, "rope_type 'dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "llama3 needs 'factor'"),
        ("qwen3", {"rope_parameters": {"full_attention": {}}}, "one for each kind of layer"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"vocab_size": None}, "vocab_size must be a positive integer"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "use_sliding_window in some layers",
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(tmp_path, model_type, change, message):
    with pytest.raises(UserError, match=message):
        read_config(tmp_path, model_type, **change)


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 8}, 0),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 28}, 0),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, 8),
    ],
)
def test_qwens_window_counts_if_every_layer_has_it(tmp_path, change, window):
    assert read_config(tmp_path, "qwen2", **change).sliding_window == window


def test_end_ids_are_those_of_both_files(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2, 5]}')
    assert read_config(tmp_path, eos_token_id=2).eos_ids == (2, 7, 5)
    assert read_config(tmp_path, eos_token_id=None).eos_ids == (7, 2, 5)


def test_head_dim_and_kv_heads_have_defaults(tmp_path):
    config = read_config(tmp_path, drop={"head_dim", "num_key_value_heads"})
    assert (config.head_dim, config.num_kv_heads) == (8, 4)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_absent_keys_mean_what_transformers_means(tmp_path, model_type):
    from transformers import CONFIG_MAPPING

    sizes = dict.fromkeys(hf.SIZES, 64)
    theirs = CONFIG_MAPPING[model_type](**sizes)
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"model_type": model_type}))
    ours = hf.read_config(tmp_path)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 1)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.tied_head == theirs.tie_word_embeddings
    assert ours.sliding_window == (getattr(theirs, "sliding_window", None) or 0)
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    if model_type == "mixtral":
        assert ours.num_experts == theirs.num_local_experts
        assert ours.experts_per_token == theirs.num_experts_per_tok


TOKENS = [*"abcd 1", "Ġ", "Ġa", "ab", "Ċ", "<s>", "</s>", "<eot>"]
CHAT = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def write_gguf(path, arch="llama", *, change=None, extra=None, drop=(), pre="smollm"):
    """Writes a GGUF file as llama.cpp would, and returns the tensors before its permutation."""
    config = CONFIGS["mistral" if arch == "mixtral" else arch]
    c = config
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        f"{arch}.block_count": c.num_layers, f"{arch}.context_length": c.max_position,
        f"{arch}.embedding_length": c.width, f"{arch}.feed_forward_length": c.mlp_width,
        f"{arch}.attention.head_count": c.num_heads,
        f"{arch}.attention.head_count_kv": c.num_kv_heads,
        f"{arch}.attention.key_length": c.head_dim, f"{arch}.attention.value_length": c.head_dim,
        f"{arch}.rope.dimension_count": c.head_dim, "tokenizer.ggml.bos_token_id": 10,
        "tokenizer.ggml.eos_token_id": 11, "tokenizer.ggml.eot_token_id": 12,
    } | (change or {})  # fmt: skip
    for key, value in numbers.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 10 + [3] * 3)
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_chat_template(CHAT)

    tensors = random_tensors(config, "gguf") | (extra or {})
    tensors = {name: tensor for name, tensor in tensors.items() if name not in drop}
    for name, tensor in tensors.items():
        if arch == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = tensor.shape[0] // c.head_dim
            tensor = tensor.reshape(heads, 2, -1, c.width).swapaxes(1, 2).reshape(tensor.shape)
        if name.endswith("attn_output.weight"):
            tensor = tensor.astype(np.float16)
        if name == "blk.1.attn_v.weight":  # 32 columns are one block
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_reads_back_through_the_inverse_of_the_table(tmp_path, arch):
    path = tmp_path / "model.gguf"
    tensors = write_gguf(path, arch)
    config, params = open_gguf(path)
    assert config == dataclasses.replace(CONFIGS[arch], bos_id=10, eos_ids=(11, 12))
    values = read_all(params)
    for row in names.rows(config):
        for place in np.ndindex(values[row.path].shape[: len(row.stacked)]):
            name = row.gguf.format(**dict(zip(row.stacked, place, strict=True)))
            tensor = names.to_tensor(row, config, values[row.path][place])
            atol = 0.5 if name == "blk.1.attn_v.weight" else 0  # half a step of Q8_0 at 127
            np.testing.assert_allclose(tensor, tensors[name], rtol=0, atol=atol, err_msg=name)
    assert_parts_equal_the_whole(params)


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("mixtral", {}, "architecture 'mixtral'"),
        ("llama", {"change": {"llama.expert_count": 8}}, "expert_count"),
        ("llama", {"change": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.type"),
        ("llama", {"extra": {"rope_freqs.weight": np.ones(3, np.float32)}}, "rope_freqs.weight"),
        ("llama", {"change": {"llama.rope.dimension_count": 4}}, "rope.dimension_count"),
        ("llama", {"change": {"llama.attention.sliding_window": 9}}, "sliding_window"),
        ("llama", {"change": {"split.count": 2}}, "one part of a split GGUF"),
        ("llama", {"drop": {"blk.0.ffn_up.weight"}}, "1 missing: blk.0.ffn_up.weight"),
        ("qwen2", {"drop": {"blk.0.attn_q.bias"}}, "1 missing: blk.0.attn_q.bias"),
        (
            "llama",
            {"extra": {"output_norm.weight": np.ones(32, np.int8)}},
            "output_norm.weight is stored as I8",
        ),
    ],
)
def test_a_gguf_that_would_be_computed_wrongly_is_refused(tmp_path, arch, options, message):
    path = tmp_path / "model.gguf"
    write_gguf(path, arch, **options)
    with pytest.raises(UserError, match=message):
        open_gguf(path)


def test_a_file_that_is_no_gguf_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model at all, but long enough for a header")
    with pytest.raises(UserError, match="Cannot read .*model.gguf as GGUF"):
        open_gguf(path)


def test_the_tokenizer_of_a_gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    tokenizer = gguf_tokenizer(path)
    assert len(tokenizer) == len(TOKENS)
    assert tokenizer("ab a</s>11\n").input_ids == [8, 7, 11, 5, 5, 9]
    assert tokenizer.decode([8, 7, 9]) == "ab a\n"
    assert tokenizer.decode([8, 11], skip_special_tokens=True) == "ab"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (10, 11)
    assert tokenizer.pad_token_id is None
    assert tokenizer.chat_template == CHAT


def test_a_llama_tokenizer_starts_with_bos(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, pre="llama-bpe")
    assert gguf_tokenizer(path)("ab").input_ids == [10, 8]
    assert gguf_tokenizer(path)("ab", add_special_tokens=False).input_ids == [8]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "I'm 1234\n\nok", ["I", "'m", "Ġ", "1", "2", "3", "4", "Ċ", "Ċ", "ok"]),
        ("llama-bpe", "I'M 1234!\n\nok", ["I", "'M", "Ġ", "123", "4", "!ĊĊ", "ok"]),
        ("qwen2", "I'M 12!\n\nok", ["I", "'M", "Ġ", "1", "2", "!ĊĊ", "ok"]),
    ],
)
def test_words_are_split_as_by_the_original(pre, text, pieces):
    from tokenizers import pre_tokenizers

    splitter = SPLITTERS[pre]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitter.use_regex)
    both = pre_tokenizers.Sequence([splitter.first, byte_level])
    assert [piece for piece, _ in both.pre_tokenize_str(text)] == pieces


def test_an_unknown_tokenizer_is_refused_by_name(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, pre="falcon")
    with pytest.raises(UserError, match="pre-tokenizer 'falcon'"):
        gguf_tokenizer(path)


def test_a_packaged_model_is_found_without_importing_the_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "packaged_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    with pytest.raises(UserError, match="'packaged_model', found 0"):
        pretrained.resolve("package:packaged_model")
    write_gguf(package / "model.gguf")
    assert pretrained.resolve("package:packaged_model") == package / "model.gguf"
    assert pretrained.open_pretrained("package:packaged_model")[0].num_layers == 3
    with pytest.raises(UserError, match="No Python package 'no_such_package'"):
        pretrained.resolve("package:no_such_package")


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


def test_tokenizers_come_from_the_same_place_as_the_model(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    tokenizer = pretrained.load_tokenizer(str(tmp_path / "model.gguf"))
    folder = tmp_path / "folder"
    folder.mkdir()
    write_hf(folder)
    with pytest.raises(UserError, match="folder has no tokenizer"):
        pretrained.load_tokenizer(str(folder))
    tokenizer.save_pretrained(folder)
    again = pretrained.load_tokenizer(str(folder))
    assert again("ab a").input_ids == tokenizer("ab a").input_ids
