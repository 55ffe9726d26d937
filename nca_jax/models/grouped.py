"""Experts on TPU: tokens sorted by expert, one grouped matrix product (megablox) for each kernel.

Axes: R rows, T tokens, D width, F MLP width, E experts, C experts a token is routed to,
      M = R * T * C pairs of (token, chosen expert), filled up to whole tiles.

Over a mesh, the tokens of an `expert` group are gathered, each device computes its own experts on
them, and the sums are scattered back (a ragged all-to-all would send less, but has no gradient to
test on CPU). No token is dropped, so M allows for all tokens to choose the experts of one device.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jax.sharding import PartitionSpec as P

from nca_jax.axes import ACTIVATION_RULES
from nca_jax.models.attention.attend import KEPT
from nca_jax.models.moe import Matrices

TILE_ROWS, TILE_SIDE = 512, 1024  # of M, and of both axes of a kernel; a core's memory bounds them
LANES = 128  # sizes of tiles are multiples of this


def mix(
    x: jax.Array,
    shares: jax.Array,
    chosen: jax.Array,
    gate: Matrices,
    up: Matrices,
    down: Matrices,
    *,
    interpret: bool,
) -> jax.Array:
    """A `Mix` as in `nca_jax.models.moe`.

    Args:
      interpret: run the kernel in Python, on any platform.
    """
    if jax.sharding.get_abstract_mesh().empty:
        one = functools.partial(
            _experts, first=0, num_experts=gate[0].shape[0], interpret=interpret
        )
        return one(x, shares, chosen, gate, up, down)
    rows = P(ACTIVATION_RULES["rows"])
    local = functools.partial(_local, num_experts=gate[0].shape[0], interpret=interpret)
    return jax.shard_map(
        local,
        in_specs=(
            *[rows] * 3,
            *[_specs(matrices, "fsdp", "tensor") for matrices in (gate, up)],
            _specs(down, "tensor", "fsdp"),
        ),
        out_specs=rows,
        check_vma=False,  # a Pallas call says nothing of replication
    )(x, shares, chosen, gate, up, down)


def _specs(matrices: Matrices, of_in: str, of_out: str) -> tuple[P, ...]:
    """Returns how W, and a and b of adapters, are split: the rank is not."""
    split = P("expert", of_in, of_out), P("expert", of_in, None), P("expert", None, of_out)
    return split[: len(matrices)]


def _gathered(matrices: Matrices, of_in: str, of_out: str) -> Matrices:
    """Returns the matrices, which are split as `_specs` has it, whole along fsdp."""
    axes = [tuple(spec) for spec in _specs(matrices, of_in, of_out)]
    return tuple(
        jax.lax.all_gather(x, "fsdp", axis=names.index("fsdp"), tiled=True)
        if "fsdp" in names
        else x
        for x, names in zip(matrices, axes, strict=True)
    )


def _local(x, shares, chosen, gate, up, down, *, num_experts: int, interpret: bool) -> jax.Array:
    """What one device does: its rows in, its rows out; its experts on all rows of the group."""
    gather = functools.partial(jax.lax.all_gather, tiled=True)
    x, shares, chosen = (gather(a, "expert", axis=0) for a in (x, shares, chosen))
    gate, up = (_gathered(matrices, "fsdp", "tensor") for matrices in (gate, up))
    down = _gathered(down, "tensor", "fsdp")
    first = jax.lax.axis_index("expert") * gate[0].shape[0]
    y = _experts(
        x, shares, chosen, gate, up, down, first=first, num_experts=num_experts, interpret=interpret
    )
    y = jax.lax.psum(y, "tensor")
    return jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)


def _experts(
    x, shares, chosen, gate, up, down, *, first, num_experts: int, interpret: bool
) -> jax.Array:
    """The share-weighted sum of the experts first, first + 1, ... that are in `gate`: [R, T, D]."""
    per_token = chosen.shape[-1]
    expert_of = chosen.reshape(-1)
    fill = -expert_of.size % (TILE_ROWS if expert_of.size > TILE_ROWS else LANES)
    expert_of = jnp.pad(expert_of, (0, fill), constant_values=num_experts - 1)  # [M]
    order = jnp.argsort(expert_of, stable=True)
    back = jnp.argsort(order)
    sizes = jnp.bincount(expert_of, length=num_experts).astype(jnp.int32)

    def grouped(rows, kernel):  # [M, a], [experts here, a, b] -> [M, b], 0 for others' tokens
        # One size for both axes of the kernel: the gradient takes them the other way round.
        side = min(TILE_SIDE, -(-min(kernel.shape[1:]) // LANES) * LANES)
        tiles = (TILE_ROWS if rows.shape[0] % TILE_ROWS == 0 else LANES, side, side)
        offset = jnp.asarray(first, jnp.int32)
        y = gmm(rows, kernel, sizes, x.dtype, tiles, offset, None, False, interpret)
        return checkpoint_name(y, KEPT)

    def product(rows, matrices):
        kernel, *adapter = matrices
        y = grouped(rows, kernel)
        return y + functools.reduce(grouped, adapter, rows) if adapter else y

    tokens = jnp.repeat(x.reshape(-1, x.shape[-1]), per_token, axis=0)
    rows = _permute(jnp.pad(tokens, ((0, fill), (0, 0))), order, back)
    hidden = jax.nn.silu(product(rows, gate)) * product(rows, up)
    out = _permute(product(hidden, down), back, order)[: tokens.shape[0]]
    out = out.reshape(*chosen.shape, -1) * shares[..., None].astype(x.dtype)
    return jnp.sum(out, axis=2)


@jax.custom_vjp
def _permute(x: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """x[order]; its gradient is the gather grad[back], where autodiff would scatter."""
    return x[order]


_permute.defvjp(
    lambda x, order, back: (x[order], back), lambda back, grad: (grad[back], None, None)
)
