"""Several processes that are one run: how they find each other, and which of them writes.

Each process holds some of the devices of one mesh and runs the same program. On Cloud TPU they find
each other by themselves. Elsewhere three variables say where they are:

    JAX_COORDINATOR_ADDRESS  host:port of process 0
    JAX_NUM_PROCESSES        how many they are; 1: this one is alone
    JAX_PROCESS_ID           0 .. JAX_NUM_PROCESSES - 1

Without them a process is alone, and is refused where SLURM or MPI says that it is not; there
JAX_NUM_PROCESSES=1 says that it is meant to be. Files, the work directory and the cache lie where
all processes see them. Who reads and writes what, of n processes:

    records      each encodes all of them, or maps the store that one process of its host made;
                 the digests of the files are compared
    a step       each packs the rows that its devices hold, by one plan that all make
    model files  the slices that its devices hold; a model on gs:// or the hub is first copied whole
    cache        every process reads all of it: 4 bytes a response
    checkpoint   each writes and reads the slices that its devices hold
    all else     process 0 alone writes: metrics, the cache, responses, evaluations
"""

import functools
import glob
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from nca_jax.checks import UserError
from nca_jax.infra.program_cache import keep_programs

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# What a launcher says to each process that it starts, and the most that one alone is told.
OF_LAUNCHERS = {
    "SLURM_NTASKS": 1,
    "SLURM_PROCID": 0,
    "OMPI_COMM_WORLD_SIZE": 1,
    "PMI_SIZE": 1,
}
PIECE = 2**24  # bytes of each process that are on the devices at a time
SILENCE = "--host_timeout="  # SECONDS after which a process that says nothing is given up
SECONDS = 40


def together(
    main: Callable[[list[str]], int], *, saves_when_stopped: bool = False
) -> Callable[[list[str]], int]:
    """Returns `main` as one of the run's processes: it joins the others, and leaves with them.

    A process that fails does not wait for them: they see that it is gone, and stop. They stop as
    well when one has said nothing for --host_timeout=SECONDS, a flag of every such command.

    Args:
      saves_when_stopped: `main` asks `preemption.stop_asked`; otherwise SIGTERM ends a process.
    """

    @functools.wraps(main)
    def joined(argv: list[str]) -> int:
        seconds, argv = _host_timeout(argv)
        _join(saves_when_stopped, seconds)
        keep_programs()
        status = main(argv)
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()
        return status

    return joined


def is_first() -> bool:
    """Whether this process writes what all of them know."""
    return jax.process_index() == 0


def from_first(x: np.ndarray) -> np.ndarray:
    """Returns what process 0 has, in all of them; shapes and dtypes agree."""
    return np.asarray(multihost_utils.broadcast_one_to_all(x))


def wait_for_first() -> None:
    """Returns once process 0 is here: what it has written is there for all."""
    from_first(np.zeros((), np.int32))


def gather(mine: bytes) -> list[bytes]:
    """Returns the bytes that each process gives, in the order of the processes."""
    sizes = _sizes(len(mine))
    if not any(sizes):
        return [b""] * len(sizes)
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    pieces = [
        multihost_utils.process_allgather(padded[start : start + PIECE])
        for start in range(0, len(padded), PIECE)
    ]
    parts = np.concatenate(pieces, axis=1)
    return [part[:size].tobytes() for part, size in zip(parts, sizes, strict=True)]


def json_from_first(x: Any) -> Any:
    """Returns what process 0 has, in all of them: what JSON says."""
    if jax.process_count() == 1:
        return x
    return json.loads(gather(json.dumps(x).encode() if is_first() else b"")[0])


def _sizes(mine: int) -> list[int]:
    """Returns the number that each process gives, up to 2^63 - 1.

    It is sent as 8 bytes: JAX has no integers of 64 bits unless it is told to.
    """
    sent = np.frombuffer(np.int64(mine).tobytes(), np.uint8)
    received = np.asarray(multihost_utils.process_allgather(sent), np.uint8)
    return np.frombuffer(received.tobytes(), np.int64).tolist()


def check_same(**digests: str) -> None:
    """Raises UserError, by name, unless every process has the same digests (hexadecimal)."""
    for name, digest in digests.items():
        mine = np.frombuffer(bytes.fromhex(digest), np.uint8)
        theirs = multihost_utils.process_allgather(mine).reshape(-1, mine.size)
        others = np.flatnonzero((theirs != theirs[0]).any(axis=1)).tolist()
        if others:
            raise UserError(
                f"Process 0 and the processes {others} do not have the same {name}; start all with "
                "one command, on one file system."
            )


def _join(saves_when_stopped: bool, seconds: int) -> None:
    """Starts jax.distributed if there are other processes; only process 0 prints from then on."""
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if given.get("JAX_NUM_PROCESSES") == "1":
        return
    if not given and not _has_tpu():
        _check_alone()
        return
    if given and len(given) < len(VARIABLES):
        lacking = ", ".join(name for name in VARIABLES if name not in given)
        raise UserError(f"{', '.join(given)} set, but not {lacking}; set all three or none.")
    where: dict[str, Any] = {}
    if given:
        address, num_processes, process_id = given.values()
        where = dict(
            coordinator_address=address,
            num_processes=_number("JAX_NUM_PROCESSES", num_processes),
            process_id=_number("JAX_PROCESS_ID", process_id),
            cluster_detection_method="deactivate",
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", saves_when_stopped)
    jax.distributed.initialize(**where, heartbeat_timeout_seconds=seconds)
    if not is_first():
        sys.stdout = open(os.devnull, "w")
    if sys.stdout.fileno() != 1:  # by which gloo says to whom it is connected
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _host_timeout(argv: list[str]) -> tuple[int, list[str]]:
    """Returns the value of --host_timeout, and the other arguments."""
    given = [arg.removeprefix(SILENCE) for arg in argv if arg.startswith(SILENCE)]
    seconds = _number("--host_timeout", given[-1]) if given else SECONDS
    if seconds < 1:
        raise UserError("--host_timeout=0; wanted seconds, 1 or more.")
    return seconds, [arg for arg in argv if not arg.startswith(SILENCE)]


def _check_alone() -> None:
    """Raises UserError if a launcher has started others, with whom this process was to run."""
    found = {name: os.environ.get(name, "") for name in OF_LAUNCHERS}
    said = [
        f"{name}={value}"
        for name, value in found.items()
        if value.isdecimal() and int(value) > OF_LAUNCHERS[name]
    ]
    if said:
        raise UserError(
            f"{', '.join(said)}: this is one of several processes, and each would train alone in "
            f"the same folder. Set {', '.join(VARIABLES)}; or JAX_NUM_PROCESSES=1 if it is alone."
        )


def _has_tpu() -> bool:
    """Whether this host has TPU chips that JAX may use; asks no device, which would open it."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    may = not platforms or "tpu" in platforms
    return bool(may and chips and importlib.util.find_spec("libtpu"))


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"{name}={text!r}; wanted a number.")
    return int(text)
