"""Rotary positions: how fast each pair of a head turns, and the turning.

Axes: R rows, T tokens, H head width, P pairs that turn: of the first 2 P elements of a head, each
      of one half with its like in the other.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from nca_jax.batch import Rows
from nca_jax.model_config import Linear, LongRope, Rope, RopeScaling, Yarn


def rotate(
    x: jax.Array, positions: jax.Array, rope: Rope | None, lengths: jax.Array | None = None
) -> jax.Array:
    """Rotary embedding of [R, T, heads, H]; float32, as bfloat16 has no 257.

    Args:
      x: queries or keys.
      positions: [R, T] int32.
      rope: how they turn; None: they do not.
      lengths: [R, T] or [R, 1] int32, see `sequence_lengths`; `LongRope` alone reads them.
    """
    if rope is None:
        return x
    freqs, scaling = rotary_frequencies(rope, x.shape[-1]), rope.scaling
    at = positions.astype(jnp.float32)[..., None]
    if isinstance(scaling, LongRope):
        if lengths is None:
            raise ValueError("LongRope goes by the lengths of sequences; give them to hidden().")
        is_long = (lengths > scaling.original_max_position)[..., None]
        angles = at * jnp.where(is_long, freqs[1][None, None], freqs[0][None, None])
    else:
        angles = at * freqs[None, None]  # [R, T, P]
    sin, cos = jnp.sin(angles)[:, :, None], jnp.cos(angles)[:, :, None]
    if isinstance(scaling, Yarn | LongRope) and scaling.attention_factor != 1:
        sin, cos = sin * scaling.attention_factor, cos * scaling.attention_factor
    turned = 2 * freqs.shape[-1]
    rest = [x[..., turned:]] if turned < x.shape[-1] else []
    a, b = jnp.split(x[..., :turned].astype(jnp.float32), 2, axis=-1)
    halves = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate([*halves, *rest], axis=-1).astype(x.dtype)


def rotary_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """[P] float32 radians a position; of `LongRope` [2, P], those of short and of long sequences.

    Made on the host, each step rounded to float32 as where the models were trained: at position
    4000 one rounding of a frequency is 2e-4 radians.
    """
    rotated, scaling = int(head_dim * rope.fraction), rope.scaling
    exponents = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    powers = (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
    if isinstance(scaling, Yarn):
        return _yarn(powers, rope.theta, scaling)
    if isinstance(scaling, LongRope):
        factors = np.array([scaling.short_factors, scaling.long_factors], np.float32)
        return np.float32(1) / (factors * powers)
    freqs = np.float32(1) / powers
    if isinstance(scaling, Linear):
        return freqs / np.float32(scaling.factor)
    return freqs if scaling is None else _llama3(freqs, scaling)


def _llama3(freqs: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    # Long wavelengths are slowed by `factor`, short ones kept, those between blended linearly in
    # the number of turns over the original context.
    turns = scaling.original_max_position / (np.float32(2 * math.pi) / freqs)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0, 1)
    return (1 - keep) * freqs / np.float32(scaling.factor) + keep * freqs


def _yarn(powers: np.ndarray, theta: float, scaling: Yarn) -> np.ndarray:
    # The same, blended linearly in the place among the pairs, from the one that turns `beta_fast`
    # times over the original context to the one that turns `beta_slow` times.
    rotated = 2 * len(powers)

    def place(turns: float) -> float:
        span = math.log(scaling.original_max_position / (turns * 2 * math.pi))
        return rotated * span / (2 * math.log(theta))

    low = max(math.floor(place(scaling.beta_fast)), 0)
    high = min(math.ceil(place(scaling.beta_slow)), rotated - 1)
    width = np.float32(high - low or 0.001)
    slowed = np.clip((np.arange(len(powers), dtype=np.float32) - np.float32(low)) / width, 0, 1)
    keep = np.float32(1) - slowed
    one = np.float32(1)
    return one / (np.float32(scaling.factor) * powers) * (one - keep) + one / powers * keep


def sequence_lengths(rows: Rows[jax.Array]) -> jax.Array:
    """[R, T] int32: how long the sequence is that a token is part of, by which LongRope chooses.

    In packed rows a prompt is in as many sequences as it has responses, and its keys have one
    angle: the length is that of the prompt with the longest of its responses in the row. So all
    that see each other turn alike, and what else is in the row, or how long it is, changes nothing.
    """
    num_ids = rows.tokens.shape[1] + 1

    def of_row(ids: jax.Array, positions: jax.Array) -> jax.Array:
        return jax.ops.segment_max(positions, ids, num_ids)[ids] + 1

    return jax.vmap(of_row)(rows.prompt_ids, rows.positions)
