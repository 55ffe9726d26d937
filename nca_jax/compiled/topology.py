"""TPU topologies without a TPU: the devices of a pod that libtpu can compile for.

Nothing here touches a device; `jax.experimental.topologies` describes them.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from nca_jax.checks import UserError
from nca_jax.chips import CHIPS
from nca_jax.compat import wanted_libtpu
from nca_jax.protocols import Device

# How Cloud TPU names a slice, GENERATION-N: libtpu's generation, what N counts on a chip (chips, or
# TensorCores) and the dimensions of the slice.
SLICES = {
    "v4": ("v4", 2, 3),
    "v5p": ("v5p", 2, 3),
    "v5e": ("v5e", 1, 2),
    "v5litepod": ("v5e", 1, 2),
    "v6e": ("v6e", 1, 2),
}


def topology_name(name: str) -> str:
    """Returns "v5e:2x4" of "v5litepod-8" or "v5e-8", and "v5p:4x4x4" of "v5p-128"; others as given.

    A slice of 2^n chips is as near to a square or a cube as there is.
    """
    found = re.fullmatch(r"(\w+)-(\d+)", name)
    if not found or found[1] not in SLICES:
        return name
    generation, per_chip, dimensions = SLICES[found[1]]
    chips = int(found[2]) // per_chip
    exponent = chips.bit_length() - 1
    if chips * per_chip != int(found[2]) or chips != 2**exponent:
        return name
    sides = [2 ** ((exponent + i) // dimensions) for i in range(dimensions)]
    sides.sort(key=lambda side: (side == 1, side))  # 2x2x1
    return f"{generation}:{'x'.join(map(str, sides))}"


def topology_devices(name: str, num_slices: int) -> Sequence[Device]:
    """Returns the devices of "v5p:4x4x4" or "v5p-128" (one slice, or several of that size).

    Raises:
      UserError: libtpu is not installed, or knows no such topology.
    """
    asked, name = name, topology_name(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"Compiling for TPUs wants libtpu: pip install '{wanted_libtpu()}'.")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no machine to ask about itself
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device is held
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "none")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    kwargs: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if name.startswith("v4:"):
        kwargs["chip_config_name"] = "megacore"
    if name.endswith(":1x1"):
        kwargs["chips_per_host_bounds"] = [1, 1, 1]
    try:
        devices = topologies.get_topology_desc(name, "tpu", **kwargs).devices
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--topology={asked!r} --num_slices={num_slices} is none that libtpu knows ({reason}); "
            "write GENERATION:SHAPE, such as v5e:4x4, v5p:4x4x4 or v6e:16x16, or the name of a "
            "slice of 4, 8, 16, ... chips: v5litepod-16, v5p-128 (of 64 chips) or v6e-256."
        ) from error
    if devices[0].device_kind not in CHIPS:
        raise UserError(
            f"The memory of a {devices[0].device_kind!r} is not in nca_jax/chips.py; known are "
            f"{', '.join(CHIPS)}."
        )
    return devices
