"""What a compiled program sends between devices, read from its text.

Units: bytes a device, of the array that a collective makes whole or takes apart: the gathered
result of an all-gather, the operand of a reduce-scatter, the array of an all-reduce. A ring moves
(n - 1) / n of that over each link, an all-reduce twice that. Between slices the TPU's compiler
writes the sum of a collective within each slice, and a `send` from host to host.

A collective is asynchronous where the program has a start and a done of it, and may compute between
the two: `-start`, `async-start` (as on SparseCores), a send, or on TPUs a chain. A chain is written
several times, with one id: where it starts, in what is computed meanwhile, and where it is done. It
counts where it starts.

A collective inside a loop counts once a turn. The turns of the loop over layers are constants of
the program; a loop whose turns are known at run time only (micro-batches, sampled tokens) counts
one turn, and what is inside such a loop is marked.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
LARGE = 2**20  # bytes of a call: smaller ones are not worth overlapping

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SENT = re.compile(r" = \((\S+?), u32\[\].*? send\(.*is_host_transfer=true")
_SHAPE = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^{}]*\})?")
# An instruction: its name, shape, opcode and operands.
MADE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_ELEMENT = re.compile(r"%([\w.\-]+)#(\d+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**62  # cycles; the compiler writes the largest int64
_CALLED = re.compile(r"(?:calls|body|to_apply)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")


class Call(NamedTuple):
    """One collective of a program."""

    kind: str  # one of KINDS, or "send"
    network: str  # "ici" within a slice, "dcn" where a group has devices of several slices
    turns: int  # how often a device calls it
    bytes: int  # a device, one call
    is_async: bool
    in_open_loop: bool = False  # one whose turns are known at run time only, here one


class Collective(NamedTuple):
    """All collectives of one kind over one network in a program."""

    kind: str
    network: str
    times: int  # a device's calls
    bytes: int  # a device, all calls together


class Overlap(NamedTuple):
    """The collectives of LARGE bytes or more, and those of them that are asynchronous."""

    times: int  # a device's calls
    bytes: int  # a device, all calls together
    async_times: int
    async_bytes: int


def calls(text: str, slices: Sequence[int]) -> list[Call]:
    """Returns every collective of an optimised module.

    Args:
      text: `compiled.as_text()`, or what the compiler dumps before it generates code.
      slices: the slice of each device, in the order of the mesh.
    """
    bodies, entry = computations(text)
    started = set(re.findall(r" async-start\(.*calls=%?([\w.\-]+)", text))
    for name in list(started):  # of sparse cores one that calls another, which has the collective
        inside = "\n".join(bodies[name])
        started.update(re.findall(r" call\(.*to_apply=%?([\w.\-]+)", inside))
    found = []
    for name, (turns, is_open) in visits(bodies, entry).items():
        is_chain = any('"AsyncCollectiveStart"' in line for line in bodies[name])
        for line in bodies[name]:
            if "chain_id=" in line and not is_chain:  # the same one again
                continue
            sent = _SENT.search(line)
            match = _COLLECTIVE.search(line)
            if sent:
                found.append(Call("send", "dcn", turns, shape_bytes(sent[1]), True, is_open))
            elif match:
                groups = replica_groups(line, len(slices))
                if groups.shape[1] == 1:  # of a mesh axis of size 1
                    continue
                kind, num_bytes = _payload(match, groups.shape[1], name)
                crosses = any(len({slices[i] for i in group}) > 1 for group in groups)
                is_async = bool(match[3]) or is_chain or name in started
                network = "dcn" if crosses else "ici"
                found.append(Call(kind, network, turns, num_bytes, is_async, is_open))
    return found


def collectives(found: Sequence[Call]) -> list[Collective]:
    """Returns what the calls send by kind and network, most bytes first."""
    totals: dict[tuple[str, str], list[int]] = {}
    for call in found:
        total = totals.setdefault((call.kind, call.network), [0, 0])
        total[0] += call.turns
        total[1] += call.turns * call.bytes
    return sorted(
        (Collective(*key, *total) for key, total in totals.items()), key=lambda c: -c.bytes
    )


def overlap(found: Sequence[Call]) -> Overlap:
    """Returns how much of the calls of LARGE bytes or more is asynchronous."""
    large = [call for call in found if call.bytes >= LARGE]
    hidden = [call for call in large if call.is_async]
    return Overlap(
        times=sum(call.turns for call in large),
        bytes=sum(call.turns * call.bytes for call in large),
        async_times=sum(call.turns for call in hidden),
        async_bytes=sum(call.turns * call.bytes for call in hidden),
    )


def estimated_cycles(text: str) -> int:
    """Returns the cycles that the TPU's compiler expects products, fusions and copies to take.

    What is sent, and Pallas kernels, have no estimate and count nothing; 0 on other devices. Two
    programs that differ in the rest alone are compared by it; a chip need not agree.

    Args:
      text: `compiled.as_text()`; what is dumped before there is code has no estimates.
    """
    bodies, entry = computations(text)
    total = 0
    for name, (turns, _) in visits(bodies, entry).items():
        found = (int(cycles) for line in bodies[name] for cycles in _CYCLES.findall(line))
        total += turns * sum(cycles for cycles in found if cycles < _NO_ESTIMATE)
    return total


def shape_bytes(shape: str) -> int:
    """Bytes of "bf16[4,8]{1,0}" or of a tuple of such.

    A 4-bit item takes half a byte where the layout says so, E(4), and else a byte; so does a pred.
    """
    total = 0
    for bits, sizes, layout in _SHAPE.findall(shape):
        items = int(np.prod([int(n) for n in sizes.split(",") if n], dtype=np.int64))
        total += -(-items // 2) if "E(4)" in layout else items * max(int(bits or 8) // 8, 1)
    return total


def replica_groups(line: str, num_devices: int) -> np.ndarray:
    """Returns which devices take part together, [groups, devices in each]; three notations."""
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", line
    )
    if mesh:
        axes, ids, along = mesh.groups()
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes))
        grid = _iota(ids, num_devices).reshape([int(n) for n in sizes.values()])
        over = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", along)]
        grid = np.moveaxis(grid, over, range(-len(over), 0))
        return grid.reshape(-1, int(np.prod([int(list(sizes.values())[i]) for i in over])))
    short = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\S+?),? ", line + " ")
    if short:
        return _iota(short[3], num_devices).reshape(int(short[1]), int(short[2]))
    pairs = re.search(r"(?:replica_groups|source_target_pairs)=\{\{(.*?)\}\}", line)
    if pairs:
        return np.array([group.split(",") for group in pairs[1].split("},{")], dtype=int)
    return np.arange(num_devices)[None]  # {}: all


def _iota(text: str | None, num_devices: int) -> np.ndarray:
    """The device ids of "[2,32]T(1,0)": arange, reshaped and transposed; flat."""
    ids = np.arange(num_devices)
    if not text:
        return ids
    found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        raise ValueError(f"{text!r} is no order of devices.")
    sizes, order = found.groups()
    ids = ids.reshape([int(n) for n in sizes.split(",")])
    return (ids.transpose([int(n) for n in order.split(",")]) if order else ids).reshape(-1)


def _payload(match: re.Match, group_size: int, computation: str) -> tuple[str, int]:
    """Returns the kind of a collective and its bytes, as the module's docstring defines them."""
    shape, kind, is_start = match.groups()
    num_bytes = shape_bytes(shape)
    if is_start and kind == "all-gather":  # a pair (operand, result)
        num_bytes = num_bytes * group_size // (group_size + 1)
    if is_start and kind == "collective-permute":
        num_bytes //= 2
    if kind == "reduce-scatter":
        num_bytes *= group_size
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"  # how the TPU compiler writes it: a fusion around an all-reduce
    return kind, num_bytes


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation, with `_spelt_out`, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header[2]
            bodies[name] = []
            entry = name if header[1] else entry
        elif name:
            bodies[name].append(line)
    return {name: _spelt_out(lines) for name, lines in bodies.items()}, entry


def _spelt_out(lines: list[str]) -> list[str]:
    """Returns a computation in which an element of a tuple is an instruction.

    From libtpu 0.0.48 on `%p#1` is written for one. It becomes `%p.element.1`, the result of a
    `get-tuple-element(%p), index=1` ahead of its first use.
    """
    shapes, seen, found = {}, set(), []
    for line in lines:
        for name, index in _ELEMENT.findall(line):
            if (name, index) not in seen:
                seen.add((name, index))
                shape = _elements(shapes[name])[int(index)]
                taken = f"get-tuple-element(%{name}), index={index}"
                found.append(f"  %{name}.element.{index} = {shape} {taken}")
        found.append(_ELEMENT.sub(r"%\1.element.\2", line))
        if made := MADE.match(line):
            shapes[made[1]] = made[2]
    return found


def _elements(shape: str) -> list[str]:
    """Returns the shapes in a tuple's, which may be tuples."""
    elements, depth = [""], 0
    for part in re.split(r"(, |[()])", re.sub(r"/\*.*?\*/", "", shape[1:-1])):
        depth += (part == "(") - (part == ")")
        if part == ", " and depth == 0:
            elements.append("")
        else:
            elements[-1] += part
    return elements


def visits(bodies: dict[str, list[str]], entry: str) -> dict[str, tuple[int, bool]]:
    """Returns how often each computation runs, and whether in a loop of unknown length.

    Such a loop counts one turn. What is called from inside and outside of one is inside.
    """
    found: dict[str, tuple[int, bool]] = {}

    def visit(name: str, times: int, is_open: bool) -> None:
        before, was_open = found.get(name, (0, False))
        found[name] = before + times, was_open or is_open
        for line in bodies[name]:
            called = [
                name
                for one, several in _CALLED.findall(line)
                for name in ([one] if one else re.findall(r"[\w.\-]+", several))
                if name in bodies
            ]
            if called:
                turns = _loop_turns(line, bodies)
                for name in called:
                    visit(name, times * (turns or 1), is_open or turns is None)

    visit(entry, 1, False)
    return found


def _loop_turns(line: str, bodies: dict[str, list[str]]) -> int | None:
    """Returns the turns of a while instruction that counts up to a constant, None of another one.

    An instruction that is no loop has one.

    The counter is an element of the loop's tuple. It starts at 0; a body that the compiler has
    unrolled, as it does products that are computed while their parts arrive, adds more than 1.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    names = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
    if not names:
        return 1
    condition, body = (instructions(bodies[name]) for name in names.groups())
    compared = re.match(r"compare\(%([\w.\-]+), %([\w.\-]+)\), direction=LT", condition["ROOT"])
    if not compared:
        return None
    counter, limit = (condition[name] for name in compared.groups())
    index, limit = re.search(r"index=(\d+)", counter), _constant(limit)
    if not index or limit is None:
        return None
    following = body[re.findall(r"%([\w.\-]+)", body["ROOT"])[int(index[1])]]
    while copied := re.match(r"copy\(%([\w.\-]+)\)", following):
        following = body[copied[1]]
    added = re.match(r"add\(%([\w.\-]+), %([\w.\-]+)\)", following)
    steps = [_constant(body[name]) for name in added.groups() if name in body] if added else []
    step = next((step for step in steps if step), 1)
    return -(-limit // step)


def instructions(lines: list[str]) -> dict[str, str]:
    """Returns {name: "opcode(operands), attributes"} of a computation; the last is "ROOT" too."""
    found = {}
    for line in lines:
        match = re.match(r"\s*(ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+\(.*)", line)
        if match:
            found[match[2]] = match[3]
            if match[1]:
                found["ROOT"] = match[3]
    return found


def _constant(instruction: str) -> int | None:
    match = re.match(r"constant\((\d+)\)", instruction)
    return int(match[1]) if match else None
