r"""What a step takes on this machine's chips, over kernels' blocks, recomputation and options.

    python -m experiments.tpu_bench --out=FILE.json [--model=smollm2_135m] [--steps=10] [--smoke]

One host with all of its devices, random weights, a cached reference; a prompt of 512 tokens with
four responses of 896 fills a row of 4096, one row a device. Each trial changes one thing of what
`nca_jax.train` would choose here, in a process of its own, so that one that needs too much memory
says so and the others go on. The file is whole after each trial; times are of steps that are waited
for, after one that is not counted.

    --model  a size of docs/config.md; 7B wants the memory of eight v6e
    --steps  that are timed
    --smoke  a tiny model on short rows: seconds on a CPU
"""

import argparse
import concurrent.futures
import contextlib
import importlib.metadata
import io
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.speed.clock import laps
from experiments.speed.ours_side import compile_step, with_reference
from nca_jax import build, flops
from nca_jax.chips import CHIPS
from nca_jax.data.pipeline import Dataset
from nca_jax.files import write_json
from nca_jax.flags import parse_flags
from nca_jax.infra.compiler import OPTIONS
from nca_jax.infra.mesh import put_batch
from nca_jax.infra.records import git_commit
from nca_jax.params import open_base

K = 4
GIB = 2**30
SIZE, TIMES = 8192, 10  # of the product that says what the chip does at most
LARGE = ",".join(f"block_{x}=1024" for x in ("q", "kv", "q_dkv", "kv_dkv"))
REMAT = ("none", "dots", "attention", "full")
SCAN = "--config.model.scan_layers=True"


class Work(NamedTuple):
    """What every trial computes."""

    model: str
    prompt_len: int
    response_len: int
    steps: int


class Trial(NamedTuple):
    """What is changed in it, beside what would be chosen."""

    flags: tuple[str, ...] = ()  # of `nca_jax.train`
    rows: int = 1  # a device


def trials(device_kind: str) -> dict[str, Trial]:
    """Returns the trials by name: nothing, then one change each."""
    found = {"as chosen": Trial(), "2 rows": Trial(rows=2)}
    for remat in REMAT:
        found[f"remat={remat}"] = Trial((SCAN, f"--config.model.remat={remat}"))
    if device_kind not in CHIPS:
        return found
    if off := ",".join(f"{option.name}=false" for option in OPTIONS.get(device_kind, ())):
        found["no options"] = Trial((f"--config.compiler_options={off}",))
    splash = {
        "blocks of 1024": f"{LARGE},block_q_dq=1024,block_kv_dq=1024",
        "fused": "use_fused_bwd_kernel=1",
        "fused, 1024": f"{LARGE},use_fused_bwd_kernel=1",
    }
    found |= {name: Trial((f"--config.model.splash={x}",)) for name, x in splash.items()}
    return found | {"blocks of 256": Trial(("--config.data.block=256",)), "4 rows": Trial(rows=4)}


def look() -> dict[str, Any]:
    """Returns what the devices are, and operations a second of a large product on one of them."""
    device = jax.devices()[0]
    size = SIZE // 8 if device.platform == "cpu" else SIZE
    peaks = {}
    for dtype in ("bfloat16", "float32"):
        a, b = jax.random.normal(jax.random.key(0), (2, size, size)).astype(dtype)
        product = jax.jit(lambda a, b: a @ b)
        jax.block_until_ready(product(a, b))
        timed = laps(lambda a=a, b=b, f=product: jax.block_until_ready(f(a, b)), TIMES)
        peaks[dtype] = 2 * size**3 / min(lap.seconds for lap in timed)
    return {
        "device_kind": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "libtpu": installed("libtpu"),
        "commit": git_commit(),
        "product_flops_per_second": peaks,
    }


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(work: Work, trial: Trial) -> dict[str, Any]:
    """Returns the times of a step, what it did in them, and the memory of a device."""
    rows = trial.rows * jax.device_count()
    with tempfile.TemporaryDirectory() as folder:
        write_records(Path(folder) / "records.jsonl", work, rows)
        argv = [
            "tpu_bench",
            f"--config=configs/jsonl.py:files={folder}/records.jsonl,model={work.model},k={K}",
            *("--config.data.tokenizer=none", "--config.data.eval_fraction=0"),
            *("--config.reference.kind=cached", "--config.reference.cache=unread"),
            f"--config.data.max_prompt_len={work.prompt_len}",
            f"--config.data.max_response_len={work.response_len}",
            *(f"--config.data.rows={rows}", f"--config.data.batch_size={rows}", *trial.flags),
        ]
        run, data = build.read_all(parse_flags(argv)[0])
    host = Dataset(data.sources, run.config.data, seed=0).batch_at(0)
    host = with_reference(host, np.zeros_like(host.batch.scores))
    with jax.set_mesh(run.mesh):
        program = compile_step(run, open_base(run), host.batch, live=False)
        on_mesh = put_batch(run.mesh, host.batch, rows)
        state = program.start()

        def step() -> None:
            nonlocal state
            state, metrics = program.train_step(state, program.frozen, on_mesh)
            jax.block_until_ready((state, metrics))

        step()
        seconds = [lap.seconds for lap in laps(step, work.steps)]
    median = statistics.median(seconds)
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "compile_seconds": program.compile_seconds,
        "step_seconds": seconds,
        "median_seconds": median,
        "tokens_per_second": sum(map(sum, host.lengths)) / median,  # all of them are needed
        "mfu": flops.mfu(
            run.model.config,
            host.lengths,
            seconds=median,
            device_kind=device.device_kind,
            num_devices=run.mesh.size,
        ),
        "peak_gib": stats["peak_bytes_in_use"] / GIB if "peak_bytes_in_use" in stats else None,
        "micro_batches": int(host.batch.num_micro),
        "config": run.config.to_dict(),
    }


def write_records(path: Path, work: Work, num: int) -> None:
    """Writes so many prompts of random ids, all of full length."""
    rng = np.random.default_rng(0)

    def ids(length: int) -> list[int]:
        return rng.integers(3, 250, length).tolist()

    with path.open("w") as file:
        for _ in range(num):
            responses = [ids(work.response_len) for _ in range(K)]
            record = {"prompt_ids": ids(work.prompt_len), "response_ids": responses}
            file.write(json.dumps(record | {"scores": list(range(K))}) + "\n")


def alone(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Returns what a function gives in a fresh process, the chips' only one; or what it died of."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(silent, function, *args).result()
        except Exception as error:  # a trial that fails is a finding too
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def silent(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Returns what a function gives, without what it prints on the way."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    work = Work("tiny", 32, 24, 2) if args.smoke else Work(args.model, 512, 896, args.steps)
    found = alone(look)
    if "error" in found:
        raise SystemExit(f"JAX has no device here: {found['error']}")
    peak = found["product_flops_per_second"]["bfloat16"]
    print(
        f"{found['devices']} x {found['device_kind']}, {peak / 1e12:.1f} TFLOP/s of one in bfloat16"
    )
    report = found | {"work": work._asdict(), "trials": {}}
    print(f"{'trial':<16} {'s a step':>9} {'tokens/s':>10} {'MFU':>6} {'GiB':>6}")
    for name, trial in trials(found["device_kind"]).items():
        began = time.perf_counter()
        result = alone(measure, work, trial) | {"trial": trial._asdict()}
        report["trials"][name] = result | {"seconds_in_all": time.perf_counter() - began}
        write_json(args.out, report)
        print(f"{name:<16} {said(result)}", flush=True)
    print(f"all of it is in {args.out}")


def said(result: dict[str, Any]) -> str:
    """Returns the numbers of a trial in a line; "-" for what the device does not say."""
    if "error" in result:
        return result["error"][:80]
    mfu, gib = result["mfu"], result["peak_gib"]
    return (
        f"{result['median_seconds']:9.3f} {result['tokens_per_second']:10.0f} "
        f"{'-' if mfu is None else f'{mfu:.1%}':>6} {'-' if gib is None else f'{gib:.2f}':>6}"
    )


if __name__ == "__main__":
    main()
