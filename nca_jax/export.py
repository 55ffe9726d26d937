r"""Write a trained policy as a Hugging Face folder.

    python -m nca_jax.export --workdir=DIR --out=HF_DIR [--dtype=float32|bfloat16] [--step=N|best]

--workdir  of a training run
--config   a config file or nca_jax:NAME, with its arguments; by default that of the run, which says
           what model and tokenizer it is; --help_config lists all fields
--out      a folder that is empty or not there yet: it is whole when the command succeeds
--dtype    of the stored weights
--step     of a checkpoint that was kept, or best by checkpoint.best_metric; by default the latest

The folder has config.json, generation_config.json, safetensors (several with an index from 5 GB
on), the tokenizer's files, and a model card: README.md with the config, metrics and commit.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from nca_jax import build
from nca_jax.axes import Params, flatten_paths
from nca_jax.checks import UserError, run_main
from nca_jax.config import flatten
from nca_jax.data.template import usual_turn
from nca_jax.files import AnyPath, as_path, new_folder, whole_folder, whole_lines
from nca_jax.flags import parse_flags
from nca_jax.infra.checkpoint import restore_params
from nca_jax.infra.mesh import host_mesh
from nca_jax.infra.records import METRICS, is_metrics, read_run
from nca_jax.losses import LOSSES
from nca_jax.model_config import ModelConfig
from nca_jax.models.decoder import Model
from nca_jax.models.formats.hf_export import DTYPES, write_hf
from nca_jax.models.formats.names import Param
from nca_jax.models.formats.pretrained import resolve_base, save_tokenizer
from nca_jax.params import chosen_step
from nca_jax.protocols import ModelSection


def main(argv: list[str]) -> int:
    config, flags = parse_flags(argv, workdir=None, out=None, dtype="float32", step="")
    workdir = as_path(flags.workdir)
    if flags.dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}; it is {flags.dtype!r}.")
    out = new_folder(flags.out)
    step = chosen_step(config, workdir, flags.step)
    card = model_card(workdir, config, step)
    model_config = build.open_model_config(config.model)

    with whole_folder(out) as folder:
        tokenizer = build.tokenizer_from(config)
        if tokenizer:
            save_tokenizer(tokenizer, folder, config.data.chat_template)
        else:
            print("no tokenizer: the run's rows were token ids, so the folder has weights alone")
        abstract = Model(model_config).abstract_params()
        params = opened(restore_params(workdir, abstract, host_mesh(), step=step))
        told = dataclasses.replace(model_config, eos_ids=ends(config, model_config))
        write_hf(folder, told, params, dtype=flags.dtype, origin=origin(config.model))
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"step {step} of {workdir} in {out}, {flags.dtype}")
    return 0


def ends(config: ConfigDict, model_config: ModelConfig) -> tuple[int, ...]:
    """Returns every id that the run stops at, the model's own first."""
    tokenizer = build.open_tokenizer(config, model_config)
    turn = usual_turn(tokenizer, model_config.eos_ids)
    run = build.Run(config, host_mesh(), Model(model_config), tokenizer, turn)
    return tuple(dict.fromkeys((*model_config.eos_ids, *run.eos_ids)))


def opened(params: Params) -> dict[str, Param]:
    """Returns parameters that are in memory as `open_hf` does those on disk; copies nothing."""
    arrays = {path: np.asarray(x) for path, x in flatten_paths(params).items()}
    return {path: Param(x.shape, x.__getitem__) for path, x in arrays.items()}


def origin(model: ModelSection) -> Path | None:
    """The Hugging Face folder that the policy was first read from; None for a .gguf or random."""
    where = resolve_base(model.init_from) if model.init_from else None
    return where if where and where.is_dir() else None


def model_card(workdir: AnyPath, config: ConfigDict, step: int) -> str:
    """Returns README.md: what was trained, from what, and what it reached."""
    start, loss = config.model.init_from or "random weights", config.loss
    hyperparameters = ", ".join(f"{name} = {loss[name]}" for name in LOSSES[loss.name].fields)
    commit = read_run(workdir)["commit"]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [alignment, {loss.name}]
---

# {config.model.init_from or config.model.name}, aligned by {loss.name}

Trained with explicit rewards by nca_jax; the method is "Noise Contrastive Alignment of Language
Models with Explicit Rewards" (arXiv:2402.05369).

- start, and reference where the config names no other: {start}
- step {step}; K = {config.data.num_responses}, {hyperparameters}
- commit of nca_jax: {commit}

## Metrics

| split | step | metric | value |
|---|---|---|---|
{_metric_rows(workdir, step)}

## Config

```json
{json.dumps(flatten(config), indent=2)}
```
"""


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
