"""One tiny random model of every family, as a Hugging Face folder made from a numpy seed alone.

What PyTorch computes with them is in data/families.npz, written by make_families.py.
"""

import json
from collections.abc import Collection
from pathlib import Path

import jax
import numpy as np
import pytest
from drawn import sampler_of
from safetensors.numpy import save_file

from nca_jax.axes import flatten_paths
from nca_jax.batch import Rows
from nca_jax.data.group import Group
from nca_jax.data.pack import RowLayout, pack
from nca_jax.data.plan import causal_bound
from nca_jax.models.decoder import Model
from nca_jax.models.families.family import FULL, SLIDING
from nca_jax.models.formats import names
from nca_jax.models.formats.hf import read_config, tensor_names
from nca_jax.models.formats.pretrained import open_pretrained

GOLDEN = Path(__file__).parent / "data" / "families.npz"
VOCAB, EOS = 61, 2

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_WINDOW = {"sliding_window": 5}  # shorter than a prompt
_QWEN_WINDOW = _WINDOW | {"use_sliding_window": True, "max_window_layers": 0}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LONGROPE = {  # the longest prompt and its responses are beyond the original context, others not
    "rope_scaling": {
        "type": "longrope", "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 3.0, 5.0],
    },
    "original_max_position_embeddings": 20, "partial_rotary_factor": 0.75,
}  # fmt: skip
FAMILIES = {  # their places are their seeds: another comes last
    "llama 2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama 3": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": _LLAMA3},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral with a window": {"model_type": "mistral", "head_dim": 12} | _WINDOW,
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen2 with a window": {"model_type": "qwen2"} | _QWEN_WINDOW,
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6},
    "qwen3 with a window": {"model_type": "qwen3", "head_dim": 16} | _QWEN_WINDOW,
    "smollm2": {
        "model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 1,
        "hidden_size": 24, "rope_theta": 1e5, "tie_word_embeddings": True,
    },
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": True} | _EXPERTS,
    "qwen3_moe, shares of all": {"model_type": "qwen3_moe", "norm_topk_prob": False} | _EXPERTS,
    "olmo2": {"model_type": "olmo2", "rope_theta": 5e5},
    "olmo3": {
        "model_type": "olmo3", "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4, "rope_scaling": _YARN,
    } | _WINDOW,
    "smollm3": {
        "model_type": "smollm3", "no_rope_layers": [1, 0, 1], "tie_word_embeddings": True,
        "rope_theta": 2e6,
    },
    "phi3": {"model_type": "phi3", "rope_theta": 1e5} | _WINDOW,
    "phi3 with longrope": {"model_type": "phi3"} | _LONGROPE,
    "granite": {
        "model_type": "granite", "embedding_multiplier": 3.0, "attention_multiplier": 0.2,
        "residual_multiplier": 0.6, "logits_scaling": 2.0,
    },
    "gemma2": {  # a layer without a window between two that have one
        "model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0,
    } | _WINDOW,
    "gemma3": {
        "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 20,
        "num_hidden_layers": 5, "layer_types": [*[SLIDING] * 2, FULL, *[SLIDING] * 2],
        "rope_theta": 1e5, "rope_local_base_freq": 1e3,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    } | _WINDOW,
}  # fmt: skip
# Not made of what another has too.
DISTINCT = (
    *list(FAMILIES)[:10],
    "qwen3_moe, shares of all", "olmo3", "smollm3", "phi3 with longrope", "granite", "gemma2",
    "gemma3",
)  # fmt: skip

# Prompts with ragged responses; the longest goes beyond llama 3's old context.
LENGTHS = [(9, (5, 2)), (1, (3,)), (21, (2, 4))]
NEW_TOKENS = 12
NUM_SLOTS = sum(len(responses) for _, responses in LENGTHS)


def families(*, but: Collection[str], mark: str) -> list:
    """Returns all FAMILIES to parametrise a test with, all but some of them marked."""
    marks = [getattr(pytest.mark, mark)]
    return [name if name in but else pytest.param(name, marks=marks) for name in FAMILIES]


def pieces() -> list[Group]:
    """Returns prompts with their responses, which fill two rows."""
    rng = np.random.default_rng(0)
    return [
        Group(
            rng.integers(3, VOCAB, length).tolist(),
            [rng.integers(3, VOCAB, n).tolist() for n in responses],
        )
        for length, responses in LENGTHS
    ]


def write_family(folder: Path, name: str) -> Path:
    """Writes config.json and model.safetensors; every machine gets the same values."""
    (folder / "config.json").write_text(json.dumps(SIZES | FAMILIES[name]))
    rng = np.random.default_rng(list(FAMILIES).index(name))
    tensors = {}
    naming, config = tensor_names(FAMILIES[name]["model_type"]), read_config(folder)
    for tensor, shape in names.tensor_shapes(config, naming).items():
        value = rng.normal(size=shape)
        if "norm" in tensor:
            value = 0.2 * value if config.norm_offset else 1 + 0.2 * value
        elif tensor == "model.embed_tokens.weight":
            value = value / 2
        elif tensor.endswith("bias"):
            value = value / 3
        else:  # logits of several nats, layers that matter
            value = (2 if tensor == "lm_head.weight" else 1.4) * value / np.sqrt(shape[1])
        tensors[tensor] = value.astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def slots() -> list[np.ndarray]:
    """Returns the slots of each of `pieces`: they count the responses."""
    ends = np.cumsum([len(responses) for _, responses in LENGTHS])
    return np.split(np.arange(ends[-1]), ends[:-1])


def packed_rows() -> Rows:
    """Returns the two rows of `pieces`."""
    layout = RowLayout(row_len=32, rows=2, block=16, num_pairs=causal_bound(32, 16), align=1)
    packed, _, _ = pack(pieces(), layout, slots=slots(), num_slots=NUM_SLOTS, num_micro=1)
    return Rows(*(x[0] for x in packed))


def packed_logits(model: Model, params: dict) -> np.ndarray:
    """Returns the logits that predict the response tokens of `pieces`, [tokens, V], in order."""
    rows = packed_rows()

    @jax.jit
    def row_logits(params):
        return model.logits(params, model.rows(params, rows, block=16))

    logits = np.asarray(row_logits(params))  # [R, T, V]
    found = []
    for slot in range(NUM_SLOTS):
        row, place = np.nonzero(rows.logp_slot == slot)
        found.append(logits[row, rows.logp_at[row, place], :VOCAB])
    return np.concatenate(found)


def greedy(model: Model, params: dict) -> np.ndarray:
    """Returns the most likely NEW_TOKENS after each prompt of `pieces`, [prompts, NEW_TOKENS]."""
    sample = sampler_of(model, max_new_tokens=NEW_TOKENS)
    lengths = np.array([length for length, _ in LENGTHS], np.int32)
    prompts = [np.pad(group.prompt, (0, max(lengths) - len(group.prompt))) for group in pieces()]
    keys = jax.random.split(jax.random.key(0), len(prompts))
    return np.asarray(sample(params, np.stack(prompts), lengths, keys).tokens)[:, 0]


def read_params(folder: Path) -> tuple[Model, dict]:
    """Returns the decoder of a Hugging Face folder and its parameters."""
    config, weights = open_pretrained(str(folder))
    model = Model(config)
    read = [weight.read((slice(None),) * len(weight.shape)) for weight in weights.values()]
    by_path = dict(zip(weights, read, strict=True))
    paths, tree = (
        flatten_paths(model.abstract_params()),
        jax.tree.structure(model.abstract_params()),
    )
    return model, jax.tree.unflatten(tree, [by_path[path] for path in paths])
