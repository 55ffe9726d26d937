"""Train a policy: python -m nca_jax.train --config=FILE[:args] --workdir=DIR [--config.key=value].

    --workdir  a local folder or one on gs://
    --profile  N:M, the first and the last of the steps to trace; see nca_jax.infra.profile

The loop reads top to bottom in the order in which it happens. Start it again with the same command
after any stop, and it goes on where the last checkpoint is, bit for bit.
"""

import contextlib
import json
import math
import sys
import time

import jax
import numpy as np

from nca_jax import build, flops, programs
from nca_jax.checks import UserError, run_main
from nca_jax.config import check_same_run, flatten, parse_flags
from nca_jax.data.pipeline import Dataset, HostBatch, eval_batches
from nca_jax.evaluators import fill_reference, heldout_metrics
from nca_jax.files import AnyPath, as_path
from nca_jax.infra import checkpoint, distributed, profile
from nca_jax.infra.fingerprint import params_fingerprint, text_fingerprint
from nca_jax.infra.mesh import put_batch, rows_here
from nca_jax.infra.preemption import catch_sigterm
from nca_jax.infra.writer import MetricWriter, SilentWriter
from nca_jax.metrics import IS_BETTER_HIGH
from nca_jax.params import reference_init_from, start_params, starts_at_reference
from nca_jax.reference import examples_fingerprint, read_cached_logps

# How far apart policy and reference may be at the start, in nats of a whole response: the same
# parameters in the same program agree exactly, a cache was made by a program of another shape.
START_TOLERANCE = {"float32": 0.02, "bfloat16": 2.0}


def main(argv: list[str]) -> int:
    config, flags = parse_flags(argv, workdir=None, profile="")
    traced = profile.parse_steps(flags.profile)
    profile.check_within(traced, config.steps or sys.maxsize)
    workdir = as_path(flags.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    asked_to_stop = catch_sigterm()

    # ---- Mesh, model, data -------------------------------------------------------------------
    run = build.build(config)
    if (workdir / "config.json").exists():
        check_same_run(config, workdir / "config.json")
    data = build.read_data(run)
    for note in data.notes():
        print(note)
    live = config.reference.kind == "live"
    cached = None if live else read_cached_logps(run)
    training = [example for source in data.sources for example in source]
    distributed.check_same(
        config=text_fingerprint(json.dumps(flatten(config))),
        rows=examples_fingerprint([*training, *data.heldout]),
    )
    here = rows_here(run.mesh, config.data.rows)
    dataset = Dataset(
        data.sources,
        config.data,
        seed=config.seed,
        ref_logps=cached and cached(training),
        rows_here=here,
    )
    heldout = eval_batches(
        data.heldout, config.data, ref_logps=cached and cached(data.heldout), rows_here=here
    )
    steps = build.num_steps(config, len(dataset))
    profile.check_within(traced, steps)
    print(
        f"{len(dataset)} training prompts, {len(data.heldout)} held out, {steps} steps of "
        f"{config.data.batch_size} prompts on {run.mesh.size} devices"
    )

    # ---- Optimizer, shapes, shardings --------------------------------------------------------
    optimizer = programs.build_optimizer(config, steps)
    abstract, shardings = programs.abstract_state(run, optimizer.tx)

    # ---- Restore: 1. own workdir, 2. init_from, 3. random ------------------------------------
    # The context waits for a save that is under way, also when the run stops with an error.
    with (
        checkpoint.open_checkpoints(
            workdir,
            config.checkpoint,
            best_is_high=IS_BETTER_HIGH.get(config.checkpoint.best_metric, True),
        ) as checkpoints,
        jax.set_mesh(run.mesh),
    ):
        restored_step = checkpoints.latest_step()
        is_new = restored_step is None
        if not is_new:
            state = checkpoint.restore(checkpoints, restored_step, abstract, shardings)
            print(f"resumed after step {restored_step} from {workdir}")
        else:
            params = start_params(run, config.model.init_from)
            make_state = jax.jit(
                lambda params: programs.new_state(run, optimizer.tx, params),
                out_shardings=shardings,
                donate_argnums=0,
            )
            state = make_state(params)
        # The reference comes from where it first came, never from the workdir.
        ref_params = start_params(run, reference_init_from(config)) if live else None
        record_run(workdir, config, steps, ref_params)

        # ---- Compile -------------------------------------------------------------------------
        train_step = programs.jit_train_step(run, optimizer)
        step_logps = programs.jit_step_logps(run)
        if live and config.eval_every:
            heldout = fill_reference(step_logps, ref_params, heldout)

        # ---- Loop ----------------------------------------------------------------------------
        writer = (
            MetricWriter(workdir, config.log, restored_step=restored_step, num_steps=steps)
            if distributed.is_first()
            else SilentWriter()
        )
        traced_here = traced if distributed.is_first() else range(0)
        with (
            contextlib.closing(writer),
            profile.tracing(train_step, traced_here, workdir) as run_step,
        ):
            if is_new and config.eval_every:
                writer.write(0, "eval", heldout_metrics(step_logps, state.params, heldout, config))
            step = first = restored_step or 0
            unread: list[tuple[int, HostBatch, dict]] = []
            clock = time.perf_counter()
            for step, batch in enumerate(dataset.iterate(first, steps), start=first + 1):
                on_mesh = put_batch(run.mesh, batch.batch, config.data.rows)
                state, metrics = run_step(step, state, ref_params, on_mesh)
                unread.append((step, batch, metrics))
                writer.advance()
                is_last, is_stopped = step == steps, asked_to_stop()
                is_eval = bool(config.eval_every) and (step % config.eval_every == 0 or is_last)
                is_save = step % config.save_every == 0 or is_last or is_stopped
                if is_eval or is_save:  # all of them: a bad step must never be saved
                    clock = write_metrics(writer, unread, run, clock, is_new)
                elif step % config.log_every == 0 or step == 2:
                    # One step late, so that the device is busy while the host reads.
                    clock = write_metrics(writer, unread[:-1], run, clock, is_new)
                    unread = unread[-1:]
                eval_metrics = None
                if is_eval:
                    eval_metrics = heldout_metrics(step_logps, state.params, heldout, config)
                    writer.write(step, "eval", eval_metrics)
                if is_save:
                    writer.sync()
                    checkpoint.save(checkpoints, state, eval_metrics)
                if is_eval or is_save:
                    unread, clock = [], time.perf_counter()
                if is_stopped:
                    break

    # ---- Close -------------------------------------------------------------------------------
    if step < steps:
        print(f"SIGTERM: saved after step {step} of {steps}; the same command goes on from there.")
    else:
        print(f"done: {steps} steps in {workdir}")
    return 0


def record_run(workdir: AnyPath, config, steps: int, ref_params: dict | None) -> None:
    """Checks on a resume that the reference is still the same; writes config.json and run.json.

    Raises:
      UserError: the live reference has other values than when the run began.
    """
    path = workdir / "run.json"
    reference = "cached" if ref_params is None else params_fingerprint(ref_params)
    if path.exists() and json.loads(path.read_text())["reference"] != reference:
        raise UserError(
            f"{workdir} was trained against another reference than "
            f"{reference_init_from(config) or 'this seed'} now gives; restore that one, or "
            "use a new --workdir."
        )
    if distributed.is_first():
        checkpoint.write_json(workdir / "config.json", flatten(config))
        commit = checkpoint.git_commit()
        checkpoint.write_json(path, {"reference": reference, "commit": commit, "steps": steps})


def write_metrics(writer, unread: list, run: build.Run, clock: float, is_new: bool) -> float:
    """Reads the metrics of finished steps, checks them, and writes those that are logged.

    Returns the time to count the next steps from.

    Raises:
      UserError: a loss is not finite, or the first step of a new run is not at the reference.
    """
    config = run.config
    fetched = [(step, host, jax.device_get(metrics)) for step, host, metrics in unread]
    seconds = (time.perf_counter() - clock) / max(len(fetched), 1)
    for step, host, metrics in fetched:
        prompt_loss = metrics.pop("prompt_loss")  # [B]
        metrics = {name: float(value) for name, value in metrics.items()}
        check_finite(step, host.examples, prompt_loss, metrics)
        if step == 1 and is_new and starts_at_reference(config):
            check_start(metrics, config)
        if step == 1 or step % config.log_every == 0:
            writer.write(step, "train", metrics | host.stats | speed(run, host, seconds))
    return time.perf_counter()


def speed(run: build.Run, host: HostBatch, seconds: float) -> dict[str, float]:
    """Returns what a step of `seconds` did a second; mfu where the devices' peak is known."""
    rates = {
        "step_seconds": seconds,
        "useful_tokens_per_second": host.stats["scored_tokens"] / seconds,
    }
    mfu = flops.mfu(
        run.model.config,
        host.lengths,
        seconds=seconds,
        device_kind=run.mesh.devices.flat[0].device_kind,
        num_devices=run.mesh.size,
    )
    return rates if mfu is None else rates | {"mfu": mfu}


def check_finite(step: int, examples: list[str], prompt_loss: np.ndarray, metrics: dict) -> None:
    """Raises UserError, naming the step and its rows, if the loss or the gradient is not finite."""
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
        return
    is_bad = ~np.isfinite(prompt_loss[: len(examples)])
    rows = [where for where, bad in zip(examples, is_bad, strict=True) if bad] or examples
    raise UserError(
        f"Step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; rows "
        f"{', '.join(rows[:8])}. The run stops; its last checkpoint is good. Lower optim.lr, or "
        "look at these rows with nca_jax.inspect."
    )


def check_start(metrics: dict, config) -> None:
    """Raises UserError unless an untrained policy is at the reference: log-ratios 0, known loss."""
    tolerance = START_TOLERANCE[config.model.dtype]
    apart, loss, start = (metrics[x] for x in ("max_abs_logratio", "loss", "start_loss"))
    if apart > tolerance or abs(loss - start) > config.loss.beta * tolerance + 1e-5:
        raise UserError(
            f"Step 1: policy and reference start equal, so log-ratios must be 0 within {tolerance} "
            f"nats and the {config.loss.name} loss {start:.6f}; they are up to {apart:.6f} and "
            f"{loss:.6f}. Tokens, masks, dtype or sharding differ between the two."
        )


if __name__ == "__main__":
    run_main(distributed.together(main, saves_on_sigterm=True))
