"""Gemma 3, text: Gemma 2 with norms of q and k in place of the caps; two thetas, 5 windows to 1."""

from nca_jax.model_config import ModelConfig, Rope
from nca_jax.models.families.family import FULL, SLIDING, Fields
from nca_jax.models.families.gemma2 import GEMMA2, read_gemma, write_gemma
from nca_jax.models.families.rope import read_rope, rope_fields_by_kind, write_rope

_THETAS = {FULL: 1_000_000.0, SLIDING: 10_000.0}


def _read(raw: Fields) -> Fields:
    """rope_theta and rope_scaling are of the full layers, rope_local_base_freq of the others."""
    by_kind = rope_fields_by_kind(raw, _THETAS)
    said = {
        FULL: {"rope_theta": raw["rope_theta"], **by_kind[FULL]},
        SLIDING: {"rope_theta": raw["rope_local_base_freq"], **by_kind[SLIDING]},
    }
    said[FULL] |= raw["rope_scaling"] or {}
    layers = range(1, raw["num_hidden_layers"] + 1)
    names = [SLIDING if i % raw["sliding_window_pattern"] else FULL for i in layers]
    return read_gemma(raw, names, {name: read_rope(raw, said[name]) for name in said})


def _write(config: ModelConfig) -> Fields:
    found = {SLIDING if kind.window else FULL: kind.rope for kind in config.kinds}
    full, local = (found.get(name) or Rope(_THETAS[name]) for name in (FULL, SLIDING))
    return {**write_rope(full), **write_gemma(config), "rope_local_base_freq": local.theta}


GEMMA3_TEXT = GEMMA2._replace(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    reward_architecture="Gemma3TextForSequenceClassification",
    defaults={
        **GEMMA2.defaults,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": _THETAS[FULL],
        "rope_local_base_freq": _THETAS[SLIDING],
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    read=_read,
    write=_write,
    has={**GEMMA2.has, "qk_norm": "head"},
    gguf=None,
    wanted={**GEMMA2.wanted, "attn_logit_softcapping": None},
)
