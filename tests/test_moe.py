"""Grouped matrix products give what the dense mixture gives, alone and over a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nca_jax.infra.mesh import make_mesh
from nca_jax.models import grouped
from nca_jax.models.moe import dense

E, D, F, C = 4, 16, 24, 2
MIX = functools.partial(grouped.mix, interpret=True)
MESH = {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}


def problem(chosen=None, rows=8, length=12, rank=0):
    """Returns (x, shares, chosen, gate, up, down); experts at random, or all tokens as given.

    With a rank the kernels have adapters.
    """
    keys = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(keys[0], (rows, length, D))
    shares = jax.nn.softmax(jax.random.normal(keys[1], (rows, length, C)))
    if chosen is None:
        chosen = jax.lax.top_k(jax.random.normal(keys[2], (rows, length, E)), C)[1]
    else:
        chosen = jnp.broadcast_to(jnp.array(chosen, jnp.int32)[None, None], shares.shape)
    sizes = zip(keys[3:], [(D, F), (D, F), (F, D)], strict=True)
    return x, shares, chosen, *(matrices(key, *of, rank) for key, of in sizes)


def matrices(key, size_in, size_out, rank):
    """Returns the kernel of all experts, and with a rank the a and b of its adapter."""
    kernel = jax.random.normal(key, (E, size_in, size_out))
    a = jax.random.normal(jax.random.fold_in(key, 1), (E, size_in, rank))
    b = jax.random.normal(jax.random.fold_in(key, 2), (E, rank, size_out))
    return (kernel, a, b) if rank else (kernel,)


def value_and_gradients(mix, arrays):
    """Returns (y, gradients by x, shares and all matrices) of a random linear function."""
    weights = jax.random.normal(jax.random.key(9), arrays[0].shape)

    def loss(x, shares, gate, up, down):
        y = mix(x, shares, arrays[2], gate, up, down)
        return jnp.sum(weights * y), y

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))
    grads, y = grad(*arrays[:2], *arrays[3:])
    return y, *jax.tree.leaves(grads)


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(None, id="random"),
        pytest.param((3, 1), id="two", marks=pytest.mark.slow),
        pytest.param((0, 2), id="other two", marks=pytest.mark.slow),
    ],
)
def test_grouped_products_equal_the_dense_mixture_and_drop_no_token(chosen):
    arrays = problem(chosen)
    assert_same(value_and_gradients(MIX, arrays), value_and_gradients(dense, arrays))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"expert": 4, "fsdp": 2}, marks=pytest.mark.slow),
        {"expert": 2, "tensor": 2, "data": 2},
    ],
    ids=["expert, fsdp", "expert, tensor, data"],
)
def test_experts_with_adapters_over_a_mesh_equal_the_dense_mixture(sizes):
    arrays = problem(rank=3)
    want = value_and_gradients(dense, arrays)
    with jax.set_mesh(make_mesh(MESH | sizes)):
        got = value_and_gradients(MIX, arrays)
    assert_same(got, want)


@pytest.mark.slow
def test_a_gradient_through_many_tiles_equals_the_dense_one(monkeypatch):
    monkeypatch.setattr(grouped, "TILE_ROWS", 128)
    monkeypatch.setattr(grouped, "TILE_SIDE", 128)
    arrays = problem(rows=8, length=40)
    assert_same(value_and_gradients(MIX, arrays), value_and_gradients(dense, arrays))
