"""What several test files write and stand in for: records of ids, stops, small checkpoints."""

import contextlib
import dataclasses
import json
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from nca_jax.data.encode import Encoder
from nca_jax.infra.preemption import Stop
from nca_jax.model_config import LayerKind, Linear, LongRope, ModelConfig, Rope, Yarn, alike
from nca_jax.models.formats import names
from nca_jax.models.formats.hf import tensor_names

# Records

BASE = dict(
    files="",
    weights="",
    eval_files="",
    eval_fraction=0.0,
    format="plain",
    join="together",
    num_responses=3,
    choose="first",
    train_on="last_assistant",
    max_prompt_len=16,
    max_response_len=8,
    prompt_keep="end",
    too_long="truncate",
    bad_rows="stop",
    shuffle=True,
    batch_size=4,
    row_len=64,
    rows=2,
    block=8,
    row_pairs=0,
    align=1,
    first_bonus=0.0,
)


def data_config(**changes) -> ConfigDict:
    return ConfigDict(BASE | changes)


def id_record(i: int, num_responses: int = 3) -> dict:
    """Returns a row of ids in which every segment can be told from its first id, 10 * i + k."""
    responses = [[10 * i + 1 + k, 7] for k in range(num_responses)]
    return {
        "prompt_ids": [10 * i, 5],
        "response_ids": responses,
        "scores": [float(k) for k in range(num_responses)],
    }


def write(path, rows) -> str:
    """Writes rows (dicts, or text as it is) to a .jsonl file; returns its path."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def make_encoder(config, tokenizer=None, vocab_size=1000, eos_ids=(), **more) -> Encoder:
    return Encoder(tokenizer, config, vocab_size, eos_ids, **more)


def encode_one(record, config, tokenizer=None, *, where="f:1", **more):
    return make_encoder(config, tokenizer, **more).record(where, record)


# Stops


def stopping(asked: Callable[[], bool]) -> Callable:
    """Stands for `preemption.stop_asked` in `train`, with another `asked_to_stop`."""
    return lambda: contextlib.nullcontext(Stop(asked, []))


# Checkpoints

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"  # of Git LFS
DENSE = ModelConfig(
    vocab_size=130, num_layers=3, width=32, num_heads=4, num_kv_heads=2, head_dim=6,
    mlp_width=10, norm_eps=1e-6, max_position=64, bos_id=1, eos_ids=(2,),
)  # fmt: skip
GEMMA = dataclasses.replace(
    DENSE, norm_offset=True, norms="both", activation="gelu_tanh", attn_scale=9**-0.5,
    embed_scale=32**0.5, tied_head=True,
)  # fmt: skip
CONFIGS = {
    "llama": dataclasses.replace(DENSE, tied_head=True),
    "mistral": dataclasses.replace(DENSE, kinds=alike(window=7)),
    "qwen2": dataclasses.replace(DENSE, qkv_bias=True),
    "qwen3": dataclasses.replace(DENSE, qk_norm="head"),
    "mixtral": dataclasses.replace(DENSE, num_experts=3, experts_per_token=2),
    "qwen3_moe": dataclasses.replace(
        DENSE, num_experts=3, experts_per_token=2, renormalise=False, qk_norm="head"
    ),
    "smollm3": dataclasses.replace(DENSE, kinds=(*alike(), LayerKind(rope=None)), tied_head=True),
    "olmo2": dataclasses.replace(DENSE, norms="after", qk_norm="width"),
    "olmo3": dataclasses.replace(
        DENSE, norms="after", qk_norm="width",
        kinds=(*alike(5e5, 7), LayerKind(rope=Rope(5e5, Yarn(4.0, 16, 0.9)))),
    ),
    "phi3": dataclasses.replace(
        DENSE, kinds=(LayerKind(rope=Rope(1e4, LongRope((1.0, 2.0), (3.0, 4.0), 16, 1.2), 0.75)),)
    ),
    "granite": dataclasses.replace(
        DENSE, embed_scale=12.0, attn_scale=0.2, residual_scale=0.22, logit_divisor=8.0
    ),
    "gemma2": dataclasses.replace(
        GEMMA, kinds=(*alike(window=7), *alike()), attn_cap=5.0, logit_cap=6.0
    ),
    "gemma3_text": dataclasses.replace(
        GEMMA, kinds=(*alike(1e3, 7) * 2, LayerKind(rope=Rope(1e4, Linear(8.0)))), qk_norm="head"
    ),
}  # fmt: skip
OWN = {  # fields of config.json that other families have not got
    "qwen3_moe": {
        "num_experts": 3, "num_local_experts": None, "moe_intermediate_size": 10,
        "norm_topk_prob": False,
    },
    "granite": {
        "embedding_multiplier": 12, "attention_multiplier": 0.2, "residual_multiplier": 0.22,
        "logits_scaling": 8,
    },
    "gemma2": {
        "query_pre_attn_scalar": 9, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 6.0,
    },
    "gemma3_text": {
        "query_pre_attn_scalar": 9, "rope_local_base_freq": 1e3, "layer_types": [
            "sliding_attention", "sliding_attention", "full_attention",
        ],
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "olmo3": {
        "rope_theta": 5e5, "layer_types": [
            "sliding_attention", "full_attention", "sliding_attention",
        ],
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
            "attention_factor": 0.9,
        },
    },
    "phi3": {
        "original_max_position_embeddings": 16, "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0],
            "attention_factor": 1.2,
        },
    },
}  # fmt: skip


def hf_json(model_type: str, config: ModelConfig) -> dict:
    """config.json of `config`."""
    return {
        "model_type": model_type, "vocab_size": config.vocab_size, "hidden_size": config.width,
        "intermediate_size": config.mlp_width, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "rms_norm_eps": config.norm_eps, "rope_theta": 10000.0,
        "max_position_embeddings": config.max_position, "hidden_act": "silu",
        "tie_word_embeddings": config.tied_head, "sliding_window": config.kinds[0].window or None,
        "num_local_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token,
        "bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids),
        "pad_token_id": config.pad_id,
    } | OWN.get(model_type, {})  # fmt: skip


def random_tensors(config: ModelConfig, naming: names.Naming, dtype=np.float32) -> dict:
    """Every tensor of a checkpoint, each value exact in bfloat16."""
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(-127, 128, shape).astype(dtype)
        for name, shape in names.tensor_shapes(config, naming).items()
    }


def write_hf(folder, model_type="mistral", *, dtype=np.float32, change=None, extra=None, drop=()):
    """Writes a folder and returns its tensors; `change` goes to config.json, `extra` to weights."""
    config = CONFIGS[model_type]
    (folder / "config.json").write_text(json.dumps(hf_json(model_type, config) | (change or {})))
    tensors = random_tensors(config, tensor_names(model_type), dtype) | (extra or {})
    tensors = {name: tensor for name, tensor in tensors.items() if name not in drop}
    save_file(tensors, folder / "model.safetensors")
    return tensors


def read_all(params: dict) -> dict:
    return {k: p.read(tuple(slice(None) for _ in p.shape)) for k, p in params.items()}


def assert_parts_equal_the_whole(params: dict) -> None:
    """Every axis of every parameter is cut in 2, each half read by itself."""
    for path, param in params.items():
        whole = param.read(tuple(slice(None) for _ in param.shape))
        for axis, size in enumerate(param.shape):
            for half in (slice(0, size // 2), slice(size // 2, size)):
                index = tuple(half if a == axis else slice(None) for a in range(whole.ndim))
                np.testing.assert_array_equal(param.read(index), whole[index], err_msg=path)
        corner = tuple(slice(n // 3, max(n // 3 + 1, 2 * n // 3)) for n in param.shape)
        np.testing.assert_array_equal(param.read(corner), whole[corner], err_msg=path)
