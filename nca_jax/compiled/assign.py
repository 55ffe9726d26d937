"""A program compiled as far as its memory is laid out, which is all that is asked of a compiler.

Generating code comes after that and is nearly all of a compile: 305 of 311 s for Mistral-7B on
v5e:4x4. It changes neither memory nor collectives.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import jax
from jax.stages import Lowered

LAST = "*_after_buffer_assignment.txt"  # written after all that is read, and before there is code


class Assigned(NamedTuple):
    """What the compiler writes of a program before it generates code."""

    program: str  # the optimised module
    buffers: str  # the buffer assignment
    live: str  # the ranges over which buffers are alive
    code: str  # the module once there is code, with what each part takes; "": there is none


def assign(lowered: Lowered, *, with_code: bool) -> Assigned:
    """Compiles a program, and returns what the compiler writes of it, whether or not it fits.

    Without code this returns while the compiler goes on in a thread, and only the end of the
    process stops that. The compile cache of JAX must be off: of what comes from it nothing is
    written.

    Raises:
      JaxRuntimeError: the compiler failed, for another reason than the device's memory.
    """
    executor = ThreadPoolExecutor(1)
    with TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        compiling = executor.submit(lowered.compile, {"xla_dump_to": name})
        while not compiling.done() and (with_code or not list(folder.glob(LAST))):
            time.sleep(0.1)
        code = ""
        if compiling.done():
            try:
                code = compiling.result().as_text() or ""
            except jax.errors.JaxRuntimeError as error:
                if "Ran out of memory on HBM" not in str(error):
                    raise

        def read(ending: str) -> str:
            return next(folder.glob(f"*after_optimizations{ending}.txt")).read_text()

        return Assigned(read(""), read("-buffer-assignment"), read("-live-range"), code)
