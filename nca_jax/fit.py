"""The training loop, as a function: what `train`, rounds and a notebook share.

It reads top to bottom in the order in which a step happens: the batch goes to the devices, the step
is dispatched, and while the devices run it the host reads the metrics of the step before.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict
from orbax.checkpoint import CheckpointManager

from nca_jax import flops
from nca_jax.axes import Params
from nca_jax.build import Run
from nca_jax.callable import make_callable
from nca_jax.checks import UserError
from nca_jax.data.pipeline import HostBatch
from nca_jax.infra import checkpoint
from nca_jax.infra.finite import bad_metrics, not_finite
from nca_jax.infra.mesh import put_batch
from nca_jax.infra.writer import SilentWriter
from nca_jax.params import starts_at_reference
from nca_jax.train_step import Frozen, Metrics, TrainState, TrainStep


class Tolerance(NamedTuple):
    """How far apart policy and reference may be at the start, nats a token."""

    mean: float  # of all tokens together: other tokens, masks or weights move it
    most: float  # of one response: a few tokens in bfloat16 are off by rounding alone


# The same arrays in the same program agree exactly; a cache was made by a program of another shape,
# in which a GPU rounds to bfloat16 in other places. SmolLM2-135M in bfloat16 is 0.036 from float32
# in a real response of 5 tokens, the most of 192, and 4e-4 on average over all of their tokens; a
# response may have a single token, whose rounding nothing averages.
START_TOLERANCES = {"float32": Tolerance(1e-3, 1e-3), "bfloat16": Tolerance(1e-2, 0.2)}


class Evaluator(NamedTuple):
    """Something that is measured while a run trains."""

    name: str  # the split that its metrics are written under
    every: int  # steps, and at the start and the end; 0: never
    measure: Callable[[Params], dict[str, float]]


class Writer(Protocol):
    """Where metrics go; see `infra.writer.MetricWriter`."""

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None: ...
    def advance(self) -> None: ...
    def sync(self) -> None: ...


class _Done(NamedTuple):
    """A step that was dispatched: what its line needs, and not the batch itself."""

    step: int
    metrics: Metrics
    examples: list[str]
    stats: dict[str, float]
    lengths: list[list[int]]


def fit(
    run: Run,
    state: TrainState,
    frozen: Frozen,
    batches: Iterable[HostBatch],
    *,
    train_step: TrainStep,
    steps: int,
    evaluators: Sequence[Evaluator] = (),
    writer: Writer | None = None,
    checkpoints: CheckpointManager | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Trains on `batches`, from the step that `state` is at, and returns the state after them.

    Every step is checked to be finite, one step late, and before anything is saved; so are the
    evaluations, and the state that is saved. The metrics of
    step 1, of every `config.log_every`-th and of the last one are written. It ends early where
    `stalled_since` says so. Called inside `jax.set_mesh(run.mesh)`.

    Args:
      state: is donated.
      batches: those of the steps that follow `state.step`, in order.
      train_step: from `programs.jit_train_step`, compiled or not.
      steps: of the whole run; its last step is evaluated and saved.
      evaluators: the metrics of the first say which checkpoint is the best.
      writer: None: metrics are checked and go nowhere.
      checkpoints: None: nothing is saved, and the run does not end early.
      asked_to_stop: called once a step; True: this step is the last one, and is saved.
    Raises:
      UserError: a loss, gradient, evaluation or saved state is not finite, or step 1 is not at the
        reference.
    """
    config, writer = run.config, writer or SilentWriter()
    step = first = int(state.step)
    by_metric = bool(config.checkpoint.best_metric)  # then a checkpoint is saved where it is known
    lap = _stopwatch()
    before: _Done | None = None

    def finish(done: _Done | None) -> None:
        if done is not None:
            write_step(writer, run, done, lap, steps, checkpoint.last_good(checkpoints))

    def evaluate(step: int) -> dict[str, float] | None:
        measured = None
        for one in evaluators:
            if step == 0 or is_time(step, one.every, steps):
                metrics = one.measure(state.params)
                check_evaluation(step, one.name, metrics, checkpoint.last_good(checkpoints))
                writer.write(step, one.name, metrics)
                measured = measured or metrics
        return measured

    if stalled_since(config, checkpoints, first) is not None:  # it has ended, and is resumed
        return state
    if first == 0:
        evaluate(0)
    for step, host in enumerate(batches, start=first + 1):
        on_mesh = put_batch(run.mesh, host.batch, config.data.rows)
        state, metrics = train_step(state, frozen, on_mesh)
        if step == first + 1:
            lap()  # its call compiles
        writer.advance()
        finish(before)
        before = _Done(step, metrics, host.examples, host.stats, host.lengths)

        is_stopped = asked_to_stop()
        is_eval = any(is_time(step, one.every, steps) for one in evaluators)
        is_save = is_time(step, config.save_every, steps) or is_stopped or (is_eval and by_metric)
        if not (is_eval or is_save):
            continue
        finish(before)  # a bad step must be neither evaluated nor saved
        before = None
        if is_save and checkpoints is not None:
            check_state(step, state, checkpoint.last_good(checkpoints))
        eval_metrics = evaluate(step) if is_eval else None
        if is_save and checkpoints is not None:
            writer.sync()
            checkpoint.save(checkpoints, state, eval_metrics)
        lap()
        if is_stopped or stalled_since(config, checkpoints, step) is not None:
            break
    finish(before)
    return state


def stalled_since(
    config: ConfigDict, checkpoints: CheckpointManager | None, step: int
) -> int | None:
    """Returns the step of the best checkpoint if a run ends early at `step`, else None.

    It does where `config.eval_patience` evaluations have followed and none was as good.
    """
    if not config.eval_patience or checkpoints is None:
        return None
    best = checkpoints.best_step()
    if best is None or step - best < config.eval_patience * config.eval_every:
        return None
    return best


def is_time(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last one, happens now."""
    return every > 0 and (step % every == 0 or step == last)


def _stopwatch() -> Callable[[], float]:
    """Returns a function that gives the seconds since it was called before."""
    then = time.perf_counter()

    def lap() -> float:
        nonlocal then
        now = time.perf_counter()
        seconds, then = now - then, now
        return seconds

    return lap


def write_step(
    writer: Writer, run: Run, done: _Done, lap: Callable[[], float], steps: int, last_good: str
) -> None:
    """Reads the metrics of a step as soon as it is done, checks them, and writes them if logged.

    Args:
      lap: gives the seconds since it was called before, when the step before was done.
      last_good: says which checkpoint there is where the step is bad.
    Raises:
      UserError: as `fit`.
    """
    found = jax.device_get(done.metrics)
    seconds = lap()
    prompt_loss = found.pop("prompt_loss")  # [B]
    metrics = {name: float(value) for name, value in found.items()}
    check_finite(done.step, done.examples, prompt_loss, metrics, last_good)
    if done.step == 1 and starts_at_reference(run.config):
        check_start(metrics, run.config)
    if done.step == 1 or is_time(done.step, run.config.log_every, steps):
        writer.write(done.step, "train", metrics | done.stats | speed(run, done, seconds))


def speed(run: Run, done: _Done, seconds: float) -> dict[str, float]:
    """Returns what a step of `seconds` did a second; mfu where the devices' peak is known."""
    rates = {
        "step_seconds": seconds,
        "useful_tokens_per_second": done.stats["scored_tokens"] / seconds,
    }
    mfu = flops.mfu(
        run.model.config,
        done.lengths,
        seconds=seconds,
        device_kind=run.mesh.devices.flat[0].device_kind,
        num_devices=run.mesh.size,
        adapters=run.model.adapter_params,
    )
    return rates if mfu is None else rates | {"mfu": mfu}


def check_finite(
    step: int,
    examples: Sequence[str],
    prompt_loss: np.ndarray,
    metrics: dict[str, float],
    last_good: str,
) -> None:
    """Raises UserError, naming the step and its records, if loss or gradient is not finite."""
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
        return
    is_bad = ~np.isfinite(prompt_loss[: len(examples)])
    bad = [where for where, is_it in zip(examples, is_bad, strict=True) if is_it] or examples
    raise UserError(
        f"Step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; records "
        f"{', '.join(bad[:8])}. {last_good} {_suspects(step - 1)}, or look at these records with "
        "nca_jax.inspect."
    )


def check_evaluation(step: int, name: str, metrics: dict[str, float], last_good: str) -> None:
    """Raises UserError, naming the step and the metrics, unless all of them are finite."""
    if bad := bad_metrics(metrics):
        raise UserError(f"Step {step}, {name}: {bad}. {last_good} {_suspects(step)}.")


def check_state(step: int, state: TrainState, last_good: str) -> None:
    """Raises UserError, naming the step and the arrays, unless all of a state is finite."""
    if bad := not_finite(state):
        raise UserError(
            f"Step {step}: {bad} hold NaN or infinity after its update, so it is not saved. "
            f"{last_good} Lower optim.lr."
        )


def _suspects(updates: int) -> str:
    """Says what to look at where a number is not finite after so many updates."""
    if updates:
        return "Lower optim.lr"
    return (
        "Nothing was trained before, so look at the reference, the weights that the run starts "
        "from, and the config's loss"
    )


def check_start(metrics: dict[str, float], config: ConfigDict) -> None:
    """Raises UserError unless an untrained policy is at the reference: log-ratios 0, known loss.

    A log-ratio that is not 0 and within the tolerance is said: a live reference is the same arrays
    in the same program, so it means that a cache, or another program, computed it.
    """
    if "start_loss" not in metrics:
        return
    allowed = START_TOLERANCES[config.model.dtype]
    mean, most = metrics["mean_logratio_per_token"], metrics["max_abs_logratio_per_token"]
    loss, start = metrics["loss"], metrics["start_loss"]
    is_apart = abs(mean) > allowed.mean or most > allowed.most
    if is_apart or (most == 0 and abs(loss - start) > 1e-5 * max(1.0, abs(start))):
        raise UserError(
            f"Step 1: policy and reference start equal, so log-ratios must be 0, within "
            f"{allowed.mean} nats a token on average and {allowed.most} in a response, and the "
            f"{config.loss.name} loss {start:.6f}; they are {mean:.6f} and up to {most:.6f}, and "
            f"{loss:.6f}. Tokens, masks, dtype or sharding differ between the two."
        )
    if most:
        print(
            f"step 1: log-probabilities of policy and reference differ by {mean:.1e} nats a token "
            f"on average and by up to {most:.1e} in a response, where 0 is expected of the same "
            f"arrays; tolerated up to {allowed.mean} and {allowed.most}"
        )


make_callable(__name__)
