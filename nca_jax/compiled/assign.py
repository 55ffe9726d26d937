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

LAST = "*-memory-usage-report.txt"  # of what is read here and written before there is code


class Assigned(NamedTuple):
    """What the compiler writes of a program before it generates code; "" where it does not."""

    program: str  # the optimised module
    buffers: str  # the buffer assignment
    live: str  # the ranges over which buffers are alive
    refusal: str  # why the compiler found that it does not fit, in its words; "" where it did not


def assign(lowered: Lowered, *, with_code: bool) -> Assigned:
    """Compiles a program, and returns what the compiler writes of it.

    Without code this returns while the compiler goes on in a thread, and only the end of the
    process stops that. The compile cache of JAX must be off: what comes from it is not written.

    Raises:
      JaxRuntimeError: the compiler failed for another reason than memory.
    """
    executor = ThreadPoolExecutor(1)
    with TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        compiling = executor.submit(lowered.compile, {"xla_dump_to": name})
        while not compiling.done() and (with_code or not list(folder.glob(LAST))):
            time.sleep(0.1)
        refusal = ""
        if compiling.done():
            try:
                compiling.result()
            except jax.errors.JaxRuntimeError as error:
                refusal = str(error).splitlines()[0]
                if "RESOURCE_EXHAUSTED" not in refusal:
                    raise

        def read(ending: str) -> str:
            written = sorted(folder.glob(f"*after_optimizations{ending}.txt"))
            return written[0].read_text() if written else ""

        return Assigned(read(""), read("-buffer-assignment"), read("-live-range"), refusal)
