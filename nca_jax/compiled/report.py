"""A compiled program in words: memory, largest temporaries, collectives."""

import re
from typing import Any

GIB = 2**30
LOOPS = re.compile(r"^jit\(\w+\)/|while/body/|closed_call/")  # what says little in a name


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
        memory = program["memory"].items()
        print("  GiB a chip: " + ", ".join(f"{key} {gib:.2f}" for key, gib in memory if gib))
        for one in program["temporaries"]:
            several = f"{one['times']} x " if one["times"] > 1 else ""
            name = LOOPS.sub("", one["name"])
            source = f" ({one['source']})" if one["source"] else ""
            print(f"    {one['bytes'] / GIB:.3f} {several}{one['shape']} {name}{source}")
        for one in program["collectives"]:
            print(
                f"  {one['kind']} over {one['network']}: {one['bytes'] / GIB:.3f} GiB a chip in "
                f"{one['times']} calls, a micro-batch being one"
            )
        if "weights" in program:
            turn, weights = program["a_turn"], program["weights"]
            sizes = " ".join(f"{axis}={size}" for axis, size in program["mesh"].items())
            print(
                f"  a token, on mesh {sizes}: {turn['sent'] / GIB:.3f} GiB a chip sent, "
                f"{turn['sent'] / weights:.2%} of {weights / GIB:.2f} GiB of weights; "
                f"{turn['written'] / GIB:.3f} GiB written into what is kept, "
                f"{turn['largest_write'] / 2**20:.2f} MiB at once"
            )
        large = program["overlap"]
        if large["times"]:
            print(
                f"  asynchronous, of the calls of 1 MiB and more: {large['async_times']} of "
                f"{large['times']}, {large['async_bytes'] / GIB:.3f} of "
                f"{large['bytes'] / GIB:.3f} GiB"
            )
        if cycles := program.get("estimated_cycles"):
            print(
                f"  the compiler expects {cycles:.4g} cycles of products, fusions and copies, a "
                "micro-batch being one; what is sent and Pallas kernels are not in it"
            )
