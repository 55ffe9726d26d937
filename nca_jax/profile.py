"""Profiles of a run: `--profile=N:M` writes what the host and its devices did in steps N to M.

`xprof DIR/profile` shows DIR/profile/plugins/profile/TIME/HOST.xplane.pb, and so does TensorBoard
with its profile plugin. Among several processes the first alone traces its host and its devices.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from nca_jax.checks import UserError
from nca_jax.files import AnyPath, copy_into

STEP = "train"  # the name of a step in the trace; its step_num is the number in metrics.jsonl


def parse_steps(text: str) -> range:
    """Returns the steps of "N:M", both of them included; none for "".

    Raises:
      UserError: it is not N:M with 1 <= N <= M.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(int(found[1]), int(found[2]) + 1) if found else range(0)
    if not steps or steps[0] < 1:
        raise UserError(
            f"--profile={text!r} is not N:M, the first and the last step to trace, from 1 on."
        )
    return steps


def check_ahead(traced: range, *, done: int, last: int) -> None:
    """Raises UserError unless a run that has done `done` of `last` steps will do all `traced`."""
    if traced and not done < traced[0] <= traced[-1] <= last:
        raise UserError(
            f"--profile={traced[0]}:{traced[-1]}, but the steps to come are {done + 1} to {last}."
        )


@contextlib.contextmanager
def tracing(train_step: Callable, traced: range, workdir: AnyPath) -> Iterator[Callable]:
    """Gives `run(step, *args)`, which is `train_step(*args)`, and is traced for the steps `traced`.

    The devices are idle when a trace begins, and have done the last step when it ends; it also ends
    where the body does, so that a run that is stopped keeps what there is.
    """
    trace = contextlib.ExitStack()

    def run(step: int, *args):
        if step not in traced:
            return train_step(*args)
        if step == traced[0]:
            jax.block_until_ready(args)
            trace.enter_context(_trace(workdir))
        with jax.profiler.StepTraceAnnotation(STEP, step_num=step):
            result = train_step(*args)
        if step == traced[-1]:
            jax.block_until_ready(result)
            trace.close()
        return result

    with trace:
        yield run


@contextlib.contextmanager
def _trace(workdir: AnyPath) -> Iterator[None]:
    """Traces the body into `workdir`/profile, by way of a local folder: XLA writes to no other."""
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        try:
            yield
        finally:
            jax.profiler.stop_trace()
            copy_into(Path(folder), workdir / "profile")
