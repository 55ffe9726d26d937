r"""Compile a run for a TPU pod that is not there, and say whether it fits.

    python -m nca_jax.aot --config=FILE[:args] --topology=v5p:4x4x4 [--num_slices=2]

What is compiled are the programs of `train`, `precompute` and `generate`, by the TPU's compiler, on
a host without a TPU. Exit status 1, with the largest buffers, when one does not fit.

    --rows_per_chip  rows of a micro-batch on each chip; 0: as config.data.rows has them
    --programs       which of train, precompute, decode
    --fit            looks for the leanest recomputation, then for the most rows a chip, that fit
    --json           a file for all that is printed, and more

Memory is that of one chip. Nothing is run, so nothing is said about speed.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from nca_jax import build
from nca_jax.aot_report import implied, print_report
from nca_jax.axes import flatten_paths
from nca_jax.batch import Rows
from nca_jax.checkpoint import write_json
from nca_jax.checks import UserError, run_main
from nca_jax.config import check_config, flatten, parse_flags
from nca_jax.data.pack import segment_spans
from nca_jax.decode import WIDTH_MULTIPLE, jit_sampler, prompts_at_once
from nca_jax.hlo import collectives
from nca_jax.mesh import check_split, make_mesh, row_shards, slice_of
from nca_jax.topology import MEMORY_GIB, topology_devices

PROGRAMS = ("train", "precompute", "decode")
LEANER = ("none", "dots", "full")  # recomputation, from none to all of a layer
MAX_ROWS = 16  # a chip; --fit looks no further
GIB = 2**30


def main(argv: list[str]) -> int:
    jax.config.update("jax_platforms", "cpu")  # a TPU of this host would be another program's
    config, flags = parse_flags(
        argv,
        topology=None,
        num_slices=1,
        rows_per_chip=0,
        programs=",".join(PROGRAMS),
        fit=False,
        json="",
    )
    programs = flags.programs.split(",")
    if unknown := set(programs) - set(PROGRAMS):
        raise UserError(f"--programs: wanted some of {', '.join(PROGRAMS)}, got {sorted(unknown)}.")
    devices = topology_devices(flags.topology, flags.num_slices)
    if flags.fit:
        config, rows_per_chip = find_fit(config, devices)
    else:
        rows_per_chip = flags.rows_per_chip
    changes = changes_for(config, devices, rows_per_chip)
    run = build.build_for(changed(config, changes), devices)
    report = {
        "topology": flags.topology,
        "num_slices": flags.num_slices,
        "chips": len(devices),
        "device_kind": devices[0].device_kind,
        "mesh": dict(run.mesh.shape),
        "changes": changes,
        "config": flatten(run.config),
        **implied(run),
        "programs": {name: compile_program(name, run) for name in programs},
    }
    print_report(report)
    if flags.json:
        write_json(Path(flags.json), report)
    return 0 if all(program["fits"] for program in report["programs"].values()) else 1


def changed(config: ConfigDict, changes: dict[str, object]) -> ConfigDict:
    """Returns a checked copy of the config with other values."""
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict(changes)
    check_config(config)
    return config.lock()


def changes_for(config: ConfigDict, devices, rows_per_chip: int) -> dict[str, object]:
    """Returns what the config must change to run on these devices: a run there wants the same.

    The data axis lies over slices, rows divide over chips, and a step has prompts for a
    micro-batch of rows at least.
    """
    changes: dict[str, object] = {}
    num_slices = len({slice_of(device) for device in devices})
    if config.mesh.data > 0 and config.mesh.data % num_slices:
        changes["mesh.data"] = config.mesh.data * num_slices
    data = config.data
    shards = row_shards(make_mesh(changed(config, changes).mesh, devices))
    rows = rows_per_chip * shards if rows_per_chip else -(-data.rows // shards) * shards
    if rows != data.rows:
        lengths = [data.max_prompt_len] + [data.max_response_len] * data.num_responses
        prompts_a_row = max(1, data.row_len // segment_spans(lengths, 0, data.align)[-1][1])
        changes["data.rows"] = rows
        changes["data.batch_size"] = max(data.batch_size, rows * prompts_a_row)
    return changes


def find_fit(config: ConfigDict, devices) -> tuple[ConfigDict, int]:
    """Returns the config with the least recomputation that fits, and the most rows a chip.

    Rows are doubled up to MAX_ROWS. Where nothing fits, the leanest, with one row a chip.
    """

    def fits(config, rows_per_chip: int) -> bool:
        changes = changes_for(config, devices, rows_per_chip)
        program = compile_program("train", build.build_for(changed(config, changes), devices))
        answer = f"{program['memory']['total']:.2f} GiB" if program["fits"] else "does not fit"
        print(f"remat={config.model.remat}, {rows_per_chip} rows a chip: {answer}", flush=True)
        return program["fits"]

    for remat in LEANER:
        config = changed(config, {"model.remat": remat, "model.scan_layers": True})
        if fits(config, 1):
            rows_per_chip = 1
            while rows_per_chip < MAX_ROWS and fits(config, 2 * rows_per_chip):
                rows_per_chip *= 2
            return config, rows_per_chip
    return config, 1


def compile_program(name: str, run: build.Run) -> dict:
    """Compiles one program; returns its memory, collectives, largest arguments and seconds."""
    jitted, arguments = PREPARE[name](run)
    start = time.perf_counter()
    try:
        with jax.set_mesh(run.mesh):
            compiled = jitted.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {
            "fits": False,
            "reason": str(error).splitlines()[0],
            "largest": largest_allocations(str(error)) + largest_arguments(arguments, jitted, run),
            "compile_seconds": time.perf_counter() - start,
        }
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    limit = MEMORY_GIB[run.mesh.devices.flat[0].device_kind]
    arguments_bytes, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    output, alias = memory.output_size_in_bytes, memory.alias_size_in_bytes
    total = arguments_bytes + temporaries + output - alias
    sent = collectives(compiled.as_text(), [slice_of(device) for device in run.mesh.devices.flat])
    return {
        "fits": True,
        "memory": {
            "arguments": arguments_bytes / GIB,
            "temporaries": temporaries / GIB,
            "output": output / GIB,
            "alias": alias / GIB,
            "total": total / GIB,
            "limit": limit,
            "margin": limit - total / GIB,
        },
        "collectives": [one._asdict() for one in sent],
        "compile_seconds": seconds,
    }
