"""From files of records to examples: each claim of nca_jax/data's sources, chat and encode."""

import gzip
import json

import numpy as np
import pytest
from helpers import data_config, encode_one, id_record, make_encoder, write
from transformers import ByT5Tokenizer

from nca_jax.checks import UserError
from nca_jax.data import chat, pipeline, sources
from nca_jax.data.load import load_examples
from nca_jax.data.sources import JsonlSource, RecordError, list_files, split_globs
from nca_jax.data.table import table_of

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


@pytest.mark.parametrize(
    "name",
    ["data[v1]/a.jsonl", "a,b/a.jsonl", "a, b,c*/a.jsonl", "*.jsonl", "a.jsonl+b,c.gz+d.jsonl"],
)
def test_a_name_that_exists_is_a_file_before_it_is_a_glob_or_a_list(name, tmp_path):
    path, other = tmp_path / name, tmp_path / "other.jsonl"
    path.parent.mkdir(exist_ok=True)
    write(path, [IDS])
    write(other, [IDS] * 2)
    assert len(JsonlSource(str(path))) == 1
    for files in (f"{path},{other}", f"{other}, {path}", f"{other}+{path}"):
        assert sorted(map(len, load(files, data_config()).sources)) == [1, 2]
        assert sorted(list_files(files)) == sorted([str(path), str(other)])


def test_a_plus_after_a_files_ending_parts_entries_and_no_other_one_does():
    parts = ["a.jsonl", "b/*.jsonl.gz", "c++/*.jsonl", "tfds:x:train[:1]", "tfds:y:train"]
    assert split_globs("+".join(parts)) == split_globs(", ".join(parts)) == parts


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
    "score text": (TEXT | {"scores": [1, "good"]}, "scores"),
    "score text of none": (TEXT | {"scores": [1, "nan"]}, "scores"),
    "score null": (TEXT | {"scores": [1, None]}, "scores"),
    "prompt empty": (TEXT | {"prompt": ""}, "empty"),
    "prompt number": (TEXT | {"prompt": 3}, "prompt"),
    "response empty": (TEXT | {"responses": ["a", ""]}, "response"),
    "rejected empty": ({"prompt": "p", "chosen": "a", "rejected": ""}, "response"),
    "response number": (TEXT | {"responses": ["a", 3]}, "text"),
    "response without assistant": (
        TEXT | {"responses": ["a", [{"role": "user", "content": "b"}]]},
        "role",
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

    def get_added_vocab(self):
        return {}

    def __call__(self, text, add_special_tokens=True):
        texts = [text] if isinstance(text, str) else text
        ids = [[2] * add_special_tokens + [ord(c) for c in one] for one in texts]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


def test_a_bos_is_put_before_a_plain_prompt_where_the_tokenizer_adds_one():
    assert chat.encode_prompt("p", BosTokenizer(), "plain") == [2, ord("p")]
    assert encode_one(
        TEXT | {"prompt": ""}, data_config(), BosTokenizer()
    ).group.prompt.tolist() == [2]


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


def test_the_eos_is_scored_where_pad_is_eos(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    config = data_config(batch_size=1, num_responses=2)
    dataset = pipeline.Dataset([table_of([encode_one(TEXT, config, tokenizer)])], config, seed=0)
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


def test_a_score_that_float32_does_not_hold_with_the_bonus_is_a_fault_of_its_record():
    record = id_record(1) | {"scores": [3e38, 1.0, 2.0]}
    with pytest.raises(RecordError, match="f:1: the first score is 3e.38, and float32 does not"):
        encode_one(record, data_config(first_bonus=1e38))
