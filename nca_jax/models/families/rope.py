"""What config.json says of rotary positions, and what it is to say: `Rope`, both ways.

Old files have rope_theta and rope_scaling, those of transformers 5 have rope_parameters.
"""

import math
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from nca_jax.checks import UserError
from nca_jax.field import Check
from nca_jax.model_config import Linear, LongRope, Rope, RopeScaling, Yarn
from nca_jax.models.formats.untrusted import (
    NUMBER,
    OBJECT,
    SIZE,
    check_field,
    list_of,
    or_null,
)

ORIGINAL = "original_max_position_embeddings"
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
KINDS = {  # what each rope_type may say; another field would change the numbers
    "default": (),
    "linear": ("factor",),
    "llama3": (*LLAMA3, ORIGINAL),
    "yarn": ("factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow"),
    "longrope": ("short_factor", "long_factor", ORIGINAL, "factor", "attention_factor"),
}
ANY = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
FACTORS = list_of(NUMBER, "a list of numbers, each above 0 and below 1e30")


def rope_fields(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the one object that says it, by transformers' precedence; empty if there is none."""
    return raw["rope_scaling"] or raw["rope_parameters"] or {}


def rope_fields_by_kind(
    raw: Mapping[str, Any], kinds: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Returns the object of each kind of layers in rope_parameters, empty where it has none.

    Raises:
      UserError: there are others.
    """
    said = raw["rope_parameters"] or {}
    for name, value in said.items():
        if name not in kinds:
            raise UserError(f"{name} in rope_parameters is not one of {', '.join(kinds)}.")
        check_field(f"{name} of rope_parameters", value, or_null(OBJECT))
    return {name: dict(said.get(name) or {}) for name in kinds}


def read_rope(raw: Mapping[str, Any], rope: Mapping[str, Any], *, partial: bool = False) -> Rope:
    """Returns what the fields of an object say.

    Args:
      raw: config.json, with defaults and head_dim filled in.
      rope: the object: `rope_fields`, or that of one kind of layers.
      partial: whether the architecture may turn a part of a head.
    Raises:
      UserError: the decoder would compute it wrongly.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, dict) for value in rope.values()):
        kind = "one for each kind of layer"
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"rope_type {reprlib.repr(kind)} is not one of {', '.join(KINDS)}.")
    for key, value in rope.items():
        if key not in (*ANY, *KINDS[kind]) and value is not None:
            raise UserError(f"{key} is not supported in rope_type {kind}; wanted none.")

    def get(key: str, default: Any = None, check: Check = NUMBER) -> Any:
        value = default if rope.get(key) is None else rope[key]
        if value is None and key not in rope:
            raise UserError(f"rope_type {kind} needs {key!r}.")
        check_field(key, value, check)
        return value

    theta, part = rope.get("rope_theta", raw["rope_theta"]), raw.get("partial_rotary_factor")
    check_field("rope_theta", theta, NUMBER)
    part = get("partial_rotary_factor", 1.0 if part is None else part)
    rotated = int(raw["head_dim"] * part)
    if not (part == 1 or (partial and part < 1 and rotated > 0 and rotated % 2 == 0)):
        wanted = "1, or an even part of a head" if partial else "1"
        raise UserError(
            f"partial_rotary_factor {reprlib.repr(part)} is not supported; wanted {wanted}."
        )
    scaling = None
    if kind == "linear":
        scaling = Linear(float(get("factor")))
    elif kind != "default":
        # The field beside the object has precedence.
        original = raw.get(ORIGINAL, rope.get(ORIGINAL, raw["max_position_embeddings"]))
        check_field(ORIGINAL, original, SIZE)
        read = {"llama3": _read_llama3, "yarn": _read_yarn, "longrope": _read_longrope}[kind]
        scaling = read(get, original, raw["max_position_embeddings"])
    if isinstance(scaling, LongRope) and len(scaling.short_factors) != rotated // 2:
        raise UserError(
            f"short_factor has {len(scaling.short_factors)} numbers; wanted {rotated // 2}, one a "
            "frequency."
        )
    if isinstance(scaling, Yarn) and theta <= 1:
        raise UserError("rope_type yarn needs a rope_theta above 1.")
    return Rope(float(theta), scaling, float(part))


def _read_llama3(get, original: int, longest: int) -> RopeScaling:
    scaling = RopeScaling(*(float(get(key)) for key in LLAMA3), original_max_position=original)
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UserError("rope_type llama3 needs a low_freq_factor below its high_freq_factor.")
    return scaling


def _read_yarn(get, original: int, longest: int) -> Yarn:
    factor = float(get("factor"))
    attention_factor = float(get("attention_factor", _yarn_attention(factor)))
    fast, slow = get("beta_fast", Yarn.beta_fast), get("beta_slow", Yarn.beta_slow)
    if fast <= slow:
        raise UserError("rope_type yarn needs a beta_slow below its beta_fast.")
    return Yarn(factor, original, attention_factor, float(fast), float(slow))


def _read_longrope(get, original: int, longest: int) -> LongRope:
    by_default = longrope_attention(get("factor", longest / original), original)
    short, long = (tuple(map(float, get(f"{x}_factor", check=FACTORS))) for x in ("short", "long"))
    if len(short) != len(long):
        raise UserError(
            f"short_factor has {len(short)} numbers, and long_factor {len(long)}; wanted as many."
        )
    return LongRope(short, long, original, float(get("attention_factor", by_default)))


def write_rope(rope: Rope) -> dict[str, Any]:
    """Returns the old fields, which every version of transformers and vLLM reads."""
    said = rope_parameters(rope)
    theta = said.pop("rope_theta")
    part = said.pop("partial_rotary_factor", None)
    beside = {} if part is None else {"partial_rotary_factor": part}
    return {
        "rope_theta": theta,
        "rope_scaling": None if rope.scaling is None else said,
        **beside,
    }


def rope_parameters(rope: Rope) -> dict[str, Any]:
    """Returns all of it as one object, as transformers 5 writes it."""
    s, said = rope.scaling, {"rope_type": "default", "rope_theta": rope.theta}
    if rope.fraction != 1:
        said["partial_rotary_factor"] = rope.fraction
    if isinstance(s, Linear):
        return said | {"rope_type": "linear", "factor": s.factor}
    if isinstance(s, RopeScaling):
        said |= {"rope_type": "llama3", **{key: getattr(s, key) for key in LLAMA3}}
    elif isinstance(s, Yarn):
        said |= {"rope_type": "yarn", "factor": s.factor}
        said |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
        said |= {"attention_factor": s.attention_factor}
    elif isinstance(s, LongRope):
        said |= {"rope_type": "longrope", "attention_factor": s.attention_factor}
        said |= {"short_factor": list(s.short_factors), "long_factor": list(s.long_factors)}
    return said if s is None else said | {ORIGINAL: s.original_max_position}


def _yarn_attention(factor: float) -> float:
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope_attention(factor: float, original: int) -> float:
    """What sin and cos are multiplied by where the context is `factor` times the original."""
    return (
        math.sqrt(1 + math.log(factor) / math.log(original)) if min(factor, original) > 1 else 1.0
    )
