"""SIGTERM: finish the step, save, and say so; in one process or in many."""

import itertools
import signal
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils


def catch_sigterm() -> Callable[[], bool]:
    """Returns `asked_to_stop() -> bool`, to be called once a step: True when it is time to save.

    Alone, that is once SIGTERM has come. Among several processes it may come to any: they agree on
    a step that none of them has passed, and all save there. So each calls it at every step.
    """
    if jax.distributed.is_initialized():
        # Calls are counted, not steps: a SIGTERM before the first call means the first step.
        calls = itertools.count(1)
        return lambda: multihost_utils.reached_preemption_sync_point(next(calls))
    received = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    return lambda: bool(received)
