"""Compiling ahead of time compiles what runs, and counts what it sends."""

import importlib.util
import json
import math
import multiprocessing
import re

import jax
import jax.numpy as jnp
import pytest
from commands import command, write_records
from jax.sharding import PartitionSpec as P

from nca_jax import aot, build, programs, train
from nca_jax.checks import UserError
from nca_jax.chips import CHIPS, Chip
from nca_jax.compiled import topology
from nca_jax.compiled.hlo import Collective, calls, collectives, replica_groups
from nca_jax.compiled.report import print_report
from nca_jax.compiled.topology import topology_name
from nca_jax.compiled.writes import Writes, writes_a_turn
from nca_jax.files import write_json
from nca_jax.flags import parse_flags
from nca_jax.infra.mesh import param_shardings

SMOKE = ("--config.data.rows=4", "--config.mesh.fsdp=4", "--config.mesh.tensor=2")


class Stopped(Exception):
    pass


def main_of(program: str) -> str:
    """The text of the main function; what it calls goes by names that depend on earlier traces."""
    return re.sub(r"@\w+", "@function", program.split("func.func private")[0])


@pytest.mark.slow
def test_the_program_that_is_compiled_is_the_one_that_trains(tmp_path, monkeypatch):
    rows = write_records(tmp_path / "rows.jsonl")
    flags = (f"--config=configs/jsonl.py:files={rows},smoke", *SMOKE)
    jit_train_step, lowered = programs.jit_train_step, []

    def lower_only(run, optimizer, frozen):
        def step(*arguments):
            lowered.append(jit_train_step(run, optimizer, frozen).lower(*arguments).as_text())
            raise Stopped

        return step

    with monkeypatch.context() as patch:
        patch.setattr(train, "jit_train_step", lower_only)
        with pytest.raises(Stopped):
            train.main(["train", *flags, "--config.eval_every=0", f"--workdir={tmp_path / 'run'}"])
    config, _ = parse_flags(["aot", *flags, "--config.eval_every=0"])
    run = build.build_for(config, jax.devices())
    step, arguments = aot.prepare_train(run)
    with jax.set_mesh(run.mesh):
        assert main_of(step.lower(*arguments).as_text()) == main_of(lowered[0])


def test_precompute_and_decode_lower_from_shapes_alone():
    config, _ = parse_flags(["aot", "--config=configs/jsonl.py:files=x,smoke", *SMOKE])
    run = build.build_for(config, jax.devices())
    for name in ("precompute", "decode"):
        program, arguments = aot.PREPARE[name](run)
        with jax.set_mesh(run.mesh):
            out = program.lower(*arguments).out_info
        if name == "decode":
            assert out[1].tokens.shape == (32, 1, config.generate.max_new_tokens)


def test_rows_and_prompts_follow_from_the_devices():
    config, _ = parse_flags(["aot", "--config=configs/jsonl.py:files=x,smoke"])
    # A row of 512 tokens holds one prompt of 64 and four responses of 96.
    assert aot.changes_for(config, jax.devices(), 0) == {"data.rows": 8, "data.batch_size": 8}
    assert aot.changes_for(config, jax.devices(), 3) == {"data.rows": 24, "data.batch_size": 24}
    config, _ = parse_flags(["aot", "--config=configs/jsonl.py:files=x,smoke", *SMOKE])
    assert aot.changes_for(config, jax.devices(), 0) == {}


def loops(x):
    """5 turns of a sum over both axes, then one of each other kind over one axis."""
    x = jax.lax.scan(lambda x, _: (jax.lax.psum(x, ("a", "b")) * 0.1, None), x, None, length=5)[0]
    x = jax.lax.all_gather(x, "b", tiled=True)
    return jax.lax.psum_scatter(x, "a", tiled=True)


def test_collectives_are_counted_by_kind_network_and_turns_of_loops():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    f = jax.shard_map(loops, mesh=mesh, in_specs=P(), out_specs=P("a"), check_vma=False)
    text = jax.jit(f).lower(jnp.ones((8, 16))).compile().as_text()
    x = 8 * 16 * 4
    found = set(collectives(calls(text, [0] * 8)))
    assert found == {
        Collective("all-reduce", "ici", 5, 5 * x),
        Collective("all-gather", "ici", 1, 4 * x),
        Collective("reduce-scatter", "ici", 1, 4 * x),
    }
    by_slice = {one.kind: one.network for one in collectives(calls(text, [0] * 4 + [1] * 4))}
    assert by_slice == {"all-reduce": "dcn", "all-gather": "ici", "reduce-scatter": "dcn"}


def test_a_loop_that_the_compiler_unrolled_turns_less_often_than_its_bound():
    text = """%body (p: (f32[4], u32[])) -> (f32[4], u32[]) {
      %p = (f32[4]{0:T(128)}, u32[]{:T(128)}) parameter(0)
      %x = f32[4]{0:T(128)} get-tuple-element(%p), index=0
      %i = u32[]{:T(128)} get-tuple-element(%p), index=1
      %two = u32[]{:T(128)} constant(2)
      %next = u32[]{:T(128)} add(%i, %two)
      %copied = u32[]{:T(128)} copy(%next)
      %sum = f32[4]{0:T(128)} all-reduce(%x), replica_groups={}, to_apply=%add
      ROOT %t = (f32[4]{0:T(128)}, u32[]{:T(128)}) tuple(%sum, %copied)
    }
    %condition (p: (f32[4], u32[])) -> pred[] {
      %limit = u32[]{:T(128)} constant(7)
      %p = (f32[4]{0:T(128)}, u32[]{:T(128)}) parameter(0)
      %i = u32[]{:T(128)} get-tuple-element(%p), index=1
      ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
    }
    ENTRY %main (p: (f32[4], u32[])) -> (f32[4], u32[]) {
      %p = (f32[4]{0:T(128)}, u32[]{:T(128)}) parameter(0)
      ROOT %w = (f32[4]{0:T(128)}, u32[]{:T(128)}) while(%p), condition=%condition, body=%body
    }""".replace("\n    ", "\n")
    newer = re.sub(r".*get-tuple-element.*\n", "", text)  # as libtpu 0.0.48 writes it
    newer = newer.replace("(%x)", "(%p#0)").replace("(%i,", "(%p#1,")
    for each in (text, newer):
        assert collectives(calls(each, [0, 0])) == [Collective("all-reduce", "ici", 4, 4 * 16)]


def test_a_slice_that_is_an_element_of_a_tuple_is_counted_alone():
    text = """%body (p: TUPLE) -> TUPLE {
  %p = (f32[8,4]{1,0:T(8,128)}, (s32[2]{0}, f32[1,4]{1,0}), /*index=2*/f32[1,4]{1,0}) parameter(0)
  %zero = s32[] constant(0)
  %new = f32[8,4]{1,0:T(8,128)} dynamic-update-slice(%p#0, %p#2, %zero, %zero)
  ROOT %t = (f32[8,4]{1,0}, (s32[2]{0}, f32[1,4]{1,0}), f32[1,4]{1,0}) tuple(%new, %p#1, %p#2)
}
%condition (p: TUPLE) -> pred[] {
  %p = (f32[8,4]{1,0}, (s32[2]{0}, f32[1,4]{1,0}), f32[1,4]{1,0}) parameter(0)
  ROOT %go = pred[] custom-call(%p#1), custom_call_target="unknown"
}
ENTRY %main (p: TUPLE) -> TUPLE {
  %p = (f32[8,4]{1,0}, (s32[2]{0}, f32[1,4]{1,0}), f32[1,4]{1,0}) parameter(0)
  ROOT %w = (f32[8,4], (s32[2], f32[1,4]), f32[1,4]) while(%p), condition=%condition, body=%body
}"""
    assert writes_a_turn(text) == Writes(bytes=16, largest=16)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, to_apply", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4], to_apply", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), to_apply", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'y'}, use", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}, use", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2] {'x','y'}, use", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}", [[0, 2], [1, 3]]),
        ("replica_groups={}, to_apply", [[0, 1, 2, 3]]),
    ],
)
def test_groups_of_devices_are_read_in_each_notation(text, groups):
    assert replica_groups(f" %x = f32[] all-reduce(%y), {text}", 4).tolist() == groups


def test_what_hosts_send_between_slices_is_counted():
    text = """ENTRY %main (p: f32[4]) -> f32[4] {
      %send.1 = (f32[1,4,128]{2,1,0:T(4,128)}, u32[], token[]) send(%p, %t), is_host_transfer=true
      %recv.1 = (f32[1,4,128]{2,1,0:T(4,128)}, u32[], token[]) recv(%t), is_host_transfer=true
    }"""
    assert collectives(calls(text, [0, 1])) == [Collective("send", "dcn", 1, 4 * 128 * 4)]


def test_without_libtpu_a_compile_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    release = "50" if jax.__version_info__ >= (0, 12) else "42"
    with pytest.raises(UserError, match=rf"pip install 'libtpu==0\.0\.{release}\.\*'"):
        topology.topology_devices("v5p:4x4x4", 1)


def test_a_step_of_billions_of_parameters_is_described_without_arrays():
    flags = ("--config.model.scan_layers=True", "--config.data.rows=8")
    config, _ = parse_flags(["aot", "--config=configs/jsonl.py:files=x,model=mixtral_8x7b", *flags])
    run = build.build_for(config, jax.devices())
    state, _, batch = aot.prepare_train(run)[1]
    num_params = sum(x.size for x in jax.tree.leaves(state.params))
    assert num_params == pytest.approx(46.7e9, rel=1e-3)
    assert batch.rows.tokens.shape == (2, 8, run.config.data.row_len)


@pytest.mark.slow
def test_a_report_says_what_memory_is_for_and_what_does_not_fit(
    uncached, monkeypatch, capsys, tmp_path
):
    config, _ = parse_flags(["aot", "--config=configs/jsonl.py:files=x,smoke", *SMOKE])
    run = build.build_for(config, jax.devices())
    monkeypatch.setitem(CHIPS, "cpu", Chip(peak_flops=1e12, memory_gib=1e-4))
    program = aot.compile_program("precompute", run, with_code=True)
    memory = program["memory"]
    params = run.model.abstract_params()
    shards = jax.tree.map(
        lambda x, sharding: math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize,
        params,
        param_shardings(run.mesh, params),
    )
    of_rows = memory["arguments"] * 2**30 - sum(jax.tree.leaves(shards))
    assert 0 < of_rows < 40 * run.config.data.row_len  # one row a device, of integers
    assert memory["total"] == memory["arguments"] + memory["output"] + memory["temporaries"]
    assert memory["margin"] == memory["limit"] - memory["total"] < 0
    assert not program["fits"] and program["reason"].endswith("of 0.00 GiB")
    report = {
        "mesh": dict(run.mesh.shape),
        "num_slices": 1,
        "topology": "none",
        "chips": 8,
        "device_kind": "cpu",
        "changes": {},
        "programs": {"precompute": program},
        **aot.implied(run),
    }
    write_json(tmp_path / "report.json", report)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    print_report(report)
    said = capsys.readouterr().out
    largest = program["temporaries"][0]
    assert "DOES NOT FIT" in said and f" {largest['shape']} " in said
    assert "asynchronous" not in said  # of calls of 1 MiB, which a small model does not make


def test_rows_that_do_not_divide_over_the_chips_are_changed_and_said(monkeypatch, capsys):
    memory = {"total": 2.0, "limit": 1.0, "margin": -1.0}
    overlap = {"times": 2, "bytes": 2**30, "async_times": 1, "async_bytes": 2**29}
    program = {"fits": False, "reason": "2.00 of 1.00 GiB", "memory": memory, "temporaries": []}
    program |= {"collectives": [], "overlap": overlap, "compile_seconds": 1.0}
    monkeypatch.setattr(aot, "topology_devices", lambda name, num_slices: jax.devices())
    monkeypatch.setattr(aot, "compile_apart", lambda *args, with_code: program)
    flags = ("--config.data.rows=12", "--topology=v5e:2x4", "--programs=train")
    assert aot.main(["aot", "--config=configs/jsonl.py:files=x,smoke", *flags]) == 1
    said = capsys.readouterr().out
    assert "to run there: --config.data.rows=16" in said
    assert "DOES NOT FIT: 2.00 of 1.00 GiB" in said
    assert "asynchronous, of the calls of 1 MiB and more: 1 of 2, 0.500 of 1.000 GiB" in said


@pytest.mark.slow
def test_a_compiler_that_dies_is_said_and_leaves_no_process():
    config, _ = parse_flags(["aot", "--config=configs/jsonl.py:files=x,smoke", *SMOKE])
    run = build.build_for(config, jax.devices())
    with pytest.raises(RuntimeError, match="Compiling train ended without an answer"):
        aot.compile_apart("train", run, "none:1x1", 1, with_code=False)
    assert not multiprocessing.active_children()


def test_fit_takes_the_least_recomputation_then_the_most_rows(capsys):
    def compiled(name, run):
        config = run.config
        rows = config.data.rows // len(jax.devices())
        fits = config.model.remat == "full" and rows <= 4
        return {"fits": fits, "reason": "too large", "memory": {"total": float(rows)}}

    config, _ = parse_flags(["aot", "--config=configs/jsonl.py:files=x,smoke"])
    config, rows_per_chip = aot.find_fit(config, jax.devices(), compiled)
    assert (config.model.remat, rows_per_chip) == ("full", 4)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == [
        "remat=none, 1 rows a chip",
        "remat=dots, 1 rows a chip",
        "remat=attention, 1 rows a chip",
        "remat=full, 1 rows a chip",
        "remat=full, 2 rows a chip",
        "remat=full, 4 rows a chip",
        "remat=full, 8 rows a chip",
    ]


@pytest.mark.parametrize(
    ("slice_", "topology"),
    [
        ("v5e-8", "v5e:2x4"),
        ("v5litepod-8", "v5e:2x4"),
        ("v5litepod-256", "v5e:16x16"),
        ("v6e-1", "v6e:1x1"),
        ("v6e-32", "v6e:4x8"),
        ("v4-8", "v4:2x2x1"),  # of 4 chips: N counts their TensorCores
        ("v4-16", "v4:2x2x2"),
        ("v5p-64", "v5p:2x4x4"),
        ("v5p-128", "v5p:4x4x4"),
        ("v5p-2048", "v5p:8x8x16"),
        ("v5e:4x4", "v5e:4x4"),
        ("v5e-6", "v5e-6"),
        ("v9-8", "v9-8"),
    ],
)
def test_the_name_that_cloud_tpu_has_for_a_slice_is_its_topology(slice_, topology):
    assert topology_name(slice_) == topology


wants_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="wants libtpu")


def compiled(path: str, *flags: str) -> tuple[int, str, dict]:
    process = command(
        "aot",
        "--config=configs/jsonl.py:files=x,smoke",
        "--config.model.scan_layers=True",
        "--config.data.block=128",
        "--config.data.align=8",
        f"--json={path}",
        *flags,
    )
    out, err = process.communicate(timeout=600)
    assert process.returncode in (0, 1), err
    return process.returncode, out, json.loads(open(path).read())


@wants_libtpu
@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--topology=v5e:4x4",),
        ("--topology=v6e:4x4", "--num_slices=2", "--programs=train"),
        ("--topology=v5p:2x2x2", "--config.model.name=tiny_moe", "--config.mesh.expert=4"),
    ],
    ids=["v5e", "two slices", "experts"],
)
def test_tpu_programs_compile_without_a_tpu_and_again_to_the_same_memory(tmp_path, flags):
    reports = []
    for turn in range(2):
        status, out, report = compiled(str(tmp_path / f"{turn}.json"), *flags)
        assert status == 0 and "GiB a chip" in out
        reports.append({name: x["memory"] for name, x in report["programs"].items()})
    assert reports[0] == reports[1]
    networks = {one["network"] for one in report["programs"]["train"]["collectives"]}
    assert networks == ({"ici", "dcn"} if report["num_slices"] == 2 else {"ici"})


@wants_libtpu
@pytest.mark.tpu_aot
@pytest.mark.slow
def test_generating_code_changes_no_number(tmp_path):
    flags = ("--topology=v5e:2x2", "--programs=train")
    reports = [compiled(str(tmp_path / "a.json"), *flags, *code)[2] for code in ((), ("--code",))]
    without, with_code = (report["programs"]["train"] for report in reports)
    assert not without.pop("with_code") and with_code.pop("with_code")
    assert without.pop("compile_seconds") < with_code.pop("compile_seconds")
    assert with_code.pop("estimated_cycles") > 1000
    assert without == with_code


@wants_libtpu
@pytest.mark.tpu_aot
@pytest.mark.slow
def test_what_does_not_fit_gives_status_1_and_the_largest_temporaries(tmp_path):
    flags = ("--topology=v5e:2x2", "--programs=train", "--rows_per_chip=65536")
    status, out, report = compiled(str(tmp_path / "a.json"), *flags)
    assert status == 1 and "DOES NOT FIT" in out
    assert report["programs"]["train"]["temporaries"][0]["source"]
