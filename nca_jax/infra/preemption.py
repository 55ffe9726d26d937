"""A run that is asked to stop finishes its step, saves, and says so; in one process or in many."""

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils

from nca_jax import signals


class Stop(NamedTuple):
    """How a loop learns that it is to stop.

    Attributes:
      asked: to be called once a step; True: it is time to save. Alone, that is once Ctrl-C, SIGTERM
        or SIGHUP has come. Among several processes it may come to any: they agree on a step that
        none of them has passed, and all save there. So each calls it at every step.
      received: the signals that came to this process.
    """

    asked: Callable[[], bool]
    received: list[int]

    @property
    def name(self) -> str:
        return signal.Signals(self.received[0]).name if self.received else "SIGTERM"


@contextlib.contextmanager
def stop_asked() -> Iterator[Stop]:
    """Gives a `Stop`. A second signal within the body ends the process at once.

    Before the first call a signal interrupts, as it does everywhere else: a start reads and
    compiles for minutes, and has nothing to save.
    """
    received = []

    def pass_on(number: int) -> None:
        received.append(number)
        os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.ExitStack() as until_end:
        calls = itertools.count(1)

        def asked_alone() -> bool:
            if next(calls) == 1:
                until_end.enter_context(signals.caught(received.append))
            return bool(received)

        def asked_together() -> bool:
            call = next(calls)  # of calls, not steps: SIGTERM before the first means the first step
            if call == 1:  # JAX's service hears SIGTERM alone, and takes it from Python
                others = (signal.SIGINT, signal.SIGHUP)
                until_end.enter_context(signals.caught(pass_on, others))
            return multihost_utils.reached_preemption_sync_point(call)

        is_alone = not jax.distributed.is_initialized()
        yield Stop(asked_alone if is_alone else asked_together, received)
