"""Granite 3: Llama with four multipliers."""

from nca_jax.model_config import ModelConfig
from nca_jax.models.families.family import Family, Fields, read_alike, write_alike
from nca_jax.models.families.llama import LLAMA


def _read(raw: Fields) -> Fields:
    return {
        **read_alike(raw),
        "embed_scale": float(raw["embedding_multiplier"]),
        "attn_scale": float(raw["attention_multiplier"]),
        "residual_scale": float(raw["residual_multiplier"]),
        "logit_divisor": float(raw["logits_scaling"]),
    }


def _write(config: ModelConfig) -> Fields:
    return {
        **write_alike(config),
        "embedding_multiplier": config.embed_scale,
        "attention_multiplier": config.score_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": config.logit_divisor,
    }


GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    defaults={
        **LLAMA.defaults,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    read=_read,
    write=_write,
)
