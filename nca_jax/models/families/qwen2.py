"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a window that a field switches on."""

from nca_jax.model_config import ModelConfig
from nca_jax.models.families.family import (
    DEFAULTS,
    FULL,
    SLIDING,
    Family,
    Fields,
    Gguf,
    one_kind_of_layer,
    read_alike,
    write_window,
)


def read_switched_window(raw: Fields) -> Fields:
    """The window counts if it is on and every layer has it; the first max_window_layers do not."""
    kinds = raw["layer_types"]
    if raw["use_sliding_window"] and not kinds:
        full, layers = raw["max_window_layers"], range(raw["num_hidden_layers"])
        kinds = [SLIDING if i >= full else FULL for i in layers]
    windowed = one_kind_of_layer(kinds) == SLIDING and raw["use_sliding_window"]
    return read_alike(raw, raw["sliding_window"] if windowed else 0)


def write_switched_window(config: ModelConfig) -> Fields:
    """What `read_switched_window` reads."""
    fields = write_window(config)
    windowed = fields["sliding_window"] is not None
    return {
        **fields,
        "use_sliding_window": windowed,
        "max_window_layers": 0 if windowed else config.num_layers,
    }


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    read=read_switched_window,
    write=write_switched_window,
    has={"qkv_bias": True},
    gguf=Gguf("qwen2"),
)
