r"""Compiles pairs by Tunix, MaxText and nca_jax for the same chips, then writes README's table.

    python -m experiments.pods.peers.run --python=PYTHON [--only=TEXT] [--table]

Llama-3-8B on v6e:4x4, all chips in `fsdp`, prompts and responses of 512 tokens. A cell is one
program and one file in cells/; those that are there are not compiled again. Programs of one row or
pair a chip are compiled with their code, for the cycles that the compiler expects. PYTHON is one
that has requirements.txt, so that all are compiled by the same JAX and libtpu; it wants no TPU.

    --only   cells whose name has this text
    --table  compiles nothing
"""

import argparse
import json
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from experiments.pods.run import ROOT, commit, sent_bytes
from nca_jax.files import write_json
from nca_jax.flops import forward_flops
from nca_jax.model_config import MODELS

HERE = Path(__file__).parent
CELLS, README = HERE / "cells", HERE / "README.md"
TOPOLOGY = "v6e:4x4"
MODEL = "llama3_8b"
LENGTH = 512  # tokens of a prompt, and of a response
PEERS = ("tunix", "maxtext")
GIB = 2**30


class Ours(NamedTuple):
    """Records of K responses, one a row, as `nca_jax.train` has them; float32 state."""

    k: int
    rows: int  # a chip
    reference: str

    @property
    def name(self) -> str:
        return f"ours-k{self.k}-{self.reference}-{self.rows}"

    @property
    def pairs(self) -> int:
        """Returns the pairs a chip: the best response with each of the others."""
        return self.rows * (self.k - 1)

    def command(self, python: str) -> list[str]:
        of_file = ",init_from=HF_FOLDER" if self.reference == "live" else ""  # in bfloat16
        return [
            *(python, "-m", "nca_jax.aot"),
            f"--config=configs/ultrafeedback.py:algo=dpo,model={MODEL}{of_file}",
            f"--config.data.num_responses={self.k}",
            "--config.loss.pairs=best_each",
            f"--config.data.row_len={LENGTH * (1 + self.k)}",
            f"--config.reference.kind={self.reference}",
            *(["--config.reference.cache=cache"] if self.reference == "cached" else []),
            f"--topology={TOPOLOGY}",
            f"--rows_per_chip={self.rows}",
            "--programs=train",
            *(["--code"] if self.rows == 1 else []),
        ]


class Peer(NamedTuple):
    """One of the two programs of a step of Tunix's DPOTrainer, with a peer's model."""

    peer: str
    dtype: str  # of weights, gradients and moments
    pairs: int  # a chip
    program: str = "train"

    @property
    def name(self) -> str:
        return f"{self.peer}-{self.program}-{self.dtype}-{self.pairs}"

    @property
    def reference(self) -> "Peer":
        """Returns the program beside it; its weights are in bfloat16, whatever the policy's."""
        return Peer(self.peer, "bfloat16", 1, "reference")

    def command(self, python: str) -> list[str]:
        return [
            *(python, "-m", "experiments.pods.peers.peer_step"),
            f"--peer={self.peer}",
            f"--topology={TOPOLOGY}",
            f"--dtype={self.dtype}",
            f"--pairs={self.pairs}",
            f"--program={self.program}",
            *(["--code"] if self.pairs == 1 else []),
        ]


STEPS: tuple[Ours | Peer, ...] = (
    *(Ours(k, 1, reference) for k in (2, 4) for reference in ("cached", "live")),
    *(Peer(peer, dtype, 1) for peer in PEERS for dtype in ("float32", "bfloat16")),
    *(Peer("tunix", "float32", pairs) for pairs in (2, 3)),  # how many fit
    *(Peer("maxtext", "float32", pairs) for pairs in (2, 8, 16, 24)),
    Ours(2, 16, "live"),
    Ours(4, 16, "live"),
)


def path_of(program: Ours | Peer) -> Path:
    return CELLS / f"{program.name}.json"


def programs_of(step: Ours | Peer) -> tuple[Ours | Peer, ...]:
    return (step,) if isinstance(step, Ours) else (step, step.reference)


def compile_missing(only: str, python: str) -> None:
    CELLS.mkdir(exist_ok=True)
    for program in dict.fromkeys(program for step in STEPS for program in programs_of(step)):
        out = path_of(program)
        if out.exists() or only not in program.name:
            continue
        print(f"== {program.name}", flush=True)
        status = subprocess.run([*program.command(python), f"--json={out}"], cwd=ROOT).returncode
        if not out.exists():
            raise SystemExit(f"{program.name} stopped with status {status}.")
        write_json(out, json.loads(out.read_text()) | {"commit": commit()})


def table() -> str:
    """Returns the Markdown table: one line a step, "-" where a program is not compiled yet."""
    lines = [
        "| step | state | pairs a chip | GiB a chip | of | sent, GiB | FLOPs a pair "
        "| Gcycles a pair | commit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(line, STEPS)]) + "\n"


def with_table(readme: str) -> str:
    """Returns a README with the table in its place: <!-- table --> ... <!-- -->."""
    filled = f"<!-- table -->\n{table()}<!-- -->"
    return re.sub(r"<!-- table -->.*<!-- -->", lambda _: filled, readme, flags=re.DOTALL)


def line(step: Ours | Peer) -> str:
    """Returns the line of a step."""
    state = step.dtype if isinstance(step, Peer) else "float32"
    start = f"| {step.name} | {state} | {step.pairs} |"
    if not all(path_of(program).exists() for program in programs_of(step)):
        return start + " - |" * 6
    reports = [read(program) for program in programs_of(step)]
    sent = sum(sent_bytes(report, "ici") for report in reports) / GIB
    total, limit = memory_gib(step), reports[0]["memory"]["limit"]
    verdict = "" if total <= limit else "does not fit: "
    return (
        f"{start} {verdict}{total:.2f} | {limit:.2f} | {sent:.1f} "
        f"| {flops_a_pair(step):.2e} | {gigacycles_a_pair(step)} | {reports[0]['commit']} |"
    )


def read(program: Ours | Peer) -> dict:
    """Returns the report of a program with its commit."""
    report = json.loads(path_of(program).read_text())
    return report.get("programs", {}).get("train", report) | {"commit": report["commit"]}


def memory_gib(step: Ours | Peer) -> float:
    """Returns what a step needs of a chip; a peer's reference lies beside its train program."""
    train, *beside = (read(program)["memory"] for program in programs_of(step))
    return train["total"] + sum(reference["arguments"] for reference in beside)


def gigacycles_a_pair(step: Ours | Peer) -> str:
    """Returns the cycles of a step's products, fusions and copies, as the compiler expects them."""
    found = [read(program).get("estimated_cycles") for program in programs_of(step)]
    if not all(found):
        return "-"
    return f"{sum(found) / step.pairs / 1e9:.3f}"


def flops_a_pair(step: Ours | Peer) -> float:
    """Returns what a pair of full length costs, by `nca_jax.flops`, recomputation left out.

    Three forward passes of the policy, and one of a live reference. Of a peer a pair is two rows,
    each with the prompt.
    """
    config = MODELS[MODEL]
    if isinstance(step, Peer):
        return 2 * 4 * forward_flops(config, LENGTH, [LENGTH]).total
    passes = 3 + (step.reference == "live")
    return passes * forward_flops(config, LENGTH, [LENGTH] * step.k).total / (step.k - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="one that has requirements.txt")
    parser.add_argument("--only", default="")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        if args.python is None:
            parser.error("--python=PYTHON is wanted, one that has requirements.txt; or --table")
        compile_missing(args.only, args.python)
    README.write_text(with_table(README.read_text()))
    print(table())


if __name__ == "__main__":
    main()
