"""TPU topologies without a TPU: the devices of a pod that libtpu can compile for.

Nothing here touches a device; `jax.experimental.topologies` describes them.
"""

import importlib.util
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from nca_jax.checks import UserError
from nca_jax.chips import CHIPS
from nca_jax.compat import wanted_libtpu
from nca_jax.protocols import Device


def topology_devices(name: str, num_slices: int) -> Sequence[Device]:
    """Returns the devices of "v5p:4x4x4" (one slice, or several of that size).

    Raises:
      UserError: libtpu is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"Compiling for TPUs wants libtpu: pip install '{wanted_libtpu()}'.")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no machine to ask about itself
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device is held
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "none")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    kwargs: dict[str, int | str] = {"num_slices": num_slices} if num_slices > 1 else {}
    if name.startswith("v4:"):
        kwargs["chip_config_name"] = "megacore"
    try:
        devices = topologies.get_topology_desc(name, "tpu", **kwargs).devices
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--topology={name!r} --num_slices={num_slices} is none that libtpu knows ({reason}); "
            "write GENERATION:SHAPE, such as v5e:4x4, v5p:4x4x4 or v6e:16x16."
        ) from error
    if devices[0].device_kind not in CHIPS:
        raise UserError(
            f"The memory of a {devices[0].device_kind!r} is not in nca_jax/chips.py; known are "
            f"{', '.join(CHIPS)}."
        )
    return devices
