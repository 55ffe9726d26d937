"""From files of rows to batches: each claim of nca_jax/data but packing (test_pack.py)."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest
from ml_collections import ConfigDict
from transformers import ByT5Tokenizer

from nca_jax.checks import UserError
from nca_jax.data import chat, encode, pipeline
from nca_jax.data.sources import JsonlSource, RowError

EOS = 1  # of ByT5, whose other ids are bytes + 3
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BASE = dict(
    files="",
    weights="",
    eval_files="",
    eval_fraction=0.0,
    format="plain",
    num_responses=3,
    choose="first",
    max_prompt_len=16,
    max_response_len=8,
    prompt_keep="end",
    too_long="truncate",
    bad_rows="stop",
    shuffle=True,
    batch_size=4,
    row_len=64,
    rows=2,
    block=8,
    row_pairs=0,
    align=1,
    prefetch=2,
)


def data_config(**changes) -> ConfigDict:
    return ConfigDict(BASE | changes)


@pytest.fixture
def tokenizer():
    tokenizer = ByT5Tokenizer()  # needs no files
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def byte_ids(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def id_row(i: int, num_responses: int = 3) -> dict:
    """Returns a row of ids in which every segment can be told from its first id, 10 * i + k."""
    responses = [[10 * i + 1 + k, 7] for k in range(num_responses)]
    return {
        "prompt_ids": [10 * i, 5],
        "response_ids": responses,
        "scores": [float(k) for k in range(num_responses)],
    }


def write(path, rows) -> str:
    """Writes rows (dicts, or text as it is) to a .jsonl file; returns its path."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def load(files, config, tokenizer=None, vocab_size=1000, eos_ids=()):
    return encode.load_examples(
        files, tokenizer=tokenizer, config=config, vocab_size=vocab_size, eos_ids=eos_ids
    )


def encode_one(row, config, tokenizer=None, vocab_size=1000, eos_ids=(), where="f:1"):
    return encode.encode_row(
        where, row, tokenizer=tokenizer, config=config, vocab_size=vocab_size, eos_ids=eos_ids
    )


def examples_of(config, num=10, num_responses=3, first=0):
    rows = {f"f:{i}": id_row(i, num_responses) for i in range(first, first + num)}
    return [encode_one(row, config, where=where) for where, row in rows.items()]


def rows_seen(batch) -> list[int]:
    """Returns which `id_row`s are in the batch, in packed order."""
    rows = batch.batch.rows
    starts = (rows.segments == 1) & (rows.positions == 0)
    return (rows.tokens[starts] // 10).tolist()


def assert_same(a, b):
    assert a.examples == b.examples and a.stats == b.stats
    for x, y in zip([*a.batch.rows, *a.batch[1:]], [*b.batch.rows, *b.batch[1:]], strict=True):
        np.testing.assert_array_equal(x, y)


# Files


def test_files_of_a_glob_are_read_in_order_with_blank_lines_left_out(tmp_path):
    write(tmp_path / "b.jsonl", ['{"x": 2}', "", '{"x": 3}'])
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"x": 1}\n')
    source = JsonlSource(str(tmp_path / "*.jsonl*"))
    assert len(source) == 3
    assert [source[i] for i in range(3)] == [
        (f"{tmp_path}/a.jsonl.gz:1", {"x": 1}),
        (f"{tmp_path}/b.jsonl:1", {"x": 2}),
        (f"{tmp_path}/b.jsonl:3", {"x": 3}),
    ]


def test_a_glob_without_files_and_a_file_without_rows_are_refused(tmp_path):
    with pytest.raises(UserError, match="No file matches"):
        JsonlSource(str(tmp_path / "*.jsonl"))
    with pytest.raises(UserError, match=r"a\.jsonl: has no rows"):
        JsonlSource(write(tmp_path / "a.jsonl", ["", " "]))
    (tmp_path / "b.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match="b.gz: cannot be read"):
        JsonlSource(str(tmp_path / "b.gz"))


TEXT = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 0]}
IDS = {"prompt_ids": [1], "response_ids": [[2], [3]], "scores": [1, 0]}
BROKEN = {
    "no JSON": ("{", "json"),
    "no object": ("[1]", "json"),
    "not UTF-8": ('{"prompt": "\udcff"}', "json"),
    "no scores": ({"prompt": "p", "responses": ["a", "b"]}, "keys"),
    "responses no list": (TEXT | {"responses": "ab"}, "responses"),
    "one response": (TEXT | {"responses": ["a"], "scores": [1]}, "responses"),
    "a score short": (TEXT | {"scores": [1]}, "scores"),
    "score NaN": (TEXT | {"scores": [1, float("nan")]}, "scores"),
    "score infinite": (TEXT | {"scores": [1, float("inf")]}, "scores"),
    "score over float32": (TEXT | {"scores": [1, 10**400]}, "scores"),
    "score bool": (TEXT | {"scores": [1, True]}, "scores"),
    "score text": (TEXT | {"scores": [1, "0"]}, "scores"),
    "score null": (TEXT | {"scores": [1, None]}, "scores"),
    "prompt empty": (TEXT | {"prompt": ""}, "empty"),
    "prompt number": (TEXT | {"prompt": 3}, "prompt"),
    "response empty": (TEXT | {"responses": ["a", ""]}, "response"),
    "response number": (TEXT | {"responses": ["a", 3]}, "text"),
    "response without assistant": (
        TEXT | {"responses": ["a", [{"role": "user", "content": "b"}]]},
        "response",
    ),
    "half a character": ('{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "text"),
    "ids out of range": (IDS | {"prompt_ids": [1000]}, "ids"),
    "ids negative": (IDS | {"response_ids": [[2], [-1]]}, "ids"),
    "ids not whole": (IDS | {"response_ids": [[2], [1.5]]}, "ids"),
    "ids bool": (IDS | {"prompt_ids": [True]}, "ids"),
    "ids empty": (IDS | {"response_ids": [[2], []]}, "empty"),
    "ids no list": (IDS | {"prompt_ids": 5}, "ids"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_stops_with_its_file_and_line_or_is_skipped_and_counted(
    name, tmp_path, tokenizer
):
    broken, reason = BROKEN[name]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(TEXT), broken if isinstance(broken, str) else json.dumps(broken)]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    with pytest.raises(RowError) as error:
        load(str(path), data_config(), tokenizer)
    assert str(error.value).startswith(f"{path}:2: ") and error.value.reason == reason
    examples = load(str(path), data_config(bad_rows="skip"), tokenizer)
    assert [len(source) for source in examples.sources] == [1]
    assert examples.skipped == {reason: 1}


def test_a_source_of_which_no_row_is_left_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", ["{", "["])
    with pytest.raises(UserError, match=r"No row of .* is left.*'json': 2"):
        load(path, data_config(bad_rows="skip"))


def test_text_without_a_tokenizer_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [TEXT])
    with pytest.raises(UserError, match=r"the rows hold text; set data\.tokenizer"):
        load(path, data_config(bad_rows="skip"))


# Text to ids


def test_plain_text_is_the_prompt_and_the_response_with_its_eos(tokenizer):
    example = encode_one(TEXT, data_config(), tokenizer)
    assert example.prompt.tolist() == byte_ids("p")
    assert [ids.tolist() for ids in example.responses] == [
        [*byte_ids("a"), EOS],
        [*byte_ids("b"), EOS],
    ]
    assert example.prompt.dtype == example.responses[0].dtype == np.int32
    assert example.scores.dtype == np.float32


class BosTokenizer:
    """Adds a bos before every text; its ids are code points."""

    bos_token_id, eos_token_id, eos_token, chat_template = 2, EOS, "</s>", None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [2] * add_special_tokens + [ord(c) for c in text]}


def test_a_bos_is_put_before_a_plain_prompt_where_the_tokenizer_adds_one():
    assert chat.encode_prompt("p", BosTokenizer(), "plain") == [2, ord("p")]
    assert encode_one(TEXT | {"prompt": ""}, data_config(), BosTokenizer()).prompt.tolist() == [2]


def test_chat_prompt_and_response_together_are_the_template_up_to_the_eos(tokenizer):
    config = data_config(format="chat", max_prompt_len=99, max_response_len=99)
    example = encode_one(TEXT, config, tokenizer)
    for ids, response in zip(example.responses, "ab", strict=True):
        text = f"<|user|>p</s>\n<|assistant|>{response}</s>"  # without the line break at the end
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [*example.prompt, *ids] == expected and ids[-1] == EOS
    assert example.prompt.tolist() == chat.encode_prompt("p", tokenizer, "chat")
    assert example.prompt_text == "p"
    _, (added, _) = chat.render("p", ["a", "b"], tokenizer, [])
    assert added == "a</s>"


def test_messages_and_text_make_the_same_example(tokenizer):
    config = data_config(format="chat", max_prompt_len=99, max_response_len=99)
    user = {"role": "user", "content": "p"}
    pair = {
        "prompt": "p",
        "chosen": [user, {"role": "assistant", "content": "a"}],
        "rejected": [user, {"role": "assistant", "content": "b"}],
    }
    expected = encode_one(TEXT, config, tokenizer)
    for row in (TEXT | {"prompt": [user]}, pair):
        example = encode_one(row, config, tokenizer)
        np.testing.assert_array_equal(example.prompt, expected.prompt)
        np.testing.assert_array_equal(example.scores, [1.0, 0.0])
        for ids, wanted in zip(example.responses, expected.responses, strict=True):
            np.testing.assert_array_equal(ids, wanted)


def test_a_template_without_an_end_of_turn_gets_the_eos_appended(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}|{{ m.content }}{% endfor %}"
    assert chat.render("p", ["a"], tokenizer, [EOS]) == ("|p", ["|a</s>"])


def test_an_end_of_turn_token_other_than_the_eos_ends_the_response(tokenizer):
    end_id = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    tokenizer.chat_template = TEMPLATE.replace("</s>", "<extra_id_0>")
    _, (response,) = chat.render("p", ["a"], tokenizer, [EOS, end_id])
    assert response == "a<extra_id_0>"
    ids = chat.encode_responses("p", ["a"], tokenizer, "chat", [EOS, end_id])
    assert ids == [[*byte_ids("a"), end_id]]


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(UserError, match="not prefix-stable"):
        chat.render("p", ["a"], tokenizer, [EOS])


def test_a_tokenizer_without_a_template_is_refused_with_a_word_about_plain(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"no chat template; set data\.format=plain"):
        chat.encode_prompt("p", tokenizer, "chat")


def test_a_row_that_the_template_refuses_is_at_fault_itself(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(RowError, match=r"f:1: the chat template refuses it \(no system role\)"):
        encode_one(TEXT, data_config(format="chat"), tokenizer)


def test_the_eos_is_scored_where_pad_is_eos(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    config = data_config(batch_size=1, num_responses=2)
    dataset = pipeline.Dataset([[encode_one(TEXT, config, tokenizer)]], config, seed=0)
    rows = dataset.batch_at(0).batch.rows
    scored = rows.scored_slot < 2
    assert rows.scored_token[scored].tolist() == [*byte_ids("a"), EOS, *byte_ids("b"), EOS]


# Lengths

LONG = {"prompt_ids": [1, 2, 3, 4], "response_ids": [[5, 6, 7], [8]], "scores": [1, 0]}


@pytest.mark.parametrize(("keep", "prompt"), [("end", [3, 4]), ("start", [1, 2])])
def test_too_long_segments_are_cut_and_counted(keep, prompt):
    config = data_config(max_prompt_len=2, max_response_len=2, prompt_keep=keep)
    example = encode_one(LONG, config)
    assert example.prompt.tolist() == prompt
    assert [ids.tolist() for ids in example.responses] == [[5, 6], [8]]
    assert (example.num_tokens, example.num_cut) == (8, 3)


def test_a_cut_response_loses_its_eos(tokenizer):
    example = encode_one(
        TEXT | {"responses": ["ab", "a"]}, data_config(max_response_len=2), tokenizer
    )
    assert [ids.tolist() for ids in example.responses] == [byte_ids("ab"), [*byte_ids("a"), EOS]]


@pytest.mark.parametrize("limit", ["max_prompt_len", "max_response_len"])
def test_a_too_long_row_stops_or_is_skipped_whatever_bad_rows_says(limit, tmp_path):
    path = write(tmp_path / "a.jsonl", [LONG, IDS])
    limits = {limit: 2}
    with pytest.raises(UserError, match=rf":1: has \d tokens where data\.{limit} is 2"):
        load(path, data_config(too_long="stop", bad_rows="skip", **limits))
    examples = load(path, data_config(too_long="skip", **limits))
    assert examples.skipped == {"too_long": 1} and len(examples.sources[0]) == 1


# Held out


def test_what_is_held_out_goes_by_the_prompt_alone(tmp_path):
    rows = [id_row(i) for i in range(40)]
    a = write(tmp_path / "a.jsonl", rows[:25])
    b = write(tmp_path / "b.jsonl", rows[25:])
    c = write(tmp_path / "c.jsonl", rows[::-1])

    def heldout(files):
        config = data_config(files=files, eval_fraction=0.3)
        data = pipeline.load_data(config, tokenizer=None, vocab_size=1000, eos_ids=())
        train = [int(e.prompt[0]) for source in data.sources for e in source]
        held = [int(e.prompt[0]) for e in data.heldout]
        assert sorted(train + held) == [10 * i for i in range(40)]
        return set(held)

    assert 4 <= len(heldout(c)) <= 20
    assert heldout(f"{a},{b}") == heldout(c)


def test_eval_files_are_held_out_instead_of_a_fraction(tmp_path):
    a = write(tmp_path / "a.jsonl", [id_row(0), id_row(1)])
    b = write(tmp_path / "b.jsonl", [id_row(2), "{"])
    config = data_config(files=a, eval_files=b, eval_fraction=0.9, bad_rows="skip")
    data = pipeline.load_data(config, tokenizer=None, vocab_size=1000, eos_ids=())
    assert [len(source) for source in data.sources] == [2]
    assert [e.where for e in data.heldout] == [f"{b}:1"] and data.skipped == {"json": 1}


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


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_resume_in_the_middle_goes_on_where_the_run_was(prefetch):
    config = data_config(choose="best_worst_random", num_responses=3, prefetch=prefetch)
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
        pipeline.load_data(config, tokenizer=None, vocab_size=9, eos_ids=())


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
    examples = [encode_one(id_row(0, 2), config), encode_one(id_row(1, 4), config)]
    ref_logps = [np.float32([-1, -2]), np.float32([-3, -4, -5, -6])]
    batch = pipeline.Dataset([examples], config, seed=0, ref_logps=ref_logps).batch_at(0).batch
    assert batch.mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.scores.tolist() == [[0, 1, 0], [0, 1, 2]]
    assert batch.ref_logps.tolist() == [[-1, -2, 0], [-3, -4, -5]]
    slots = batch.rows.scored_slot
    assert Counter(slots[slots < 6].tolist()) == {0: 2, 1: 2, 3: 2, 4: 2, 5: 2}


def test_every_step_has_the_same_shape_and_says_what_it_spends():
    config = data_config(num_responses=3, max_response_len=2)
    row = id_row(0) | {"prompt_ids": list(range(20))}  # 4 more than max_prompt_len
    dataset = pipeline.Dataset([[encode_one(row, config)]], config, seed=0)
    batch, where, stats = dataset.batch_at(0)
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
    assert pipeline.eval_batches([], config) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_responses": 1}, "num_responses is 1, which teaches nothing"),
        ({"num_responses": 4}, "is 4, but no row has more than 3 responses; set it to 3"),
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
