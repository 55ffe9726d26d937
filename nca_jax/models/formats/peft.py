"""PEFT folders: the adapters of a model, read and written without PyTorch.

adapter_config.json says what adapters there are; adapter_model.safetensors holds them, for each
adapted matrix MODULE.weight [out, in] of the base. A parameter P/kernel [.., *in, *out], where ".."
are its stacked axes, has
    base_model.model.MODULE.lora_A.weight          [r, in]     P/lora/a  [.., *in, r]
    base_model.model.MODULE.lora_B.weight          [out, r]    P/lora/b  [.., r, *out]
    base_model.model.MODULE.lora_magnitude_vector  [out]       P/lora/m  [.., *out], with DoRA alone
"""

import functools
import itertools
import json
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from nca_jax.checks import UserError
from nca_jax.field import FLAG, TEXT, Check, one_of
from nca_jax.model_config import TARGETS, ModelConfig
from nca_jax.models.formats import hf, names
from nca_jax.models.formats.hf_export import family_of
from nca_jax.models.formats.untrusted import NUMBER, SIZE, check_field, list_of, or_null, read_json
from nca_jax.models.lora import Lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}

NAMES = list_of(TEXT, "")
DEFAULTS: dict[str, Any] = {  # what files of older versions leave out
    "task_type": None,
    "base_model_name_or_path": None,
    "revision": None,
    "use_rslora": False,
    "use_dora": False,
    "lora_dropout": 0.0,
}
FIELDS: dict[str, Check] = {  # all that is read of adapter_config.json
    "peft_type": one_of("LORA"),
    "task_type": or_null(one_of("CAUSAL_LM")),
    "base_model_name_or_path": or_null(TEXT),
    "revision": or_null(TEXT),
    "r": SIZE,
    "lora_alpha": NUMBER,
    "target_modules": Check(
        object, lambda x: TEXT.accepts(x) or NAMES.accepts(x), "a string or a list of names"
    ),
    "use_rslora": FLAG,
    "use_dora": FLAG,
    "lora_dropout": Check(float, lambda x: 0 <= x <= 1, "a number from 0 to 1"),
}
# No number depends on these; any other field must say nothing: null, false, empty or as here.
UNREAD = (
    "auto_mapping",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
)
NOTHING = {"bias": ("none",), "init_lora_weights": (True, "gaussian")}  # "pissa" changes the base


class Adapter(NamedTuple):
    """The adapters of one folder.

    Attributes:
      lora: what they are.
      params: {"P/lora/a": Param, ...}, float32, still on disk.
      base: the model that they were trained on, as `pretrained.resolve` takes it; "" if unsaid.
    """

    lora: Lora
    params: dict[str, names.Param]
    base: str


class _Module(NamedTuple):
    """A linear layer of the base, all of its layers (and experts) together."""

    path: str  # of the parameter, without /kernel
    entry: names.Entry
    names: dict[tuple[int, ...], str]  # {place on the stacked axes: name, as in "...q_proj"}

    @property
    def target(self) -> str:
        return self.path.split("/")[-1]


def is_adapter(path: Path) -> bool:
    """Whether a path is a folder of adapters without their model."""
    return (path / CONFIG).exists() and not any(path.glob("model*.safetensors*"))


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Returns what is read of adapter_config.json, with its defaults filled in.

    Raises:
      UserError: it is broken, or says what is not served; names the field.
    """
    file = folder / CONFIG
    raw = DEFAULTS | read_json(file)
    try:
        for name, value in raw.items():
            is_read = name in FIELDS or name in UNREAD
            if value and not is_read and value not in NOTHING.get(name, ()):
                raise UserError(
                    f"{name} {reprlib.repr(value)} is not supported; merge adapter and model once "
                    "with peft (merge_and_unload, then save_pretrained)."
                )
        for name, check in FIELDS.items():
            check_field(name, raw.get(name), check)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return {name: raw[name] for name in FIELDS}


def base_of(folder: Path) -> str:
    """Returns the model that a folder's adapters were trained on, as `Adapter.base`."""
    raw = read_adapter_config(folder)
    name, revision = raw["base_model_name_or_path"] or "", raw["revision"]
    return f"{name}@{revision}" if name and revision else name


def open_peft(folder: str | Path, config: ModelConfig) -> Adapter:
    """Opens a folder with adapter_config.json and adapter_model.safetensors.

    Every name, shape and dtype is checked here; the values are read when a `Param` is. Where
    target_modules is an expression or "all-linear", the tensors tell what it matched: somebody
    else's expression may run for ever.

    Args:
      folder: as peft's save_pretrained writes it.
      config: of the model that the adapters belong to.
    Raises:
      UserError: what `read_adapter_config` refuses, no safetensors, or tensors that are not those
        of every layer of the modules that it names.
    """
    folder = Path(folder)
    raw = read_adapter_config(folder)
    if raw["lora_dropout"]:
        print(f"{folder}: lora_dropout {raw['lora_dropout']} was of its training; none is here.")
    if not (folder / WEIGHTS).exists():
        raise UserError(
            f"{folder} has no {WEIGHTS}. PyTorch's .bin files are not read, as unpickling runs "
            "code: convert it once with peft (from_pretrained, then save_pretrained)."
        )
    tensors = hf.list_tensors([folder / WEIGHTS])
    hf.stored_dtypes(tensors)
    modules = [
        module for module in _modules(config) if _is_adapted(module, raw["target_modules"], tensors)
    ]
    adapted = {module.target for module in modules}
    lora = Lora(
        raw["r"],
        float(raw["lora_alpha"]),
        tuple(name for name in TARGETS if name in adapted),
        rslora=raw["use_rslora"],
        dora=raw["use_dora"],
    )
    wanted = {
        tensor: shape
        for module in modules
        for part, shape in _tensor_shapes(module, config, lora).items()
        for tensor in _tensor_names(module, part).values()
    }
    found = {name: tensor.shape for name, tensor in tensors.items()}
    names.check_tensors(str(folder), found, wanted)
    if not modules:
        raise UserError(
            f"{folder / CONFIG}: target_modules {reprlib.repr(raw['target_modules'])} is no linear "
            "layer of the model."
        )
    fetch, params = hf.fetch_from(tensors), {}
    for module in modules:
        for part, shape in _param_shapes(module, config, lora).items():
            read = functools.partial(_read, module, part, shape, fetch)
            params[f"{module.path}/lora/{part}"] = names.Param(shape, read)
    return Adapter(lora, params, base_of(folder))


def write_peft(
    folder: str | Path,
    config: ModelConfig,
    lora: Lora,
    params: Mapping[str, names.Param],
    *,
    base: str = "",
) -> None:
    """Writes both files, which `open_peft` reads back bit for bit and torch's PEFT loads.

    The rsLoRA of experts is written as the plain scale that it is.

    Args:
      folder: is made if it does not exist.
      config: of the model that the adapters belong to.
      lora: what they are.
      params: {"P/lora/a": Param, ...}, float32.
      base: see `Adapter`.
    Raises:
      UserError: no Hugging Face architecture computes this config, or it fuses what is adapted.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modules = [module for module in _modules(config) if module.target in lora.targets]
    fused = [name for name in lora.targets if name not in {module.target for module in modules}]
    if fused:
        raise UserError(
            f"adapters on {', '.join(fused)} cannot be written for peft: "
            f"{family_of(config).model_type} has them in one tensor with others, which peft adapts "
            "as one."
        )
    name, _, revision = base.partition("@")
    # Where peft fuses experts it doubles their rank and alpha, which leaves rsLoRA's scale no more.
    has_experts = any("E" in module.entry.stacked for module in modules)
    alpha = lora.scale * lora.rank if has_experts else lora.alpha
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name or None,
        "revision": revision or None,
        "r": lora.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "target_modules": sorted({_last_word(module) for module in modules}),
        "use_rslora": lora.rslora and not has_experts,
        "use_dora": lora.dora,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for module in modules:
        for part, shape in _tensor_shapes(module, config, lora).items():
            value = params[f"{module.path}/lora/{part}"]
            whole = value.read(tuple(slice(None) for _ in value.shape))
            for place, tensor in _tensor_names(module, part).items():
                tensors[tensor] = np.ascontiguousarray(whole[place].reshape(shape[::-1]).T)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _modules(config: ModelConfig) -> Iterator[_Module]:
    """The linear layers that may have adapters, in the order of `names.TABLE`."""
    naming = hf.tensor_names(family_of(config).model_type)
    places: dict[names.Entry, dict[tuple[int, ...], str]] = {}
    for tensor, held in names.places(config, naming).items():
        if len(held) == 1:
            entry, place = held[0]
            places.setdefault(entry, {})[place] = tensor.removesuffix(".weight")
    for entry, found in places.items():
        if entry.stacked and entry.path.endswith("/kernel"):
            yield _Module(entry.path.removesuffix("/kernel"), entry, found)


def _is_adapted(module: _Module, wanted: str | list[str], tensors: Mapping[str, Any]) -> bool:
    """Whether peft puts adapters on a module, or on a layer of it."""
    if not isinstance(wanted, str):
        return any(
            name == end or name.endswith(f".{end}")
            for name in module.names.values()
            for end in wanted
        )
    return any(name in tensors for name in _tensor_names(module, "a").values())


def _last_word(module: _Module) -> str:
    return next(iter(module.names.values())).split(".")[-1]


def _tensor_names(module: _Module, part: str) -> dict[tuple[int, ...], str]:
    return {place: f"{PREFIX}{name}.{PARTS[part]}" for place, name in module.names.items()}


def _tensor_shapes(module: _Module, config: ModelConfig, lora: Lora) -> dict[str, tuple[int, ...]]:
    num_out, num_in = module.entry.tensor_shape(config)
    shapes = {"a": (lora.rank, num_in), "b": (num_out, lora.rank)}
    return shapes | ({"m": (num_out,)} if lora.dora else {})


def _param_shapes(module: _Module, config: ModelConfig, lora: Lora) -> dict[str, tuple[int, ...]]:
    entry, sizes = module.entry, names.axis_sizes(config)
    stacked = tuple(sizes[axis] for axis in entry.stacked)
    outs, ins = (tuple(sizes[axis] for axis in word) for word in entry.tensor_axes.split())
    shapes = {"a": (*stacked, *ins, lora.rank), "b": (*stacked, lora.rank, *outs)}
    return shapes | ({"m": (*stacked, *outs)} if lora.dora else {})


def _read(
    module: _Module,
    part: str,
    shape: tuple[int, ...],
    fetch: names.Fetch,
    index: tuple[slice, ...],
) -> np.ndarray:
    """Returns `index` of a stacked parameter, tensor by tensor, in float32."""
    tensors, num_stacked = _tensor_names(module, part), len(module.entry.stacked)
    spans = [range(n)[s] for n, s in zip(shape, index, strict=True)]
    out = np.zeros([len(span) for span in spans], np.float32)
    for place in itertools.product(*(range(len(span)) for span in spans[:num_stacked])):
        at = tuple(span[i] for span, i in zip(spans[:num_stacked], place, strict=True))
        whole = fetch(tensors[at], (slice(None),))
        out[place] = whole.T.reshape(shape[num_stacked:])[index[num_stacked:]]
    return out
