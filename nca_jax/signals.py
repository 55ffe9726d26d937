"""What Ctrl-C, `kill` and a terminal that goes away do to a command.

It is interrupted: it cleans up, says so in one line, and ends with status 128 + the signal's
number. What can save asks to be told instead (`caught`): the first signal is its own to answer, and
a second one ends the process at once. A signal that is ignored, as `nohup` has it, stays so.

Native code that runs for minutes sees no signal before it returns. So a thread watches, and ends
the process that does not end by itself.
"""

import contextlib
import itertools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 5.0  # seconds that a command has to clean up once it is interrupted
ECHO = 0.2  # seconds: `timeout`, or a terminal and a launcher, may send one and the same stop twice


Handler = Callable[[int, FrameType | None], object]


class Interrupted(KeyboardInterrupt):
    """One of SIGNALS has come."""

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.status = 128 + number


def while_importing(package: str) -> None:
    """Ends `python -m PACKAGE.COMMAND` at once, until it watches: its imports take seconds.

    In any other program that imports the package nothing changes.
    """
    words = itertools.pairwise(sys.orig_argv)
    if any(flag == "-m" and name.startswith(f"{package}.") for flag, name in words):
        handle(lambda number, frame: _end(number))


def watch() -> None:
    """From now on the first of SIGNALS raises Interrupted in the main thread."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    handle(_interrupt)


@contextlib.contextmanager
def caught(
    answer: Callable[[int], object], numbers: Sequence[signal.Signals] = SIGNALS
) -> Iterator[None]:
    """Within the body the first of `numbers` calls `answer(number)`, and is no interrupt."""
    received = []

    def hear(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            answer(number)

    before = handle(hear, numbers)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def handle(handler: Handler, numbers: Sequence[signal.Signals] = SIGNALS) -> dict[int, Any]:
    """Sets the handler of signals that are not ignored; returns {number: its handler before}."""
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def _interrupt(number: int, frame: FrameType | None) -> None:
    handle(_again)  # a second one must not stop the cleaning up
    raise Interrupted(number)


def _again(number: int, frame: FrameType | None) -> None: ...


def _watch(reader: int) -> None:
    """Ends the process at the second signal, or where an interrupt was not answered in time."""
    number = os.read(reader, 1)[0]
    time.sleep(ECHO)
    while select.select([reader], [], [], 0)[0]:
        os.read(reader, 1)
    is_caught = signal.getsignal(number) not in (_interrupt, _again)
    select.select([reader], [], [], None if is_caught else GRACE)
    _end(number)


def _end(number: int) -> NoReturn:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there may be no stderr
        os.write(sys.stderr.fileno(), f"{Interrupted(number)}: stopped at once\n".encode())
    os._exit(128 + number)
