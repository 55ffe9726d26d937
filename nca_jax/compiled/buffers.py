"""What a program holds in a device's memory, read from the compiler's buffer assignment.

The compiler lays out every buffer before it generates code: arguments, outputs that are no donated
argument, and one block of temporaries in which places are used again. Their sum is what a device
sets aside, and what a TPU's compiler judges by: it refuses a program whose sum is more than the
chip has, and names the sum ("HLO temporaries", arguments included).

`compiled.memory_analysis()` says less. On TPUs its temporaries are too many by gigabytes (11.03 GiB
where 7.12 are laid out, Mistral-7B on v5e:4x4), and its peak has the chip's scratch memory (vmem)
in it and no padding or gaps (12.13 where 12.19 are laid out; 76 MB for a small program that needs
25 and computes in vmem). On CPU its peak leaves the temporaries out.

The program's own code, 0.05 to 0.1 GiB for a model in a loop over layers, is in none of these.
"""

import re
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

from nca_jax.compiled.hlo import instructions

DEVICE, HOST = "0", "5"  # memory spaces
PACKAGE = "/nca_jax/"  # whose source lines name a buffer

_ALLOCATION = re.compile(r"allocation \d+: size (\d+)(?:, color (\d+))?(?:, page \d+)?, (.*):$")
_VALUE = re.compile(r" value: <\d+ (\S+)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)")
_RANGE = re.compile(r"^    (\S+):(\d+)-(\d+)$", re.MULTILINE)


class Memory(NamedTuple):
    """Bytes of one device, and of its host."""

    arguments: int
    output: int  # but for donated arguments
    temporaries: int  # and constants
    host: int  # of all three, what is kept in the host's memory

    @property
    def total(self) -> int:
        """Returns what the program needs of a device's memory."""
        return self.arguments + self.output + self.temporaries


class Temporary(NamedTuple):
    """Temporaries alike."""

    bytes: int  # all together, as laid out
    times: int
    shape: str  # "bf16[32,4096,1024]"
    name: str  # of the operation it comes from, as JAX has it
    source: str  # "models/decoder.py:210", or ""


class _Value(NamedTuple):
    place: tuple[int, int]  # offset and size within the block of temporaries
    shape: str


def memory(assignment: str) -> Memory:
    """Returns what the text of a buffer assignment sets aside."""
    sizes = dict.fromkeys(Memory._fields, 0)
    for line in assignment.splitlines():
        found = _ALLOCATION.match(line)
        if not found:
            continue
        size, space, what = int(found[1]), found[2] or DEVICE, found[3]
        if space == HOST:
            sizes["host"] += size
        elif space == DEVICE:
            is_output = "maybe-live-out" in what
            is_argument = what.startswith("parameter")
            sizes["arguments" if is_argument else "output" if is_output else "temporaries"] += size
    return Memory(**sizes)


def largest_temporaries(assignment: str, live: str, program: str, num: int) -> list[Temporary]:
    """Returns the largest temporaries at the instruction at which most of them are alive.

    Args:
      assignment: the text of the buffer assignment.
      live: that of the live ranges, from instruction to instruction.
      program: that of the optimised module.
      num: how many, those that are alike counting once.
    """
    values = dict(_temporaries(assignment))
    sharing: dict[_Value, list[str]] = {}  # the values that are one buffer, as of a loop's tuple
    for name, value in values.items():
        sharing.setdefault(value, []).append(name)
    alive = _alive_at_peak(values, live)
    by_name, sources = instructions(program.splitlines()), _sources(program)
    found: dict[tuple[str, str, str], list[int]] = {}
    for name in alive:
        names = [name, *sharing[values[name]]]
        key = (values[name].shape, *_origin(names, by_name, sources))
        found.setdefault(key, []).append(values[name].place[1])
    alike = [Temporary(sum(sizes), len(sizes), *key) for key, sizes in found.items()]
    return sorted(alike, key=lambda one: -one.bytes)[:num]


def _temporaries(assignment: str) -> Iterator[tuple[str, _Value]]:
    """Yields the values in the device's block of temporaries, by name: "while.3{2}", "add.1{}"."""
    is_block = False
    for line in assignment.splitlines():
        if allocation := _ALLOCATION.match(line):
            is_block = allocation[2] in (None, DEVICE) and "preallocated-temp" in allocation[3]
        elif is_block and (value := _VALUE.match(line)):
            name, size, offset, shape = value.groups()
            name = name if name.endswith("}") else name + "{}"
            yield name, _Value((int(offset), int(size)), shape.partition("{")[0])


def _alive_at_peak(values: dict[str, _Value], live: str) -> list[str]:
    """Returns the values that are alive at the peak, one for each place."""
    ranges: dict[tuple[int, int], list[tuple[int, int, str]]] = {}
    for name, start, end in _RANGE.findall(live):
        if name in values:
            ranges.setdefault(values[name].place, []).append((int(start), int(end), name))
    changes: dict[int, int] = {}  # bytes alive from this instruction on, less those before it
    for (_, size), spans in ranges.items():
        reached = -1
        for start, end, _ in sorted(spans):
            start = max(start, reached + 1)
            if start <= end:
                changes[start] = changes.get(start, 0) + size
                changes[end + 1] = changes.get(end + 1, 0) - size
                reached = end
    times = sorted(changes)
    sums = list(accumulate(changes[time] for time in times))
    peak = times[sums.index(max(sums))] if sums else 0
    here = ((name for a, b, name in spans if a <= peak <= b) for spans in ranges.values())
    return [name for name in (next(names, "") for names in here) if name]


def _origin(names: list[str], by_name: dict[str, str], sources: dict[str, str]) -> tuple[str, str]:
    """Returns (the name of the operation, its source line) that one of these values comes from.

    The compiler's own copies and conversions have no name: they go by what they are of, and else
    by the instruction.
    """
    names = [name.partition("{")[0] for name in names]
    first = names[0]
    while names:
        for name in names:
            text = by_name.get(name, "")
            if found := re.search(r'op_name="([^"]+)"', text):
                frame = re.search(r"stack_frame_id=(\d+)", text)
                return found[1].replace("\\", ""), sources.get(frame[1], "") if frame else ""
        operand = re.match(r"[\w\-]+\(%?([\w.\-]+)", by_name.get(names.pop(0), ""))
        names = [operand[1]] if operand else names
    return first, ""


def _sources(program: str) -> dict[str, str]:
    """Returns the innermost line of this package, "train_step.py:143", of each stack frame."""

    def table(title: str, entry: str) -> dict[str, list[str]]:
        text = re.search(rf"^{title}\n((?:\d+ .*\n)*)", program, re.MULTILINE)
        return {n: rest for n, *rest in re.findall(entry, text[1] if text else "")}

    files = table("FileNames", r'(\d+) "(.*)"')
    places = table("FileLocations", r"(\d+) \{file_name_id=(\d+) .*?line=(\d+)")
    frames = table("StackFrames", r"(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")
    found = {}
    for frame in frames:
        at = frame
        while at in frames:
            place, parent = frames[at]
            file, line = places[place]
            _, is_ours, name = files[file][0].rpartition(PACKAGE)
            if is_ours:
                found[frame] = f"{name}:{line}"
                break
            at = parent if parent != at else ""
    return found
