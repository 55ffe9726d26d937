"""Qwen3: Qwen2 with norms of q and k in place of the biases."""

from nca_jax.models.families.family import Family, Gguf
from nca_jax.models.families.qwen2 import QWEN2, read_switched_window, write_switched_window

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={**QWEN2.defaults, "head_dim": 128},
    read=read_switched_window,
    write=write_switched_window,
    has={"qk_norm": "head"},
    gguf=Gguf("qwen3"),
)
