"""Phi-3, 3.5 and 4: Llama with q, k and v in one tensor, gate and up in another; LongRope."""

import reprlib
from typing import Any

from nca_jax.checks import UserError
from nca_jax.model_config import LayerKind, LongRope, ModelConfig
from nca_jax.models.families.family import DEFAULTS, Family, Fields, one_kind_of_layer, write_window
from nca_jax.models.families.rope import ORIGINAL, longrope_attention, read_rope, rope_fields

_LAYER = "model.layers.{L}."
_QKV, _GATE_UP = _LAYER + "self_attn.qkv_proj.weight", _LAYER + "mlp.gate_up_proj.weight"
LONG = ("longrope", "su", "yarn")  # names of one thing, from new to old


def _read(raw: Fields) -> Fields:
    one_kind_of_layer(raw["layer_types"])
    rope = dict(rope_fields(raw))
    kind = rope.get("rope_type", rope.pop("type", "default"))
    if kind not in ("default", *LONG):
        raise UserError(f"rope_type {reprlib.repr(kind)} is not one of default, {', '.join(LONG)}.")
    rope["rope_type"] = "longrope" if kind in LONG else kind
    turned = read_rope(raw, rope, partial=True)
    return {"kinds": (LayerKind(raw["sliding_window"] or 0, turned),)}


def _write(config: ModelConfig) -> Fields:
    fields, rope = write_window(config), config.kinds[0].rope
    if rope is None or not isinstance(rope.scaling, LongRope):
        return fields
    # Older versions want a type and the two lists alone.
    scaling, original = rope.scaling, rope.scaling.original_max_position
    said: dict[str, Any] = {"type": "longrope"}
    said |= {key: fields["rope_scaling"][key] for key in ("short_factor", "long_factor")}
    if scaling.attention_factor != longrope_attention(config.max_position / original, original):
        said["attention_factor"] = scaling.attention_factor
    return {**fields, "rope_scaling": said, ORIGINAL: original}


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    defaults={
        "pad_token_id": 32000,
        **DEFAULTS,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        ORIGINAL: 4096,
        "partial_rotary_factor": None,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "sliding_window": None,
    },
    read=_read,
    write=_write,
    tensors={
        "layers/attn/q/kernel": _QKV,
        "layers/attn/k/kernel": _QKV,
        "layers/attn/v/kernel": _QKV,
        "layers/mlp/gate/kernel": _GATE_UP,
        "layers/mlp/up/kernel": _GATE_UP,
    },
)
