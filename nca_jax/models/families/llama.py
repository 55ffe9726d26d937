"""Llama 2 and 3, and what says it is one: SmolLM2, TinyLlama, ..."""

from nca_jax.models.families.family import DEFAULTS, Family, Gguf

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    defaults={
        **DEFAULTS,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    gguf=Gguf("llama", interleaves=True),  # Mistral and SmolLM2 files say llama
)
