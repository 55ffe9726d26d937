"""What a program writes into arrays that it keeps from one turn of a loop to the next.

A cache grows by a slot where a turn updates a slice of it in place. Counted are the slices, not the
array; a cache that a turn makes anew, whole, is a slice of the layer's size.
"""

import re
from typing import NamedTuple

from nca_jax.compiled.hlo import MADE, computations, shape_bytes, visits


class Writes(NamedTuple):
    """The slices written in one turn of the loops whose turns are known at run time only."""

    bytes: int  # a device, all slices together
    largest: int  # a device, the largest slice


def writes_a_turn(text: str) -> Writes:
    """Returns what the dynamic-update-slices of an optimised module write; none: 0 bytes."""
    bodies, entry = computations(text)
    sizes = []
    for name, (turns, is_open) in visits(bodies, entry).items():
        if not is_open:
            continue
        made = [match.groups() for match in map(MADE.match, bodies[name]) if match]
        shapes = {name: shape for name, shape, _, _ in made}
        for _, _, opcode, operands in made:
            if opcode == "dynamic-update-slice":
                update = re.findall(r"%([\w.\-]+)", operands)[1]
                sizes.append((turns, shape_bytes(shapes[update])))
    return Writes(sum(n * size for n, size in sizes), max((size for _, size in sizes), default=0))
