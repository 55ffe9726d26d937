"""What is known of the chips that JAX runs on: one table, by the name that JAX has for a device.

A device is what JAX counts as one: of v4 and v5p a chip with two cores.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """One device."""

    peak_flops: float  # bfloat16 operations a second
    memory_gib: float  # that a program may use
    name: str = ""  # as people say it


# Published peaks, from cloud.google.com/tpu/docs, the pages v4, v5e, v5p and v6e. Memory as the
# compiler of the libtpu of nca_jax.compiled.topology says when it refuses a program.
CHIPS = {
    "TPU v4": Chip(275e12, 30.75, "v4"),
    "TPU v5 lite": Chip(197e12, 15.75, "v5e"),
    "TPU v5": Chip(459e12, 95.74, "v5p"),
    "TPU v6 lite": Chip(918e12, 31.25, "v6e"),
}
