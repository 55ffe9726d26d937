"""Profiles of a run: `--profile=N:M` writes what the host and its devices did in steps N to M.

`xprof DIR/profile` shows DIR/profile/plugins/profile/TIME/HOST.xplane.pb, and so does TensorBoard
with its profile plugin. Among several processes the first alone traces its host and its devices.
"""

import contextlib
import itertools
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import jax

from nca_jax.checks import UserError
from nca_jax.files import AnyPath, copy_into

Args = ParamSpec("Args")  # of a train step
Result = TypeVar("Result")

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


def check_within(traced: range, last: int) -> None:
    """Raises UserError unless a run of `last` steps has all of the steps `traced`."""
    if traced and traced[-1] > last:
        raise UserError(f"--profile={traced[0]}:{traced[-1]}, but the run has {last} steps.")


@contextlib.contextmanager
def tracing(
    train_step: Callable[Args, Result], traced: range, workdir: AnyPath, *, first: int
) -> Iterator[Callable[Args, Result]]:
    """Gives `run(*args)`, which is `train_step(*args)`, and is traced for the steps `traced`.

    Its first call is step `first`, the next one `first` + 1.

    The devices are idle when the trace begins, and have done the last step when it ends; it also
    ends where the body does, so that a run that is stopped keeps what there is. A run that resumes
    after some of the steps traces the others.
    """
    trace, has_begun = contextlib.ExitStack(), False

    numbers = itertools.count(first)

    def run(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        nonlocal has_begun
        step = next(numbers)
        if step not in traced:
            return train_step(*args, **kwargs)
        if not has_begun:
            has_begun = True
            jax.block_until_ready((args, kwargs))
            trace.enter_context(_trace(workdir))
        with jax.profiler.StepTraceAnnotation(STEP, step_num=step):
            result = train_step(*args, **kwargs)
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
            print(f"traced: {workdir / 'profile'}")
