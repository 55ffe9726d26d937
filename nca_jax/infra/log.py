"""train.log in a workdir: what a run said, with the time, and what its libraries said.

Lines of ours go to the screen and to the log. Native code (XLA, TensorFlow) writes to the
descriptors 1 and 2 what is no concern of a user: while a log is open that goes to the log alone.
"""

import contextlib
import io
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from nca_jax.checks import UserError
from nca_jax.files import AnyPath, copy_into, is_remote
from nca_jax.infra import distributed
from nca_jax.infra.lock import CheckHeld

LOG = "train.log"


@contextlib.contextmanager
def logged(workdir: AnyPath, check_held: CheckHeld) -> Iterator[None]:
    """Adds what is printed in the body, and what ends it early, to workdir/train.log.

    Process 0 has the log. On gs://, where nothing can be appended, it is copied when the body ends.

    Args:
      check_held: raises where the workdir is not the run's any more; see `infra.lock`.
    """
    if not distributed.is_first():
        yield
        return
    with contextlib.ExitStack() as until_end:
        folder = workdir
        if is_remote(workdir):
            folder = Path(until_end.enter_context(tempfile.TemporaryDirectory()))
            if (workdir / LOG).exists():
                (folder / LOG).write_bytes((workdir / LOG).read_bytes())
            until_end.callback(_give_back, folder, workdir, check_held)
        file = until_end.enter_context(open(folder / LOG, "ab", buffering=0))
        until_end.enter_context(_native_to(file))
        copy = _Copied(sys.stdout, file)
        with contextlib.redirect_stdout(copy):
            try:
                yield
            except BaseException as error:
                is_said = isinstance(error, UserError | KeyboardInterrupt)
                with contextlib.suppress(OSError):  # a full disk may be what ends it
                    copy.log(f"error: {error}" if is_said else traceback.format_exc())
                raise


def _give_back(folder: Path, workdir: AnyPath, check_held: CheckHeld) -> None:
    check_held()
    copy_into(folder, workdir)


class _Copied(io.TextIOBase):
    """A stream for text, each line of which is added to a log as well."""

    def __init__(self, stream: IO[str], file: IO[bytes]):
        self._stream, self._file, self._begun = stream, file, ""

    def write(self, text: str) -> int:
        self._stream.write(text)
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self.log(line)
        return len(text)

    def log(self, line: str) -> None:
        """Adds a line to the log alone."""
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n".encode())

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()


@contextlib.contextmanager
def _native_to(file: IO[bytes]) -> Iterator[None]:
    """Sends the descriptors 1 and 2 to a file, each unless Python's own stream writes by it."""
    kept = {
        number: os.dup(number)
        for number, stream in ((1, sys.stdout), (2, sys.stderr))
        if not _writes_by(stream, number)
    }
    for number in kept:
        os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, before in kept.items():
            os.dup2(before, number)
            os.close(before)


def _writes_by(stream: IO[str], number: int) -> bool:
    try:
        return stream.fileno() == number
    except OSError:  # of a notebook, or of a test
        return False
