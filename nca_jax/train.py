r"""Train a policy on scored responses.

    python -m nca_jax.train --config=FILE[:args] --workdir=DIR [--config.section.field=value ...]

--config        a config file or nca_jax:NAME, with its arguments; --help_config lists all fields;
                without it that of the run in --workdir goes on
--workdir       of the run: a local folder or one on gs://
--more_steps    N: a finished run goes on for N steps, from the peak learning rate without warmup
                through optim.schedule over these N; run.json says from which step
--profile       N:M, the first and the last of the steps to trace; see nca_jax.infra.profile
--host_timeout  seconds after which a process of several that says nothing is given up

The loop reads top to bottom in the order in which it happens. Start it again with the same command
after any stop, and it goes on where the last checkpoint is, bit for bit; or says what has changed
since. A workdir is that of one run at a time, which holds it.
"""

import contextlib
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from nca_jax import advice, build
from nca_jax.checks import UserError, run_main
from nca_jax.data.pipeline import Dataset, eval_batches
from nca_jax.data.table import Table, joined
from nca_jax.files import AnyPath, as_path, out_folder, whole_lines, write_json
from nca_jax.fit import fit, stalled_since
from nca_jax.flags import parse_flags
from nca_jax.infra import checkpoint, distributed, lock, profile, progress
from nca_jax.infra.fingerprint import tokenizer_fingerprint
from nca_jax.infra.log import LOG, logged
from nca_jax.infra.mesh import rows_here
from nca_jax.infra.preemption import stop_asked
from nca_jax.infra.records import (
    METRICS,
    extended,
    is_metrics,
    note_best,
    note_early_stop,
    read_run,
    record_run,
)
from nca_jax.infra.steps import best_step, saved_steps
from nca_jax.infra.writer import MetricWriter, SilentWriter
from nca_jax.params import (
    base_fingerprint,
    best_is_high,
    open_base,
)
from nca_jax.programs import (
    build_optimizer,
    jit_step_logps,
    jit_train_step,
)
from nca_jax.reference import cache_date, examples_fingerprint, make_reference
from nca_jax.saved_config import (
    CONFIG,
    VERSION,
    check_same_run,
    config_json,
    read_saved,
    saved_version,
)
from nca_jax.start import make_evaluators, open_state
from nca_jax.train_step import Frozen, TrainState


def main(argv: list[str]) -> int:
    config, flags = parse_flags(argv, workdir=None, profile="", more_steps=0)
    if "rounds" in config:
        raise UserError("config.rounds is of nca_jax.rounds: start that, or leave the section out.")
    traced = profile.parse_steps(flags.profile)
    workdir = out_folder(flags.workdir, "--workdir")
    with lock.held(workdir) as check_held, logged(workdir, check_held):
        return train(config, workdir, traced, flags.more_steps, check_held)


def train(
    config: ConfigDict,
    workdir: AnyPath,
    traced: range,
    more_steps: int,
    check_held: lock.CheckHeld,
) -> int:
    """Trains in a workdir that this process holds, and returns the exit status.

    Args:
      more_steps: by which a finished run is extended; 0: none.
    """
    started = time.perf_counter()
    # ---- Mesh, model, data -------------------------------------------------------------------
    began, log_every, version = None, config.log_every, VERSION
    saved = saved_steps(workdir)
    if saved:
        config = check_same_run(config, workdir / CONFIG)
        began, log_every = read_run(workdir), read_saved(workdir / CONFIG).log_every
        version = saved_version(workdir / CONFIG)
    elif (workdir / CONFIG).exists():
        print(f"{workdir} has no checkpoint of the run that was started there: it starts anew")
    extensions = extended(began, max(saved, default=0), more_steps)
    more = [one["steps"] for one in extensions]
    if config.steps:
        profile.check_within(traced, config.steps + sum(more))
    run, data = build.read_all(config, date=start_date(config, began))
    config = run.config
    for note in data.notes():
        print(note)
    training, held = data.training, data.heldout
    distributed.check_same(records=examples_fingerprint(joined([training, held])))

    # The contexts wait for a save that is under way, also when the run stops with an error.
    with (
        contextlib.ExitStack() as until_saved,
        checkpoint.open_checkpoints(
            workdir,
            config.checkpoint,
            best_is_high=best_is_high(config),
        ) as checkpoints,
        jax.set_mesh(run.mesh),
    ):
        if distributed.is_first():
            until_saved.callback(checkpoint.remove_unfinished, workdir)
        # ---- Base, reference, batches --------------------------------------------------------
        # It comes from where it first came, never from the workdir.
        base = open_base(run)
        reference = make_reference(run, base)
        here = rows_here(run.mesh, config.data.rows)
        dataset = Dataset(
            data.sources,
            config.data,
            seed=config.seed,
            ref_logps=reference.cached(training),
            rows_here=here,
        )
        heldout = {
            split: eval_batches(
                examples, config.data, ref_logps=reference.cached(examples), rows_here=here
            )
            for split, examples in data.splits.items()
        }
        base_steps = build.num_steps(config, len(dataset))
        steps = base_steps + sum(more)
        profile.check_within(traced, steps)
        for line in advice.before_training(
            dataset.examples,
            config,
            steps,
            num_heldout=len(held),
            num_devices=run.mesh.size,
        ):
            print(line)
        now = {
            "reference": reference.fingerprint,
            "tokenizer": tokenizer_fingerprint(run.tokenizer),
            "eos_ids": list(run.eos_ids),
            "date": run.date,
            "records": " + ".join(map(counted, data.sources)),
            "heldout": counted(held),
            "score_unit": data.score_unit,
            "steps": base_steps,
        }
        now |= {"more_steps": extensions} if extensions else {}
        now |= {} if base is None else {"base": base_fingerprint(base)}
        for note in record_run(workdir, began, now):
            print(note)
        if distributed.is_first():
            write_json(workdir / CONFIG, config_json(config, version))

        # ---- State: 1. own workdir, 2. init_from, 3. random ----------------------------------
        optimizer = build_optimizer(config, base_steps, more)
        state, restored_step = open_state(run, optimizer, checkpoints, base, reference)
        if restored_step is not None:
            print(f"resumed after step {restored_step} from {workdir}")
        frozen = Frozen(base, reference.params)
        print(said_sizes(state, frozen))
        print(f"outputs in {workdir}: checkpoints, metrics.jsonl, {LOG} (what is said here)")

        # ---- Compile -------------------------------------------------------------------------
        train_step = progress.first_call("a step", jit_train_step(run, optimizer, frozen))
        step_logps = progress.first_call("held-out log-probabilities", jit_step_logps(run))
        evaluators = make_evaluators(run, step_logps, frozen, heldout)

        # ---- Loop ----------------------------------------------------------------------------
        stop = until_saved.enter_context(stop_asked())
        first = restored_step or 0
        writer = (
            MetricWriter(
                workdir,
                config.log,
                restored_step=restored_step,
                num_steps=steps,
                log_every=log_every,
                check_held=check_held,
            )
            if distributed.is_first()
            else SilentWriter()
        )
        traced_here = traced if distributed.is_first() else range(0)
        with (
            contextlib.closing(writer),
            profile.tracing(train_step, traced_here, workdir, first=first + 1) as traced_step,
        ):
            state = fit(
                run,
                state,
                frozen,
                dataset.iterate(first, steps),
                train_step=traced_step,
                steps=steps,
                evaluators=evaluators,
                writer=writer,
                checkpoints=checkpoints,
                asked_to_stop=stop.asked,
            )
        best = stalled_since(config, checkpoints, int(state.step))
        if best is not None and distributed.is_first():
            note_early_stop(workdir, int(state.step))

    # ---- Close -------------------------------------------------------------------------------
    if distributed.is_first():
        note_best(workdir, best_step(workdir, config.checkpoint, best_is_high=best_is_high(config)))
    step = int(state.step)
    if best is not None and step < steps:
        print(
            f"early stop after step {step} of {steps}: {config.checkpoint.best_metric} was best at "
            f"step {best}, and {config.eval_patience} evaluations since were not as good; with a "
            "larger config.eval_patience the run goes on"
        )
    elif step < steps:
        print(f"{stop.name}: saved after step {step} of {steps}; the same command goes on.")
    else:
        if peak := progress.peak_memory(run.mesh.local_devices[0]):
            print(f"a device held at most {peak}")
        took = progress.duration(time.perf_counter() - started)
        print(f"done: {steps} steps in {workdir}, {took} since the start")
        if distributed.is_first():
            for line in advice.after_training(whole_lines(workdir / METRICS, is_metrics)):
                print(line)
        is_policy = config.model.head == "lm"
        can_evaluate, can_sample = bool(len(held)), is_policy and run.tokenizer is not None
        rounded = "lora" in config and config.lora.base_dtype not in ("", "float32")
        export = " --merge=dequantised" if rounded else ""  # there is no default
        can = {"can_evaluate": can_evaluate, "can_sample": can_sample}
        print(*advice.what_next(workdir, **can, export=export), sep="\n")
    return 0


def said_sizes(state: TrainState, frozen: Frozen) -> str:
    """Returns how many parameters are trained, and what is in the memory of a device for them."""
    held = {"parameters": state.params, "optimizer": state.opt_state} | frozen._asdict()
    said = [f"{name} {progress.size_here(x)}" for name, x in held.items() if x]
    return f"{progress.num_values(state.params):,} parameters; on a device {', '.join(said)}"


def start_date(config: ConfigDict, began: dict[str, Any] | None) -> str:
    """Returns the date that chat templates write: of the run, else of its cache, else "", today."""
    cache = config.reference.cache
    return (began or {}).get("date", "") or (cache and cache_date(as_path(cache)))


def counted(examples: Table) -> str:
    """Returns how many examples there are, and a digest of them, in their order."""
    return f"{len(examples)} ({examples_fingerprint(examples)})"


if __name__ == "__main__":
    run_main(
        distributed.together(main, saves_when_stopped=True),
        interrupted="before the first step; nothing to save",
    )
