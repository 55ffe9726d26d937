"""Where a step's time goes: our own step, traced, its instructions grouped by what they compute.

    python -m experiments.speed.breakdown --job=DIR/CELL/ours_fast_cached.job.json [--setting=fast]

Prints the share of each group in the time of all instructions. Two that run at once count both, so
shares are of the time of threads, not of the clock.
"""

import argparse
import collections
import gzip
import json
import re
import tempfile
from pathlib import Path

import jax
import numpy as np

from experiments.speed.ours_side import Program, compile_step, config_of, train, with_reference
from nca_jax import build
from nca_jax.data.pipeline import Dataset, HostBatch
from nca_jax.params import open_base

# Group of an instruction: the first whose pattern its op_name has; the einsums are those of
# models/attention.py and logprobs.py.
GROUPS = {
    "attention, products": r"rpg\w+,rpg\w+->",
    "head, products": r"rc[dv],\w+->",
    "layers, products": r"dot_general",
    "attention, the rest": r"closed_call.*while/body",
    "head, the rest": r"^(?!.*closed_call).*while/body.*while/body",
    "optimizer and metrics": r"^(?!.*while)",
    "layers, embedding, sum of gradients": r"",
}


def groups_of(hlo: str) -> dict[str, str]:
    """Returns {name of an instruction: group}; loops and calls, which hold others, are left out."""
    found = {}
    for line in hlo.splitlines():
        match = re.match(r"\s*(?:ROOT )?%(\S+) = \w+\[([\d,]*)\]\S* (\w[\w-]*)\(", line)
        if not match or match[3] in ("while", "call", "conditional"):
            continue
        op_name = re.search(r'op_name="([^"]*)"', line)
        if op_name:
            found[match[1]] = next(g for g, x in GROUPS.items() if re.search(x, op_name[1]))
        elif "ynn" in line and match[2].count(",") > 1:
            found[match[1]] = "attention, products"  # the compiler drops names of batched products
    return found


def trace(program: Program, host: HostBatch) -> list[dict]:
    """Returns the events of one step after one that is not traced."""
    state, _ = train(program, program.start(), host)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            train(program, state, host)
        (path,) = Path(folder).rglob("perfetto_trace.json.gz")
        with gzip.open(path) as file:
            found = json.load(file)
    return found["traceEvents"] if isinstance(found, dict) else found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--setting", default="fast", choices=("fast", "lean"))
    args = parser.parse_args()
    job = json.loads(args.job.read_text()) | {"ours_flags": []}
    run = build.build(config_of(job, args.setting, live=False))
    host = Dataset(build.read_data(run).sources, run.config.data, seed=0).batch_at(0)
    host = with_reference(host, np.asarray(job["ref_logps"], np.float32))
    with jax.set_mesh(run.mesh):
        program = compile_step(run, open_base(run), host.batch, live=False)
        groups = groups_of(program.hlo)
        seconds = collections.Counter()
        for event in trace(program, host):
            if event.get("ph") == "X" and event["name"] in groups:
                seconds[groups[event["name"]]] += event["dur"] / 1e6
    total = sum(seconds.values())
    for group in GROUPS:
        print(f"| {group} | {seconds[group]:.1f} | {seconds[group] / total:.0%} |")


if __name__ == "__main__":
    main()
