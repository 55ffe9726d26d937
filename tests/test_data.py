"""From files of records to examples: each claim of nca_jax/data's sources, chat and encode."""

import gzip
import json

import numpy as np
import pytest
from helpers import data_config, encode_one, make_encoder, write
from transformers import ByT5Tokenizer

from nca_jax.checks import UserError
from nca_jax.data import chat, pipeline, sources
from nca_jax.data.load import load_examples
from nca_jax.data.sources import JsonlSource, RecordError

EOS = 1  # of ByT5, whose other ids are bytes + 3
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer():
    tokenizer = ByT5Tokenizer()  # needs no files
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def byte_ids(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def load(files, config, tokenizer=None, **more):
    return load_examples(files, make_encoder(config, tokenizer, **more))


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


def test_a_glob_without_files_and_a_file_without_records_are_refused(tmp_path):
    with pytest.raises(UserError, match="No file matches"):
        JsonlSource(str(tmp_path / "*.jsonl"))
    with pytest.raises(UserError, match=r"a\.jsonl: has no records"):
        JsonlSource(write(tmp_path / "a.jsonl", ["", " "]))
    (tmp_path / "b.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match="b.gz: cannot be read"):
        JsonlSource(str(tmp_path / "b.gz"))


def test_a_gz_that_holds_far_more_than_it_looks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LINE_BYTES", 1000)
    with gzip.open(tmp_path / "a.gz", "wb") as file:
        file.write(b"0" * 1001)
    with pytest.raises(UserError, match=r"a.gz: has a line of more than \d+ bytes"):
        JsonlSource(str(tmp_path / "a.gz"))
    monkeypatch.setattr(sources.os, "sysconf", lambda name: 64)  # 64 pages of 64 bytes
    with gzip.open(tmp_path / "b.gz", "wb") as file:
        file.write(b'{"x": 1}\n' * 1000)
    with pytest.raises(UserError, match="b.gz: holds more than this machine's memory"):
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
def test_a_broken_record_stops_with_its_file_and_line_or_is_skipped_and_counted(
    name, tmp_path, tokenizer
):
    broken, reason = BROKEN[name]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(TEXT), broken if isinstance(broken, str) else json.dumps(broken)]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    with pytest.raises(RecordError) as error:
        load(str(path), data_config(), tokenizer)
    assert str(error.value).startswith(f"{path}:2: ") and error.value.reason == reason
    examples = load(str(path), data_config(bad_rows="skip"), tokenizer)
    assert [len(source) for source in examples.sources] == [1]
    assert examples.counts == {f"records skipped: {reason}": 1}


def test_a_source_of_which_no_record_is_left_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", ["{", "["])
    with pytest.raises(UserError, match=r"No record of .* is left: 2 records skipped: json"):
        load(path, data_config(bad_rows="skip"))


def test_text_without_a_tokenizer_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [TEXT])
    with pytest.raises(
        UserError, match=r"no tokenizer, and the records hold text; set data\.tokenizer"
    ):
        load(path, data_config(bad_rows="skip"))


# Text to ids


def test_plain_text_is_the_prompt_and_the_response_with_its_eos(tokenizer):
    example = encode_one(TEXT, data_config(), tokenizer)
    assert example.group.prompt.tolist() == byte_ids("p")
    assert [ids.tolist() for ids in example.group.responses] == [
        [*byte_ids("a"), EOS],
        [*byte_ids("b"), EOS],
    ]
    assert example.group.prompt.dtype == example.group.responses[0].dtype == np.int32
    assert example.scores.dtype == np.float32


class BosTokenizer:
    """Adds a bos before every text; its ids are code points."""

    bos_token_id, eos_token_id, eos_token, chat_template = 2, EOS, "</s>", None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [2] * add_special_tokens + [ord(c) for c in text]}


def test_a_bos_is_put_before_a_plain_prompt_where_the_tokenizer_adds_one():
    assert chat.encode_prompt("p", BosTokenizer(), "plain") == [2, ord("p")]
    assert encode_one(
        TEXT | {"prompt": ""}, data_config(), BosTokenizer()
    ).group.prompt.tolist() == [2]


def test_chat_prompt_and_response_together_are_the_template_up_to_the_eos(tokenizer):
    config = data_config(format="chat", max_prompt_len=99, max_response_len=99)
    example = encode_one(TEXT, config, tokenizer)
    for ids, response in zip(example.group.responses, "ab", strict=True):
        text = f"<|user|>p</s>\n<|assistant|>{response}</s>"  # without the line break at the end
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [*example.group.prompt, *ids] == expected and ids[-1] == EOS
    assert example.group.prompt.tolist() == chat.encode_prompt("p", tokenizer, "chat")
    assert example.record == {"prompt": "p"}
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
        np.testing.assert_array_equal(example.group.prompt, expected.group.prompt)
        np.testing.assert_array_equal(example.scores, [1.0, 0.0])
        for ids, wanted in zip(example.group.responses, expected.group.responses, strict=True):
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


def test_a_record_that_the_template_refuses_is_at_fault_itself(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(RecordError, match=r"f:1: the chat template refuses it \(no system role\)"):
        encode_one(TEXT, data_config(format="chat"), tokenizer)


def test_the_eos_is_scored_where_pad_is_eos(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    config = data_config(batch_size=1, num_responses=2)
    dataset = pipeline.Dataset([[encode_one(TEXT, config, tokenizer)]], config, seed=0)
    rows = dataset.batch_at(0).batch.rows
    scored = rows.logp_slot < 2
    assert rows.logp_token[scored].tolist() == [*byte_ids("a"), EOS, *byte_ids("b"), EOS]


# Lengths

LONG = {"prompt_ids": [1, 2, 3, 4], "response_ids": [[5, 6, 7], [8]], "scores": [1, 0]}


@pytest.mark.parametrize(("keep", "prompt"), [("end", [3, 4]), ("start", [1, 2])])
def test_too_long_segments_are_cut_and_counted(keep, prompt):
    config = data_config(max_prompt_len=2, max_response_len=2, prompt_keep=keep)
    example = encode_one(LONG, config)
    assert example.group.prompt.tolist() == prompt
    assert [ids.tolist() for ids in example.group.responses] == [[5, 6], [8]]
    assert (example.num_tokens, example.num_cut) == (8, 3)


def test_a_cut_response_loses_its_eos(tokenizer):
    example = encode_one(
        TEXT | {"responses": ["ab", "a"]}, data_config(max_response_len=2), tokenizer
    )
    assert [ids.tolist() for ids in example.group.responses] == [
        byte_ids("ab"),
        [*byte_ids("a"), EOS],
    ]


@pytest.mark.parametrize("limit", ["max_prompt_len", "max_response_len"])
def test_a_too_long_record_stops_or_is_skipped_whatever_bad_rows_says(limit, tmp_path):
    path = write(tmp_path / "a.jsonl", [LONG, IDS])
    limits = {limit: 2}
    with pytest.raises(UserError, match=rf":1: has \d tokens where data\.{limit} is 2"):
        load(path, data_config(too_long="stop", bad_rows="skip", **limits))
    examples = load(path, data_config(too_long="skip", **limits))
    assert examples.counts == {"records skipped: too_long": 1} and len(examples.sources[0]) == 1
