"""What a command says while it is waited for: its phases and their times, sizes, the time left."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
from tqdm import tqdm

from nca_jax.protocols import Device

GIB = 2**30
WHOLE = 10**6  # steps of which the whole of an entry is made
SHORT = 1.0  # seconds: a phase that takes less is not worth a second line

Args = ParamSpec("Args")
Result = TypeVar("Result")


def say(line: str) -> None:
    """Prints a line at once, above the progress bar where there is one."""
    tqdm.write(line)
    print(end="", flush=True)


@contextlib.contextmanager
def phase(what: str) -> Iterator[None]:
    """Says what is waited for before the body runs, and after it how long it took."""
    say(f"{what} ...")
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    if seconds >= SHORT:
        say(f"  took {duration(seconds)}")


def first_call(what: str, program: Callable[Args, Result]) -> Callable[Args, Result]:
    """Returns `program`, whose first call, in which it is compiled, is a phase."""
    is_compiled = False

    def run(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        nonlocal is_compiled
        if is_compiled:
            return program(*args, **kwargs)
        is_compiled = True
        with phase(f"compiling {what}, which may take minutes"):
            return program(*args, **kwargs)

    return run


def duration(seconds: float) -> str:
    """Returns "42 s", "4 min 20 s" or "2 h 5 min"; below 10 s "0.42 s"."""
    if seconds < 9.5:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def time_left(num_steps: int) -> Callable[[int], str]:
    """Returns `left(step)`: "4 min 20 s left" by the pace since it was called first, or "".

    The first call sets the clock: it is after the first step, which has compiled.
    """
    first: tuple[int, float] | None = None

    def left(step: int) -> str:
        nonlocal first
        now = time.perf_counter()
        if first is None or step <= first[0]:
            first = first or (step, now)
            return ""
        pace = (now - first[1]) / (step - first[0])
        return f"{duration(pace * (num_steps - step))} left" if step < num_steps else ""

    return left


def pace_of_entries() -> Callable[[str, int, float], None]:
    """Returns `said(entry, records, done)`: prints how far each entry is, and the time left."""
    of_entry: dict[str, Callable[[int], str]] = {}

    def said(entry: str, records: int, done: float) -> None:
        left = of_entry.setdefault(entry, time_left(WHOLE))(round(done * WHOLE))
        share = f" ({done:.0%})" if done else ""
        say(f"  {records} records of {entry} are encoded{share}{', ' if left else ''}{left}")

    return said


def num_values(tree: Any) -> int:
    """Returns how many numbers the arrays of a tree hold."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def size_here(tree: Any) -> str:
    """Returns what the arrays of a tree take on each of their devices, "1.50 GiB"."""
    shards = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(tree)]
    return _size(sum(math.prod(shape) * itemsize for shape, itemsize in shards))


def peak_memory(device: Device) -> str:
    """Returns "12.30 GiB of 15.75 GiB" that a device held at most; "" where it does not say."""
    stats = device.memory_stats() or {}
    if not {"peak_bytes_in_use", "bytes_limit"} <= stats.keys():
        return ""
    return f"{_size(stats['peak_bytes_in_use'])} of {_size(stats['bytes_limit'])}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes > GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"
