"""What is read of a compiler's text: memory, temporaries by name, bytes, what is asynchronous."""

import re

import jax
import jax.numpy as jnp
import pytest

from nca_jax.compiled.assign import assign
from nca_jax.compiled.buffers import Memory, Temporary, largest_temporaries, memory
from nca_jax.compiled.hlo import Overlap, calls, estimated_cycles, overlap, shape_bytes

PROGRAM = """HloModule jit_step, is_scheduled=true

FileNames
1 "/opt/nca_jax/models/decoder.py"
2 "/usr/lib/python3/site-packages/jax/lax.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=145 end_line=145 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}
3 {file_location_id=2 parent_frame_id=3}

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0), metadata={op_name="params['w']"}
  %cast.1 = bf16[8,128]{1,0:T(8,128)(2,1)} convert(%p), backend_config={}
  %add.1 = f32[4,8,128]{2,1,0} add(%p, %p), metadata={op_name="jit(step)/add" stack_frame_id=2}
  %dot.1 = f32[4,8,128]{2,1,0} fusion(%p), metadata={op_name="jit(step)/dot" stack_frame_id=3}
  %dot.2 = f32[4,8,128]{2,1,0} fusion(%p), metadata={op_name="jit(step)/dot" stack_frame_id=3}
}
"""
ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, parameter 0, shape |f32[8,128]| at ShapeIndex {}, maybe-live-out:
 value: <1 p @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
allocation 1: size 512, maybe-live-out:
 value: <2 sum @0> (size=512,offset=0): f32[]{:T(128)}
allocation 2: size 64, thread-local:
allocation 3: size 8192, color 5, parameter 1, shape |f32[16,128]| at ShapeIndex {}:
 value: <3 moments @5> (size=8192,offset=0): f32[16,128]{1,0:T(8,128)S(5)}
allocation 4: size 2048, color 1, preallocated-temp:
 value: <4 scratch @1> (size=2048,offset=0): bf16[8,128]{1,0:T(8,128)(2,1)S(1)}
allocation 5: size 67584, preallocated-temp:
 value: <5 cast.1 @0> (size=2048,offset=0): bf16[8,128]{1,0:T(8,128)(2,1)}
 value: <6 dot.1 @0> (size=16384,offset=2048): f32[4,8,128]{2,1,0}
 value: <7 dot.2 @0> (size=16384,offset=18432): f32[4,8,128]{2,1,0}
 value: <8 while.1{2} (phi) @0> (size=16384,offset=34816): f32[4,8,128]{2,1,0}
 value: <9 add.1 @0> (size=16384,offset=34816): f32[4,8,128]{2,1,0}
 value: <11 broadcast.7 @0> (size=512,offset=67072): s32[8]{0}
 value: <10 gone @0> (size=32768,offset=34816): f32[8,8,128]{2,1,0}
"""
LIVE = """HloLiveRange (max 9):
  InstructionSequence:
    0:p
  BufferLiveRange:
    p{}:0-9
    gone{}:0-3
    scratch{}:0-9
    dot.1{}:2-6
    dot.2{}:4-6
    while.1{2}:4-5
    add.1{}:5-7
    broadcast.7{}:5-5
    cast.1{}:0-9
"""


def test_memory_is_what_is_set_aside_on_the_device_and_the_host_apart():
    found = memory(ASSIGNMENT)
    assert found == Memory(arguments=4096, output=512, temporaries=64 + 67584, host=8192)
    assert found.total == 4096 + 512 + 64 + 67584
    paged = re.sub(r"(allocation .*?: size \d+(, color \d+)?)", r"\1, page 0", ASSIGNMENT)
    assert "color 5, page 0, parameter 1" in paged  # as libtpu 0.0.48 writes it
    assert memory(paged) == found


def test_temporaries_where_most_is_alive_are_named_by_what_they_come_from():
    step = "f32[4,8,128]"
    assert largest_temporaries(ASSIGNMENT, LIVE, PROGRAM, 9) == [
        Temporary(32768, 2, step, "jit(step)/dot", ""),  # no line of this package
        Temporary(16384, 1, step, "jit(step)/add", "models/decoder.py:145"),  # of the loop's tuple
        Temporary(2048, 1, "bf16[8,128]", "params['w']", ""),  # the compiler's own conversion
        Temporary(512, 1, "s32[8]", "broadcast.7", ""),  # of nothing that has a name
    ]
    assert len(largest_temporaries(ASSIGNMENT, LIVE, PROGRAM, 2)) == 2


def test_the_layout_of_a_program_holds_its_donated_arguments_once(uncached):
    def step(w, x):
        x, seen = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x.astype(jnp.bfloat16)), x, w)
        return w * x.sum(), seen.sum(), x

    w, x = jnp.ones((8, 128, 128)), jnp.ones((64, 128))
    lowered = jax.jit(step, donate_argnums=0).lower(w, x)
    found = memory(assign(lowered, with_code=True).buffers)
    said = lowered.compile().memory_analysis()
    assert found.arguments == said.argument_size_in_bytes == w.nbytes + x.nbytes
    assert found.output == said.output_size_in_bytes - said.alias_size_in_bytes
    assert 0 <= found.temporaries - said.temp_size_in_bytes < 100  # scalar constants
    assert said.peak_memory_in_bytes < found.arguments + said.temp_size_in_bytes  # too little


@pytest.mark.parametrize(
    ("shape", "num_bytes"),
    [
        ("(bf16[4,8]{1,0:T(8,128)}, f32[3]{0}, s32[], pred[2], token[])", 64 + 12 + 4 + 2),
        ("f8e4m3fn[4,8]{1,0:T(8,128)(4,1)}", 32),
        ("u4[5,3]{1,0:T(8,128)(8,1)E(4)S(1)}", 8),  # two in a byte
        ("(s4[6]{0:E(4)}, s4[6]{0}, c64[2]{0})", 3 + 6 + 16),  # a byte each where not packed
    ],
)
def test_bytes_of_shapes(shape, num_bytes):
    assert shape_bytes(shape) == num_bytes


def test_what_starts_and_is_done_later_is_asynchronous():
    shape, small = "f32[1024,1024]{1,0:T(8,128)}", "f32[8,128]{1,0:T(8,128)}"
    text = f"""%offloaded (p: f32[4]) -> f32[4] {{
      ROOT %rs = {shape} all-gather(%p), replica_groups={{{{0,1}}}}, dimensions={{0}}
    }}
    %outer (p: f32[4]) -> f32[4] {{
      ROOT %call = {shape} call(%p), to_apply=%inner
    }}
    %inner (p: f32[4]) -> f32[4] {{
      ROOT %rs2 = {shape} all-gather(%p), replica_groups={{{{0,1}}}}, dimensions={{0}}
    }}
    %start (p: f32[4]) -> f32[4] {{
      %g = {shape} all-gather(%p), replica_groups={{{{0,1}}}}, frontend_attributes={{chain_id="1"}}
      ROOT %s = ({shape}, u32[]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
    }}
    %meanwhile (p: f32[4]) -> f32[4] {{
      %g2 = {shape} all-gather(%p), replica_groups={{{{0,1}}}}, frontend_attributes={{chain_id="1"}}
    }}
    ENTRY %main (p: f32[4]) -> f32[4] {{
      %a = {shape} all-reduce(%p), replica_groups={{{{0,1}}}}, to_apply=%add
      %b = {small} all-reduce(%p), replica_groups={{{{0,1}}}}, to_apply=%add
      %c = ({shape}, {shape}) collective-permute-start(%p), source_target_pairs={{{{0,1}}}}
      %d = ({shape}, {shape}, s32[]) async-start(%p), calls=%offloaded
      %h = ({shape}, {shape}, s32[]) async-start(%p), calls=%outer
      %e = ({shape}, u32[]) fusion(%p), kind=kCustom, calls=%start
      %f = {shape} fusion(%p), kind=kCustom, calls=%meanwhile
    }}""".replace("\n    ", "\n")
    large = 4 * 2**20
    assert overlap(calls(text, [0, 0])) == Overlap(5, 5 * large, 4, 4 * large)


def test_estimated_cycles_are_of_all_turns_and_leave_out_what_has_no_estimate():
    def part(name, cycles):
        return f'%{name} = f32[4] fusion(%p), backend_config={{"estimated_cycles":"{cycles}"}}'

    text = f"""%body (p: f32[4]) -> f32[4] {{
      {part("a", 100)}
      ROOT {part("b", 20)}
    }}
    ENTRY %main (p: f32[4]) -> f32[4] {{
      %loop = f32[4] while(%p), condition=%c, body=%body, {{"known_trip_count":{{"n":"3"}}}}
      {part("sent", 2**63 - 1)}
      ROOT {part("d", 7)}
    }}""".replace("\n    ", "\n")
    assert estimated_cycles(text) == 3 * (100 + 20) + 7
