"""What config.json says of rotary positions, and what it is to say: `Rope`, both ways.

Old files have rope_theta and rope_scaling, those of transformers 5 have rope_parameters.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

from nca_jax.checks import UserError
from nca_jax.model_config import Rope, RopeScaling
from nca_jax.models.formats.untrusted import NUMBER, SIZE, check_field

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")  # of rope_type llama3


def rope_fields(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the one object that says it, by transformers' precedence; empty if there is none."""
    return raw["rope_scaling"] or raw["rope_parameters"] or {}


def read_rope(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> Rope:
    """Returns what the fields of an object say.

    Args:
      raw: config.json, with the defaults filled in.
      rope: the object: `rope_fields`, or that of one kind of layers.
    Raises:
      UserError: the decoder would compute it wrongly.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if any(isinstance(value, dict) for value in rope.values()):
        kind = "one for each kind of layer"
    if kind not in ("default", "llama3"):
        raise UserError(f"rope_type {reprlib.repr(kind)} is not one of default, llama3.")
    if partial not in (None, 1):
        raise UserError(
            f"partial_rotary_factor {reprlib.repr(partial)} is not supported; wanted 1."
        )

    theta = rope.get("rope_theta", raw["rope_theta"])
    check_field("rope_theta", theta, NUMBER)
    if kind == "default":
        return Rope(float(theta))
    original = rope.get("original_max_position_embeddings", raw["max_position_embeddings"])
    original = raw.get("original_max_position_embeddings", original)
    check_field("original_max_position_embeddings", original, SIZE)
    for key in LLAMA3:
        if key not in rope:
            raise UserError(f"rope_type llama3 needs {key!r}.")
        check_field(key, rope[key], NUMBER)
    scaling = RopeScaling(*(float(rope[key]) for key in LLAMA3), original_max_position=original)
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UserError("rope_type llama3 needs a low_freq_factor below its high_freq_factor.")
    return Rope(float(theta), scaling)


def write_rope(rope: Rope) -> dict[str, Any]:
    """Returns the fields that `read_rope` reads, as every version of transformers and vLLM does."""
    scaling = None
    if rope.scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": rope.scaling.factor,
            "low_freq_factor": rope.scaling.low_freq_factor,
            "high_freq_factor": rope.scaling.high_freq_factor,
            "original_max_position_embeddings": rope.scaling.original_max_position,
        }
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
