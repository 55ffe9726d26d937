r"""Compiles every cell of the table of pods, then writes the table and its plots.

    python experiments/pods/run.py [--only=TEXT] [--table]

A cell is one `nca_jax.aot` command and one file in experiments/pods/cells/; those that are there
are not compiled again, so the table can be continued. It wants libtpu (the tpu extra) and no TPU.

    --only   cells whose name has this text
    --table  compiles nothing
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CELLS = HERE / "cells"


class Cell(NamedTuple):
    """One compile; `flags` are added to those that all share."""

    name: str
    model: str
    reference: str
    topology: str
    num_slices: int = 1
    rows_a_chip: int = 1
    flags: tuple[str, ...] = ()


EXPERTS = ("--config.mesh.expert=8",)
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v6e:16x16", "v5p:4x4x4", "v5p:8x8x16")


def cells() -> list[Cell]:
    """Returns the table: models by references by topologies, two slices, and one choice undone."""
    table = [
        Cell(f"{model}-{reference}-{topology}", model, reference, topology, flags=flags)
        for topology in TOPOLOGIES
        for reference in ("cached", "live")
        for model, flags in (("mistral_7b", ()), ("mixtral_8x7b", EXPERTS))
    ]
    table += [
        Cell(f"mistral_7b-cached-2x{topology}", "mistral_7b", "cached", topology, 2)
        for topology in ("v5e:16x16", "v5p:4x4x4")
    ]
    base = ("mistral_7b", "cached", "v5p:4x4x4")
    whole_rows = ("--config.loss.logits_chunk=4096",)
    table += [
        Cell("choice-whole-logits", *base, flags=whole_rows),
        Cell("choice-4-rows", *base, rows_a_chip=4),
        Cell("choice-no-remat", *base, flags=("--config.model.remat=none",)),
        Cell("choice-remat-dots", *base, flags=("--config.model.remat=dots",)),
    ]
    return table


def command(cell: Cell, out: Path) -> list[str]:
    """Returns the command line of one cell."""
    reference = ["--config.reference.kind=cached", "--config.reference.cache=cache"]
    return [
        sys.executable,
        "-m",
        "nca_jax.aot",
        f"--config=configs/ultrafeedback.py:model={cell.model},algo=nca",
        *(reference if cell.reference == "cached" else []),
        f"--topology={cell.topology}",
        f"--num_slices={cell.num_slices}",
        f"--rows_per_chip={cell.rows_a_chip}",
        "--programs=train",
        *cell.flags,
        f"--json={out}",
    ]


def compile_missing(only: str) -> None:
    """Compiles one after another what has no file yet."""
    CELLS.mkdir(exist_ok=True)
    for cell in cells():
        out = CELLS / f"{cell.name.replace(':', '_')}.json"
        if out.exists() or only not in cell.name:
            continue
        print(f"== {cell.name}", flush=True)
        status = subprocess.run(command(cell, out), cwd=ROOT).returncode
        if not out.exists():
            raise SystemExit(f"{cell.name} stopped with status {status}.")
