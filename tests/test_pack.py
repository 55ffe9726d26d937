"""Block plans and packed rows, against brute force over every token and token pair."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nca_jax.checks import UserError
from nca_jax.data import pack as packing
from nca_jax.data.group import Group
from nca_jax.data.pack import RowLayout, segment_spans
from nca_jax.data.plan import causal_bound, live_pairs, num_off_diagonal

BLOCK, ROW_LEN, NUM_SLOTS = 8, 64, 99
ALL_PAIRS = causal_bound(ROW_LEN, BLOCK)

# Lengths of a prompt and its responses; together never more than a row, at any alignment.
group_lengths = st.tuples(
    st.integers(1, 14), st.lists(st.integers(1, 9), min_size=1, max_size=2)
).map(lambda lengths: [lengths[0], *lengths[1]])
many_groups = st.lists(group_lengths, min_size=1, max_size=9)


def make_groups(lengths_of_groups: list[list[int]]) -> list[Group]:
    """Returns groups in which every token has an id of its own, from 1 on."""
    next_id, groups = 1, []
    for prompt_len, *response_lens in lengths_of_groups:
        starts = np.cumsum([next_id + prompt_len, *response_lens])
        responses = [np.arange(s, s + n) for s, n in zip(starts, response_lens, strict=False)]
        groups.append(Group(np.arange(next_id, next_id + prompt_len), responses))
        next_id = int(starts[-1])
    return groups


def slots_of(groups: list[Group]) -> list[np.ndarray]:
    """Returns slots that count the responses."""
    ends = np.cumsum([len(group.responses) for group in groups])
    return np.split(np.arange(ends[-1]), ends[:-1])


def pack(groups: list[Group], shape: RowLayout, **how):
    return packing.pack(groups, shape, slots=slots_of(groups), **how)


def layout(align=1, num_pairs=ALL_PAIRS, rows=2) -> RowLayout:
    return RowLayout(row_len=ROW_LEN, rows=rows, block=BLOCK, num_pairs=num_pairs, align=align)


def dense_pairs(prompt_ids: np.ndarray, segments: np.ndarray) -> list[list[int]]:
    """Returns the live block pairs of a row [T], from the dense attention mask [T, T]."""
    t = np.arange(len(segments))
    mask = (t[:, None] >= t) & (prompt_ids[:, None] == prompt_ids) & (prompt_ids > 0)
    mask &= (segments == 1) | (segments[:, None] == segments)
    blocks = mask.reshape(ROW_LEN // BLOCK, BLOCK, ROW_LEN // BLOCK, BLOCK).any((1, 3))
    return np.argwhere(blocks | np.eye(len(blocks), dtype=bool)).tolist()


def rows_of(rows):
    """Iterates over the rows of all micro-batches."""
    flat = [x.reshape(-1, *x.shape[2:]) for x in rows]
    return [type(rows)(*arrays) for arrays in zip(*flat, strict=True)]


@settings(deadline=None, max_examples=60)
@given(many_groups, st.sampled_from([1, 8, 16]))
def test_the_plan_of_every_row_equals_brute_force_over_its_dense_mask(lengths, align):
    rows, _, _ = pack(make_groups(lengths), layout(align), num_slots=NUM_SLOTS)
    for row in rows_of(rows):
        live = row.pairs[row.pairs[:, 0] >= 0]
        assert live.tolist() == dense_pairs(row.prompt_ids, row.segments)
        assert (row.pairs[len(live) :] == -1).all()


@settings(deadline=None, max_examples=60)
@given(group_lengths, group_lengths, st.integers(0, 9))
def test_groups_that_meet_in_a_block_share_its_diagonal_pair_alone(first, second, gap):
    a = segment_spans(first, gap, 1)
    b = segment_spans(second, a[-1][1], 1)
    row_len = 2 * ROW_LEN
    together = len(live_pairs([a, b], row_len=row_len, block=BLOCK))
    apart = num_off_diagonal(a, BLOCK) + num_off_diagonal(b, BLOCK)
    assert together == row_len // BLOCK + apart


def test_a_row_of_padding_has_the_diagonal_pairs_alone():
    assert live_pairs([], row_len=24, block=8).tolist() == [[0, 0], [1, 1], [2, 2]]


def test_a_response_does_not_attend_to_the_blocks_of_another():
    spans = [(0, 8), (8, 16), (16, 24)]
    expected = [[0, 0], [1, 0], [1, 1], [2, 0], [2, 2]]
    assert live_pairs([spans], row_len=24, block=8).tolist() == expected


@settings(deadline=None, max_examples=60)
@given(many_groups, st.sampled_from([1, 8, 16]))
def test_every_token_is_packed_once_at_its_position_and_alignment(lengths, align):
    groups = make_groups(lengths)
    rows, used, micro_of_group = pack(groups, layout(align), num_slots=NUM_SLOTS)
    on = rows.prompt_ids > 0
    total = sum(map(sum, lengths))
    assert sorted(rows.tokens[on]) == list(range(1, total + 1))
    assert (rows.tokens[~on] == 0).all() and (rows.positions[~on] == 0).all()
    np.testing.assert_array_equal(rows.segments > 0, on)
    np.testing.assert_array_equal(rows.key_on, on)
    assert rows.tokens.shape == (used, 2, ROW_LEN)
    for group, micro in zip(groups, micro_of_group, strict=True):
        for segment, ids in enumerate([group.prompt, *group.responses], start=1):
            m, r, start = (int(i[0]) for i in np.nonzero(rows.tokens == ids[0]))
            at = slice(start, start + len(ids))
            first_position = 0 if segment == 1 else len(group.prompt)
            assert m == micro and (at.stop if segment == 1 else start) % align == 0
            np.testing.assert_array_equal(rows.tokens[m, r, at], ids)
            np.testing.assert_array_equal(rows.segments[m, r, at], segment)
            np.testing.assert_array_equal(
                rows.positions[m, r, at], first_position + np.arange(len(ids))
            )


@settings(deadline=None, max_examples=60)
@given(many_groups, st.sampled_from([1, 8]))
def test_each_response_token_is_scored_once_from_the_state_before_it(lengths, align):
    groups = make_groups(lengths)
    rows, _, _ = pack(groups, layout(align), num_slots=NUM_SLOTS)
    before = {}  # token id: (the id that it follows, its slot)
    for group, slots in zip(groups, slots_of(groups), strict=True):
        for ids, slot in zip(group.responses, slots, strict=True):
            for previous, token in zip([group.prompt[-1], *ids[:-1]], ids, strict=True):
                before[int(token)] = (int(previous), slot)
    seen = {}
    for row in rows_of(rows):
        scored = row.logp_slot < NUM_SLOTS
        count = scored.sum()
        assert scored[:count].all(), "scored tokens come first"
        assert not row.logp_at[count:].any() and not row.logp_token[count:].any()
        for at, token, slot in zip(
            row.logp_at[:count], row.logp_token, row.logp_slot, strict=False
        ):
            seen[int(token)] = (int(row.tokens[at]), int(slot))
    assert seen == before


@settings(deadline=None, max_examples=30)
@given(many_groups)
def test_packing_is_deterministic(lengths):
    groups = make_groups(lengths)
    first, second = (pack(groups, layout(), num_slots=NUM_SLOTS) for _ in range(2))
    for a, b in zip([*first[0], *first[1:]], [*second[0], *second[1:]], strict=True):
        np.testing.assert_array_equal(a, b)


@settings(deadline=None, max_examples=30)
@given(many_groups, st.permutations(range(4)), st.integers(1, 3))
def test_the_rows_of_all_processes_together_are_those_of_one(lengths, order, cut):
    groups, shape = make_groups(lengths), layout(rows=4)
    whole, *plan_of_whole = pack(groups, shape, num_slots=NUM_SLOTS)
    for rows_here in (sorted(order[:cut]), sorted(order[cut:])):
        part, *plan = pack(groups, shape, num_slots=NUM_SLOTS, rows_here=rows_here)
        for a, b in zip([*part, *plan], [*whole, *plan_of_whole], strict=True):
            b = b[:, rows_here] if np.ndim(b) > 1 else b
            np.testing.assert_array_equal(a, b)


def test_the_order_of_prompt_ids_in_a_row_is_one_two_three():
    rows, _, _ = pack(make_groups([[2, 3], [4, 4], [1, 1]]), layout(), num_slots=NUM_SLOTS)
    ids = rows.prompt_ids[0, 0]
    assert ids[ids > 0].tolist() == [1] * 8 + [2] * 5 + [3] * 2


def test_a_group_goes_where_the_least_room_is_left():
    lengths = [[40, 10], [30, 10], [10, 4], [20, 4]]  # 50, 40, 14, 24 tokens in rows of 64
    rows, used, micro = pack(make_groups(lengths), layout(rows=1), num_slots=NUM_SLOTS)
    assert used == 2 and micro.tolist() == [0, 1, 0, 1]
    assert (rows.prompt_ids > 0).sum(-1).tolist() == [[64], [64]]


@settings(deadline=None, max_examples=60)
@given(many_groups, st.integers(18, 36))
def test_no_row_holds_more_pairs_than_it_may(lengths, num_pairs):
    rows, _, _ = pack(make_groups(lengths), layout(num_pairs=num_pairs), num_slots=NUM_SLOTS)
    assert rows.pairs.shape[2] == num_pairs
    for row in rows_of(rows):
        live = row.pairs[row.pairs[:, 0] >= 0]
        assert live.tolist() == dense_pairs(row.prompt_ids, row.segments)


def test_rows_that_are_not_needed_are_padding():
    rows, used, _ = pack(make_groups([[3, 2]]), layout(), num_slots=NUM_SLOTS, num_micro=3)
    assert used == 1 and rows.tokens.shape == (3, 2, ROW_LEN)
    for row in rows_of(rows)[1:]:
        assert not any(x.any() for x in row[:5])
        assert (row.logp_slot == NUM_SLOTS).all()
        assert row.pairs[row.pairs[:, 0] >= 0].tolist() == [[i, i] for i in range(8)]


def test_keys_are_off_where_the_group_says_so():
    group = Group([1, 2], [[3, 4]], key_on=([True, False], [[False, True]]))
    rows, _, _ = pack([group], layout(), num_slots=1)
    assert rows.key_on[0, 0, :5].tolist() == [True, False, False, True, False]


def test_a_group_longer_than_a_row_is_refused_with_the_length_that_it_needs():
    with pytest.raises(UserError, match=r"needs 72 tokens .*row_len is 64; set it to 72"):
        pack(make_groups([[3, 2], [33, 32]]), layout(align=40), num_slots=NUM_SLOTS)


def test_a_group_with_more_pairs_than_a_row_is_refused_with_the_number_that_it_needs():
    with pytest.raises(UserError, match=r"needs 36 block pairs .*row_pairs is 35; set it to 36"):
        pack(make_groups([[60, 4]]), layout(num_pairs=35), num_slots=NUM_SLOTS)


def test_too_few_micro_batches_are_a_bug_of_the_caller():
    with pytest.raises(ValueError, match="need 2 micro-batches"):
        pack(make_groups([[60, 4]] * 3), layout(), num_slots=NUM_SLOTS, num_micro=1)
