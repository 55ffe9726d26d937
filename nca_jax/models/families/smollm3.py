"""SmolLM3: Llama with a tied head and every fourth layer without rotary positions."""

from nca_jax.checks import UserError
from nca_jax.model_config import LayerKind, ModelConfig, Rope, shortest_period
from nca_jax.models.families.family import (
    DEFAULTS,
    FULL,
    SLIDING,
    Family,
    Fields,
    layer_names,
    write_by_layer,
)
from nca_jax.models.families.rope import read_rope, rope_fields, write_rope


def _read(raw: Fields) -> Fields:
    layers, turned = range(raw["num_hidden_layers"]), raw["no_rope_layers"]  # 1: it is turned
    if turned is None:
        turned = [(i + 1) % raw["no_rope_layer_interval"] for i in layers]
    if len(turned) < len(layers):
        raise UserError(
            f"no_rope_layers are {len(turned)}, and num_hidden_layers is {len(layers)}."
        )
    window = raw["sliding_window"] if raw["use_sliding_window"] else 0
    names = layer_names(raw, [SLIDING if window and not turned[i] else FULL for i in layers])
    if SLIDING in names and not window:
        raise UserError(
            f"layer_types has a {SLIDING}, but use_sliding_window and sliding_window say that "
            "there is none."
        )
    rope = read_rope(raw, rope_fields(raw))
    kinds = [
        LayerKind(window if names[i] == SLIDING else 0, rope if turned[i] else None) for i in layers
    ]
    return {"kinds": shortest_period(kinds)}


def _write(config: ModelConfig) -> Fields:
    ropes = [kind.rope for kind in config.kinds if kind.rope is not None]
    return {
        **write_rope(ropes[0] if ropes else Rope()),
        **write_by_layer(config),
        "use_sliding_window": max(config.windows) > 0,
        "no_rope_layers": [int(kind.rope is not None) for kind in config.layer_kinds],
    }


SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    defaults={
        "pad_token_id": 128004,
        **DEFAULTS,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    read=_read,
    write=_write,
)
