"""What differs between the releases of JAX that this runs on: 0.10.2 (Python 3.11) and 0.12.

All else that is used of JAX is the same in both, the private fields of splash attention included;
the tests of either release say so (`make test`, `make test-second`).
"""

import functools
import importlib.metadata


@functools.cache
def wanted_libtpu() -> str:
    """Returns the one libtpu that goes with the installed JAX, as pip is told: "libtpu==0.0.42.*".

    Another release compiles another program, with another need of memory.
    """
    asked = importlib.metadata.requires("jax") or ()
    return next(line.split(";")[0].strip() for line in asked if line.startswith("libtpu"))
