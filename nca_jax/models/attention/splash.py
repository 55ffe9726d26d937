"""Splash attention over packed rows: the Pallas kernel of TPUs, by the same plan as `attention`.

Axes: R rows, T tokens, N query heads, G kv heads, H head width, Q = T / block blocks of tokens.

The kernel of `jax.experimental` takes a mask function of one integer a query token. Here it is a
code, made at run time, that says where the token's own segment starts and which tokens before it
are other responses; prompt ids, as segment ids of the kernel, part the prompts of a row; and the
live pairs of `Rows.pairs`, without those beyond a window, say which blocks are computed at all. So
rows of any lengths share one compiled program. All of it is the kernel's private `MaskInfo`, made
here, as the kernel's own functions would go through a mask [T, T]: hence the pinned jax.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jax.sharding import PartitionSpec as P

from nca_jax.axes import ACTIVATION_RULES
from nca_jax.batch import PROMPT_SEGMENT, Rows
from nca_jax.checks import UserError
from nca_jax.field import parse_pairs
from nca_jax.models.attention.attend import ATTENDED, Attend
from nca_jax.models.attention.seen import seen_by_blocks, seen_by_tokens

LANES = 128  # the kernel wants blocks that are multiples of this
CODE_BITS = 31  # a code is a non-negative int32

Blocks = tuple[tuple[str, int], ...]  # fields of the kernels' `BlockSizes`, those that are not Q's
BLOCKS = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
COMPUTED = {"block_kv_compute": "block_kv", "block_kv_dkv_compute": "block_kv_dkv"}  # parts of them
FUSED = "use_fused_bwd_kernel"


class Code(NamedTuple):
    """How a query token's integer is laid out: [gap / align | start / align | place in the row].

    `start` is the first token of its segment, `gap` how many tokens between its prompt and its
    segment are hidden from it (those of other responses); both 0 in a prompt. A prompt ends and a
    response starts at a multiple of `align`, so both are whole numbers of it.

    A window, which is the same in all layers of a kind, needs no bit more: see `seen`.
    """

    place_bits: int
    span_bits: int
    align: int
    window: int  # positions that a query sees, its own included; 0: all

    @classmethod
    def of(cls, row_len: int, align: int, window: int = 0) -> "Code | None":
        """Returns the layout for rows of segments at multiples of `align`, if one fits."""
        place_bits = max(1, math.ceil(math.log2(row_len)))
        span_bits = max(1, math.ceil(math.log2(row_len / align)))
        fits = place_bits + 2 * span_bits <= CODE_BITS
        return cls(place_bits, span_bits, align, window) if fits else None

    def pack(self, place: jax.Array, start: jax.Array, gap: jax.Array) -> jax.Array:
        start, gap = start // self.align, gap // self.align
        return place | start << self.place_bits | gap << (self.place_bits + self.span_bits)

    def __call__(self, code: jax.Array, key: jax.Array) -> jax.Array:
        """Whether the query of this code may attend to the token at `key`, prompt ids aside."""
        place = code & ((1 << self.place_bits) - 1)
        span = (1 << self.span_bits) - 1
        start = (code >> self.place_bits & span) * self.align
        gap = (code >> (self.place_bits + self.span_bits) & span) * self.align
        own, of_prompt = key >= start, key < start - gap
        if self.window:
            own &= place - key < self.window
            of_prompt &= place - gap - key < self.window
        return (key <= place) & (own | of_prompt)


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
    cap: float = 0.0,
) -> Attend:
    """Returns the attention of these rows by the rule of `nca_jax.batch`; the cache is unused.

    Codes and block masks are made here, once for all layers of one window.

    Args:
      rows: one micro-batch; T / num_blocks is a multiple of LANES.
      num_blocks: Q, blocks a row.
      align: segments lie at multiples of this, and `Code.of(T, align)` fits.
      interpret: run the kernel in Python, on any platform.
      scale: of the scores q k.
      blocks: of the kernels, those that have not T / num_blocks tokens; see `parse_blocks`.
      window: positions that a query sees, its own included; 0: all.
      cap: scaled scores s become cap tanh(s / cap); 0: they stay.
    """
    row_len = rows.tokens.shape[1]
    code = Code.of(row_len, align, window)
    if code is None:
        raise ValueError(f"No code for rows of {row_len} tokens, segments at multiples of {align}.")
    block = row_len // num_blocks
    sizes = _block_sizes(block, blocks)
    live = jax.vmap(lambda pairs: _live_blocks(pairs, num_blocks))(rows.pairs)  # [R, Q, Q]
    if window:
        live &= seen_by_blocks(seen_by_tokens(rows, window), num_blocks)

    def blocks_of(block_q: int | None, block_kv: int | None, *, by_key: bool = False) -> _Blocks:
        coarse = _coarser(live, (block_q or block) // block, (block_kv or block) // block)
        following = jax.vmap((lambda x: _next_live(x.T).T) if by_key else _next_live)(coarse)
        return _Blocks(coarse.astype(jnp.int8), following)

    plan = _Plan(
        _codes(rows, code),
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
        attend_here = _local(code, sizes, cap, interpret)
        if not jax.sharding.get_abstract_mesh().empty:
            attend_here = jax.shard_map(
                attend_here,
                in_specs=(*[by_head] * 3, by_row),
                out_specs=by_head,
                check_vma=False,  # a Pallas call says nothing of replication
            )
        return attend_here(*heads_first, plan).transpose(0, 2, 1, 3), cache

    return attend


def _local(
    code: Code, sizes: kernels.BlockSizes, cap: float, interpret: bool
) -> Callable[..., jax.Array]:
    """Returns the attention of the rows and heads that one device holds, q [R, N, T, H]."""

    def one_row(q, k, v, plan):
        def info(blocks):
            return MaskInfo(
                data_next=blocks.following[None],
                mask_next=None,
                block_mask=blocks.live[None],
                partial_mask_blocks=None,
                q_sequence=plan.codes,
            )

        of_row = kernels.SplashAttentionKernel(
            info(plan.forward),
            None if sizes.use_fused_bwd_kernel else info(plan.dq),
            info(plan.dkv),
            block_sizes=sizes,
            is_mqa=False,
            save_residuals=False,
            mask_value=kernels.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=cap or None,
            residual_checkpoint_name=ATTENDED,
            mask_function=code,
            interpret=interpret,
        )
        out = of_row(q, k, v, kernels.SegmentIds(plan.query_ids, plan.key_ids))
        assert not isinstance(out, tuple)  # that would have the residuals, which nobody asked for
        return out

    return jax.vmap(one_row)


def _codes(rows: Rows, code: Code) -> jax.Array:
    """Returns the code of each token, [R, T] int32."""
    place, seen = jnp.arange(rows.tokens.shape[1], dtype=jnp.int32)[None], seen_by_tokens(rows, 0)
    start = jnp.where(rows.segments > PROMPT_SEGMENT, seen.own, 0)
    return code.pack(place, start, jnp.maximum(start - seen.prompt_end, 0))


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
