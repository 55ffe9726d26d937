"""Hugging Face folders: config.json and safetensors, read without PyTorch or remote code."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from nca_jax.checks import UserError
from nca_jax.model_config import ModelConfig, RopeScaling
from nca_jax.models.families import FAMILIES
from nca_jax.models.families.family import Family
from nca_jax.models.formats import names

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
DTYPES = {  # by safetensors' names
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def open_hf(folder: str | Path) -> tuple[ModelConfig, dict[str, names.Param]]:
    """Opens a folder with config.json and model.safetensors, whole or sharded with an index.

    Every name, shape and dtype is checked here; the values are read when a `Param` is.

    Raises:
      UserError: no safetensors, tensors that do not fit the config, or what `read_config` refuses.
    """
    folder = Path(folder)
    config, naming = _read_config(folder)
    tensors = _list_tensors(folder)
    if config.tied_head:  # some writers store the tied head all the same
        tensors.pop(naming["head/kernel"], None)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    names.check_tensors(str(folder), shapes, names.tensor_shapes(config, naming))
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{name} in {folder} is {tensor.dtype}; wanted one of {', '.join(DTYPES)}."
            )

    def fetch(name: str, index: tuple[slice, ...]) -> np.ndarray:
        # Opened for each read: a file that stays mapped counts as memory of this process.
        with safe_open(tensors[name].file, framework="np") as handle:
            return handle.get_slice(name)[index]

    dtypes = {name: DTYPES[tensor.dtype] for name, tensor in tensors.items()}
    return config, names.open_params(config, naming, fetch, dtypes)


def tensor_names(model_type: str) -> dict[str, str]:
    """Returns {parameter path: tensor name, with {L} and {E}} of a family, a key of FAMILIES."""
    return {**names.HF, **FAMILIES[model_type].tensors}


def read_config(folder: str | Path) -> ModelConfig:
    """Reads config.json, and further end-of-turn ids from generation_config.json if it is there.

    Raises:
      UserError: a file that is missing or broken, or a model this decoder would compute wrongly.
    """
    return _read_config(Path(folder))[0]


def parse_config(raw: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """Returns what the contents of config.json and generation_config.json say.

    Raises:
      UserError: a model this decoder would compute wrongly, without the name of the file.
    """
    if raw.get("model_type") not in FAMILIES:
        raise UserError(
            f"model_type {raw.get('model_type')!r} is not one of {', '.join(FAMILIES)}."
        )
    family = FAMILIES[raw["model_type"]]
    raw = {**family.defaults, **raw}
    _refuse(family, raw)

    num_heads, width = raw["num_attention_heads"], raw["hidden_size"]
    num_kv_heads = raw["num_key_value_heads"] or num_heads
    if num_heads % num_kv_heads or (not raw["head_dim"] and width % num_heads):
        raise UserError(
            f"num_attention_heads {num_heads} must divide hidden_size {width} and be a multiple "
            f"of num_key_value_heads {num_kv_heads}."
        )
    rope_theta, rope_scaling = _rope(raw)
    common = {
        "vocab_size": raw["vocab_size"],
        "num_layers": raw["num_hidden_layers"],
        "width": width,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": raw["head_dim"] or width // num_heads,
        "mlp_width": raw["intermediate_size"],
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "norm_eps": raw["rms_norm_eps"],
        "tied_head": raw["tie_word_embeddings"],
        "max_position": raw["max_position_embeddings"],
        "bos_id": raw["bos_token_id"],
        "eos_ids": _eos_ids(raw, generation),
    }
    return ModelConfig(**{**common, **family.has, **family.read(raw)})


def _read_config(folder: Path) -> tuple[ModelConfig, dict[str, str]]:
    """Returns the config of a folder, and the names of its tensors."""
    file, generation = folder / "config.json", folder / "generation_config.json"
    raw, more = _read_json(file), _read_json(generation) if generation.exists() else {}
    try:
        return parse_config(raw, more), tensor_names(raw["model_type"])
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _refuse(family: Family, raw: dict[str, Any]) -> None:
    for key in SIZES:
        if not isinstance(raw.get(key), int) or raw[key] < 1:
            raise UserError(f"{key} must be a positive integer, not {raw.get(key)!r}.")
    if raw["architectures"] not in (None, [family.architecture]):
        raise UserError(
            f"architectures {raw['architectures']} is not supported; wanted {family.architecture}."
        )
    for key, value in family.wanted.items():
        if raw[key] != value:
            raise UserError(f"{key} {raw[key]!r} is not supported; wanted {value!r}.")


def _rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Returns (theta, scaling) of the old fields or the new one, by transformers' precedence."""
    rope = raw["rope_scaling"] or raw["rope_parameters"] or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if any(isinstance(value, dict) for value in rope.values()):
        kind = "one for each kind of layer"
    if kind not in ("default", "llama3"):
        raise UserError(f"rope_type {kind!r} is not one of default, llama3.")
    if partial not in (None, 1):
        raise UserError(f"partial_rotary_factor {partial} is not supported; wanted 1.")

    theta = float(rope.get("rope_theta", raw["rope_theta"]))
    if kind == "default":
        return theta, None
    original = rope.get("original_max_position_embeddings", raw["max_position_embeddings"])
    original = raw.get("original_max_position_embeddings", original)
    try:
        factors = [float(rope[f]) for f in ("factor", "low_freq_factor", "high_freq_factor")]
    except KeyError as error:
        raise UserError(f"rope_type llama3 needs {error}.") from None
    return theta, RopeScaling(*factors, original_max_position=original)


def _eos_ids(raw: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
    """Returns every id that ends a turn, those of config.json first."""
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


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object.")
    return content
