"""Conversations of every layout become one prompt and its answers, or a record's own fault."""

import json

import pytest
from helpers import data_config, encode_one, make_encoder, write
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from nca_jax import prepare
from nca_jax.data.conversation import read_responses
from nca_jax.data.load import load_examples, load_prompts
from nca_jax.data.record import EQUAL, REVERSED, UNREAD_SCORES
from nca_jax.data.sources import RecordError
from nca_jax.data.tfds_source import TfdsSource

LIMITS = dict(max_prompt_len=999, max_response_len=99, num_responses=2)


def turns(*contents: str, system: str | None = None) -> list[dict]:
    """Returns a conversation that the user begins, with a system's turn before it if there is."""
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return said if system is None else [{"role": "system", "content": system}, *said]


def make_tokenizer() -> ByT5Tokenizer:
    tokenizer = ByT5Tokenizer()  # needs no files
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def encode(record: dict, tokenizer, format: str = "chat"):
    return encode_one(record, data_config(format=format, **LIMITS), tokenizer)


def same_ids(a, b) -> bool:
    ids = [[x.tolist() for x in (e.group.prompt, *e.group.responses)] for e in (a, b)]
    return ids[0] == ids[1]


# Forms of one record

LONG = {"prompt": turns("a", "b", "c"), "responses": ["d", "e"], "scores": [1, 0]}
CHOSEN, REJECTED = turns("a", "b", "c", "d"), turns("a", "b", "c", "e")
SAME = {
    "a text, and whole conversations": {"prompt": "a", "chosen": CHOSEN, "rejected": REJECTED},
    "other white space": {"prompt": " a\n", "chosen": CHOSEN, "rejected": REJECTED},
    "no prompt": {"chosen": CHOSEN, "rejected": REJECTED},
    "a prompt of null": {"prompt": None, "chosen": CHOSEN, "rejected": REJECTED},
    "all turns before": {"prompt": turns("a", "b", "c"), "chosen": CHOSEN, "rejected": REJECTED},
    "the first turn": {"prompt": turns("a"), "chosen": CHOSEN, "rejected": REJECTED},
    "answers alone": {"prompt": LONG["prompt"], "chosen": CHOSEN[-1:], "rejected": REJECTED[-1:]},
    "it goes on": {"prompt": "a", "chosen": CHOSEN[1:], "rejected": REJECTED[1:]},
    "a conversation and a text": {"prompt": LONG["prompt"], "chosen": CHOSEN, "rejected": "e"},
    "responses": {"responses": [CHOSEN, REJECTED], "scores": ["1", " 0.0"]},
    "parts": {
        "chosen": [t | {"content": [{"type": "text", "text": t["content"]}]} for t in CHOSEN],
        "rejected": REJECTED,
    },
    "from and value": {
        "chosen": [
            {"from": "human" if t["role"] == "user" else "gpt", "value": t["content"]}
            for t in CHOSEN
        ],
        "rejected": REJECTED,
    },
    "keys of no meaning": {
        "chosen": [t | {"tool_calls": None, "id": 3, "function_call": {}} for t in CHOSEN],
        "rejected": REJECTED,
    },
}


@pytest.mark.parametrize("form", SAME)
def test_every_form_of_a_conversation_is_one_example(form, tokenizer):
    example, wanted = encode(SAME[form], tokenizer), encode(LONG, tokenizer)
    assert same_ids(example, wanted)
    assert example.scores.tolist() == [1, 0] and example.notes == ()
    assert example.prompt_hash == wanted.prompt_hash
    said = [(turn["role"], turn["content"]) for turn in example.record["prompt"]]
    assert said == [(turn["role"], turn["content"]) for turn in LONG["prompt"]]


@pytest.mark.parametrize("prompt", [None, "a", turns("a"), turns("a", system="s")])
@pytest.mark.parametrize("system", [None, "s"])
def test_a_system_turn_may_be_in_the_prompt_or_in_the_conversation(prompt, system, tokenizer):
    pair = {"chosen": turns("a", "d", system=system), "rejected": turns("a", "e", system=system)}
    has_system = system or prompt == turns("a", system="s")
    wanted = LONG | {"prompt": turns("a", system="s") if has_system else "a"}
    assert same_ids(encode(pair | {"prompt": prompt}, tokenizer), encode(wanted, tokenizer))


def test_a_prompt_of_one_turn_is_a_text_also_in_plain_format(tokenizer):
    pair = {"chosen": turns("a", "d"), "rejected": turns("a", "e")}
    example = encode(pair, tokenizer, "plain")
    assert same_ids(example, encode(LONG | {"prompt": "a"}, tokenizer, "plain"))
    assert example.record == {"prompt": "a"}


def test_in_released_format_the_response_begins_with_the_first_answer(tokenizer):
    wanted = encode({"prompt": "a", "chosen": CHOSEN, "rejected": REJECTED}, tokenizer, "released")
    for more in ({}, {"prompt": turns("a")}, {"prompt": turns("a", "b", "c")}):
        pair = {"chosen": CHOSEN, "rejected": REJECTED} | more
        assert same_ids(encode(pair, tokenizer, "released"), wanted)
    text = tokenizer.decode(wanted.group.responses[0])
    assert text.replace("\n", "") == "b</s><|user|>c</s><|assistant|>d</s></s>"


def test_what_a_template_reads_beside_role_and_content_stays(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.name }}:{{ m.content }}</s>{% endfor %}"
    prompt = [turns("a")[0] | {"name": "Ann"}]
    ids = make_encoder(data_config(format="chat"), tokenizer).prompt(prompt)
    assert tokenizer.decode(ids) == "Ann:a</s>"


# Faults of a record

PAIR = {"prompt": "a", "chosen": turns("a", "d"), "rejected": turns("a", "e")}


def changed(**message) -> dict:
    return PAIR | {"chosen": [turns("a")[0] | message, *turns("a", "d")[1:]]}


FAULTS = {
    "another chosen": (PAIR | {"chosen": turns("x", "d")}, "prompts differ"),
    "another prompt": (PAIR | {"prompt": "x"}, "prompts differ"),
    "another turn between": (
        {"chosen": CHOSEN, "rejected": turns("a", "x", "c", "e")},
        "prompts differ",
    ),
    "one turn more": (PAIR | {"chosen": CHOSEN}, "prompts differ"),
    "another system": (
        PAIR | {"prompt": turns("a", system="x"), "chosen": turns("a", "d", system="s")},
        "prompts differ",
    ),
    "a response of another": (
        {"responses": [CHOSEN, turns("a", "b", "x", "y")], "scores": [1, 0]},
        "prompts differ",
    ),
    "the user last": (PAIR | {"chosen": turns("a", "d", "f")}, "role"),
    "no turn before": ({"chosen": turns("", "d")[1:], "rejected": turns("", "e")[1:]}, "keys"),
    "no prompt for a text": ({"chosen": "d", "rejected": "e"}, "keys"),
    "a begun prompt": (LONG | {"prompt": turns("a", "b")}, "begun answer"),
    "two answers in turn": (
        {key: [*turns("a", "d"), PAIR[key][1]] for key in ("chosen", "rejected")},
        "begun answer",
    ),
    "an image": (changed(content=[{"type": "image"}, {"type": "text", "text": "a"}]), "content"),
    "a part that is bare": (changed(content=["a"]), "content"),
    "no content": (changed(content=None), "text"),
    "a call": (
        changed(role="assistant", content=None, tool_calls=[{"name": "f"}]),
        "tools",
    ),
    "a tool": (changed(role="tool"), "tools"),
    "a function": (changed(role="function"), "tools"),
    "no role": (changed(role=None), "role"),
    "a role that is unknown": (
        PAIR | {"chosen": [{"from": "critic", "value": "a"}, *turns("a", "d")[1:]]},
        "role",
    ),
    "chosen and rejected the same": (PAIR | {"rejected": PAIR["chosen"]}, "same response"),
    "a role of half a character": (changed(role="\ud800"), "text"),
    "a key of half a character": (PAIR | {"answer": {"deep": ["\udcff"]}}, "text"),
    "a score that is true": (LONG | {"scores": [1, True]}, "scores"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_conversation_has_its_place_and_goes_by_bad_rows(fault, tokenizer, tmp_path):
    record, reason = FAULTS[fault]
    path = write(tmp_path / "a.jsonl", [PAIR, record])
    with pytest.raises(RecordError) as error:
        load_examples(path, make_encoder(data_config(format="chat"), tokenizer))
    assert str(error.value).startswith(f"{path}:2: ") and error.value.reason == reason
    encoder = make_encoder(data_config(format="chat", bad_rows="skip"), tokenizer)
    (examples,), counts = load_examples(path, encoder)
    assert len(examples) == 1 and counts == {f"records skipped: {error.value.reason}": 1}


def test_json_that_is_nested_too_deep_is_a_fault_of_its_record(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [PAIR, "[" * 100_000])
    with pytest.raises(RecordError, match=":2: not JSON"):
        load_examples(path, make_encoder(data_config(format="chat"), tokenizer))


# What is said


@pytest.mark.parametrize(
    ("record", "notes"),
    [
        (PAIR | {"score_chosen": 8.0, "score_rejected": "6"}, (UNREAD_SCORES,)),
        (PAIR | {"score_chosen": 5, "score_rejected": 6}, (UNREAD_SCORES, REVERSED)),
        (PAIR | {"score_chosen": None, "score_rejected": 6}, ()),
        (LONG | {"responses": ["d", "d"]}, (EQUAL,)),
        (LONG | {"responses": ["d", "d"], "scores": [1, 1]}, ()),
    ],
)
def test_what_a_record_says_that_is_not_learnt_is_said(record, notes, tokenizer):
    example = encode(record, tokenizer)
    assert example.notes == notes and example.scores.tolist() == record.get("scores", [1, 0])


def test_scores_of_several_units_are_told_with_their_ranges(tmp_path, tokenizer):
    scored = [LONG | {"scores": [0, 10]}, LONG | {"scores": [4, 7.5]}]
    mixed = write(tmp_path / "mixed.jsonl", [PAIR, *scored])
    encoder = make_encoder(data_config(format="chat"), tokenizer)
    assert load_examples(mixed, encoder).counts == {
        f"pairs of {mixed!r} have scores from 0 to 1: of several units?": 1,
        f"records of {mixed!r} have scores from 0 to 10: of several units?": 2,
    }
    alike = write(tmp_path / "alike.jsonl", [PAIR, LONG | {"scores": [0.5, -0.7]}])
    assert not load_examples(alike, encoder).counts


def test_a_prompt_that_is_rendered_already_is_told_in_training_and_generation(tmp_path, tokenizer):
    rendered = PAIR | {"prompt": "<|user|>a</s>\n<|assistant|>", "chosen": "d", "rejected": "e"}
    path = write(tmp_path / "a.jsonl", [PAIR, rendered])
    encoder = make_encoder(data_config(format="chat", **LIMITS), tokenizer)
    for counts in (load_examples(path, encoder).counts, load_prompts(path, encoder).counts):
        (note,) = counts
        assert counts[note] == 1 and "prompts hold marks of the chat template" in note
    plain = make_encoder(data_config(format="plain", **LIMITS), tokenizer)
    assert not load_prompts(path, plain).counts


def test_an_empty_response_that_says_nothing_of_its_end_is_left_out_alone(tmp_path, tokenizer):
    four = {"prompt": "a", "responses": ["d", "", "e", "f"], "scores": [1, 2, 3, 4]}
    none = four | {"responses": [""] * 4, "scores": [0] * 4}
    path = write(tmp_path / "a.jsonl", [four, none])
    encoder = make_encoder(data_config(format="chat", first_bonus=0.5), tokenizer)
    ((example,),), counts = load_examples(path, encoder)
    assert example.scores.tolist() == [1.5, 3, 4] and counts.total() == 2


# Prepare


def test_prepare_reads_conversations_as_training_does(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    bad = [FAULTS[name][0] for name in ("another prompt", "an image", "a begun prompt")]
    raw = write(tmp_path / "train.jsonl", [*SAME.values(), *bad])
    prepare.main(["prepare", "--name=scored_jsonl", f"--raw={raw}"])
    source = TfdsSource("tfds:scored_jsonl:train")
    assert len(source) == len(SAME)
    wanted = encode(LONG, tokenizer)
    assert all(same_ids(encode(source[i][1], tokenizer), wanted) for i in range(len(source)))


# No record is a traceback

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
TEXTS = st.sampled_from(["", "a", "b", "<|user|>"])
CONTENTS = TEXTS | SCALARS | st.lists(st.fixed_dictionaries({"type": TEXTS | st.just("text")}))
ROLE_NAMES = st.sampled_from(["user", "assistant", "system", "tool"])
MESSAGES = st.fixed_dictionaries(
    {}, optional={"role": ROLE_NAMES | SCALARS, "content": CONTENTS, "from": TEXTS, "value": TEXTS}
)
PROPER = st.fixed_dictionaries({"role": ROLE_NAMES, "content": TEXTS})
VALUES = TEXTS | SCALARS | st.lists(PROPER, max_size=3) | st.lists(MESSAGES | SCALARS, max_size=3)
NUMBERS = st.lists(SCALARS | st.sampled_from([0, 1, "2"]), max_size=2) | SCALARS
OTHERS = {
    "prompt": VALUES,
    "finished": st.lists(SCALARS, max_size=2) | SCALARS,
    "tokenizer": SCALARS | st.just("own"),
    "prompt_ids": NUMBERS,
    "response_ids": st.lists(NUMBERS, max_size=2),
    "score_chosen": SCALARS,
    "score_rejected": SCALARS,
}
RECORDS = st.fixed_dictionaries({"chosen": VALUES, "rejected": VALUES}, optional=OTHERS)
RECORDS |= st.fixed_dictionaries(
    {"responses": st.lists(VALUES, min_size=2, max_size=2), "scores": NUMBERS | st.just([1, 0])},
    optional=OTHERS,
)
ENCODERS = [
    make_encoder(data_config(format=format, **LIMITS), make_tokenizer(), digest="own")
    for format in ("chat", "plain", "released")
]


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(record=RECORDS, encoder=st.sampled_from(ENCODERS))
def test_a_record_is_read_or_refused_with_its_place(record, encoder):
    for read in (encoder.record, encoder.question):
        try:
            read("f:1", json.loads(json.dumps(record)))
        except RecordError as error:
            assert str(error).startswith("f:1: ") and error.reason


def test_the_prompt_of_conversations_is_their_turns_before_the_answer():
    assert read_responses(None, [CHOSEN, REJECTED]) == (turns("a", "b", "c"), ["d", "e"])
