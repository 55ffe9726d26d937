"""Mixtral: Mistral with a mixture of experts in place of the MLP."""

from nca_jax.checks import UserError
from nca_jax.model_config import ModelConfig
from nca_jax.models.families.family import Family, Fields, read_window, write_window
from nca_jax.models.families.mistral import MISTRAL
from nca_jax.models.formats.untrusted import NUM_STACKED, check_field

_MOE = "model.layers.{L}.block_sparse_moe."
_EXPERT = _MOE + "experts.{E}."


def read_experts(raw: Fields, key: str) -> Fields:
    """Returns how many experts there are, which `key` says, and how many a token is routed to."""
    num_experts, per_token = raw[key], raw["num_experts_per_tok"]
    check_field(key, num_experts, NUM_STACKED)
    if per_token > num_experts:
        raise UserError(f"num_experts_per_tok {per_token} is more than {key} {num_experts}.")
    return {"num_experts": num_experts, "experts_per_token": per_token}


def _read(raw: Fields) -> Fields:
    return {**read_window(raw), **read_experts(raw, "num_local_experts")}


def _write(config: ModelConfig) -> Fields:
    experts = {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
    }
    return {**write_window(config), **experts}


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    defaults={
        **MISTRAL.defaults,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    read=_read,
    write=_write,
    tensors={
        "layers/moe/router/kernel": _MOE + "gate.weight",
        "layers/moe/gate/kernel": _EXPERT + "w1.weight",
        "layers/moe/up/kernel": _EXPERT + "w3.weight",
        "layers/moe/down/kernel": _EXPERT + "w2.weight",
    },
)
