"""A compiled program in words: memory, collectives, largest buffers."""

import re
from typing import Any

import numpy as np

GIB = 2**30
NUM_LARGEST = 8


def largest_values(text: str, num_chips: int) -> list[str]:
    """Returns the largest intermediate shapes of a lowered program, before it is split over chips.

    The compiler does not say what it ran out of memory for; each of these is a candidate.
    """
    sized = {}
    for sizes, dtype in set(re.findall(r"tensor<((?:\d+x)+)(\w+)>", text)):
        shape = tuple(int(n) for n in sizes.split("x")[:-1])
        bits = int(re.sub(r"\D", "", dtype) or 0)
        sized[shape, dtype] = int(np.prod(shape, dtype=np.int64)) * max(bits, 8) / 8 / GIB
    largest = sorted(sized.items(), key=lambda item: -item[1])[:NUM_LARGEST]
    return [
        f"{size / num_chips:.3f} GiB if split over all chips: {dtype} {shape}"
        for (shape, dtype), size in largest
    ]


def print_report(report: dict[str, Any]) -> None:
    """Prints a report of `nca_jax.aot` for people."""
    mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    slices = f"{report['num_slices']} slices of " if report["num_slices"] > 1 else ""
    print(
        f"{report['model'] or 'model'} ({report['params'] / 1e9:.2f}B parameters), reference "
        f"{report['reference']}, remat {report['remat']}, on {slices}{report['topology']}: "
        f"{report['chips']} chips ({report['device_kind']}), mesh {mesh}"
    )
    for name, value in report["changes"].items():
        print(f"to run there: --config.{name}={value}")
    print(
        f"a micro-batch: {report['rows_a_chip']} rows, {report['tokens_a_chip']} tokens a chip; "
        f"it holds {report['prompts_a_micro_batch']} prompts of full length; a step has "
        f"{report['prompts_a_step']}, in {report['micro_batches_a_step']} micro-batches at most"
    )
    print(
        f"model FLOPs at full length: {report['flops_a_prompt']:.3e} a prompt, "
        f"{report['flops_a_step_and_chip']:.3e} a step and chip"
    )
    for name, program in report["programs"].items():
        print(f"{name}: compiled in {program['compile_seconds']:.0f} s")
        if not program["fits"]:
            print(f"  DOES NOT FIT: {program['reason']}")
            print("\n".join(f"    {line}" for line in program["largest"]))
        if "memory" not in program:
            continue
        memory = program["memory"]
        print("  GiB a chip: " + ", ".join(f"{key} {gib:.2f}" for key, gib in memory.items()))
        for one in program["collectives"]:
            print(
                f"  {one['kind']} over {one['network']}: {one['bytes'] / GIB:.3f} GiB a chip in "
                f"{one['times']} calls, a micro-batch being one"
            )
