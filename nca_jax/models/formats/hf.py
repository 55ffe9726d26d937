"""Hugging Face folders: config.json and safetensors, read without PyTorch or remote code."""

import json
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401  safetensors asks numpy for "bfloat16" by name
import numpy as np
from safetensors import SafetensorError, safe_open

from nca_jax.checks import UserError
from nca_jax.model_config import ModelConfig, RopeScaling
from nca_jax.models.formats import names

# A config.json leaves out what equals the default of its class in transformers; a test compares.
_EVERY_MODEL = {
    "architectures": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "rope_parameters": None,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "head_dim": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attention_bias": False,
    "mlp_bias": False,
    "layer_types": None,
    "quantization_config": None,
}
_LLAMA = _EVERY_MODEL | {
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MISTRAL = _LLAMA | {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_MIXTRAL = _MISTRAL | {
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_QWEN2 = _EVERY_MODEL | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "mixtral": _MIXTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128},
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
DTYPES = ("F32", "F16", "BF16")


def open_hf(folder: str | Path) -> tuple[ModelConfig, dict[str, names.Param]]:
    """Opens a folder with config.json and model.safetensors, whole or sharded with an index.

    Every name, shape and dtype is checked here; the values are read when a `Param` is.

    Raises:
      UserError: no safetensors, tensors that do not fit the config, or what `read_config` refuses.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = _list_tensors(folder)
    if config.tied_head:  # some writers store the tied head all the same
        tensors.pop("lm_head.weight", None)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    names.check_tensors(str(folder), shapes, names.tensor_shapes(config, "hf"))
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{name} in {folder} is {tensor.dtype}; wanted one of {', '.join(DTYPES)}."
            )

    def fetch(name: str, index: tuple[slice, ...]) -> np.ndarray:
        # Opened for each read: a file that stays mapped counts as memory of this process.
        with safe_open(tensors[name].file, framework="np") as handle:
            return handle.get_slice(name)[index]

    return config, names.open_params(config, "hf", fetch)


def read_config(folder: str | Path) -> ModelConfig:
    """Reads config.json, and further end-of-turn ids from generation_config.json if it is there.

    Raises:
      UserError: a file that is missing or broken, or a model this decoder would compute wrongly.
    """
    file = Path(folder) / "config.json"
    raw = _read_json(file)
    model_type = raw.get("model_type")
    if model_type not in DEFAULTS:
        raise UserError(f"{file}: model_type {model_type!r} is not one of {', '.join(DEFAULTS)}.")
    raw = DEFAULTS[model_type] | raw
    _refuse(file, raw)

    num_heads, width = raw["num_attention_heads"], raw["hidden_size"]
    num_kv_heads = raw["num_key_value_heads"] or num_heads
    if num_heads % num_kv_heads or (not raw["head_dim"] and width % num_heads):
        raise UserError(
            f"{file}: num_attention_heads {num_heads} must divide hidden_size {width} and be a "
            f"multiple of num_key_value_heads {num_kv_heads}."
        )
    rope_theta, rope_scaling = _rope(file, raw)
    is_moe = model_type == "mixtral"
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        num_layers=raw["num_hidden_layers"],
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=raw["head_dim"] or width // num_heads,
        mlp_width=raw["intermediate_size"],
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=raw["rms_norm_eps"],
        tied_head=raw["tie_word_embeddings"],
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        sliding_window=_sliding_window(file, raw),
        num_experts=raw["num_local_experts"] if is_moe else 0,
        experts_per_token=raw["num_experts_per_tok"] if is_moe else 0,
        max_position=raw["max_position_embeddings"],
        bos_id=raw["bos_token_id"],
        eos_ids=_eos_ids(raw, file.with_name("generation_config.json")),
    )


def _refuse(file: Path, raw: dict) -> None:
    for key in SIZES:
        if not isinstance(raw.get(key), int) or raw[key] < 1:
            raise UserError(f"{file}: {key} must be a positive integer, not {raw.get(key)!r}.")
    architecture = ARCHITECTURES[raw["model_type"]]
    if raw["architectures"] not in (None, [architecture]):
        raise UserError(
            f"{file}: architectures {raw['architectures']} is not supported; wanted {architecture}."
        )
    wanted = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "quantization_config": None,
    }
    for key, value in wanted.items():
        if raw[key] != value:
            raise UserError(f"{file}: {key} {raw[key]!r} is not supported; wanted {value!r}.")


def _rope(file: Path, raw: dict) -> tuple[float, RopeScaling | None]:
    """Returns (theta, scaling) of the old fields or the new one, by transformers' precedence."""
    rope = raw["rope_scaling"] or raw["rope_parameters"] or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if any(isinstance(value, dict) for value in rope.values()):
        kind = "one for each kind of layer"
    if kind not in ("default", "llama3"):
        raise UserError(f"{file}: rope_type {kind!r} is not one of default, llama3.")
    if partial not in (None, 1):
        raise UserError(f"{file}: partial_rotary_factor {partial} is not supported; wanted 1.")

    theta = float(rope.get("rope_theta", raw["rope_theta"]))
    if kind == "default":
        return theta, None
    original = rope.get("original_max_position_embeddings", raw["max_position_embeddings"])
    original = raw.get("original_max_position_embeddings", original)
    try:
        factors = [float(rope[f]) for f in ("factor", "low_freq_factor", "high_freq_factor")]
    except KeyError as error:
        raise UserError(f"{file}: rope_type llama3 needs {error}.") from None
    return theta, RopeScaling(*factors, original_max_position=original)


def _sliding_window(file: Path, raw: dict) -> int:
    """Returns the window of every layer, 0 for none."""
    is_qwen = raw["model_type"] in ("qwen2", "qwen3")
    kinds = raw["layer_types"]
    if is_qwen and raw["use_sliding_window"] and not kinds:
        full, layers = raw["max_window_layers"], range(raw["num_hidden_layers"])
        kinds = ["sliding_attention" if i >= full else "full_attention" for i in layers]
    if len(set(kinds or ())) > 1:
        raise UserError(
            f"{file}: a sliding window in some layers only (layer_types, max_window_layers) is not "
            "supported; wanted all or none."
        )
    if raw["model_type"] == "llama" or raw["sliding_window"] is None:
        return 0
    if is_qwen and not (raw["use_sliding_window"] and kinds[0] == "sliding_attention"):
        return 0
    return raw["sliding_window"]


def _eos_ids(raw: dict, generation_file: Path) -> tuple[int, ...]:
    """Returns every id that ends a turn, those of config.json first."""
    generation = _read_json(generation_file) if generation_file.exists() else {}
    ids = []
    for value in (raw["eos_token_id"], generation.get("eos_token_id")):
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(ids))


class Tensor(NamedTuple):
    """What a safetensors file says of one of its tensors."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it


def _list_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of all files by name, less what RoPE recomputes."""
    tensors = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="np") as handle:
                for name in handle.keys():
                    at = handle.get_slice(name)
                    tensors[name] = Tensor(file, tuple(at.get_shape()), at.get_dtype())
        except (OSError, SafetensorError) as error:
            raise UserError(f"Cannot read {file}: {error}") from error
    return {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}


def _weight_files(folder: Path) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if not index.exists():
        raise UserError(
            f"{folder} has no model.safetensors and no {index.name}. PyTorch's .bin and .pt files "
            "are not read, as unpickling runs code: convert them once with transformers "
            "(from_pretrained, then save_pretrained)."
        )
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} has no weight_map.")
    for name in weight_map.values():
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise UserError(
                f"{index} names {name!r}; wanted names of files in this folder, and no other "
                "place. Write the weight_map anew, or download the model again."
            )
    files = [folder / name for name in dict.fromkeys(weight_map.values())]
    lost = [file.name for file in files if not file.exists()]
    if lost:
        raise UserError(
            f"{index} names {len(lost)} absent files: {', '.join(lost[: names.SHOWN])}."
        )
    return files


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object.")
    return content
