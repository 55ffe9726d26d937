"""Times nca_jax beside the PyTorch release, TRL and Tunix, on the same token ids and weights.

    python experiments/speed/run.py --out=DIR --data=ROWS.jsonl.gz [--cells=real_k4,real_pairs]
        [--sides=released_f32,ours_fast] [--rounds=3] [--steps=1] [--device=cuda] [--smoke]

For each cell: every side first computes one step in a process of its own, and its
log-probabilities, loss and gradient norm must agree with those of the first side, or it is not
timed. Then the sides are timed, one after the other, round by round, each in a fresh process. What
is done is kept in DIR and not done again, so a run that was stopped goes on. Writes
DIR/cells/CELL.json, DIR/table.md and DIR/speed.png. Wants a machine that does nothing else; --smoke
is for trying it out.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from report import write_report

from nca_jax.infra.records import git_commit

ROOT = Path(__file__).parents[2]
# MKL takes its fast road on a processor of another make only where this says that it is Intel's.
PRELOAD = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


class Side(NamedTuple):
    module: str
    preload: bool = False
    pairs_only: bool = False  # K = 2
    cached: bool = False  # wants the log-probabilities of its check
    is_bf16: bool = False


SIDES = {
    "released_f32": Side("torch_side"),
    "released_preload": Side("torch_side", preload=True),
    "released_bf16": Side("torch_side", is_bf16=True),
    "trl_live": Side("trl_side", pairs_only=True),
    "trl_cached": Side("trl_side", pairs_only=True),
    "trl_cached_preload": Side("trl_side", preload=True, pairs_only=True),
    "tunix": Side("tunix_side", pairs_only=True),
    "ours_fast_cached": Side("ours_side", cached=True),
    "ours_fast_live": Side("ours_side"),
    "ours_lean_cached": Side("ours_side", cached=True),
    "ours_lean_live": Side("ours_side"),
    "ours_fast_cached_bf16": Side("ours_side", cached=True, is_bf16=True),
    "ours_lean_cached_bf16": Side("ours_side", cached=True, is_bf16=True),
}

# How far a side may be from the first one: nats of a response, and relative.
TOLERANCES = {
    False: {
        "logps": 0.02,
        "logps_after": 0.05,
        "loss": 1e-4,
        "loss_after": 1e-3,
        "grad_norm": 1e-3,
    },
    # Adam's first step is the sign of the gradient, which rounding turns where it is near 0, so
    # what comes after an update is not compared.
    True: {"logps": 4.0, "loss": 5e-3, "grad_norm": 0.1},
}  # by is_bf16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="scored responses, JSON lines, for real rows")
    parser.add_argument("--cells", default="real_k4,prompt512_k8,real_pairs")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="timed in each process")
    parser.add_argument("--tunix_python", default="", help="a Python that has google-tunix")
    parser.add_argument("--torch_python", default="", help="one that has torch, PEFT and TRL")
    parser.add_argument("--ours_flags", default="", help="more flags of nca_jax, by spaces")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for PyTorch and JAX on a GPU")
    parser.add_argument("--ladder", default="real_k4", help="cells whose factors are taken apart")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    args = parser.parse_args()
    args.out = args.out.resolve()  # sides run elsewhere
    args.out.mkdir(parents=True, exist_ok=True)
    for cell in args.cells.split(","):
        run_cell(cell, args)
        if cell in args.ladder.split(",") and not (args.out / cell / "ladder.json").exists():
            paths = (f"--{x}={args.out / cell / x}.json" for x in ("job", "ladder"))
            start("experiments.speed.ladder", *paths)
    write_report(args.out)


def run_cell(cell: str, args: argparse.Namespace) -> None:
    """Makes a cell's rows, checks every side, and times those that can run here."""
    folder = args.out / cell
    if not (folder / "job.json").exists():
        flags = [f"--data={args.data.resolve()}"] if args.data else []
        flags += ["--smoke"] if args.smoke else []
        flags += [f"--device={args.device}"]
        start("experiments.speed.cells", f"--out={args.out}", f"--cell={cell}", *flags)
    job = json.loads((folder / "job.json").read_text())
    names = [
        name
        for name in args.sides.split(",")
        if can_run(SIDES[name], args) and (job["k"] == 2 or not SIDES[name].pairs_only)
    ]
    checks = {}
    for name in names:
        found = measured(folder, name, f"{name}.check.json", 0, job, args)
        if found is None and not checks:
            sys.exit(f"{name} did not run, and the others have nothing to agree with.")
        checks |= {name: found} if found else {}
    apart = {name: difference(found, checks[names[0]]) for name, found in checks.items()}
    (folder / "agreement.json").write_text(json.dumps(apart, indent=2) + "\n")
    names = [name for name in checks if agrees(name, apart[name])]
    for number in range(args.rounds):
        if not (folder / f"peak.{number}.json").exists():
            start("experiments.speed.peak", f"--out={folder / f'peak.{number}.json'}")
        for name in names:
            told = job | {"ref_logps": checks[name]["logps"] if SIDES[name].cached else None}
            measured(folder, name, f"{name}.{number}.json", args.steps, told, args)


def can_run(side: Side, args: argparse.Namespace) -> bool:
    if side.module == "tunix_side":
        return bool(args.tunix_python)
    has_trl = args.torch_python or importlib.util.find_spec("trl") is not None
    return side.module != "trl_side" or bool(has_trl)


def python_of(side: Side, args: argparse.Namespace) -> str:
    """Returns the Python that a side runs in: this one where no other is given."""
    others = {"tunix_side": args.tunix_python, "torch_side": args.torch_python}
    return others.get(side.module.replace("trl", "torch"), "") or sys.executable


def measured(
    folder: Path, name: str, file: str, steps: int, job: dict, args: argparse.Namespace
) -> dict | None:
    """Returns what a side's process wrote, running it unless it is there; None if it fails."""
    out = folder / file
    if not out.exists():
        side = SIDES[name]
        told = folder / f"{name}.job.json"
        told.write_text(json.dumps(job | {"ours_flags": args.ours_flags.split()}))
        env = {"LD_PRELOAD": str(preload_library(args.out))} if side.preload else {}
        flags = (f"--job={told}", f"--side={name}", f"--steps={steps}", f"--out={out}")
        try:
            start(f"experiments.speed.{side.module}", *flags, python=python_of(side, args), env=env)
        except subprocess.CalledProcessError as error:  # out of memory, most often
            print(f"{name} failed: {error}")
            return None
        found = json.loads(out.read_text()) | {"commit": git_commit()}
        out.write_text(json.dumps(found) + "\n")
    return json.loads(out.read_text())


def start(module: str, *flags: str, python: str = sys.executable, env: dict | None = None) -> None:
    """Runs `python -m MODULE FLAGS` in a process of its own; stops where it fails."""
    print(module, *flags, flush=True)
    # Compiled programs that were kept would make compiling look free.
    inherited = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    command = [python, "-m", module, *flags]
    subprocess.run(command, cwd=ROOT, env=inherited | (env or {}), check=True)


def preload_library(out: Path) -> Path:
    """Returns the compiled PRELOAD, compiling it with cc the first time."""
    library = out / "preload.so"
    if not library.exists():
        source = library.with_suffix(".c")
        source.write_text(PRELOAD)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def agrees(name: str, apart: dict[str, float]) -> bool:
    """Returns whether a side computes what the first one does; says so where it does not."""
    tolerances = TOLERANCES[SIDES[name].is_bf16]
    is_same = all(apart[quantity] <= tolerances[quantity] for quantity in tolerances)
    if not is_same:
        print(f"{name} is not timed: it is {apart} from the first side, wanted {tolerances}.")
    return is_same


def difference(found: dict, first: dict) -> dict[str, float]:
    """Returns the largest difference of log-probabilities, nats, and relative ones of the rest."""
    apart = {}
    for quantity in ("logps", "logps_after"):
        pairs = zip(found[quantity], first[quantity], strict=True)
        apart[quantity] = max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True))
    for quantity in ("loss", "loss_after", "grad_norm"):
        apart[quantity] = abs(found[quantity] / first[quantity] - 1)
    return apart


if __name__ == "__main__":
    main()
