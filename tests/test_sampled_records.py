"""What a record of samples says is what is trained on: its ids, and how each response ended."""

import json

import numpy as np
import pytest
from helpers import data_config, encode_one, make_encoder, write
from transformers import ByT5Tokenizer

from nca_jax.checks import UserError
from nca_jax.data import pipeline
from nca_jax.data.load import load_examples, load_prompts
from nca_jax.data.sources import RecordError

EOS, OWN = 1, "own"  # the id of ByT5; the digest of the reader's tokenizer
THINKS = (  # a template that gives each response of the assistant an empty thought
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = {"prompt": "p", "responses": ["ab", "c"], "scores": [1, 0]}
ROLLOUT = TEXT | {
    "prompt_ids": [20, 21],
    "response_ids": [[30, 31], [32, EOS]],
    "finished": [False, True],
    "tokenizer": OWN,
}


@pytest.fixture
def tokenizer():
    tokenizer = ByT5Tokenizer()  # needs no files
    tokenizer.chat_template = THINKS
    return tokenizer


def byte_ids(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def responses_of(record: dict, tokenizer, **changes) -> list[list[int]]:
    example = encode_one(record, data_config(**changes), tokenizer, digest=OWN)
    return [ids.tolist() for ids in example.group.responses]


# Ids and text


def test_ids_of_the_own_tokenizer_are_trained_on_as_they_were_sampled(tokenizer):
    example = encode_one(ROLLOUT, data_config(), tokenizer, digest=OWN)
    assert example.group.prompt.tolist() == [20, 21]
    assert [ids.tolist() for ids in example.group.responses] == [[30, 31], [32, EOS]]
    assert example.notes == ()
    same_prompt = encode_one(TEXT, data_config(), tokenizer)
    assert example.prompt_hash == same_prompt.prompt_hash  # so that the same ones are held out


def test_of_another_tokenizer_the_text_is_trained_on_and_that_is_said(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [ROLLOUT | {"tokenizer": "another"}, ROLLOUT, TEXT])
    encoder = make_encoder(data_config(files=path), tokenizer, digest=OWN)
    data = pipeline.load_data(encoder)
    first = data.sources[0][0].group
    assert first.prompt.tolist() == byte_ids("p")
    assert [ids.tolist() for ids in first.responses] == [byte_ids("ab"), [*byte_ids("c"), EOS]]
    assert data.notes() == ["1 records of another tokenizer: their text is encoded"]


def test_a_response_without_ids_is_its_text(tokenizer):
    record = ROLLOUT | {"response_ids": [[30, 31], None]}
    assert responses_of(record, tokenizer) == [[30, 31], [*byte_ids("c"), EOS]]


def test_ids_of_a_rollout_are_cut_to_the_limits_of_the_run(tokenizer):
    config = data_config(max_prompt_len=1, max_response_len=1)
    example = encode_one(ROLLOUT, config, tokenizer, digest=OWN)
    assert example.group.prompt.tolist() == [21]
    assert [ids.tolist() for ids in example.group.responses] == [[30], [32]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"finished": [True]}, "finished is \\[True\\]; give true or false for each of the 2"),
        ({"finished": [True, 1]}, "finished is .*; give true or false"),
        ({"finished": True}, "finished is True"),
        ({"response_ids": [[3]]}, "2 responses but 1 response_ids"),
        ({"response_ids": [[3, 4], []]}, "response 1 has no tokens"),
        ({"prompt_ids": [5000]}, "wanted \\[0, 1000\\)"),
    ],
)
def test_a_rollout_that_contradicts_itself_is_refused(changes, said, tokenizer):
    with pytest.raises(RecordError, match=f"f:1: .*{said}"):
        encode_one(ROLLOUT | changes, data_config(), tokenizer, digest=OWN)


def test_the_other_keys_of_a_record_stay_and_its_answers_do_not(tokenizer):
    record = ROLLOUT | {"answer": 7, "source": {"name": "x"}}
    example = encode_one(record, data_config(), tokenizer, digest=OWN)
    assert example.record == {"prompt": "p", "answer": 7, "source": {"name": "x"}}


# How a response ended


@pytest.mark.parametrize("format", ["plain", "chat", "released"])
def test_a_response_that_was_cut_off_is_its_text_alone_without_an_end(format, tokenizer):
    cut_off = TEXT | {"finished": [False, True]}
    limits = dict(format=format, max_prompt_len=99, max_response_len=99)
    first, second = responses_of(cut_off, tokenizer, **limits)
    assert first == byte_ids("ab")  # nor does a template write a thought before it
    assert second == responses_of(TEXT, tokenizer, **limits)[1] and second[-1] == EOS
    both = responses_of(TEXT | {"finished": [True, True]}, tokenizer, **limits)
    assert both == responses_of(TEXT, tokenizer, **limits)


def test_a_record_of_ids_alone_may_say_that_a_response_has_no_token(tokenizer):
    ids = {"prompt_ids": [5], "response_ids": [[6, 7], [], [8]], "scores": [3, 2, 1]}
    with pytest.raises(RecordError, match="response 1 has no tokens"):
        encode_one(ids, data_config())
    example = encode_one(ids | {"finished": [True, False, True]}, data_config())
    assert [x.tolist() for x in example.group.responses] == [[6, 7], [8]]
    assert example.scores.tolist() == [3, 1]


@pytest.mark.parametrize("format", ["plain", "chat", "released"])
def test_an_empty_sample_that_ended_is_its_end_of_turn_token(format, tokenizer):
    record = TEXT | {"responses": ["ab", ""], "finished": [True, True]}
    limits = dict(format=format, max_prompt_len=99, max_response_len=99)
    assert responses_of(record, tokenizer, **limits)[1] == [EOS]
    ids = record | ROLLOUT | {"response_ids": [[30, EOS], [EOS]], "finished": [True, True]}
    assert responses_of(ids, tokenizer, **limits)[1] == [EOS]


def test_a_response_without_a_token_is_left_out_and_a_record_of_too_few_skipped(
    tokenizer, tmp_path
):
    three = {"prompt": "p", "responses": ["a", "", "b"], "scores": [1, 2, 3]}
    records = [
        three | {"finished": [True, False, False]},
        TEXT | {"responses": ["a", ""], "finished": [True, False]},
    ]
    encoder = make_encoder(data_config(bad_rows="stop"), tokenizer)
    (examples,), counts = load_examples(write(tmp_path / "a.jsonl", records), encoder)
    (example,) = examples
    assert [ids.tolist() for ids in example.group.responses] == [
        [*byte_ids("a"), EOS],
        byte_ids("b"),
    ]
    assert example.scores.tolist() == [1, 3]
    assert counts == {
        "responses left out: cut off before their first token": 1,
        "records skipped: too few responses with a token": 1,
    }


def test_a_silent_policy_is_trained_on_its_silence(tokenizer, tmp_path):
    """Every response empty: leaving them out would hide that the policy collapsed."""
    silent = {"prompt": "p", "responses": ["", ""], "scores": [0, 0], "finished": [True, True]}
    path = write(tmp_path / "a.jsonl", [silent] * 2)
    (examples,), counts = load_examples(path, make_encoder(data_config(), tokenizer))
    assert [len(ids) for example in examples for ids in example.group.responses] == [1] * 4
    assert not counts


# How many responses there must be


def test_a_loss_that_takes_one_response_gets_records_of_one(tokenizer, tmp_path):
    one = {"prompt": "p", "responses": ["a"], "scores": [1]}
    path = write(tmp_path / "a.jsonl", [one] * 2)
    config = data_config(files=path, num_responses=1, batch_size=2)
    with pytest.raises(UserError, match="num_responses is 1, which teaches nothing; set it to 2"):
        pipeline.load_data(make_encoder(config, tokenizer))
    with pytest.raises(RecordError, match="has 1 response.*give 2 or more"):
        load_examples(path, make_encoder(config, tokenizer))
    data = pipeline.load_data(make_encoder(config, tokenizer, least_responses=1))
    batch = pipeline.Dataset(data.sources, config, seed=0).batch_at(0).batch
    assert batch.mask.tolist() == [[True], [True]]


def test_the_best_and_the_worst_of_one_response_cannot_be_chosen(tokenizer):
    config = data_config(files="x", num_responses=1, choose="best_worst_random")
    with pytest.raises(UserError, match="best_worst_random takes 2 responses"):
        pipeline.load_data(make_encoder(config, tokenizer, least_responses=1))


# Prompts


def test_a_prompt_is_cut_or_refused_as_in_training(tokenizer):
    for keep, want in (("end", "cd"), ("start", "ab")):
        config = data_config(max_prompt_len=2, prompt_keep=keep)
        ids = make_encoder(config, tokenizer).prompt("abcd")
        assert ids.tolist() == byte_ids(want) and ids.dtype == np.int32
        trained = encode_one(TEXT | {"prompt": "abcd"}, config, tokenizer)
        assert trained.group.prompt.tolist() == ids.tolist()
    encoder = make_encoder(data_config(max_prompt_len=2, too_long="stop"), tokenizer)
    with pytest.raises(RecordError, match=r"f:7: has 4 tokens where data\.max_prompt_len is 2"):
        encoder.question("f:7", {"prompt": "abcd"})


def test_a_prompt_of_released_format_keeps_its_last_tokens_where_the_longest_response_may_follow(
    tokenizer,
):
    config = data_config(format="released", max_prompt_len=4, max_response_len=8)
    whole = make_encoder(data_config(format="released", max_prompt_len=99), tokenizer).prompt("ab")
    assert make_encoder(config, tokenizer).prompt("ab").tolist() == whole[-4:].tolist()


PROMPTS = {
    "wanted a prompt of text or messages": {"prompt": 7},
    "text is not Unicode": {"prompt": "half \ud800"},
    "the prompt is empty; write something": {"prompt": ""},
    "wanted a 'prompt', got the keys ['question']": {"question": "a"},
    "the chat template refuses it (no system role)": {
        "prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "b"}]
    },
}


@pytest.mark.parametrize("said", PROMPTS)
def test_a_bad_prompt_is_named_with_its_line_or_skipped_and_counted(said, tokenizer, tmp_path):
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + THINKS
    )
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a", "answer": 3}, PROMPTS[said]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RecordError) as error:
        load_prompts(str(path), make_encoder(data_config(format="chat"), tokenizer))
    assert str(error.value).startswith(f"{path}:2: {said}")
    encoder = make_encoder(data_config(format="chat", bad_rows="skip"), tokenizer)
    (prompt,), counts = load_prompts(str(path), encoder)
    assert prompt.where == f"{path}:1" and prompt.record == lines[0]
    assert prompt.ids.tolist() == encoder.prompt("a").tolist()
    assert counts.total() == 1
