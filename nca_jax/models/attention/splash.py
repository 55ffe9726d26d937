"""Splash attention over packed rows: the Pallas kernel of TPUs, by the same plan as `attention`.

Axes: R rows, T tokens, N query heads, G kv heads, H head width, Q = T / block blocks of tokens.

The kernel of `jax.experimental` takes a mask function of one integer a query token. Here it is a
code, made at run time, that says where the token's own segment starts and which tokens before it
are other responses; prompt ids, as segment ids of the kernel, part the prompts of a row; and the
live pairs of `Rows.pairs` say which blocks are computed at all. So rows of any lengths share one
compiled program. The codes lean on private fields of the kernel (`MaskInfo`), hence the pinned jax.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from nca_jax.axes import ACTIVATION_RULES
from nca_jax.batch import PROMPT_SEGMENT, Rows
from nca_jax.checks import UserError
from nca_jax.field import parse_pairs
from nca_jax.models.attention.attend import ATTENDED, Attend

LANES = 128  # the kernel wants blocks that are multiples of this
CODE_BITS = 31  # a code is a non-negative int32

Blocks = tuple[tuple[str, int], ...]  # fields of the kernels' `BlockSizes`, those that are not Q's
BLOCKS = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
COMPUTED = {"block_kv_compute": "block_kv", "block_kv_dkv_compute": "block_kv_dkv"}  # parts of them
FUSED = "use_fused_bwd_kernel"


class Code(NamedTuple):
    """How a query token's integer is laid out: [gap / align | start / align | place in the row].

    `start` is the first token of its segment, `gap` how many tokens between the first response's
    start and its own are hidden from it (those of other responses); both 0 in a prompt.
    """

    place_bits: int
    span_bits: int
    align: int

    @classmethod
    def of(cls, row_len: int, align: int) -> "Code | None":
        """Returns the layout for rows whose segments start at multiples of `align`, if one fits."""
        place_bits = max(1, math.ceil(math.log2(row_len)))
        span_bits = max(1, math.ceil(math.log2(row_len / align)))
        fits = place_bits + 2 * span_bits <= CODE_BITS
        return cls(place_bits, span_bits, align) if fits else None

    def pack(self, place: jax.Array, start: jax.Array, gap: jax.Array) -> jax.Array:
        start, gap = start // self.align, gap // self.align
        return place | start << self.place_bits | gap << (self.place_bits + self.span_bits)

    def allows(self, code: jax.Array, key: jax.Array) -> jax.Array:
        """Whether the query of this code may attend to the token at `key`, prompt ids aside."""
        place = code & ((1 << self.place_bits) - 1)
        span = (1 << self.span_bits) - 1
        start = (code >> self.place_bits & span) * self.align
        gap = (code >> (self.place_bits + self.span_bits) & span) * self.align
        return (key <= place) & ((key >= start) | (key < start - gap))


class _CodeMask(masks._ComputableMask):
    """A mask of [T, T] that the kernel computes from the codes it is given at run time."""

    def __init__(self, row_len: int, code: Code):
        self.code = code
        super().__init__((row_len, row_len), code.allows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _CodeMask) and (self.shape, self.code) == (other.shape, other.code)

    def __hash__(self) -> int:
        return hash((self.shape, self.code))


def parse_blocks(text: str, *, block: int, row_len: int) -> Blocks:
    """Returns the sizes of "block_q=1024,use_fused_bwd_kernel=1", names of `kernels.BlockSizes`.

    Args:
      block: of the plan, and of what is not named.
      row_len: T; 0: not known yet.
    Raises:
      UserError: there is no such size, or the kernels cannot have it.
    """
    known = (*BLOCKS, *COMPUTED, FUSED)
    asked = parse_pairs(text)
    for name, value in asked.items():
        if name not in known or not value.isdecimal():
            raise UserError(
                f"config.model.splash: {name}={value} is no size; wanted whole numbers for some of "
                f"{', '.join(known)}."
            )
    sizes = {name: int(value) for name, value in asked.items()}
    is_fused = bool(sizes.get(FUSED))
    for name, size in sizes.items():
        whole = sizes.get(COMPUTED.get(name, ""), block)
        for is_bad, wanted in (
            (name == FUSED and size > 1, "must be 0 or 1"),
            (is_fused and name in BLOCKS[4:], f"is of the kernel that {FUSED}=1 does without"),
            (
                name in BLOCKS and (not size or size % block or row_len % size),
                f"must be a multiple of config.data.block={block} and divide "
                f"config.data.row_len={row_len}",
            ),
            (
                name in COMPUTED and (not size or size % LANES or whole % size),
                f"must be a multiple of {LANES} and divide {COMPUTED.get(name)}={whole}",
            ),
        ):
            if is_bad:
                raise UserError(f"config.model.splash: {name}={size} {wanted}.")
    return tuple(sizes.items())


def _block_sizes(block: int, blocks: Blocks) -> kernels.BlockSizes:
    sizes: dict[str, Any] = dict.fromkeys(BLOCKS, block) | dict(blocks)
    is_fused = bool(sizes.pop(FUSED, 0))
    if is_fused:
        del sizes["block_q_dq"], sizes["block_kv_dq"]
    return kernels.BlockSizes(**sizes, use_fused_bwd_kernel=is_fused)


class _Blocks(NamedTuple):
    """Which pairs of blocks a kernel computes."""

    live: jax.Array  # [R, query blocks, key blocks] int8
    following: jax.Array  # the same shape: the block that is fetched ahead


class _Plan(NamedTuple):
    """What the kernels are told of rows."""

    codes: jax.Array  # [R, T] int32
    query_ids: jax.Array  # [R, T] int32
    key_ids: jax.Array  # [R, T] int32, -1 where a key is off
    forward: _Blocks
    dq: _Blocks  # unread where the backward kernels are fused
    dkv: _Blocks


def packed(
    rows: Rows[jax.Array],
    *,
    num_blocks: int,
    align: int,
    interpret: bool,
    scale: float,
    blocks: Blocks = (),
    window: int = 0,
) -> Attend:
    """Returns the attention of these rows by the rule of `nca_jax.batch`; the cache is unused.

    Codes and block masks are made here, once for all layers.

    Args:
      rows: one micro-batch; T / num_blocks is a multiple of LANES.
      num_blocks: Q, blocks a row.
      align: segments start at multiples of this, and `Code.of(T, align)` fits.
      interpret: run the kernel in Python, on any platform.
      scale: of the scores q k.
      blocks: of the kernels, those that have not T / num_blocks tokens; see `parse_blocks`.
      window: hides nothing: no prompt with a response is longer.
    """
    row_len = rows.tokens.shape[1]
    code = Code.of(row_len, align)
    if code is None:
        raise ValueError(f"No code for rows of {row_len} tokens, segments at multiples of {align}.")
    block = row_len // num_blocks
    sizes = _block_sizes(block, blocks)
    live = jax.vmap(lambda pairs: _live_blocks(pairs, num_blocks))(rows.pairs)  # [R, Q, Q]

    def blocks_of(block_q: int | None, block_kv: int | None, *, by_key: bool = False) -> _Blocks:
        coarse = _coarser(live, (block_q or block) // block, (block_kv or block) // block)
        following = jax.vmap((lambda x: _next_live(x.T).T) if by_key else _next_live)(coarse)
        return _Blocks(coarse.astype(jnp.int8), following)

    plan = _Plan(
        jax.vmap(lambda rows: _codes(rows, code))(rows),
        rows.prompt_ids,
        jnp.where(rows.key_on, rows.prompt_ids, -1),
        forward=blocks_of(sizes.block_q, sizes.block_kv),
        dq=blocks_of(sizes.block_q_dq, sizes.block_kv_dq),
        dkv=blocks_of(sizes.block_q_dkv, sizes.block_kv_dkv, by_key=True),
    )

    def attend(q, k, v, cache):
        by_head = P(ACTIVATION_RULES["rows"], ACTIVATION_RULES["heads"], None, None)
        by_row = P(ACTIVATION_RULES["rows"])
        heads_first = [x.transpose(0, 2, 1, 3) for x in (q * scale, k, v)]
        attend_here = _local(code, sizes, interpret)
        if not jax.sharding.get_abstract_mesh().empty:
            attend_here = jax.shard_map(
                attend_here,
                in_specs=(*[by_head] * 3, by_row),
                out_specs=by_head,
                check_vma=False,  # a Pallas call says nothing of replication
            )
        return attend_here(*heads_first, plan).transpose(0, 2, 1, 3), cache

    return attend


def _local(code: Code, sizes: kernels.BlockSizes, interpret: bool) -> Callable[..., jax.Array]:
    """Returns the attention of the rows and heads that one device holds, q [R, N, T, H]."""

    def attend(q, k, v, plan):
        num_heads, row_len = q.shape[1:3]
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([_CodeMask(row_len, code)] * num_heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=ATTENDED,
            interpret=interpret,
        )

        def one_row(q, k, v, plan):
            def with_plan(info, blocks):
                return info._replace(
                    q_sequence=plan.codes,
                    block_mask=blocks.live[None],
                    data_next=blocks.following[None],
                )

            of_row = kernels.SplashAttentionKernel(
                with_plan(kernel.fwd_mask_info, plan.forward),
                kernel.dq_mask_info and with_plan(kernel.dq_mask_info, plan.dq),
                with_plan(kernel.dkv_mask_info, plan.dkv),
                **kernel.kwargs,
            )
            out = of_row(q, k, v, kernels.SegmentIds(plan.query_ids, plan.key_ids))
            assert not isinstance(
                out, tuple
            )  # that would have the residuals, which nobody asked for
            return out

        return jax.vmap(one_row)(q, k, v, plan)

    return attend


def _codes(rows: Rows, code: Code) -> jax.Array:
    """Returns the code of each token of one row, [T] int32."""
    place = jnp.arange(rows.tokens.shape[0], dtype=jnp.int32)

    def differs(x):  # from the token before
        return jnp.diff(x, prepend=-1) != 0

    def last(there):  # where the latest one was
        return jax.lax.cummax(jnp.where(there, place, 0))

    begins = differs(rows.segments) | differs(rows.prompt_ids)
    start = last(begins)
    first_response = last(begins & (rows.segments == PROMPT_SEGMENT + 1))
    is_response = rows.segments > PROMPT_SEGMENT
    start = jnp.where(is_response, start, 0)
    return code.pack(place, start, jnp.where(is_response, start - first_response, 0))


def _live_blocks(pairs: jax.Array, num_blocks: int) -> jax.Array:
    """[P, 2] pairs of one row -> [Q, Q] bool, queries first. Filler is (-1, -1)."""
    live = jnp.zeros((num_blocks + 1, num_blocks + 1), bool)  # filler goes to the last, dropped
    return live.at[pairs[:, 0], pairs[:, 1]].set(True)[:num_blocks, :num_blocks]


def _coarser(live: jax.Array, q: int, kv: int) -> jax.Array:
    """[R, Q, Q] -> [R, Q / q, Q / kv] of blocks that are so many times as large."""
    num_rows, num_blocks, _ = live.shape
    return live.reshape(num_rows, num_blocks // q, q, num_blocks // kv, kv).any(axis=(2, 4))


def _next_live(live: jax.Array) -> jax.Array:
    """For each place of [Q, Q], row by row: the column of the first live pair from there on.

    The kernel fetches that block ahead. After the last live pair it is that of the first.
    """
    flat = live.reshape(-1)
    at = jnp.where(flat, jnp.arange(flat.size), flat.size)
    following = jax.lax.cummin(at, reverse=True)
    following = jnp.where(following == flat.size, at.min(), following)
    dtype = jnp.int8 if live.shape[1] <= 128 else jnp.int32  # scalar memory is scarce
    return (following % live.shape[1]).astype(dtype).reshape(live.shape)
