"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer in place of the MLP."""

import reprlib

from nca_jax.checks import UserError
from nca_jax.model_config import ModelConfig
from nca_jax.models.families.family import WANTED, Family, Fields, Gguf, read_alike, write_window
from nca_jax.models.families.mixtral import read_experts
from nca_jax.models.families.qwen3 import QWEN3
from nca_jax.models.formats.untrusted import NUM_STACKED


def _read(raw: Fields) -> Fields:
    if raw["mlp_only_layers"]:
        raise UserError(
            f"mlp_only_layers {reprlib.repr(raw['mlp_only_layers'])} is not supported; wanted none."
        )
    # transformers writes what it calls num_local_experts, the models' own files say num_experts.
    key = "num_experts" if raw["num_local_experts"] is None else "num_local_experts"
    return {
        **read_alike(raw, raw["sliding_window"] if raw["use_sliding_window"] else 0),
        **read_experts(raw, key),
        "mlp_width": raw["moe_intermediate_size"],
        "renormalise": raw["norm_topk_prob"],
    }


def _read_gguf(get, common: Fields) -> Fields:
    """llama.cpp renormalises the shares, whatever the model."""
    return {
        "num_experts": get("expert_count", NUM_STACKED),
        "experts_per_token": get("expert_used_count", NUM_STACKED),
        "mlp_width": get("expert_feed_forward_length"),
    }


def _write(config: ModelConfig) -> Fields:
    fields = write_window(config)
    return {
        **fields,
        "use_sliding_window": fields["sliding_window"] is not None,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.mlp_width,
        "norm_topk_prob": config.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    defaults={
        **QWEN3.defaults,
        "num_key_value_heads": 4,
        "head_dim": None,
        "num_experts": 128,
        "num_local_experts": None,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    },
    read=_read,
    write=_write,
    has=QWEN3.has,
    wanted={**WANTED, "decoder_sparse_step": 1},
    gguf=Gguf("qwen3moe", reads=("expert_count",), read=_read_gguf),
)
