"""From examples to batches: each claim of nca_jax/data/pipeline."""

from collections import Counter

import numpy as np
import pytest
from helpers import data_config, encode_one, id_record, make_encoder, write
from transformers import ByT5Tokenizer

from nca_jax.checks import UserError
from nca_jax.data import pipeline
from nca_jax.data.encode import hash_prompt
from nca_jax.data.table import table_of


def examples_of(config, num=10, num_responses=3, first=0):
    rows = {f"f:{i}": id_record(i, num_responses) for i in range(first, first + num)}
    return table_of(encode_one(row, config, where=where) for where, row in rows.items())


def rows_seen(batch) -> list[int]:
    """Returns which `id_record`s are in the batch, in packed order."""
    rows = batch.batch.rows
    starts = (rows.segments == 1) & (rows.positions == 0)
    return (rows.tokens[starts] // 10).tolist()


def assert_same(a, b):
    assert a.examples == b.examples and a.stats == b.stats
    for x, y in zip([*a.batch.rows, *a.batch[1:]], [*b.batch.rows, *b.batch[1:]], strict=True):
        np.testing.assert_array_equal(x, y)


# Held out


def test_what_is_held_out_goes_by_the_prompt_alone(tmp_path):
    rows = [id_record(i) for i in range(40)]
    a = write(tmp_path / "a.jsonl", rows[:25])
    b = write(tmp_path / "b.jsonl", rows[25:])
    c = write(tmp_path / "c.jsonl", rows[::-1])

    def heldout(files):
        config = data_config(files=files, eval_fraction=0.3)
        data = pipeline.load_data(make_encoder(config))
        train = [int(e.group.prompt[0]) for source in data.sources for e in source]
        held = [int(e.group.prompt[0]) for e in data.heldout]
        assert sorted(train + held) == [10 * i for i in range(40)]
        return set(held)

    assert 4 <= len(heldout(c)) <= 20
    assert heldout(f"{a},{b}") == heldout(c)


def test_eval_files_are_held_out_instead_of_a_fraction(tmp_path):
    a = write(tmp_path / "a.jsonl", [id_record(0), id_record(1)])
    b = write(tmp_path / "b.jsonl", [id_record(2), "{"])
    config = data_config(files=a, eval_files=b, eval_fraction=0.9, bad_rows="skip")
    data = pipeline.load_data(make_encoder(config))
    assert [len(source) for source in data.sources] == [2]
    assert [e.where for e in data.heldout] == [f"{b}:1"] and data.counts == {
        "records skipped: json": 1
    }


def test_held_out_sets_with_names_are_splits_and_a_file_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", [id_record(i) for i in range(5)])
    for i, name in enumerate(("b.jsonl", "c.jsonl", "d.jsonl", "x=e.jsonl")):
        write(tmp_path / name, [id_record(10 + i)])
    files = "hard=b.jsonl,easy=c.jsonl,hard=d.jsonl,x=e.jsonl"
    data = pipeline.load_data(make_encoder(data_config(files="a.jsonl", eval_files=files)))
    assert {split: [e.where for e in examples] for split, examples in data.splits.items()} == {
        "eval/hard": ["b.jsonl:1", "d.jsonl:1"],
        "eval/easy": ["c.jsonl:1"],
        "eval": ["x=e.jsonl:1"],
    }
    assert len(data.heldout) == 4 and len(data.sources[0]) == 5


def test_a_prompt_is_held_out_in_every_form_that_it_is_written_in(tmp_path):
    def forms(i: int) -> list[dict]:
        user, answers = {"role": "user", "content": f"Say {i}."}, {"chosen": "a", "rejected": "b"}
        turns = {key: [user, {"role": "assistant", "content": x}] for key, x in answers.items()}
        parts = [user | {"content": [{"type": "text", "text": user["content"]}]}]
        prompts = [user["content"], [user], [user | {"id": 3}], parts]
        return [*({"prompt": prompt} | answers for prompt in prompts), turns]

    config = data_config(files=write(tmp_path / "a.jsonl", sum(map(forms, range(30)), [])))
    config.update(format="chat", eval_fraction=0.3, max_prompt_len=99)
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    data = pipeline.load_data(make_encoder(config, tokenizer))
    held = Counter(tuple(e.group.prompt) for e in data.heldout)
    assert 4 <= len(held) <= 15 and set(held.values()) == {5}
    assert data.heldout[0].prompt_hash == hash_prompt(data.heldout[0].record["prompt"])  # a text


def test_prompts_of_eval_files_are_left_out_of_training_and_counted(tmp_path):
    a = write(tmp_path / "a.jsonl", [id_record(i) for i in (0, 1, 2, 1)])
    b = write(tmp_path / "b.jsonl", [id_record(1, 2), id_record(5)])
    data = pipeline.load_data(make_encoder(data_config(files=a, eval_files=b)))
    assert [e.where for e in data.sources[0]] == [f"{a}:1", f"{a}:3"] and len(data.heldout) == 2
    assert data.notes() == [
        "2 training records share a prompt with data.eval_files: left out of training"
    ]
    with pytest.raises(UserError, match=r"Every prompt of a source of data\.files is one of"):
        pipeline.load_data(make_encoder(data_config(files=a, eval_files=a)))


# Order and choice


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_epoch_visits_each_row_once(shuffle):
    config = data_config(shuffle=shuffle, batch_size=5)
    dataset = pipeline.Dataset(
        [examples_of(config, 4), examples_of(config, 6, first=4)], config, seed=3
    )
    seen = [where for step in range(8) for where in dataset.batch_at(step).examples]
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]  # of 10 rows, in steps of 5
    in_order = [f"f:{i}" for i in range(10)]
    assert all(sorted(epoch) == in_order for epoch in epochs)
    assert (epochs[0] == in_order) != shuffle
    assert (epochs[0] == epochs[1]) != shuffle


def test_a_batch_is_a_pure_function_of_seed_and_step():
    config = data_config(choose="random", num_responses=2)
    first, second = (pipeline.Dataset([examples_of(config)], config, seed=5) for _ in range(2))
    forwards = [first.batch_at(step) for step in range(6)]
    backwards = [second.batch_at(step) for step in reversed(range(6))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert_same(a, b)
    other = pipeline.Dataset([examples_of(config)], config, seed=6)
    assert [rows_seen(b) for b in forwards] != [rows_seen(other.batch_at(s)) for s in range(6)]


def test_a_resume_in_the_middle_goes_on_where_the_run_was():
    config = data_config(choose="best_worst_random", num_responses=3)
    dataset = pipeline.Dataset([examples_of(config, num_responses=5)], config, seed=0)
    whole = list(dataset.iterate(0, 6))
    resumed = list(dataset.iterate(4, 6))
    assert len(whole) == 6 and len(resumed) == 2
    for a, b in zip(whole[4:], resumed, strict=True):
        assert_same(a, b)
    assert_same(whole[2], dataset.batch_at(2))


def test_a_mixture_keeps_its_weights_and_visits_each_source_evenly():
    config = data_config(files="a,b", weights="3,1", batch_size=8)
    dataset = pipeline.Dataset(
        [examples_of(config, 2), examples_of(config, 4, first=2)], config, seed=0
    )
    counts = Counter(i for step in range(4) for i in rows_seen(dataset.batch_at(step)))
    assert counts == {0: 12, 1: 12, 2: 2, 3: 2, 4: 2, 5: 2}


@pytest.mark.parametrize("weights", ["1", "1,2,3", "1,0", "1,-1", "1,x", "1,inf"])
def test_weights_that_are_not_one_positive_number_a_glob_are_refused(weights):
    config = data_config(files="a,b", weights=weights)
    with pytest.raises(UserError, match="wanted 2 positive numbers"):
        pipeline.load_data(make_encoder(config))


SCORES = np.float32([1, 5, 0, 5, 0, 3])


def test_choices_keep_data_order_and_the_best_and_worst_are_always_there():
    draws = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        chosen = pipeline.choose(SCORES, 3, "best_worst_random", rng).tolist()
        assert chosen == sorted(set(chosen)) and {1, 4} <= set(chosen)  # first best, last worst
        draws.add(tuple(chosen))
        chosen = pipeline.choose(SCORES, 3, "random", rng).tolist()
        assert len(chosen) == 3 and chosen == sorted(set(chosen))
    assert len(draws) == 4
    assert pipeline.choose(SCORES, 3, "first", rng).tolist() == [0, 1, 2]
    assert pipeline.choose(SCORES, 6, "all", rng).tolist() == [0, 1, 2, 3, 4, 5]


def test_where_all_scores_tie_best_and_worst_are_two_responses():
    rng = np.random.default_rng(0)
    assert pipeline.choose(np.zeros(4), 2, "best_worst_random", rng).tolist() == [0, 3]


# Batches


def test_responses_that_lack_are_masked_and_ref_logps_follow_the_choice():
    config = data_config(shuffle=False, batch_size=2, num_responses=3)
    examples = table_of(encode_one(id_record(i, n), config) for i, n in ((0, 2), (1, 4)))
    ref_logps = [np.float32([-1, -2]), np.float32([-3, -4, -5, -6])]
    batch = pipeline.Dataset([examples], config, seed=0, ref_logps=ref_logps).batch_at(0).batch
    assert batch.mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.scores.tolist() == [[0, 1, 0], [0, 1, 2]]
    assert batch.ref_logps.tolist() == [[-1, -2, 0], [-3, -4, -5]]
    slots = batch.rows.logp_slot
    assert Counter(slots[slots < 6].tolist()) == {0: 2, 1: 2, 3: 2, 4: 2, 5: 2}


def test_every_step_has_the_same_shape_and_says_what_it_spends():
    config = data_config(num_responses=3, max_response_len=2)
    row = id_record(0) | {"prompt_ids": list(range(20))}  # 4 more than max_prompt_len
    dataset = pipeline.Dataset([table_of([encode_one(row, config)])], config, seed=0)
    batch, where, stats, lengths = dataset.batch_at(0)
    assert batch.rows.tokens.shape == (2, 2, 64)
    assert where == ["f:1"] * 4
    assert batch.num_micro == 1  # four prompts of 22 tokens: two rows, of two
    assert batch.micro_of_prompt.tolist() == [0, 0, 0, 0]
    assert stats == {
        "truncated_frac": 4 / 26,
        "padding_frac": 1 - 88 / 128,
        "scored_tokens": 24.0,
        "needed_tokens": 88.0,
    }
    assert lengths == [[16, 2, 2, 2]] * 4


def test_evaluation_covers_each_example_once_and_the_last_batch_may_be_short():
    config = data_config(choose="random", num_responses=2)
    examples = examples_of(config, 6)
    first, second = (pipeline.eval_batches(examples, config) for _ in range(2))
    assert [len(batch.examples) for batch in first] == [4, 2]
    assert sorted(rows_seen(first[0]) + rows_seen(first[1])) == list(range(6))
    last = first[1].batch
    assert last.rows.tokens.shape == first[0].batch.rows.tokens.shape
    assert last.mask.any(1).tolist() == [True, True, False, False]
    assert last.micro_of_prompt.tolist() == [0, 0, -1, -1]
    for a, b in zip(first, second, strict=True):
        assert_same(a, b)
    assert pipeline.eval_batches(table_of([]), config) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_responses": 4}, "is 4, but no record has more than 3 responses; set it to 3"),
        ({"num_responses": 2, "choose": "all"}, "f:0: has 3 responses, .*num_responses is 2"),
        ({"row_len": 8, "align": 4}, "f:0: with 3 responses needs 14 tokens .*row_len is 8"),
        ({"row_pairs": 8, "align": 8}, "f:0: with 3 responses needs 11 block pairs"),
    ],
)
def test_examples_that_do_not_fit_the_config_are_refused_before_the_first_step(changes, message):
    examples = examples_of(data_config(), 3)
    config = data_config(**changes)
    with pytest.raises(UserError, match=message):
        pipeline.Dataset([examples], config, seed=0)
