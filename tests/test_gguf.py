"""GGUF files: their tensors, their tokenizer, and what is refused."""

import dataclasses

import gguf
import ml_dtypes
import numpy as np
import pytest
from helpers import CONFIGS, assert_parts_equal_the_whole, random_tensors, read_all, write_hf

from nca_jax.checks import UserError
from nca_jax.model_config import alike
from nca_jax.models.families.gemma2 import GEMMA2
from nca_jax.models.formats import names, pretrained
from nca_jax.models.formats.gguf import SPLITTERS, gguf_tokenizer, open_gguf

TOKENS = [*"abcd 1", "Ġ", "Ġa", "ab", "Ċ", "<s>", "</s>", "<eot>"]
OF_ARCH = CONFIGS | {
    "qwen3moe": dataclasses.replace(CONFIGS["qwen3_moe"], renormalise=True),
    "mixtral": CONFIGS["mistral"],
    "gemma2": dataclasses.replace(CONFIGS["gemma2"], attn_scale=6**-0.5),
}
CHAT = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def write_gguf(path, arch="llama", *, change=None, extra=None, drop=(), pre="smollm"):
    """Writes a GGUF file as llama.cpp would, and returns the tensors before its permutation."""
    config = OF_ARCH[arch]
    c = config
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        f"{arch}.block_count": c.num_layers, f"{arch}.context_length": c.max_position,
        f"{arch}.embedding_length": c.width, f"{arch}.feed_forward_length": c.mlp_width,
        f"{arch}.attention.head_count": c.num_heads,
        f"{arch}.attention.head_count_kv": c.num_kv_heads,
        f"{arch}.attention.key_length": c.head_dim, f"{arch}.attention.value_length": c.head_dim,
        **({
            f"{arch}.expert_count": c.num_experts, f"{arch}.expert_used_count": c.experts_per_token,
            f"{arch}.expert_feed_forward_length": c.mlp_width,
        } if c.num_experts else {}),
        f"{arch}.rope.dimension_count": c.head_dim, "tokenizer.ggml.bos_token_id": 10,
        "tokenizer.ggml.eos_token_id": 11, "tokenizer.ggml.eot_token_id": 12,
    } | (change or {})  # fmt: skip
    for key, value in numbers.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    if arch == "gemma2":
        writer.add_sliding_window(c.windows[-1])
        writer.add_attn_logit_softcapping(c.attn_cap)
        writer.add_final_logit_softcapping(c.logit_cap)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 10 + [3] * 3)
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_chat_template(CHAT)

    tensors = random_tensors(config, names.GGUF) | (extra or {})
    tensors = {name: tensor for name, tensor in tensors.items() if name not in drop}
    for name, tensor in tensors.items():
        if arch == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = tensor.shape[0] // c.head_dim
            tensor = tensor.reshape(heads, 2, -1, c.width).swapaxes(1, 2).reshape(tensor.shape)
        if arch == "gemma2" and name.endswith("norm.weight"):
            tensor = tensor + 1
        if name.endswith("_exps.weight"):  # all experts of a layer
            tensor = tensor.reshape(c.num_experts, -1, tensor.shape[-1])
        if name.endswith("attn_output.weight"):
            tensor = tensor.astype(np.float16)
        if name == "blk.1.attn_v.weight":  # 32 columns are one block
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
        elif name.endswith("ffn_up.weight"):
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "qwen3moe", "gemma2"])
def test_a_gguf_file_reads_back_through_the_inverse_of_the_table(tmp_path, arch):
    path = tmp_path / "model.gguf"
    tensors = write_gguf(path, arch)
    config, params = open_gguf(path)
    assert config == dataclasses.replace(OF_ARCH[arch], bos_id=10, eos_ids=(11, 12))
    values, parts = read_all(params), {}
    for entry in names.entries(config):
        for place in np.ndindex(values[entry.path].shape[: len(entry.stacked)]):
            name = entry.gguf.format(**dict(zip(entry.stacked, place, strict=True)))
            tensor = names.to_tensor(entry, config, values[entry.path][place])
            parts.setdefault(name, []).append(tensor)
    assert parts.keys() == tensors.keys()
    for name, expected in tensors.items():
        atol = 0.5 if name == "blk.1.attn_v.weight" else 0  # half a step of Q8_0 at 127
        found = np.concatenate(parts[name])
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol, err_msg=name)
    assert_parts_equal_the_whole(params)


def test_gemma_2_of_27b_divides_scores_by_another_root():
    """Of google/gemma-2-27b; the metadata do not say it."""
    sizes = {"kinds": alike(), "num_layers": 46, "width": 4608, "num_heads": 32, "head_dim": 128}
    found = GEMMA2.gguf.read(lambda key, *check, default: default, sizes)
    assert found["attn_scale"] == 144**-0.5
    assert (found["attn_cap"], found["logit_cap"]) == (50, 30)
    assert [kind.window for kind in found["kinds"]] == [4096, 0]


def test_what_is_not_quantised_keeps_its_dtype(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    params = open_gguf(tmp_path / "model.gguf")[1]
    halves = {"layers/attn/o/kernel": np.float16, "layers/mlp/up/kernel": ml_dtypes.bfloat16}
    for path, dtype in halves.items():
        param = params.pop(path)
        whole = (slice(None),) * len(param.shape)
        stored = param.reader("")(whole)
        assert param.dtype == stored.dtype == dtype
        np.testing.assert_array_equal(stored.astype(np.float32), param.read(whole))
    assert {param.dtype for param in params.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("mixtral", {}, "architecture 'mixtral'"),
        ("llama", {"change": {"llama.expert_count": 8}}, "expert_count"),
        (
            "qwen3moe",
            {"change": {"qwen3moe.expert_used_count": 4}},
            "4 is more than expert_count 3",
        ),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.attention.head_count": "4"}, "llama.attention.head_count must be a positive"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count must be a positive"),
        ({"llama.attention.head_count_kv": 3}, "4 must be a multiple of .*head_count_kv 3"),
        ({"llama.block_count": 2**31}, "llama.block_count must be .* at most 1000"),
        ({"tokenizer.ggml.eos_token_id": "</s>"}, "eos_token_id must be an integer, or null"),
    ],
)
def test_metadata_of_another_kind_are_refused_by_name(tmp_path, change, message):
    write_gguf(tmp_path / "model.gguf", change=change)
    with pytest.raises(UserError, match=message):
        open_gguf(tmp_path / "model.gguf")


def test_special_ids_beyond_the_vocabulary_are_none(tmp_path):
    path, beyond = tmp_path / "model.gguf", 2**32 - 1  # -1, in 32 bits
    write_gguf(path, change={f"tokenizer.ggml.{x}_token_id": beyond for x in ("bos", "eos")})
    config, _ = open_gguf(path)
    assert (config.bos_id, config.eos_ids) == (None, (12,))
    assert gguf_tokenizer(path).eos_token is None


def test_a_length_beyond_the_end_of_a_file_ends_its_reading(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    content = path.read_bytes()
    at = content.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    path.write_bytes(content[:at] + (2**50).to_bytes(8, "little") + content[at + 8 :])
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


def test_tokenizers_come_from_the_same_place_as_the_model(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    tokenizer = pretrained.load_tokenizer(str(tmp_path / "model.gguf"))
    folder = tmp_path / "folder"
    folder.mkdir()
    write_hf(folder)
    with pytest.raises(UserError, match="folder has no tokenizer"):
        pretrained.load_tokenizer(str(folder))
    pretrained.save_tokenizer(str(tmp_path / "model.gguf"), folder)
    again = pretrained.load_tokenizer(str(folder))
    assert again("ab a").input_ids == tokenizer("ab a").input_ids
