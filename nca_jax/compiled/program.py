"""What is said of one program: memory, largest temporaries, collectives."""

from collections.abc import Sequence
from typing import Any

from jax.stages import Lowered

from nca_jax.chips import CHIPS
from nca_jax.compiled.assign import assign
from nca_jax.compiled.buffers import largest_temporaries, memory
from nca_jax.compiled.hlo import calls, collectives, overlap

NUM_LARGEST = 8  # temporaries of a report
GIB = 2**30


def program_report(
    lowered: Lowered, device_kind: str, slices: Sequence[int], *, with_code: bool
) -> dict[str, Any]:
    """Compiles a program as `assign` does; returns what its text says.

    Memory is in GiB a chip, as `buffers` has it; the rest is in bytes.

    Args:
      device_kind: as JAX names the devices.
      slices: the slice of each device, in the order of the mesh.
    """
    written = assign(lowered, with_code=with_code)
    needed = memory(written.buffers)
    limit, total = CHIPS[device_kind].memory_gib, needed.total / GIB
    temporaries = largest_temporaries(written.buffers, written.live, written.program, NUM_LARGEST)
    sent = calls(written.program, slices)
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
        "with_code": with_code,
    }
    return report if report["fits"] else report | {"reason": f"{total:.2f} of {limit:.2f} GiB"}
