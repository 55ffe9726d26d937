"""Hugging Face folders: config.json and safetensors, read without PyTorch or remote code."""

import dataclasses
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from nca_jax.checks import UserError
from nca_jax.field import FLAG, TEXT, Check, one_of
from nca_jax.model_config import ModelConfig
from nca_jax.models.families import FAMILIES
from nca_jax.models.families.family import Family
from nca_jax.models.formats import names
from nca_jax.models.formats.four_bit import Tensor, check_quantisation, find_stored
from nca_jax.models.formats.halves import read_model_json, text_half
from nca_jax.models.formats.untrusted import (
    EVEN,
    IDS,
    INTEGER,
    NUM_STACKED,
    NUMBER,
    OBJECT,
    SIZE,
    SIZE_OR_0,
    check_field,
    check_file,
    list_of,
    or_null,
    read_json,
)

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
KINDS = one_of("full_attention", "sliding_attention")
BIT = Check(int, lambda x: x in (0, 1), "0 or 1")
FIELDS: dict[str, Check] = dict.fromkeys(SIZES, SIZE) | {  # all that is read of config.json
    "num_hidden_layers": NUM_STACKED,
    "architectures": or_null(list_of(TEXT, "a list of names")),
    "hidden_act": TEXT,
    "rms_norm_eps": NUMBER,
    "rope_theta": NUMBER,
    "rope_parameters": or_null(OBJECT),
    "rope_scaling": or_null(OBJECT),
    "tie_word_embeddings": FLAG,
    "head_dim": or_null(EVEN),
    "num_key_value_heads": or_null(SIZE),
    "max_position_embeddings": SIZE,
    "bos_token_id": or_null(INTEGER),
    "pad_token_id": or_null(INTEGER),
    "id2label": or_null(OBJECT),
    "num_labels": or_null(SIZE),
    "eos_token_id": or_null(IDS),
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "layer_types": or_null(list_of(KINDS, f"a list of {KINDS.wanted}")),
    "quantization_config": or_null(OBJECT),
    "use_sliding_window": FLAG,
    "sliding_window": or_null(SIZE_OR_0),
    "max_window_layers": SIZE_OR_0,
    "hidden_activation": TEXT,
    "query_pre_attn_scalar": NUMBER,
    "attn_logit_softcapping": or_null(NUMBER),
    "final_logit_softcapping": or_null(NUMBER),
    "rope_local_base_freq": NUMBER,
    "sliding_window_pattern": SIZE,
    "embedding_multiplier": NUMBER,
    "attention_multiplier": NUMBER,
    "residual_multiplier": NUMBER,
    "logits_scaling": NUMBER,
    "num_local_experts": or_null(NUM_STACKED),
    "num_experts": NUM_STACKED,
    "num_experts_per_tok": NUM_STACKED,
    "moe_intermediate_size": SIZE,
    "norm_topk_prob": FLAG,
    "decoder_sparse_step": SIZE,
    "mlp_only_layers": or_null(list_of(INTEGER, "a list of integers")),
    "no_rope_layers": or_null(list_of(BIT, f"a list, each {BIT.wanted}")),
    "no_rope_layer_interval": SIZE,
    "original_max_position_embeddings": SIZE,
    "partial_rotary_factor": or_null(NUMBER),
    "clip_qkv": or_null(NUMBER),
}
LABELS = 2  # of a reward model that does not say how many
REGRESSION = (["LlamaRewardModel"], ["EurusRewardModel"])  # UltraRM's and Eurus': one label
COMPARED = 1 << 24  # elements of the head and of the embedding that are in memory at once
DTYPES = {  # by safetensors' names
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def open_hf(folder: str | Path) -> tuple[ModelConfig, dict[str, names.Param]]:
    """Opens a folder with config.json and model.safetensors, whole or sharded with an index.

    Matrices may be in 4 bits, as bitsandbytes stores nf4: `read` gives their values in float32.

    Every name, shape and dtype is checked here; the values are read when a `Param` is. A head that
    is stored beside tie_word_embeddings is left out if it is the embedding, and is else the head,
    as in transformers: its values alone are read here.

    Raises:
      UserError: no safetensors, tensors that do not fit the config, or what `read_config` refuses.
    """
    folder = Path(folder)
    config, naming = _read_config(folder)
    naming, tensors = text_half(naming, list_tensors(_weight_files(folder)))
    fetch_stored = fetch_from(tensors)
    try:
        stored, parts = find_stored(tensors, fetch_stored)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name not in parts}
    shapes |= {name: matrix.shape for name, matrix in stored.items()}
    plain = {name: tensors[name] for name in shapes.keys() - stored.keys()}
    dtypes = dict.fromkeys(stored, names.FLOAT32) | stored_dtypes(plain)

    def fetch(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return stored[name].values(index) if name in stored else fetch_stored(name, index)

    embedding, head = naming["embed/table"], naming["head/kernel"]
    if config.tied_head and head in shapes:
        shape = (config.vocab_size, config.width)
        have_it = [shapes.get(name) == shape for name in (embedding, head)]
        if all(have_it) and _are_equal(embedding, head, shape, fetch):
            del shapes[head]
        else:
            config = dataclasses.replace(config, tied_head=False)
            print(
                f"{folder}: config.json says tie_word_embeddings=true, but {head} is stored with "
                f"other values than {embedding}; it is used as the head."
            )
    names.check_tensors(str(folder), shapes, names.tensor_shapes(config, naming))
    return config, names.open_params(config, naming, fetch, dtypes, stored)


def _are_equal(one: str, other: str, shape: tuple[int, int], fetch: names.Fetch) -> bool:
    """Whether two matrices of one shape hold the same values, read some rows at a time."""
    height, width = shape
    rows = max(1, COMPARED // width)
    parts = [(slice(i, min(i + rows, height)), slice(None)) for i in range(0, height, rows)]
    return all(np.array_equal(fetch(one, part), fetch(other, part)) for part in parts)


def tensor_names(model_type: str) -> dict[str, str]:
    """Returns {parameter path: tensor name, with {L} and {E}} of a family, a key of FAMILIES."""
    return {**names.HF, **FAMILIES[model_type].tensors}


def fuses(folder: Path) -> bool:
    """Whether a Hugging Face folder has several matrices of a layer in one tensor."""
    naming = tensor_names(read_model_json(folder)["model_type"])
    kernels = [name for path, name in naming.items() if path.endswith("/kernel")]
    return len(set(kernels)) < len(kernels)


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
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"model_type {reprlib.repr(model_type)} is not one of {', '.join(FAMILIES)}."
        )
    family = FAMILIES[model_type]
    raw = {**family.defaults, **raw}
    _refuse(family, raw)
    ends = generation.get("eos_token_id")
    check_field("eos_token_id of generation_config.json", ends, FIELDS["eos_token_id"])

    num_heads, width = raw["num_attention_heads"], raw["hidden_size"]
    num_kv_heads = raw["num_key_value_heads"] or num_heads
    if num_heads % num_kv_heads or (not raw["head_dim"] and width % num_heads):
        raise UserError(
            f"num_attention_heads {num_heads} must divide hidden_size {width} and be a multiple "
            f"of num_key_value_heads {num_kv_heads}."
        )
    head_dim = raw["head_dim"] or width // num_heads
    check_field("head_dim", head_dim, EVEN)  # its halves are rotated
    common = {
        "vocab_size": raw["vocab_size"],
        "num_layers": raw["num_hidden_layers"],
        "width": width,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "mlp_width": raw["intermediate_size"],
        "norm_eps": raw["rms_norm_eps"],
        "tied_head": raw["tie_word_embeddings"],
        "max_position": raw["max_position_embeddings"],
        "bos_id": next(_in_vocabulary(_ids(raw["bos_token_id"]), raw), None),
        "eos_ids": tuple(_in_vocabulary(_eos_ids(raw, generation), raw)),
        **_pooling(family, raw),
    }
    return ModelConfig(**{**common, **family.has, **family.read({**raw, "head_dim": head_dim})})


def _read_config(folder: Path) -> tuple[ModelConfig, dict[str, str]]:
    """Returns the config of a folder, and the names of its tensors."""
    file, generation = folder / "config.json", folder / "generation_config.json"
    raw = read_model_json(folder)
    more = read_json(generation) if generation.exists() else {}
    try:
        config = parse_config(raw, more)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    naming = tensor_names(raw["model_type"])
    if raw.get("architectures") in REGRESSION:
        naming["score/kernel"] = "regression_head.weight"
    defaults = FAMILIES[raw["model_type"]].defaults
    lost = [i for i in _eos_ids({**defaults, **raw}, more) if i not in config.eos_ids]
    if lost:
        print(f"{folder}: eos_token_id {lost} is not in the vocabulary; no turn ends by it.")
    return config, naming


def _refuse(family: Family, raw: dict[str, Any]) -> None:
    for key in (*SIZES, *family.defaults):
        check_field(key, raw.get(key), FIELDS[key])
    known = (None, [family.architecture], [family.classifier], *REGRESSION)
    if raw["architectures"] not in known:
        raise UserError(
            f"architectures {reprlib.repr(raw['architectures'])} is not supported; wanted "
            f"{family.architecture} or {family.classifier}."
        )
    if raw["quantization_config"] is not None:
        check_quantisation(raw["quantization_config"])
    for key, value in family.wanted.items():
        if raw[key] != value:
            raise UserError(f"{key} {reprlib.repr(raw[key])} is not supported; wanted {value!r}.")


def _pooling(family: Family, raw: dict[str, Any]) -> dict[str, int | None]:
    """Returns how many labels a reward model has, and the id that it does not read at an end.

    Those with a regression_head read the last token, whichever it is.
    """
    for key in ("pad_token_id", "id2label", "num_labels"):
        check_field(key, raw.get(key), FIELDS[key])
    if raw["architectures"] in REGRESSION:
        return {"num_labels": 1, "pad_id": None}
    labels = len(raw.get("id2label") or ()) or raw.get("num_labels") or LABELS
    return {
        "num_labels": labels if raw["architectures"] == [family.classifier] else 0,
        "pad_id": next(_in_vocabulary(_ids(raw.get("pad_token_id")), raw), None),
    }


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _eos_ids(raw: dict[str, Any], generation: dict[str, Any]) -> list[int]:
    """Returns every id that is said to end a turn, those of config.json first."""
    return list(dict.fromkeys(_ids(raw["eos_token_id"]) + _ids(generation.get("eos_token_id"))))


def _in_vocabulary(ids: Iterable[int], raw: dict[str, Any]) -> Iterator[int]:
    """The ids that are any; some models write -1 for none, and some are cut to fewer."""
    return (i for i in ids if 0 <= i < raw["vocab_size"])


def list_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """Returns the tensors of all files by name, less what RoPE recomputes."""
    tensors = {}
    for file in files:
        check_file(file)
        try:
            with safe_open(file, framework="np") as handle:
                for name in handle.keys():
                    if name in tensors:
                        raise UserError(f"{name} is in {tensors[name].file} and in {file}.")
                    at = handle.get_slice(name)
                    tensors[name] = Tensor(file, tuple(at.get_shape()), at.get_dtype())
        except (OSError, SafetensorError) as error:
            raise UserError(f"Cannot read {file}: {error}") from error
    return {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}


def stored_dtypes(tensors: Mapping[str, Tensor]) -> dict[str, np.dtype]:
    """Returns {tensor name: dtype}. Raises UserError if one is not of `DTYPES`."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{name} in {tensor.file} is {tensor.dtype}; wanted one of {', '.join(DTYPES)}."
            )
    return {name: DTYPES[tensor.dtype] for name, tensor in tensors.items()}


def fetch_from(tensors: Mapping[str, Tensor]) -> names.Fetch:
    """Returns what reads a part of one of these tensors."""

    def fetch(name: str, index: tuple[slice, ...]) -> np.ndarray:
        # Opened for each read: a file that stays mapped counts as memory of this process.
        with safe_open(tensors[name].file, framework="np") as handle:
            return handle.get_slice(name)[index]

    return fetch


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
    weight_map = read_json(index).get("weight_map")
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
