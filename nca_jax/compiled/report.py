"""What `nca_jax.aot` says of a run beside what the compiler says: work, shapes, largest buffers."""

import re

import numpy as np

from nca_jax import build, programs
from nca_jax.axes import flatten_paths
from nca_jax.data.pack import segment_spans
from nca_jax.flops import forward_flops, needed_flops
from nca_jax.infra.mesh import row_shards

GIB = 2**30
NUM_LARGEST = 8


def prompts_a_row(data) -> int:
    """Returns how many prompts of full length, with K responses of full length, a row holds."""
    lengths = [data.max_prompt_len] + [data.max_response_len] * data.num_responses
    return data.row_len // segment_spans(lengths, 0, data.align)[-1][1]


def implied(run: build.Run) -> dict[str, object]:
    """Returns what follows from the config and the mesh alone.

    rows_a_chip and tokens_a_chip are those of a micro-batch. prompts_a_step is B; as many as
    prompts_a_micro_batch fit at once when all are of full length, and more when they are shorter.
    flops are what B prompts of full length need: every token once, the prompt once for all of its
    responses, and a forward pass of a live reference.
    """
    data, mesh = run.config.data, run.mesh
    prompt, responses = data.max_prompt_len, [data.max_response_len] * data.num_responses
    a_prompt = needed_flops(run.model.config, prompt, responses).total
    if run.config.reference.kind == "live":
        a_prompt += forward_flops(run.model.config, prompt, responses).total
    fit = data.rows * prompts_a_row(data)
    rows_a_chip = data.rows // row_shards(mesh)
    return {
        "model": run.config.model.name,
        "params": int(sum(x.size for x in flatten_paths(run.model.abstract_params()).values())),
        "remat": run.config.model.remat,
        "reference": run.config.reference.kind,
        "rows_a_chip": rows_a_chip,
        "tokens_a_chip": rows_a_chip * data.row_len,
        "prompts_a_micro_batch": fit,
        "prompts_a_step": data.batch_size,
        "micro_batches_a_step": -(-data.batch_size // max(fit, 1)),
        "flops_a_prompt": a_prompt,
        "flops_a_step_and_chip": a_prompt * data.batch_size / mesh.size,
    }


def largest(run: build.Run, text: str) -> list[str]:
    """Returns the largest arrays of the train state and of a lowered program's text, described."""
    return [*largest_arguments(run), *largest_values(text, run.mesh.size)]


def largest_arguments(run: build.Run) -> list[str]:
    """Returns the largest arrays of the train state, as one chip has them."""
    optimizer = programs.build_optimizer(run.config, 1)
    state, shardings = programs.abstract_state(run, optimizer.tx)
    arrays, shardings = flatten_paths(state), flatten_paths(shardings).values()
    sized = []
    for (path, x), sharding in zip(arrays.items(), shardings, strict=True):
        shape = sharding.shard_shape(x.shape)
        sized.append((int(np.prod(shape)) * x.dtype.itemsize / GIB, path, shape))
    sized.sort(key=lambda one: -one[0])
    return [
        f"{size:.3f} GiB on a chip: {path} {shape}" for size, path, shape in sized[:NUM_LARGEST]
    ]


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


def print_report(report: dict) -> None:
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
