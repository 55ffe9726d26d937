"""Gemma 2: norms of (1 + w) on both sides, soft caps, and a window in every other layer."""

from collections.abc import Mapping, Sequence

from nca_jax.checks import UserError
from nca_jax.model_config import LayerKind, ModelConfig, Rope, shortest_period
from nca_jax.models.families.family import (
    DEFAULTS,
    FULL,
    SLIDING,
    Family,
    Fields,
    Gguf,
    read_by_layer,
    write_alike,
    write_by_layer,
)
from nca_jax.models.families.rope import read_rope, rope_fields
from nca_jax.models.formats.untrusted import NUMBER

_ACTIVATION = {"hidden_activation": "gelu_pytorch_tanh"}


def read_gemma(raw: Fields, names: Sequence[str], ropes: Mapping[str, Rope]) -> Fields:
    """What Gemma 2 and 3 read alike; the arguments are those of `read_by_layer`."""
    if raw.get("use_bidirectional_attention"):
        raise UserError("use_bidirectional_attention is not supported; wanted False.")
    return {
        **read_by_layer(raw, list(names), ropes),
        "attn_scale": raw["query_pre_attn_scalar"] ** -0.5,
        "embed_scale": raw["hidden_size"] ** 0.5,
        "logit_cap": float(raw["final_logit_softcapping"] or 0),
    }


def write_gemma(config: ModelConfig) -> Fields:
    """What `read_gemma` reads. The root of query_pre_attn_scalar divides scores: a whole number."""
    return {
        **write_by_layer(config),
        "query_pre_attn_scalar": round(config.score_scale**-2),
        "final_logit_softcapping": config.logit_cap or None,
    }


def _read(raw: Fields) -> Fields:
    rope = read_rope(raw, rope_fields(raw))
    names = [FULL if i % 2 else SLIDING for i in range(raw["num_hidden_layers"])]
    cap = float(raw["attn_logit_softcapping"] or 0)
    return {**read_gemma(raw, names, {SLIDING: rope, FULL: rope}), "attn_cap": cap}


def _write(config: ModelConfig) -> Fields:
    cap = {"attn_logit_softcapping": config.attn_cap or None}
    return {**write_alike(config), **write_gemma(config), **cap}


def _read_gguf(get, common: Fields) -> Fields:
    """What a file leaves out is as llama.cpp has it: of all sizes 27B alone has another scale."""
    rope, layers = common["kinds"][0].rope, range(common["num_layers"])
    window = get("attention.sliding_window", default=4096)
    is_27b, per_head = len(layers) == 46, common["width"] // common["num_heads"]
    return {
        "kinds": shortest_period([LayerKind(0 if i % 2 else window, rope) for i in layers]),
        "attn_scale": (per_head if is_27b else common["head_dim"]) ** -0.5,
        "attn_cap": get("attn_logit_softcapping", NUMBER, default=50.0),
        "embed_scale": common["width"] ** 0.5,
        "logit_cap": get("final_logit_softcapping", NUMBER, default=30.0),
    }


GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    defaults={
        "pad_token_id": 0,
        **{key: value for key, value in DEFAULTS.items() if key != "hidden_act"},
        **_ACTIVATION,
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    read=_read,
    write=_write,
    has={"norm_offset": True, "norms": "both", "activation": "gelu_tanh"},
    wanted={**_ACTIVATION, "attention_bias": False},
    tensors={"layers/mlp_norm/scale": "model.layers.{L}.pre_feedforward_layernorm.weight"},
    gguf=Gguf("gemma2", norms_hold=1.0, reads=("attention.sliding_window",), read=_read_gguf),
)
