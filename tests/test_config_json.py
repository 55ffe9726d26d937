"""What config.json of each family says, what it may leave out, and what of it is refused."""

import json
import math

import pytest
from helpers import CONFIGS, OWN, hf_json

from nca_jax.checks import UserError
from nca_jax.model_config import LayerKind, ModelConfig, Rope, RopeScaling
from nca_jax.models.families import FAMILIES
from nca_jax.models.formats import hf


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
    rope = Rope(5e5, RopeScaling(8.0, 1.0, 4.0, 8192))
    assert read_config(tmp_path, **change).kinds == (LayerKind(rope=rope),)


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("llama", {"model_type": "gpt2"}, "model_type 'gpt2'"),
        ("llama", {"model_type": "phi"}, "model_type 'phi' is not one of llama, mistral"),
        ("llama", {"architectures": ["LlamaForTokenClassification"]}, "wanted LlamaForCausalLM or"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias True"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("llama", {"mlp_bias": True}, "mlp_bias True"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "linear needs 'factor'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "yarn needs 'factor'"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}}, "^.*: mscale"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}}, "truncate"),
        ("olmo2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 1}}, "beta_slow"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic"}}, "rope_type 'dynamic'"),
        ("mistral", {"rope_scaling": {"rope_type": "longrope"}}, "longrope needs 'short_factor'"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ("phi3", {"partial_rotary_factor": 1.0}, "short_factor has 2 numbers; wanted 3"),
        ("phi3", {"partial_rotary_factor": 0.6}, "partial_rotary_factor 0.6"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias True"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\]"),
        ("qwen3_moe", {"num_experts_per_tok": 4}, "4 is more than num_experts 3"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
        ("olmo2", {"attention_bias": True}, "attention_bias True"),
        ("olmo3", {"rope_theta": 1e4}, "rope_theta 10000.0 is of all layers or of the full ones"),
        ("olmo3", {"rope_parameters": {"rope_theta": 5e5}}, "rope_theta in rope_parameters"),
        ("olmo3", {"layer_types": ["full_attention"]}, "layer_types are 1"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers are 1"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 3}, "has a sliding_attention"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias True"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "llama3 needs 'factor'"),
        ("qwen3", {"rope_parameters": {"full_attention": {}}}, "one for each kind of layer"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"vocab_size": None}, "vocab_size must be a positive integer"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "a sliding window in some layers only",
        ),
        (
            "mistral",
            {"layer_types": ["sliding_attention", "full_attention"]},
            "a sliding window in some layers only",
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
        ({"sliding_window": 8, "layer_types": ["full_attention"] * 3}, 0),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention"] * 3,
            },
            8,
        ),
    ],
)
def test_qwens_window_counts_if_every_layer_has_it(tmp_path, change, window):
    assert read_config(tmp_path, "qwen2", **change).windows == (window,)


def test_end_ids_are_those_of_both_files(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2, 5]}')
    assert read_config(tmp_path, eos_token_id=2).eos_ids == (2, 7, 5)
    assert read_config(tmp_path, eos_token_id=None).eos_ids == (7, 2, 5)


def test_head_dim_and_kv_heads_have_defaults(tmp_path):
    config = read_config(tmp_path, drop={"head_dim", "num_key_value_heads"})
    assert (config.head_dim, config.num_kv_heads) == (8, 4)


YARN = {"rope_theta": 5e5, **OWN["olmo3"]["rope_scaling"]}
LONGROPE = {
    **OWN["phi3"]["rope_scaling"], "type": None, "rope_type": "longrope", "rope_theta": 1e4,
    "partial_rotary_factor": 0.75, "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("qwen3_moe", {"num_local_experts": 3, "num_experts": 128}),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1], "layer_types": ["full_attention"] * 3}),
        (
            "olmo3",
            {
                "rope_theta": 1.0,
                "rope_scaling": None,
                "rope_parameters": {
                    "full_attention": YARN,
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
                },
            },
        ),
        ("olmo3", {"rope_parameters": {"full_attention": None}}),
        ("phi3", {"rope_scaling": OWN["phi3"]["rope_scaling"] | {"type": "su"}}),
        ("phi3", {"rope_scaling": OWN["phi3"]["rope_scaling"] | {"type": "yarn"}}),
        ("phi3", {"rope_scaling": None, "rope_parameters": LONGROPE}),
    ],
)
def test_newer_and_older_files_of_a_family_say_the_same(tmp_path, model_type, change):
    assert read_config(tmp_path, model_type, **change) == CONFIGS[model_type]


def test_factors_that_are_unsaid_follow_from_the_lengths(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0}
    rope = read_config(tmp_path, "qwen3", rope_scaling=yarn).kinds[0].rope.scaling
    assert rope.original_max_position == 64 and rope.attention_factor == 0.1 * math.log(4) + 1
    longrope = OWN["phi3"]["rope_scaling"] | {"attention_factor": None}
    rope = read_config(tmp_path, "phi3", rope_scaling=longrope).kinds[0].rope.scaling
    assert rope.attention_factor == math.sqrt(1 + math.log(64 / 16) / math.log(16))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_keys_mean_what_transformers_means(tmp_path, model_type):
    from transformers import CONFIG_MAPPING

    sizes = dict.fromkeys(hf.SIZES, 64) | {"num_attention_heads": 32, "vocab_size": 2**18}
    theirs = CONFIG_MAPPING[model_type](**sizes)
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"model_type": model_type}))
    ours = hf.read_config(tmp_path)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2)
    assert ours.norm_eps == theirs.rms_norm_eps
    for i, kind in enumerate(ours.layer_kinds):
        name = (getattr(theirs, "layer_types", None) or [None] * 64)[i]
        windowed = name in (None, "sliding_attention")
        assert kind.window == (windowed and getattr(theirs, "sliding_window", None) or 0)
        rope = theirs.rope_parameters.get(name, theirs.rope_parameters)
        turned = getattr(theirs, "no_rope_layers", [1] * 64)[i]
        assert kind.rope == (Rope(rope["rope_theta"]) if turned else None)
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.tied_head == theirs.tie_word_embeddings
    assert (ours.bos_id, ours.pad_id) == (theirs.bos_token_id, theirs.pad_token_id)
    assert ours.eos_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    if hasattr(theirs, "num_local_experts"):
        assert ours.num_experts == theirs.num_local_experts
        assert ours.experts_per_token == theirs.num_experts_per_tok
