"""Sums over the responses that are there. Axes: B prompts, K responses a prompt."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def float32_at_least(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def all_if_none(mask: jax.Array | None, like: jax.Array) -> jax.Array:
    return jnp.ones(like.shape, bool) if mask is None else mask


def num_responses(mask: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[B, 1]; 1 for an empty row, so that nothing is divided by 0."""
    return jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1).astype(dtype)


def masked_sum(terms: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, K] -> [B]."""
    return jnp.sum(terms, axis=-1, where=mask)


def masked_mean(terms: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """The mean of the terms that are there, over an axis or two; 0 where none is."""
    return jnp.sum(terms, axis=axis, where=mask) / jnp.maximum(jnp.sum(mask, axis=axis), 1)


def pairwise(of_two: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """[B, K] -> [B, i, j]: of_two(x_i, x_j)."""
    return of_two(x[:, :, None], x[:, None, :])
