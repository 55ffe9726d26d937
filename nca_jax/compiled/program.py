"""What is said of one program: memory, largest temporaries, collectives, writes."""

from collections.abc import Sequence
from typing import Any

from jax.stages import Lowered

from nca_jax.chips import CHIPS
from nca_jax.compiled.assign import assign
from nca_jax.compiled.buffers import largest_temporaries, memory
from nca_jax.compiled.hlo import calls, collectives, estimated_cycles, overlap
from nca_jax.compiled.writes import writes_a_turn

NUM_LARGEST = 8  # temporaries of a report
GIB = 2**30


def program_report(
    lowered: Lowered, device_kind: str, slices: Sequence[int], *, with_code: bool
) -> dict[str, Any]:
    """Compiles a program as `assign` does; returns what its text says.

    Memory is in GiB a chip, as `buffers` has it; the rest is in bytes. `a_turn` is of one turn of
    the loops whose turns are known at run time only: of a micro-batch, or a sampled token; so is
    `estimated_cycles`, which is there with code.

    Args:
      device_kind: as JAX names the devices.
      slices: the slice of each device, in the order of the mesh.
    """
    written = assign(lowered, with_code=with_code)
    needed = memory(written.buffers)
    limit, total = CHIPS[device_kind].memory_gib, needed.total / GIB
    temporaries = largest_temporaries(written.buffers, written.live, written.program, NUM_LARGEST)
    sent = calls(written.program, slices)
    writes = writes_a_turn(written.program)
    report = {
        "fits": total <= limit,
        "memory": {
            **{kind: num_bytes / GIB for kind, num_bytes in needed._asdict().items()},
            "total": total,
            "limit": limit,
            "margin": limit - total,
        },
        "temporaries": [one._asdict() for one in temporaries],
        "collectives": [one._asdict() for one in collectives(sent)],
        "overlap": overlap(sent)._asdict(),
        "a_turn": {
            "sent": sum(call.turns * call.bytes for call in sent if call.in_open_loop),
            "written": writes.bytes,
            "largest_write": writes.largest,
        },
        "with_code": with_code,
        **({"estimated_cycles": estimated_cycles(written.code)} if written.code else {}),
    }
    return report if report["fits"] else report | {"reason": f"{total:.2f} of {limit:.2f} GiB"}
