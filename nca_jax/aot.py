r"""Compile a run for a TPU pod that is not there, and say whether it fits.

    python -m nca_jax.aot --config=FILE[:args] --topology=v5p:4x4x4 [--num_slices=2]

What is compiled are the programs of `train`, `precompute` and `generate`, by the TPU's compiler, on
a host without a TPU, as far as it lays out their memory: seconds, where generating code takes
minutes. Exit status 1 when one does not fit.

    --config         a config file or nca_jax:NAME, with its arguments; --help_config lists fields
    --topology       GENERATION:SHAPE, or by the name that Cloud TPU has for it, as in v5litepod-8
    --num_slices     slices of that topology
    --rows_per_chip  rows of a micro-batch on each chip; 0: as config.data.rows has them
    --programs       which of train, precompute, decode
    --fit            looks for the least recomputation and use of the host's memory, then for the
                     most rows a chip, that fit
    --code           generates code too: it says whether kernels compile, and what cycles the
                     compiler expects
    --json           a file for all that is printed, and more

Memory is that of one chip. Nothing is run: of speed there is the compiler's estimate alone.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
from jax.stages import Wrapped
from ml_collections import ConfigDict

from nca_jax import auto, build, programs
from nca_jax.axes import flatten_paths
from nca_jax.batch import Rows
from nca_jax.checks import UserError, run_main
from nca_jax.compiled.program import program_report
from nca_jax.compiled.report import print_report
from nca_jax.compiled.topology import topology_devices, topology_name
from nca_jax.config import flatten
from nca_jax.config_check import check_config
from nca_jax.data.pack import segment_spans
from nca_jax.field import Value
from nca_jax.files import write_json
from nca_jax.flags import parse_flags
from nca_jax.flops import forward_flops, needed_flops
from nca_jax.infra.mesh import make_mesh, row_shards, slice_of
from nca_jax.infra.records import git_commit
from nca_jax.protocols import DataSection, Device
from nca_jax.reference import abstract_frozen
from nca_jax.sampling.refill import width_of
from nca_jax.sampling.serving import bytes_of

Program = tuple[Wrapped, tuple[Any, ...]]  # jitted, and the shapes of its arguments

LEANER: tuple[dict[str, Value], ...] = (  # by fields that change no number, from fast to lean
    {"model.remat": "none"},
    {"model.remat": "dots"},
    {"model.remat": "attention"},
    {"model.remat": "full"},
    {"model.remat": "host"},
    {"model.remat": "host", "optim.moments": "host"},
)
MAX_ROWS = 16  # a chip; --fit looks no further


def main(argv: list[str]) -> int:
    jax.config.update("jax_platforms", "cpu")  # a TPU of this host would be another program's
    config, flags = parse_flags(
        argv,
        sections=("generate",),
        topology=None,
        num_slices=1,
        rows_per_chip=0,
        programs=",".join(PREPARE),
        fit=False,
        code=False,
        json="",
    )
    wanted = flags.programs.split(",")
    if unknown := set(wanted) - set(PREPARE):
        raise UserError(f"--programs: wanted some of {', '.join(PREPARE)}, got {sorted(unknown)}.")
    devices = topology_devices(flags.topology, flags.num_slices)
    needed = changes_for(config, devices, 0)
    asked = changed(config, needed)
    config = build.build_for(asked, devices).config
    for line in auto.chosen(asked, config):
        print(line)

    def compiled(name: str, run: build.Run, *, with_code: bool = False) -> dict[str, Any]:
        return compile_apart(name, run, flags.topology, flags.num_slices, with_code=with_code)

    if flags.fit:
        config, rows_per_chip = find_fit(config, devices, compiled)
    else:
        rows_per_chip = flags.rows_per_chip
    changes = changes_for(config, devices, rows_per_chip)
    run = build.build_for(changed(config, changes), devices)
    report = {
        "commit": git_commit(),
        "topology": topology_name(flags.topology),
        "num_slices": flags.num_slices,
        "chips": len(devices),
        "device_kind": devices[0].device_kind,
        "mesh": dict(run.mesh.shape),
        "changes": needed | changes,
        "config": flatten(run.config),
        **implied(run),
        "programs": {name: compiled(name, run, with_code=flags.code) for name in wanted},
    }
    print_report(report)
    if flags.json:
        write_json(Path(flags.json), report)
    return 0 if all(program["fits"] for program in report["programs"].values()) else 1


def changed(config: ConfigDict, changes: dict[str, Value]) -> ConfigDict:
    """Returns a checked copy of the config with other values."""
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict(changes)
    check_config(config)
    return config.lock()


def changes_for(
    config: ConfigDict, devices: Sequence[Device], rows_per_chip: int
) -> dict[str, Value]:
    """Returns what the config must change to run on these devices: a run there wants the same.

    The data axis lies over slices, rows divide over chips, and a step has prompts for a
    micro-batch of rows at least.
    """
    changes: dict[str, Value] = {}
    num_slices = len({slice_of(device) for device in devices})
    if config.mesh.data > 0 and config.mesh.data % num_slices:
        changes["mesh.data"] = config.mesh.data * num_slices
    data = config.data
    shards = row_shards(make_mesh(changed(config, changes).mesh, devices))
    rows = rows_per_chip * shards if rows_per_chip else -(-data.rows // shards) * shards
    if rows != data.rows:
        changes["data.rows"] = rows
        changes["data.batch_size"] = max(data.batch_size, rows * prompts_a_row(data))
    return changes


def prepare_train(run: build.Run) -> Program:
    """Returns (the jitted train step of `nca_jax.train`, the shapes of its arguments)."""
    optimizer = programs.build_optimizer(run.config, run.config.steps or 1000)  # a constant in it
    state, _ = programs.abstract_state(run, optimizer.tx)
    frozen, has_ref_logps = abstract_frozen(run)
    step = programs.jit_train_step(run, optimizer, frozen)
    return step, (state, frozen, programs.abstract_batch(run, has_ref_logps=has_ref_logps))


def prepare_precompute(run: build.Run) -> Program:
    """Returns (the jitted forward pass of `nca_jax.precompute`, the shapes of its arguments)."""
    data = run.config.data
    num_slots = data.batch_size * data.num_responses
    rows = programs.abstract_batch(run, has_ref_logps=False).rows
    micro = Rows(*(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in rows))
    return programs.jit_rows_logps(run, num_slots), (programs.abstract_policy(run), micro)


def prepare_decode(run: build.Run) -> Program:
    """Returns (the jitted block of tokens of `nca_jax.generate`, the shapes of its arguments).

    The run is a `serving_run`. Prompts have the longest width, as many of them at once as fill
    `config.generate.batch_size`.
    """
    sampler, longest = programs.jit_sampler(run), run.config.data.max_prompt_len
    lanes = jax.eval_shape(lambda: sampler.empty(width_of(longest, longest)))
    ended = jax.ShapeDtypeStruct(lanes.done.shape, lanes.done.dtype)
    return sampler.decode, (programs.abstract_served(run), lanes, ended)


PREPARE = {"train": prepare_train, "precompute": prepare_precompute, "decode": prepare_decode}


def find_fit(
    config: ConfigDict,
    devices: Sequence[Device],
    compiled: Callable[[str, build.Run], dict[str, Any]],
) -> tuple[ConfigDict, int]:
    """Returns the config with the first of LEANER that fits, and the most rows a chip.

    Rows are doubled up to MAX_ROWS. Where nothing fits, the leanest, with one row a chip.

    Args:
      compiled: (name, run) -> the report of a program.
    """

    def fits(config: ConfigDict, rows_per_chip: int) -> bool:
        changes = changes_for(config, devices, rows_per_chip)
        program = compiled("train", build.build_for(changed(config, changes), devices))
        if program["fits"]:
            answer = f"{program['memory']['total']:.2f} GiB"
        else:
            answer = f"does not fit ({program['reason']})"
        said = ", ".join(f"{name.split('.')[-1]}={flatten(config)[name]}" for name in leaner)
        print(f"{said}, {rows_per_chip} rows a chip: {answer}", flush=True)
        return program["fits"]

    for leaner in LEANER:
        config = changed(config, {"model.scan_layers": True, **leaner})
        if fits(config, 1):
            rows_per_chip = 1
            while rows_per_chip < MAX_ROWS and fits(config, 2 * rows_per_chip):
                rows_per_chip *= 2
            return config, rows_per_chip
    return config, 1


def compile_apart(
    name: str, run: build.Run, topology: str, num_slices: int, *, with_code: bool
) -> dict[str, Any]:
    """Returns the same as `compile_program`, from a process of its own.

    A compiler cannot be stopped; a process can, once it has answered.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    arguments = (theirs, name, run.config.to_dict(), topology, num_slices, with_code)
    process = context.Process(target=_answer, args=arguments)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError as error:
        said = f"Compiling {name} ended without an answer; what it said is above."
        raise RuntimeError(said) from error
    finally:
        process.kill()
        process.join()


def _answer(
    answer: Connection, name: str, config: dict, topology: str, num_slices: int, with_code: bool
) -> None:
    """Sends the report of one program."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # as `assign` wants it
    run = build.build_for(ConfigDict(config).lock(), topology_devices(topology, num_slices))
    answer.send(compile_program(name, run, with_code=with_code))


def compile_program(name: str, run: build.Run, *, with_code: bool) -> dict[str, Any]:
    """Compiles one program; returns its `program_report`, and the seconds it took.

    Of sampling also its mesh, which is its own, and the bytes of all weights.
    """
    of_sampling = {}
    if name == "decode":
        run = programs.serving_run(run)
        weights = bytes_of(programs.abstract_served(run))
        of_sampling = {"mesh": dict(run.mesh.shape), "weights": weights}
    jitted, arguments = PREPARE[name](run)
    devices = list(run.mesh.devices.flat)
    start = time.perf_counter()
    with jax.set_mesh(run.mesh):
        lowered = jitted.lower(*arguments)
    slices = [slice_of(device) for device in devices]
    report = program_report(lowered, devices[0].device_kind, slices, with_code=with_code)
    return report | of_sampling | {"compile_seconds": time.perf_counter() - start}


def prompts_a_row(data: DataSection) -> int:
    """Returns how many prompts of full length, with K responses of full length, a row holds."""
    lengths = [data.max_prompt_len] + [data.max_response_len] * data.num_responses
    return data.row_len // segment_spans(lengths, 0, data.align)[-1][1]


def implied(run: build.Run) -> dict[str, Value]:
    """Returns what follows from the config and the mesh alone.

    rows_a_chip and tokens_a_chip are those of a micro-batch. prompts_a_step is B; as many as
    prompts_a_micro_batch fit at once when all are of full length, and more when they are shorter.
    flops are what B prompts of full length need: every token once, the prompt once for all of its
    responses, and a forward pass of a live reference.
    """
    data, mesh = run.config.data, run.mesh
    prompt, responses = data.max_prompt_len, [data.max_response_len] * data.num_responses
    adapters = run.model.adapter_params
    a_prompt = needed_flops(run.model.config, prompt, responses, adapters=adapters).total
    if abstract_frozen(run)[0].reference is not None:
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


if __name__ == "__main__":
    run_main(main)
