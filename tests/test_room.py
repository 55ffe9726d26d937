"""What does not fit a row stops, is skipped, or loses its worst responses, and is counted."""

from collections import Counter

import pytest
from helpers import data_config, encode_one, make_encoder, write

from nca_jax.checks import UserError
from nca_jax.data import pipeline
from nca_jax.data.room import check_examples, fit_examples
from nca_jax.data.table import table_of

ROW = {
    "prompt_ids": [1] * 4,
    "response_ids": [[2] * 8, [3] * 8, [4] * 8, [5] * 2],
    "scores": [0.5, 0.1, 0.9, 0.1],
}


def config_of(too_long: str, **changes):
    sizes = dict(num_responses=4, max_prompt_len=8, row_len=24, block=8)
    return data_config(too_long=too_long, **(sizes | changes))


def test_drop_leaves_out_the_worst_until_the_rest_fits():
    config, counts = config_of("drop"), Counter()
    (kept,) = fit_examples(table_of([encode_one(ROW, config)]), make_encoder(config), counts)
    # Of two that score 0.1 the later goes first, though it is the shorter one.
    assert [ids[0] for ids in kept.group.responses] == [2, 4]
    assert kept.scores.tolist() == pytest.approx([0.5, 0.9])
    assert counts == {"responses left out: do not fit data.row_len": 2}
    assert kept.num_cut == 10
    check_examples(table_of([kept]), config)


def test_drop_leaves_out_a_row_whose_best_two_do_not_fit():
    config, counts = config_of("drop", row_len=16), Counter()
    assert not len(fit_examples(table_of([encode_one(ROW, config)]), make_encoder(config), counts))
    assert counts["records skipped: row_len"] == 1


def test_skip_leaves_out_and_counts_what_does_not_fit(tmp_path):
    short = ROW | {"response_ids": [[2], [3], [4], [5]]}
    config = config_of("skip", files=write(tmp_path / "rows.jsonl", [ROW, short]))
    data = pipeline.load_data(make_encoder(config))
    assert [len(example.group.responses[0]) for example in data.sources[0]] == [1]
    assert data.notes() == ["1 records skipped: row_len"]


@pytest.mark.parametrize("too_long", ["truncate", "stop"])
def test_otherwise_the_row_is_named_with_the_length_it_needs(too_long):
    config = config_of(too_long)
    with pytest.raises(UserError, match="f:1.*needs 30 tokens of a row, but data.row_len is 24"):
        examples = table_of([encode_one(ROW, config)])
        check_examples(fit_examples(examples, make_encoder(config), Counter()), config)
