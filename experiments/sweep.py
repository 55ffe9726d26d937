r"""Train a grid of settings, each over several seeds; start it again after any stop.

    python -m experiments.sweep --config=FILE[:args] --out=DIR --seeds=3 \
        --grid "loss.alpha=0.01,0.1,1;loss.beta=1e-3,1e-2;config.algo=nca,infonca" \
        [--point "NAME: loss.beta=1;config.algo=dpo"] [--config.section.field=value ...] \
        [--jobs=1] [--evaluate=0 [--judge=SCORER] [--text=FILE]] [--print]

--grid      axes, separated by ";": a field of the config, or config.NAME for an argument of the
            config string; given more than once, the points add up
--point     one setting under a name of its own; given more than once, the points add up
--jobs      runs at a time
--evaluate  held-out prompts that nca_jax.evaluate answers once a run is trained; 0: none
--judge, --text  go to nca_jax.evaluate
--print     only print the commands that are left, one line a point, for a scheduler

A point is one nca_jax.train in the workdir DIR/SETTING/seed=N; "{seed}" in a value is its N. What
is left to do is read from the workdirs alone: a finished point is not run again, a killed one
resumes; the checkpoints of one that is evaluated may be removed. A point that breaks says why and
stops no other; the exit status is then 1. Where reference.kind=cached is asked for without a cache,
points with the same reference share one, which is made first.

Writes DIR/table.md and, by experiments.report, DIR/report.html.
"""

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import results
from experiments.tasks import GOES_ON, TRAINED, Task, commands_left, run_tasks
from nca_jax.checks import UserError, run_main
from nca_jax.files import local_path, out_folder
from nca_jax.flags import parse_flags
from nca_jax.infra.fingerprint import text_fingerprint
from nca_jax.infra.records import METRICS
from nca_jax.infra.steps import saved_steps
from nca_jax.params import reference_init_from
from nca_jax.reference import ENCODING
from nca_jax.saved_config import CONFIG, check_same_run

CACHE = "--config.reference.cache="


class Point(NamedTuple):
    task: Task  # trains, and evaluates where that is asked for
    cache: Task | None  # makes the cached reference that it reads


def main(argv: list[str]) -> int:
    args, overrides = parse_arguments(argv)
    points, broken = make_points(args, overrides)
    tasks = [point.task for point in points]
    left = [point for point in points if commands_left(point.task)]
    caches = [point.cache for point in left if point.cache and commands_left(point.cache)]
    caches = list({cache.name: cache for cache in caches}.values())
    if args.is_print:
        print_commands(caches, tasks, broken)
        return bool(broken)

    out_folder(args.out)
    # Points of one shape share their compiled programs.
    env = {"JAX_COMPILATION_CACHE_DIR": str(args.out.absolute() / "compiled")} | os.environ
    lost = run_tasks(caches, jobs=args.jobs, env=env)
    for task, cache in left:
        if cache and cache.name in lost:
            broken[task.name] = f"{cache.name}: {lost[cache.name]}"
    ready = [task for task in tasks if task.name not in broken]
    broken |= run_tasks(ready, jobs=args.jobs, env=env)
    return report(args.out, broken)


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the sweep's own arguments, and the overrides that go to every point."""
    parser = argparse.ArgumentParser(
        prog="experiments.sweep", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--grid", action="append", default=[])
    parser.add_argument("--point", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--evaluate", type=int, default=0)
    parser.add_argument("--judge", default="")
    parser.add_argument("--text", default="")
    parser.add_argument("--print", action="store_true", dest="is_print")
    args, overrides = parser.parse_known_args(argv[1:])
    args.out = local_path(args.out)
    if min(args.seeds, args.jobs) < 1:
        raise UserError(f"--seeds={args.seeds} and --jobs={args.jobs} must be at least 1.")
    for flag in overrides:
        if not flag.startswith("--config.") or "=" not in flag:
            raise UserError(f"Unknown argument {flag!r}; overrides are --config.field=value.")
    return args, overrides


def make_points(args, overrides: list[str]) -> tuple[list[Point], dict[str, str]]:
    """Returns the points, settings first, seeds within; and {name: why} of those that are refused.

    A point is refused where its config is, or where its workdir holds a run of another one.

    Raises:
      UserError: a grid cannot be read, or gives a point twice.
    """
    points, broken = [], {}
    settings = named_settings(args.point)
    if args.grid or not settings:
        settings += [(setting_name(setting), setting) for setting in settings_of(args.grid)]
    names = set()
    for (of_setting, setting), seed in itertools.product(settings, range(args.seeds)):
        name = f"{of_setting}/seed={seed}"
        if name in names:
            raise UserError(f"--grid or --point gives {name} twice; write it once.")
        names.add(name)
        try:
            points.append(make_point(args, overrides, setting, seed, name))
        except UserError as error:
            broken[name] = str(error)
    return points, broken


def named_settings(points: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Returns (name, {field: value}) of every --point.

    Raises:
      UserError: a point is not NAME: FIELD=VALUE;FIELD=VALUE;...
    """
    named = []
    for point in points:
        name, colon, changes = point.partition(":")
        pairs = [change.strip().partition("=") for change in filter(None, changes.split(";"))]
        if not colon or not name or "/" in name or not all(x and y for x, y, _ in pairs):
            raise UserError(
                f"--point wants 'NAME: FIELD=VALUE;FIELD=VALUE'; {point!r} is not that."
            )
        named.append((name.strip(), {field: value for field, _, value in pairs}))
    return named


def settings_of(grids: Sequence[str]) -> list[dict[str, str]]:
    """Returns {name: value} of every point of every grid; no grid is one point without changes.

    Raises:
      UserError: an axis is not NAME=VALUE,VALUE,...
    """
    settings = []
    for grid in grids or [""]:
        axes = {}
        for axis in filter(None, grid.split(";")):
            name, _, values = axis.strip().partition("=")
            if not name or not all(values.split(",")):
                raise UserError(f"--grid wants NAME=VALUE,VALUE;NAME=...; {axis!r} is not that.")
            axes[name] = values.split(",")
        settings += [
            dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
        ]
    return settings


def setting_name(setting: dict[str, str]) -> str:
    """Returns the folder of a setting: "loss.alpha=0.1,config.algo=nca"."""
    return ",".join(f"{x}={value}" for x, value in setting.items()).replace("/", "_") or "base"


def make_point(args, overrides: list[str], setting: dict, seed: int, name: str) -> Point:
    """Returns the commands of one point.

    Raises:
      UserError: its config is refused, or the workdir holds a run of another config.
    """
    config, fields = args.config, []
    for field, value in setting.items():
        if field.startswith("config."):
            config += f"{',' if ':' in config else ':'}{field.removeprefix('config.')}={value}"
        else:
            fields.append(f"--config.{field}={value}")
    flags = [f"--config={config}", *overrides, *fields, f"--config.seed={seed}"]
    flags = [flag.replace("{seed}", str(seed)) for flag in flags]
    folder = next((x.partition("=")[2] for x in reversed(flags) if x.startswith(CACHE)), "")
    if "--config.reference.kind=cached" in flags and not folder:
        digest = reference_digest(parse_flags(["sweep", *flags, f"{CACHE}unknown"])[0])
        flags.append(f"{CACHE}{args.out / 'reference' / digest}")
    read, _ = parse_flags(["sweep", *flags])
    workdir = args.out / name
    if saved_steps(workdir):
        check_same_run(read, workdir / CONFIG)

    cache = None
    if read.reference.kind == "cached":
        folder = local_path(read.reference.cache)
        steps = ((nca_jax("precompute", *flags), "complete.json"),)
        cache = Task(f"reference {folder}", folder, steps)
    flags.append(f"--workdir={workdir}")
    steps = ((nca_jax("train", *flags), TRAINED),)
    if args.evaluate:
        flags.append(f"--num_prompts={args.evaluate}")
        flags += [f"--judge={args.judge}"] if args.judge else []
        flags += [f"--text={args.text}"] if args.text else []
        steps += ((nca_jax("evaluate", *flags), "evaluation.json"),)
    return Point(Task(name, workdir, steps), cache)


def nca_jax(name: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", f"nca_jax.{name}", *flags]


def reference_digest(config) -> str:
    """A digest of the fields that name a reference and its rows; train compares what they hold."""
    init_from = reference_init_from(config)
    parts = [init_from or config.seed, config.model.name, config.model.dtype, config.data.files]
    parts += [config.data.eval_files, config.data.tokenizer, *(config.data[x] for x in ENCODING)]
    if "lora" in config:  # neither rank nor scale nor targets: the base, and what goes on from it
        parts += [config.lora.base_dtype, config.lora.init_from]
    return text_fingerprint(json.dumps(parts))


def print_commands(caches: list[Task], tasks: list[Task], broken: dict[str, str]) -> None:
    """Prints what is left, a line a task; what to know about it goes to stderr."""
    left = [commands for task in [*caches, *tasks] if (commands := commands_left(task))]
    for commands in left:
        print(" && ".join(shlex.join(["python", *command[1:]]) for command in commands))
    if caches:
        print("Run the lines of nca_jax.precompute before the others.", file=sys.stderr)
    for name, why in broken.items():
        print(f"broken {name}: {why}", file=sys.stderr)


def report(out: Path, broken: dict[str, str]) -> int:
    """Writes the table and the page of what is there, and says what is broken.

    Returns the exit status: 1 if a point is broken, or the page could not be written.
    """
    print()
    runs, damaged = results.find_whole_runs([out]) if any(out.rglob(METRICS)) else ([], [])
    lines = "".join(f"- broken {name}: {why}\n" for name, why in broken.items())
    lines += "".join(f"- left out: {said}\n" for said in damaged)
    print(lines, end="")
    table = results.markdown(results.table(runs)) if runs else "No run has begun.\n"
    (out / "table.md").write_text(table + ("\n" + lines if lines else ""))
    print(table)
    return bool(broken or damaged or not runs or write_page(out))


def write_page(out: Path) -> int:
    """Returns the exit status of experiments.report, a command: a pod may have no matplotlib."""
    command = [sys.executable, "-m", "experiments.report", str(out), f"--out={out}/report.html"]
    return subprocess.run(command).returncode


if __name__ == "__main__":
    run_main(main, interrupted=GOES_ON)
