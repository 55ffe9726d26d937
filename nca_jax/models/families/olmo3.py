"""OLMo 3: OLMo 2 with a window in three layers of four, and often YaRN in the fourth."""

import reprlib

from nca_jax.checks import UserError
from nca_jax.model_config import ModelConfig, Rope
from nca_jax.models.families.family import (
    FULL,
    SLIDING,
    Fields,
    read_by_layer,
    write_by_layer,
)
from nca_jax.models.families.olmo2 import OLMO2
from nca_jax.models.families.rope import (
    read_rope,
    rope_fields_by_kind,
    rope_parameters,
    write_rope,
)

THETA = 500_000.0


def _read(raw: Fields) -> Fields:
    """rope_scaling is of the full layers alone."""
    ropes = rope_fields_by_kind(raw, (SLIDING, FULL))
    unsaid = any("rope_theta" not in rope for rope in ropes.values())
    if unsaid and raw["rope_theta"] != THETA:
        raise UserError(
            f"rope_theta {reprlib.repr(raw['rope_theta'])} is of all layers or of the full ones, "
            f"as the version of transformers has it; wanted {THETA}, or rope_parameters with a "
            f"rope_theta for each of {SLIDING}, {FULL}."
        )
    ropes[FULL] |= raw["rope_scaling"] or {}
    layers = range(1, raw["num_hidden_layers"] + 1)
    names = [SLIDING if i % 4 else FULL for i in layers]
    return read_by_layer(raw, names, {name: read_rope(raw, ropes[name]) for name in ropes})


def _write(config: ModelConfig) -> Fields:
    found = {SLIDING if kind.window else FULL: kind.rope or Rope() for kind in config.kinds}
    ropes = {name: found.get(name, Rope(THETA)) for name in (SLIDING, FULL)}
    return {
        **write_rope(ropes[FULL]),  # older versions read no other
        "rope_parameters": {name: rope_parameters(rope) for name, rope in ropes.items()},
        **write_by_layer(config),
    }


OLMO3 = OLMO2._replace(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    defaults={**OLMO2.defaults, "rope_theta": THETA, "sliding_window": 4096},
    read=_read,
    write=_write,
)
