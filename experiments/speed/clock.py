"""How a side is measured: in a fresh process, first its numbers, in another process its time.

A side is a module that is run as `python -m experiments.speed.MODULE --job=... --side=...`. It
opens its model and rows and hands two functions to `measure`:

    check()     -> {"loss", "grad_norm", "logps" [B, K], "loss_after", "logps_after" [B, K], ...}:
                   one step from the weights as they are. At the start policy and reference are
                   equal, whatever the tokens are; the values after the update are not trivial.
    run(steps)  -> one `Lap` a step: B prompts, gradient and AdamW's update, after whatever is
                   compiled has been compiled and has run once.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Lap(NamedTuple):
    seconds: float  # wall clock
    cpu_seconds: float  # of all threads


class Side(NamedTuple):
    """What a side's module opens; `facts` go into its result as they are when it has run."""

    check: Callable[[], dict]
    run: Callable[[int], list[Lap]]
    facts: dict[str, float | str]  # "reference": live or cached; "peak_bytes" of a device


def laps(step: Callable[[], object], steps: int) -> list[Lap]:
    """Times `step`, which returns when its work is done."""
    found = []
    for _ in range(steps):
        start, cpu = time.perf_counter(), time.process_time()
        step()
        found.append(Lap(time.perf_counter() - start, time.process_time() - cpu))
    return found


def measure(open_side: Callable[[dict, str], Side]) -> None:
    """Runs a side as its process was told: `--steps=0` is the check, more is the timing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--side", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    side = open_side(json.loads(args.job.read_text()), args.side)
    if args.steps:
        timed = side.run(args.steps)
        result = {"seconds": [lap.seconds for lap in timed]}
        result["cpu_seconds"] = [lap.cpu_seconds for lap in timed]
        # The largest resident set so far, in kilobytes on Linux.
        result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        result = side.check()
    args.out.write_text(json.dumps(result | side.facts) + "\n")
