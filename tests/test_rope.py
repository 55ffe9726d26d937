"""Rotary positions: what each way of stretching them leaves, and which length LongRope goes by."""

import jax.numpy as jnp
import numpy as np
from families import packed_rows, pieces

from nca_jax.model_config import Linear, LongRope, Rope, Yarn
from nca_jax.models.rope import rotary_frequencies, rotate, sequence_lengths

HEAD = 16
PLAIN = rotary_frequencies(Rope(), HEAD)


def queries(length: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, length, 2, HEAD)).astype(np.float32)


def test_under_linear_scaling_a_position_turns_as_one_that_is_nearer():
    x = queries(5)
    at, rope = jnp.arange(5)[None], Rope(scaling=Linear(4.0))
    np.testing.assert_allclose(rotate(x, 4 * at, rope), rotate(x, at, Rope()), atol=1e-6)


def test_yarn_keeps_what_turns_fast_and_slows_what_turns_slowly_by_its_factor():
    found = rotary_frequencies(Rope(scaling=Yarn(8.0, 512, 1.0)), HEAD)
    turns = 512 * PLAIN / (2 * np.pi)
    assert (found <= PLAIN).all() and (found >= PLAIN / 8 * (1 - 1e-6)).all()
    np.testing.assert_array_equal(found[turns > 32], PLAIN[turns > 32])
    np.testing.assert_allclose(found[turns < 1], PLAIN[turns < 1] / 8, rtol=1e-6)


def test_an_attention_factor_multiplies_what_is_turned():
    x, at = queries(3), jnp.arange(3)[None]
    one, two = (rotate(x, at, Rope(scaling=Yarn(8.0, 512, factor))) for factor in (1.0, 2.0))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)


def test_a_part_of_a_head_is_turned_and_the_rest_stays():
    x, at = queries(3), 1000 + jnp.arange(3)[None]
    found = rotate(x, at, Rope(fraction=0.75))
    np.testing.assert_array_equal(found[..., 12:], x[..., 12:])
    whole = rotate(x[..., :12], at, Rope())
    np.testing.assert_allclose(found[..., :12], whole, atol=1e-6)


def test_longrope_goes_by_the_longest_sequence_of_a_prompt_whatever_else_is_in_the_row():
    """Prompts of 9, 1 and 21 tokens with responses of up to 5, 3 and 4, in two rows."""
    rows = packed_rows()
    lengths = sequence_lengths(rows)
    wanted = {len(g.prompt): len(g.prompt) + max(map(len, g.responses)) for g in pieces()}
    for row, ids in enumerate(rows.prompt_ids):
        for i in filter(None, np.unique(ids)):
            is_prompt = (ids == i) & (rows.segments[row] == 1)
            assert set(lengths[row, ids == i].tolist()) == {wanted[is_prompt.sum()]}

    short, long = (1.0,) * 8, (2.0, 3.0) * 4
    x = np.random.default_rng(1).normal(size=(*rows.tokens.shape, 1, HEAD)).astype(np.float32)
    found, *alone = (
        rotate(x, rows.positions, Rope(scaling=LongRope(*factors, 20, 1.0)), lengths)
        for factors in ((short, long), (short, short), (long, long))
    )
    is_long = np.asarray(lengths > 20)[..., None, None]
    np.testing.assert_array_equal(found, np.where(is_long, alone[1], alone[0]))
    assert is_long.any() and not is_long.all()
