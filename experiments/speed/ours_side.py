"""Ours: the step that `nca_jax.train` runs, built from an ordinary config.

ours_fast keeps the products of each layer for the backward pass, ours_lean computes layers again.
`_live` runs the reference in the step; `_cached` is given the log-probabilities that the check
wrote, as `nca_jax.precompute` does for a run; `_bf16` has matmuls in bfloat16.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from experiments.speed.clock import Lap, Side, laps, measure
from nca_jax import build, programs
from nca_jax.axes import Params
from nca_jax.batch import Batch
from nca_jax.data.pipeline import Dataset, HostBatch
from nca_jax.evaluators import heldout_metrics
from nca_jax.fit import fit
from nca_jax.flags import parse_flags
from nca_jax.infra.writer import SilentWriter
from nca_jax.losses import LOSSES
from nca_jax.params import open_base, start_trained
from nca_jax.reference import open_reference
from nca_jax.train_step import Frozen, TrainState

SETTINGS = {
    "fast": ("--config.model.scan_layers=True", "--config.model.remat=dots"),
    "lean": ("--config.model.scan_layers=True", "--config.model.remat=full"),
}


def config_of(job: dict, setting: str, *, live: bool, dtype: str = "float32"):
    """Returns the checked config of a job: configs/jsonl.py with the job's sizes."""
    arg = f"files={job['rows']},init_from={job['model']},algo={job['loss']},k={job['k']}"
    flags = {
        "data.tokenizer": "none",
        "data.shuffle": False,
        "data.choose": "all",
        "data.eval_fraction": 0.0,
        "data.max_prompt_len": job["row_len"],
        "data.max_response_len": job["row_len"],
        "data.batch_size": job["batch_size"],
        "data.row_len": job["row_len"],
        "loss.logits_chunk": job["logits_chunk"],
        **{f"loss.{name}": job[name] for name in LOSSES[job["loss"]].fields if name in job},
        "optim.lr": job["lr"],
        "optim.schedule": "constant",
        "optim.warmup_frac": 0.0,
        "steps": 1,
        "epochs": 0.0,
        "eval_every": 0,
        "reference.kind": "live" if live else "cached",
        "reference.cache": "" if live else "unread",  # its numbers are in the job
    }
    if job["adapter"]:
        flags |= {"lora.init_from": job["adapter"]}
    flags |= {"model.dtype": dtype}
    argv = [f"--config.{name}={value}" for name, value in flags.items()]
    argv = [f"--config=configs/jsonl.py:{arg}", *argv, *SETTINGS[setting], *job["ours_flags"]]
    return parse_flags(["speed", *argv])[0]


class Program(NamedTuple):
    """A compiled training step, what it starts from, and what compiling took."""

    run: build.Run
    frozen: Frozen
    start: Callable[[], TrainState]  # fresh each time, for a step donates its state
    train_step: Callable
    compile_seconds: float
    hlo: str  # the optimised program


def compile_step(run: build.Run, base: Params | None, batch: Batch, *, live: bool) -> Program:
    """Compiles the step of `nca_jax.train` for batches of one shape; `base` is `open_base`'s."""
    optimizer = programs.build_optimizer(run.config, steps=1)
    abstract, _ = programs.abstract_state(run, optimizer.tx)
    frozen = Frozen(base, open_reference(run, base) if live else None)
    jitted = programs.jit_train_step(run, optimizer, frozen)
    began = time.perf_counter()
    compiled = jitted.lower(abstract, frozen, batch).compile()
    return Program(
        run,
        frozen,
        start=lambda: programs.start_state(run, optimizer, start_trained(run, base)),
        train_step=compiled,
        compile_seconds=time.perf_counter() - began,
        hlo=compiled.as_text(),
    )


class LastMetrics(SilentWriter):
    """Keeps the metrics of the last step."""

    metrics: dict[str, float]

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        self.metrics = metrics


def train(
    program: Program, state: TrainState, host: HostBatch
) -> tuple[TrainState, dict[str, float]]:
    """Returns the state after one step of the training loop, and its metrics."""
    writer = LastMetrics()
    state = fit(
        program.run,
        state,
        program.frozen,
        [host],
        train_step=program.train_step,
        steps=int(state.step) + 1,
        writer=writer,
    )
    return jax.block_until_ready(state), writer.metrics


def time_steps(program: Program, state: TrainState, host: HostBatch, steps: int) -> list[Lap]:
    """Times steps one after the other, each from the state that the one before left."""

    def step() -> None:
        nonlocal state
        state, _ = train(program, state, host)

    return laps(step, steps)


def check_program(run: build.Run, host: HostBatch, *, live: bool) -> dict:
    """Returns the numbers of `clock.Side.check`, and what a pass of the reference costs."""
    step_logps = programs.jit_step_logps(run)
    base = open_base(run)
    params = Frozen(base).whole(start_trained(run, base))
    jax.block_until_ready(step_logps(params, host.batch))  # compiles
    began = time.perf_counter()
    ref_logps = np.asarray(step_logps(params, host.batch))
    ref_seconds = time.perf_counter() - began
    host = with_reference(host, None if live else ref_logps)
    program = compile_step(run, base, host.batch, live=live)
    state, metrics = train(program, program.start(), host)
    given, params = with_reference(host, ref_logps), program.frozen.whole(state.params)
    after = heldout_metrics(step_logps, params, [given], run.config)
    return {
        "loss": metrics["loss"],
        "grad_norm": metrics["grad_norm"],
        "logps": ref_logps.tolist(),
        "loss_after": after["loss"],
        "logps_after": np.asarray(step_logps(params, host.batch)).tolist(),
        "ref_seconds": ref_seconds,
    }


def with_reference(host: HostBatch, ref_logps: np.ndarray | None) -> HostBatch:
    """Returns the batch with the log-probabilities of a cached reference, or without."""
    return host._replace(batch=host.batch._replace(ref_logps=ref_logps))


def open_side(job: dict, side: str) -> Side:
    _, setting, *rest = side.split("_")
    live, dtype = "live" in rest, "bfloat16" if "bf16" in rest else "float32"
    run = build.build(config_of(job, setting, live=live, dtype=dtype))
    data = run.config.data
    host = Dataset(build.read_data(run).sources, data, seed=0).batch_at(0)
    facts = {"slots": int(host.batch.num_micro) * data.rows * data.row_len}
    facts["reference"] = "live" if live else "cached"

    def check() -> dict:
        with jax.set_mesh(run.mesh):
            return check_program(run, host, live=live)

    def run_steps(steps: int) -> list[Lap]:
        with jax.set_mesh(run.mesh):
            given = with_reference(host, None if live else np.float32(job["ref_logps"]))
            program = compile_step(run, open_base(run), given.batch, live=live)
            facts["compile_seconds"] = program.compile_seconds
            state, _ = train(program, program.start(), given)  # this touches the memory
            found = time_steps(program, state, given, steps)
            if stats := jax.local_devices()[0].memory_stats():  # not of a CPU
                facts["peak_bytes"] = stats["peak_bytes_in_use"]
            return found

    return Side(check, run_steps, facts)


if __name__ == "__main__":
    measure(open_side)
