"""Ours: the step that `nca_jax.train` runs, built from an ordinary config.

ours_fast keeps the products of each layer for the backward pass, ours_lean computes layers again.
`_live` runs the reference in the step; `_cached` is given the log-probabilities that the check
wrote, as `nca_jax.precompute` does for a run.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from experiments.speed.clock import Lap, Side, laps, measure
from nca_jax import build, losses, programs
from nca_jax.batch import Batch
from nca_jax.data.pipeline import Dataset
from nca_jax.flags import parse_flags
from nca_jax.infra.mesh import batch_shardings
from nca_jax.params import start_params
from nca_jax.train_step import TrainState

SETTINGS = {
    "fast": ("--config.model.scan_layers=True", "--config.model.remat=dots"),
    "lean": ("--config.model.scan_layers=True", "--config.model.remat=full"),
}


def config_of(job: dict, setting: str, *, live: bool):
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
        "loss.alpha": job["alpha"],
        "loss.beta": job["beta"],
        "optim.lr": job["lr"],
        "optim.schedule": "constant",
        "optim.warmup_frac": 0.0,
        "steps": 1,
        "epochs": 0.0,
        "eval_every": 0,
        "reference.kind": "live" if live else "cached",
        "reference.cache": "" if live else "unread",  # its numbers are in the job
    }
    argv = [f"--config.{name}={value}" for name, value in flags.items()]
    argv = [f"--config=configs/jsonl.py:{arg}", *argv, *SETTINGS[setting], *job["ours_flags"]]
    return parse_flags(["speed", *argv])[0]


class Program(NamedTuple):
    """A compiled training step, what it starts from, and what compiling took."""

    start: Callable[[], TrainState]  # fresh each time, for a step donates its state
    step: Callable[[TrainState], tuple[TrainState, dict]]
    compile_seconds: float
    hlo: str  # the optimised program


def compile_step(run: build.Run, batch: Batch, *, live: bool) -> Program:
    """Compiles the step of `nca_jax.train` for one batch, which stays the same."""
    config = run.config
    optimizer = programs.build_optimizer(config, steps=1)
    abstract, shardings = programs.abstract_state(run, optimizer.tx)
    ref_params = start_params(run, config.model.init_from) if live else None
    jitted = programs.jit_train_step(run, optimizer)
    began = time.perf_counter()
    compiled = jitted.lower(abstract, ref_params, batch).compile()
    compile_seconds = time.perf_counter() - began
    on_device = jax.device_put(batch, batch_shardings(run.mesh))
    make_state = jax.jit(
        lambda params: programs.new_state(run, optimizer.tx, params),
        out_shardings=shardings,
        donate_argnums=0,
    )
    return Program(
        start=lambda: make_state(start_params(run, config.model.init_from)),
        step=lambda state: jax.block_until_ready(compiled(state, ref_params, on_device)),
        compile_seconds=compile_seconds,
        hlo=compiled.as_text(),
    )


def time_steps(program: Program, state: TrainState, steps: int) -> list[Lap]:
    """Times steps one after the other, each from the state that the one before left."""

    def step() -> None:
        nonlocal state
        state, _ = program.step(state)

    return laps(step, steps)


def check_program(run: build.Run, batch: Batch, *, live: bool) -> dict:
    """Returns the numbers of `clock.Side.check`, and what a pass of the reference costs."""
    config = run.config
    step_logps = programs.jit_step_logps(run)
    params = start_params(run, config.model.init_from)
    jax.block_until_ready(step_logps(params, batch))  # compiles
    began = time.perf_counter()
    ref_logps = np.asarray(step_logps(params, batch))
    ref_seconds = time.perf_counter() - began
    batch = batch._replace(ref_logps=ref_logps)
    program = compile_step(run, batch, live=live)
    state, metrics = program.step(program.start())
    after = step_logps(state.params, batch)
    targets = losses.targets_from_scores(batch.scores, alpha=config.loss.alpha)
    rewards = config.loss.beta * (after - ref_logps)
    return {
        "loss": float(metrics["loss"]),
        "grad_norm": float(metrics["grad_norm"]),
        "logps": ref_logps.tolist(),
        "loss_after": float(losses.LOSSES[config.loss.name](rewards, targets).mean()),
        "logps_after": after.tolist(),
        "ref_seconds": ref_seconds,
    }


def open_side(job: dict, side: str) -> Side:
    _, setting, *rest = side.split("_")
    live = "live" in rest
    run = build.build(config_of(job, setting, live=live))
    data = run.config.data
    batch = Dataset(build.read_data(run).sources, data, seed=0).batch_at(0).batch
    facts = {"slots": int(batch.num_micro) * data.rows * data.row_len}
    facts["reference"] = "live" if live else "cached"

    def check() -> dict:
        with jax.set_mesh(run.mesh):
            return check_program(run, batch, live=live)

    def run_steps(steps: int) -> list[Lap]:
        with jax.set_mesh(run.mesh):
            ref_logps = np.zeros_like(batch.scores) if live else np.float32(job["ref_logps"])
            program = compile_step(run, batch._replace(ref_logps=ref_logps), live=live)
            facts["compile_seconds"] = program.compile_seconds
            state, _ = program.step(program.start())  # compiled already; this touches the memory
            return time_steps(program, state, steps)

    return Side(check, run_steps, facts)


if __name__ == "__main__":
    measure(open_side)
