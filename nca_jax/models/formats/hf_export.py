"""Writes parameters as a Hugging Face folder that transformers and vLLM load: `hf` backwards.

Files are written tensor by tensor, so nothing beside the parameters is ever whole in memory.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nca_jax.checks import UserError
from nca_jax.model_config import ModelConfig
from nca_jax.models.families import FAMILIES
from nca_jax.models.families.family import Family
from nca_jax.models.formats import hf, names
from nca_jax.models.formats.halves import read_model_json
from nca_jax.models.formats.untrusted import read_json

SHARD_BYTES = 5 * 10**9  # of one .safetensors file; Hugging Face's own habit
DTYPES = {
    "float32": (np.dtype(np.float32), "F32"),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
}

Places = Mapping[str, tuple[names.Place, ...]]  # of each tensor by its name


def write_hf(
    folder: str | Path,
    config: ModelConfig,
    params: Mapping[str, names.Param],
    *,
    dtype: str = "float32",
    origin: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json, generation_config.json and the weights, all but a tokenizer.

    `hf.open_hf` reads the same config and, for float32, the same parameters bit for bit. A tied
    head and the padding of the vocabulary are not stored.

    Args:
      folder: is made if it does not exist.
      config: sizes.
      params: {path: Param}, as `open_hf` and `open_gguf` return.
      dtype: what the tensors are stored in, a key of DTYPES.
      origin: the folder that the parameters were first read from; fields of its two json files
        that nca_jax does not know are kept.
      shard_bytes: a file holds no more than this, but one tensor at least.
    Raises:
      UserError: no Hugging Face architecture computes this config, or `origin` has another one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content, generation = _json_files(config, Path(origin) if origin else None)
    # transformers reads "dtype" from version 5 on, "torch_dtype" before.
    _write_json(folder / "config.json", content | {"dtype": dtype, "torch_dtype": dtype})
    _write_json(folder / "generation_config.json", generation)
    if hf.read_config(folder) != config:
        raise UserError(f"{origin} holds a model of another config than the one to be written.")
    places = names.places(config, hf.tensor_names(content["model_type"]))
    _write_weights(folder, config, params, places, dtype, shard_bytes)


def family_of(config: ModelConfig) -> Family:
    """Returns the first family whose config.json says all that this config says.

    Raises:
      UserError: there is none.
    """
    wanted, differs = dataclasses.asdict(config), {}
    for name, family in FAMILIES.items():
        try:
            found = dataclasses.asdict(hf.parse_config(config_json(config, family), {}))
        except UserError:  # a mixture without experts
            continue
        differs[name] = [field for field in wanted if found[field] != wanted[field]]
        if not differs[name]:
            return family
    nearest = min(differs, key=lambda name: len(differs[name]))
    raise UserError(
        f"No Hugging Face model computes this config, so it cannot be exported; the nearest is "
        f"{nearest}, which is without its {', '.join(differs[nearest])}."
    )


def config_json(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Returns config.json as this family writes it, complete but for the dtype."""
    c = config
    return {
        "model_type": family.model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps,
        "max_position_embeddings": c.max_position,
        "tie_word_embeddings": c.tied_head,
        "pad_token_id": c.pad_id,  # null too, or it would be one of the class
        **_token_ids(config),
        **_head(config, family),
        **family.wanted,
        **family.write(config),
    }


def _head(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The class in transformers, by the head that the model has, and the labels of that."""
    if not config.num_labels:
        return {"architectures": [family.architecture]}
    labels = [f"LABEL_{i}" for i in range(config.num_labels)]
    return {
        "architectures": [family.classifier],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _token_ids(config: ModelConfig) -> dict[str, Any]:
    ends = list(config.eos_ids)
    return {
        "bos_token_id": config.bos_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
    }


def _json_files(config: ModelConfig, origin: Path | None) -> tuple[dict, dict]:
    """Returns config.json without a dtype, and generation_config.json.

    Both name every id that ends a turn, and config.json whether the head is stored, whatever the
    origin's say.
    """
    if origin is None:
        return config_json(config, family_of(config)), _token_ids(config)
    ends = {"eos_token_id": _token_ids(config)["eos_token_id"]}
    content = read_model_json(origin)
    content |= ends | {"tie_word_embeddings": config.tied_head}
    if config.num_labels:
        family = FAMILIES[content["model_type"]]
        content |= _head(config, family) | {"pad_token_id": config.pad_id}
    content.pop("auto_map", None)  # names code in files that are not copied
    content.pop("quantization_config", None)  # what is written is not quantised
    generation = origin / "generation_config.json"
    if not generation.exists():
        return content, _token_ids(config)
    return content, read_json(generation) | ends


def _write_weights(
    folder: Path,
    config: ModelConfig,
    params: Mapping[str, names.Param],
    places: Places,
    dtype: str,
    shard_bytes: int,
) -> None:
    """Writes model.safetensors, or numbered shards and their index."""
    by_layer = sorted(places.items(), key=lambda item: item[1][0].index[:1])
    itemsize = DTYPES[dtype][0].itemsize
    shards, filled, total = [{}], 0, 0
    for name, held in by_layer:
        size = itemsize * math.prod(names.tensor_shape(config, held))
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = held
        filled, total = filled + size, total + size

    if len(shards) == 1:
        _write_safetensors(folder / "model.safetensors", config, params, shards[0], dtype)
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(file, config, params, shard, dtype)
        weight_map |= dict.fromkeys(shard, file.name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_safetensors(
    file: Path,
    config: ModelConfig,
    params: Mapping[str, names.Param],
    places: Places,
    dtype: str,
) -> None:
    """Writes one file: the header's length, the header, and the tensors in its order.

    By hand, as the library's own writer wants the whole file in memory, twice.
    """
    numpy_dtype, stored_as = DTYPES[dtype]
    # transformers asks for the format
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, held in places.items():
        shape = names.tensor_shape(config, held)
        start, end = end, end + numpy_dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": stored_as, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for held in places.values():
            out.write(names.read_tensor(config, params, held).astype(numpy_dtype).tobytes())


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
