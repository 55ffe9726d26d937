r"""Write a trained policy, or a reward model, as a Hugging Face folder.

    python -m nca_jax.export --workdir=DIR --out=HF_DIR [--dtype=float32|bfloat16] [--step=N|best]
        [--merge=none|dequantised|original]

--workdir  of a training run
--config   a config file or nca_jax:NAME, with its arguments; by default that of the run, which says
           what model and tokenizer it is; --help_config lists all fields
--out      a folder that is empty or not there yet: it is whole when the command succeeds
--dtype    of the stored weights
--step     of a checkpoint that was kept, or best by checkpoint.best_metric; by default the latest
--merge    of a run with adapters: none, the adapters alone as peft loads them; dequantised, merged
           into the base that they were trained on, which is the model that was trained; original,
           merged into the weights as their files have them, which is another model where the base
           was quantised or rounded. Where it was not, the two are one, and the default; where it
           was there is no default

The folder has config.json, generation_config.json, safetensors (several with an index from 5 GB
on), the tokenizer's files, and a model card: README.md with the config, metrics and commit. With
--merge=none it has adapter_config.json and adapter_model.safetensors in place of the first three.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nca_jax import build
from nca_jax.axes import Params, flatten_paths
from nca_jax.checks import UserError, run_main
from nca_jax.config import flatten
from nca_jax.data.template import usual_turn
from nca_jax.files import AnyPath, as_path, new_folder, whole_folder, whole_lines
from nca_jax.flags import parse_flags
from nca_jax.infra.mesh import host_mesh
from nca_jax.infra.records import METRICS, is_metrics, read_run
from nca_jax.losses import LOSSES
from nca_jax.model_config import ModelConfig
from nca_jax.models import nf4
from nca_jax.models.decoder import Model
from nca_jax.models.formats.hf import fuses
from nca_jax.models.formats.hf_export import DTYPES, write_hf
from nca_jax.models.formats.merge import merge
from nca_jax.models.formats.names import Param, param_shapes
from nca_jax.models.formats.peft import write_peft
from nca_jax.models.formats.pretrained import (
    open_pretrained,
    resolve,
    resolve_base,
    save_tokenizer,
)
from nca_jax.models.lora import split_adapters
from nca_jax.params import chosen_step, policy_params, start_params
from nca_jax.protocols import ModelSection

MERGES = ("none", "dequantised", "original")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
DORA = ": vLLM serves no DoRA adapters, but what --merge=dequantised writes"


def main(argv: list[str]) -> int:
    config, flags = parse_flags(argv, workdir=None, out=None, dtype="float32", step="", merge="")
    workdir = as_path(flags.workdir)
    if flags.dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}; it is {flags.dtype!r}.")
    out = new_folder(flags.out)
    step = chosen_step(config, workdir, flags.step)
    merging = chosen_merge(config, flags.merge, flags.dtype)
    card = model_card(workdir, config, step, merging)
    model_config = build.open_model_config(config.model)

    with whole_folder(out) as folder:
        tokenizer = build.tokenizer_from(config)
        if tokenizer:
            save_tokenizer(tokenizer, folder, config.data.chat_template)
        else:
            print("no tokenizer: the run's rows were token ids, so the folder has weights alone")
        run = host_run(config, model_config)
        params = policy_params(run, flags.workdir, flags.step)
        if run.model.lora is not None and merging == "none":
            adapters = opened(model_config, split_adapters(params)[0])
            base = config.model.init_from
            write_peft(folder, model_config, run.model.lora, adapters, base=base)
        else:
            told = dataclasses.replace(model_config, eos_ids=ends(run))
            weights = merged(run, params, merging)
            write_hf(folder, told, weights, dtype=flags.dtype, origin=origin(config.model))
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"step {step} of {workdir} in {out}, {flags.dtype}{said(config, merging)}")
    return 0


def chosen_merge(config: ConfigDict, asked: str, dtype: str) -> str:
    """Returns what becomes of a run's adapters, one of MERGES; "" where it has none.

    Args:
      asked: --merge, "" without it.
      dtype: --dtype.
    Raises:
      UserError: what is asked for is not there to be had, or nothing is where it makes a
        difference.
    """
    if "lora" not in config:
        if asked:
            raise UserError(f"--merge={asked} is of adapters; this run trained none: leave it out.")
        return ""
    where, rounded = config.model.init_from, rounding(config)
    if asked not in ("", *MERGES):
        raise UserError(f"--merge must be one of {', '.join(MERGES)}; it is {asked!r}.")
    if not asked and rounded:
        raise UserError(
            f"the adapters were trained on a base in {rounded}: give --merge=dequantised for the "
            "model that was trained, --merge=original for one on the weights as their files have "
            "them, or --merge=none for the adapters alone."
        )
    if asked == "original" and is_quantised(where):
        raise UserError(
            f"--merge=original: {where} has no other weights than those in 4 bits; give "
            "--merge=dequantised, or --merge=none and merge it elsewhere."
        )
    if asked == "none" and where and resolve_base(where) != resolve(where):
        raise UserError(
            f"--merge=none: {where} is an adapter too, so no folder has the base of this run's; "
            "give --merge=dequantised."
        )
    start = origin(config.model)
    if asked == "none" and start is not None and fuses(start):
        raise UserError(
            f"--merge=none: {where} has q, k and v in one tensor, which peft adapts as one; give "
            "--merge=dequantised."
        )
    if asked == "none" and dtype != "float32":
        raise UserError(
            f"--dtype={dtype} is of merged weights; adapters are float32: leave it out."
        )
    return asked or "dequantised"


def rounding(config: ConfigDict) -> str:
    """Returns the dtype that a run's base has and its files have not; "" where they agree."""
    dtype, where = config.lora.base_dtype, config.model.init_from
    weights = open_pretrained(where)[1].values() if where else ()
    if dtype == "nf4":
        kernels = [weight.nf4 for weight in weights if weight.nf4 is not None]
        is_same = bool(kernels) and all(k.num_stored == k.num_tensors for k in kernels)
    else:
        is_same = dtype in ("", "float32") or {weight.dtype.name for weight in weights} == {dtype}
    return "" if is_same else dtype


def is_quantised(where: str) -> bool:
    """Whether the files of a model have matrices in 4 bits."""
    weights = open_pretrained(where)[1].values() if where else ()
    return any(weight.nf4 is not None and weight.nf4.num_stored for weight in weights)


def said(config: ConfigDict, merging: str) -> str:
    """Returns what was done to adapters, in words; "" where there are none."""
    if merging == "none":
        return ", adapters alone" + DORA * config.lora.dora
    if merging == "original" and rounding(config):
        return (
            f", adapters merged into the original weights: they were trained on these in "
            f"{rounding(config)}, so this is not the model that was trained and evaluated; "
            "--merge=dequantised is"
        )
    return ", adapters merged" if merging else ""


def merged(run: build.Run, params: Params, merging: str) -> dict[str, Param]:
    """Returns the parameters of one model without adapters, which a run's may have been."""
    if run.model.lora is None:
        return opened(run.model.config, params)
    adapters, base = split_adapters(params)
    if merging == "original":
        base = start_params(run, run.config.model.init_from, dtype="")
    config = run.model.config
    return merge(opened(config, base), run.model.lora, opened(config, adapters))


def host_run(config: ConfigDict, model_config: ModelConfig) -> build.Run:
    """Returns the run of a config in the host's memory, where nothing is computed."""
    tokenizer = build.open_tokenizer(config, model_config)
    turn = usual_turn(tokenizer, model_config.eos_ids)
    model = Model(model_config, lora=build.adapters_of(config, model_config))
    return build.Run(config, host_mesh(), model, tokenizer, turn)


def ends(run: build.Run) -> tuple[int, ...]:
    """Returns every id that the run stops at, the model's own first."""
    return tuple(dict.fromkeys((*run.model.config.eos_ids, *run.eos_ids)))


def opened(config: ModelConfig, params: Params) -> dict[str, Param]:
    """Returns parameters that are in memory as `open_hf` does those on disk; copies nothing.

    A kernel in nf4 is dequantised as it is read.
    """
    arrays = {path: np.asarray(x) for path, x in flatten_paths(params).items()}
    shapes, found = param_shapes(config), {}
    for path, x in arrays.items():
        module, _, name = path.rpartition("/")
        if name == "codes":
            kernel = f"{module}/kernel"
            read = functools.partial(_dequantised, x, arrays[f"{module}/absmax"], shapes[kernel])
            found[kernel] = Param(shapes[kernel], read)
        elif name != "absmax":
            found[path] = Param(x.shape, x.__getitem__)
    return found


def _dequantised(
    codes: np.ndarray, absmax: np.ndarray, shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    """Returns `index` of a kernel in nf4, float32."""
    num_stacked = codes.ndim - 3
    stacked, inner = index[:num_stacked], index[num_stacked:]
    parts = jnp.asarray(codes[stacked]), jnp.asarray(absmax[stacked])
    whole = np.asarray(nf4.dequantise(*parts, jnp.dtype("float32")))
    return whole.reshape(*whole.shape[:num_stacked], *shape[num_stacked:])[
        (slice(None),) * num_stacked + inner
    ]


def origin(model: ModelSection) -> Path | None:
    """The Hugging Face folder that the policy was first read from; None for a .gguf or random."""
    where = resolve_base(model.init_from) if model.init_from else None
    return where if where and where.is_dir() else None


def model_card(workdir: AnyPath, config: ConfigDict, step: int, merging: str = "") -> str:
    """Returns README.md: what was trained, from what, and what it reached.

    Args:
      merging: as `chosen_merge` returns it.
    """
    start, loss = config.model.init_from or "random weights", config.loss
    hyperparameters = ", ".join(f"{name} = {loss[name]}" for name in LOSSES[loss.name].fields)
    commit = read_run(workdir)["commit"]
    library = "peft" if merging == "none" else "transformers"
    base = f"base_model: {start}\n" if merging and config.model.init_from else ""
    is_reward = config.model.head == "reward"
    made = f"a reward model by {loss.name}" if is_reward else f"aligned by {loss.name}"
    return f"""---
library_name: {library}
{base}pipeline_tag: {"text-classification" if is_reward else "text-generation"}
tags: [{"reward-model" if is_reward else "alignment"}, {loss.name}]
---

# {config.model.init_from or config.model.name}, {made}

Trained with explicit rewards by nca_jax; the method is "Noise Contrastive Alignment of Language
Models with Explicit Rewards" (arXiv:2402.05369).

- start{"" if is_reward else ", and reference where the config names no other"}: {start}
{_adapters(config, merging)}- step {step}; K = {config.data.num_responses}, {hyperparameters}
- commit of nca_jax: {commit}
{_serving(config, merging)}
## Metrics

| split | step | metric | value |
|---|---|---|---|
{_metric_rows(workdir, step)}

## Config

```json
{json.dumps(flatten(config), indent=2)}
```
"""


def _adapters(config: ConfigDict, merging: str) -> str:
    """The line of a card that says what adapters there were, and what became of them."""
    if not merging:
        return ""
    lora, kept = config.lora, rounding(config)
    scaled = "sqrt(rank)" if lora.rslora else "rank"
    of_base = f" in {kept}" if kept else ""
    became = {
        "none": f"not merged: load them on the base{of_base}",
        "dequantised": f"merged into the base{of_base} that they were trained on",
        "original": "merged into the base as its files have it",
    }[merging]
    if merging == "original" and kept:
        became += f", though trained on it{of_base}: the metrics below are not of this model"
    return (
        f"- {'DoRA' if lora.dora else 'LoRA'} adapters on {lora.targets}: rank {lora.rank}, scale "
        f"{lora.alpha:g} / {scaled}; {became}\n"
    )


def _serving(config: ConfigDict, merging: str) -> str:
    """The line of a card that says how vLLM serves the folder."""
    command = "vllm serve FOLDER"
    if merging == "none":
        rank = next((rank for rank in RANKS if rank >= config.lora.rank), 0)
        if config.lora.dora or not rank:
            return "- vLLM does not serve these adapters; what --merge=dequantised writes it does\n"
        base = config.model.init_from or "BASE"
        command = f"vllm serve {base} --enable-lora --max-lora-rank {rank}"
        command += " --lora-modules policy=FOLDER"
    return f"- served by `{command}`\n"


def _metric_rows(workdir: AnyPath, step: int) -> str:
    """The last training and evaluation metrics up to `step`, a row each."""
    last = {}
    for metrics in whole_lines(workdir / METRICS, is_metrics):
        if metrics["step"] <= step:
            last[metrics.pop("split")] = metrics
    return "\n".join(
        f"| {split} | {metrics['step']} | {name} | {value:.6g} |"
        for split, metrics in last.items()
        for name, value in metrics.items()
        if name != "step"
    )


if __name__ == "__main__":
    run_main(main)
