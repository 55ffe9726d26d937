"""Mistral: Llama with a sliding window, or without one from version 0.2 on."""

from nca_jax.models.families.family import Family, read_window, write_window
from nca_jax.models.families.llama import LLAMA

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults={
        **LLAMA.defaults,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    read=read_window,
    write=write_window,
)
