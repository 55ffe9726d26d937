"""OLMo 2: norms after attention and MLP in place of before, and norms of q and k over all heads."""

from nca_jax.models.families.family import DEFAULTS, WANTED, Family

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    defaults={
        "pad_token_id": 1,
        **DEFAULTS,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "eos_token_id": 50279,
        "rms_norm_eps": 1e-5,
        "clip_qkv": None,
    },
    has={"norms": "after", "qk_norm": "width"},
    wanted={**WANTED, "clip_qkv": None},  # OLMo 1 has one
)
