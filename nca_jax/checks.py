"""Errors for people, and how a command reports them.

A `UserError` says what was wanted, what came and what to do. It is raised at three borders only:
config, data to batch, and checkpoint or Hugging Face to params. Every other exception is a bug in
this project and keeps its traceback.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

EXTRAS = {  # libraries that only some commands and files want, and the extra that has them
    "tensorflow_datasets": "tfds",
    "importlib_resources": "tfds",
    "pyarrow": "tfds",
    "gguf": "gguf",
}


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


def run_main(main: Callable[[list[str]], int | None]) -> None:
    """Runs `main(argv)` as a command, and ends the process with its status.

    A UserError becomes one line on stderr and status 2, as does a library of an extra that is not
    installed; a bug its traceback and status 1.
    """
    from absl import logging  # of commands alone: a loss needs jax and no more

    logging.set_verbosity(logging.ERROR)  # libraries warn of what is no concern of a user
    try:
        status = main(sys.argv)
    except Exception as error:
        said = _to_mend(error)
        if said is None:
            traceback.print_exc()
        else:
            print(f"error: {' '.join(said.split())}", file=sys.stderr)
        status = 1 if said is None else 2
    sys.stdout.flush()
    sys.stderr.flush()
    # Reader threads and asynchronous writers are closed by then; a plain exit would wait for
    # worker threads that a failed run has left behind, and for the run's other processes.
    os._exit(status or 0)


def _to_mend(error: Exception) -> str | None:
    """Returns what the user can mend, in words; None for a bug."""
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"{error.name} is not installed: pip install 'nca_jax[{EXTRAS[error.name]}]'."
    return str(error) if isinstance(error, UserError) else None
