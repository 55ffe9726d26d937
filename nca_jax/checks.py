"""Errors for people, and how a command reports them.

A `UserError` says what was wanted, what came and what to do. It is raised at three borders only:
config, data to batch, and checkpoint or Hugging Face to params. Every other exception is a bug in
this project and keeps its traceback.
"""

import contextlib
import errno
import inspect
import io
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nca_jax import signals

if TYPE_CHECKING:
    import jax
    from typing_extensions import Buffer

EXTRAS = {  # libraries that only some commands and files want, and the extra that has them
    "tensorflow_datasets": "tfds",
    "importlib_resources": "tfds",
    "pyarrow": "datasets",
    "datasets": "datasets",
    "gguf": "gguf",
    "lm_eval": "eval",
    "sklearn": "eval",
}
# What a disk says to a file that it does not take.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
REFUSALS += (errno.ENAMETOOLONG,)
EXHAUSTED = "RESOURCE_EXHAUSTED: "  # what XLA begins with where memory is too small


class UserError(ValueError):
    """Something the user can mend; commands print it as one line and exit with status 2."""


def check_same_shape(**arrays: "jax.Array | None") -> None:
    """Raises ValueError, naming the arguments, unless all shapes are equal (no silent broadcast).

    An argument that is None is left out.
    """
    shapes = {name: tuple(x.shape) for name, x in arrays.items() if x is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            "Wanted equal shapes, got " + ", ".join(f"{k} {v}" for k, v in shapes.items())
        )


def first_few(names: Sequence[str], *, between: str = ", ") -> str:
    """Returns "a, b, c and 5 more" for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return between.join(names[:3]) + more


def run_main(
    main: Callable[[list[str]], int | None], *, interrupted: str = "nothing half-written is left"
) -> None:
    """Runs `main(argv)` as a command, and ends the process with its status.

    --help prints the docstring of the command's module instead. A UserError becomes one line on
    stderr and status 2, as do a library of an extra that is not installed, a disk that refuses and
    memory that is too small; a bug its traceback and status 1. Ctrl-C and its like are one
    line and 128 + the signal's number, unless `main` answers them: see `nca_jax.signals`.

    Args:
      interrupted: what that line says of what was done.
    """
    _outlive_readers()
    if not {"--help", "-help", "-h"}.isdisjoint(sys.argv[1:]):
        print((sys.modules[inspect.unwrap(main).__module__].__doc__ or "").rstrip(), flush=True)
        return
    from absl import logging  # of commands alone: a loss needs jax and no more

    # Libraries warn of what is no concern of a user, and log the errors that they raise.
    logging.set_verbosity(logging.FATAL)
    signals.watch()
    _hear_threads()
    try:
        status = main(sys.argv)
        sys.stdout.flush()
    except signals.Interrupted as stop:
        print(f"{stop}: {interrupted}", file=sys.stderr)
        status = stop.status
    except Exception as error:
        said = _to_mend(error)
        if said is None:
            traceback.print_exc()
        else:
            print(f"error: {' '.join(said.split())}", file=sys.stderr)
        status = 1 if said is None else 2
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # it has been said, where there was somewhere to say it
            stream.flush()
    # Reader threads and asynchronous writers are closed by then; a plain exit would wait for
    # worker threads that a failed run has left behind, and for the run's other processes.
    os._exit(status or 0)


class _Outliving(io.FileIO):
    """A descriptor whose reader may go away; what is written after that goes nowhere."""

    def write(self, content: "Buffer") -> int:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # of a pipe, of a terminal
                raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        return super().write(content)


def _outlive_readers() -> None:
    """Makes stdout and stderr outlive their readers: a run must not end with `| head`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when the process began
            setattr(sys, name, open(os.devnull, "w"))
        elif stream is getattr(sys, f"__{name}__"):
            stream.flush()
            # By a descriptor of its own: 1 and 2 are left to native code; see `infra.log`.
            raw = io.BufferedWriter(_Outliving(os.dup(stream.fileno()), "w"))
            lines = stream.line_buffering
            text = io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=lines)
            setattr(sys, name, text)


def _hear_threads() -> None:
    """Leaves to the main thread what a disk refused to others, such as those that save."""

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is None or _refused(args.exc_value) is None:
            threading.__excepthook__(args)

    def of_native_code(args: "sys.UnraisableHookArgs") -> None:
        is_closed = "Event loop is closed" in str(args.exc_value)  # who was to hear has stopped
        is_stop = isinstance(args.exc_value, signals.Interrupted)  # in a callback, which ends it
        if not (is_closed or is_stop):
            sys.__unraisablehook__(args)

    threading.excepthook, sys.unraisablehook = of_thread, of_native_code


def _to_mend(error: Exception) -> str | None:
    """Returns what the user can mend, in words; None for a bug."""
    if isinstance(error, ModuleNotFoundError):
        library = (error.name or "").partition(".")[0]
        if library in EXTRAS:
            return f"{library} is not installed: pip install 'nca_jax[{EXTRAS[library]}]'."
    if isinstance(error, UserError):
        return str(error)
    return _exhausted(error) or _refused(error)


def _exhausted(error: Exception) -> str | None:
    """Returns what to lower where memory is too small, as XLA or numpy said; None for others."""
    said = str(error).strip() or "no more memory"
    if isinstance(error, MemoryError):
        where = "of the host"
    elif type(error).__name__ == "JaxRuntimeError" and EXHAUSTED in said:
        where, said = "of a device", said.partition(EXHAUSTED)[2]
    else:
        return None
    return (
        f"out of memory {where} ({said.splitlines()[0]:.200}). What needs less, the cheapest "
        "first: a smaller config.loss.logits_chunk, config.data.rows, then row_len with "
        "max_prompt_len and max_response_len; config.model.remat=full with scan_layers=True; "
        "config.generate.batch_size where responses are sampled; reference.kind=cached; more "
        "devices on config.mesh.fsdp. nca_jax.aot says what fits before there is a device."
    )


def _refused(error: BaseException) -> str | None:
    """Returns which file or disk refused and why; None if none did.

    Libraries of storage put such an error into one of their own, as a cause or as text.
    """
    why = next((text for number in REFUSALS if (text := os.strerror(number)) in str(error)), None)
    if why:
        said = (str(error).partition(why)[0] + why)[-300:]  # which ends in the file itself
        if isinstance(error, OSError):
            said = f"{error.filename or 'what is written'}: {why}"
        return f"{said}. Mend that, or give another place; the same command goes on from there."
    inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return _refused(inner) if inner else None
