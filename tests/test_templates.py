"""What a chat template makes of a response is what transformers makes of the conversation, or said.

The templates are those of model families, shortened; the tokenizers are made here.
"""

import datetime
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import DENSE, data_config, encode_one, make_encoder, write
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from nca_jax import build
from nca_jax.checks import UserError
from nca_jax.data import chat
from nca_jax.data.load import load_examples, notes_of
from nca_jax.data.sources import RecordError
from nca_jax.data.template import apply_template, usual_turn
from nca_jax.flags import parse_flags
from nca_jax.inspect import print_turn
from nca_jax.rollout import read_response

ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
) + ASKED
TRIMMED = CHATML.replace("m.content", "m.content | trim").replace("<|im_end|>\n", "<|im_end|>")
ENDS_TWICE = CHATML.replace("{% endif %}", "{% else %}</s>{% endif %}")
WITHOUT_END = "{% for m in messages %}|{{ m.content }}{% endfor %}"
END_OF_TEXT = CHATML.replace("<|im_end|>", "[END]")  # not one token of any tokenizer here
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
DROPS = "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
THINKS = (  # a last answer without a thought gets an empty one
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}" + DROPS + "<think>\n"
    "{% if '</think>' in m.content %}"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') }}{% endif %}"
    "{{ '\n' }}</think>\n\n{{ said }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    + ASKED
)
DROPS_THOUGHTS = (
    "{% for m in messages %}" + DROPS + "<|im_start|>{{ m.role }}\n{{ said }}<|im_end|>{% endfor %}"
) + ASKED
BEGINS_THOUGHTS = DROPS_THOUGHTS.replace("assistant\n", "assistant\n<think>\n")
ENDS_THOUGHTS = THINKS.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
IM_START, IM_END, EOS = 384, 385, 1  # what is added to ByT5, and its eos
LONG = dict(format="chat", max_prompt_len=99, max_response_len=99)
THOUGHT = "<think>\nwhy\n</think>\n\nRed"


@pytest.fixture
def tokenizer():
    """That of a base model: turns end in another token than the eos."""
    tokenizer = ByT5Tokenizer()  # needs no files
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    return tokenizer


def sentencepiece(*, legacy: bool) -> PreTrainedTokenizerFast:
    """As Mistral's: a word begins with a space, which is put before a text."""
    letters = "▁\nINSTRUedabcfiorsunt<>|[]/'?"
    vocab = ["<unk>", "<s>", "</s>", *letters, "▁R", "ed", "▁Red", "Red"]
    merges = [("▁", "R"), ("e", "d"), ("▁R", "ed"), ("R", "ed")]
    ids = {token: i for i, token in enumerate(vocab)}
    inner = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>"))
    if legacy:
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        inner.normalizer = normalizers.Sequence(spaces)
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def record(*responses: str, **more) -> dict:
    scores = list(range(len(responses)))
    return {"prompt": "a", "responses": list(responses), "scores": scores} | more


def encoded(tokenizer, *responses: str, prompt="a", **more) -> tuple[list[list[int]], tuple]:
    """Returns the ids of prompt and response together, a list each, and the notes."""
    of_prompt = chat.encode_prompt(prompt, tokenizer, "chat")
    ids, notes = chat.encode_responses(prompt, responses, tokenizer, "chat", [EOS], **more)
    return [[*of_prompt, *of_response] for of_response in ids], notes


def of_transformers(tokenizer, response: str, prompt="a") -> list[int]:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return tokenizer.apply_chat_template(turns, return_dict=False)


# Ids


@pytest.mark.parametrize("template", [CHATML, TRIMMED, ENDS_TWICE, ZEPHYR, THINKS, ENDS_THOUGHTS])
@pytest.mark.parametrize("response", ["Red", " Red\n", THOUGHT])
def test_ids_are_those_of_transformers_up_to_the_first_end_of_turn(template, response, tokenizer):
    tokenizer.chat_template = template
    end = EOS if template == ZEPHYR else IM_END
    (ids,), _ = encoded(tokenizer, response)
    whole = of_transformers(tokenizer, response)
    turns_before = 1 if end in chat.encode_prompt("a", tokenizer, "chat") else 0
    assert ids == whole[: len(ids)] and ids[-1] == end and ids.count(end) == turns_before + 1


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("template", [ZEPHYR, MISTRAL])
def test_words_of_a_sentencepiece_vocabulary_go_on_from_the_prompt(template, legacy):
    tokenizer = sentencepiece(legacy=legacy)
    tokenizer.chat_template = template
    (red, sun), notes = encoded(tokenizer, "Red", "sun")
    for ids, response in ((red, "Red"), (sun, "sun")):
        assert ids == of_transformers(tokenizer, response)[: len(ids)] and ids[-1] == 2
    word = "Red" if template == ZEPHYR else "▁Red"
    assert tokenizer.convert_ids_to_tokens(red[-2]) == word and notes == ()
    apart, notes = encoded(tokenizer, "Red", "sun", join="apart")
    is_same = template == MISTRAL and not legacy  # there the template writes the only space
    assert (apart == [red, sun]) == is_same and notes == ()


@pytest.mark.parametrize("legacy", [True, False])
def test_plain_text_goes_on_from_the_prompt_too(legacy):
    tokenizer = sentencepiece(legacy=legacy)
    example = encode_one(record("Red", " Red") | {"prompt": "S"}, data_config(), tokenizer)
    red, space_red = (tokenizer.convert_ids_to_tokens(x) for x in example.group.responses)
    assert red == ["Red", "</s>"] and space_red == ["▁Red", "</s>"] and example.notes == ()
    cut = encode_one(record("Red", "s", finished=[False, True]), data_config(), tokenizer)
    assert tokenizer.convert_ids_to_tokens(cut.group.responses[0]) == ["Red"]


def test_responses_that_the_prompt_merges_with_are_encoded_apart_and_counted(tmp_path):
    tokenizer = sentencepiece(legacy=False)
    records = [record("ed", "s") | {"prompt": "R"}, record("ed", "s")]
    path = write(tmp_path / "a.jsonl", [x for x in records])
    (examples,), counts = load_examples(path, make_encoder(data_config(), tokenizer))
    for example in examples:
        tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in example.group.responses]
        assert tokens[0][-2:] == ["ed", "</s>"]
    assert tokenizer.convert_ids_to_tokens(examples[0].group.prompt) == ["▁R"]
    assert notes_of(counts) == [f"1 {chat.APART}"]


# The end of a turn


def test_a_template_that_writes_no_end_gets_the_eos(tokenizer):
    tokenizer.chat_template = WITHOUT_END
    (ids,), _ = encoded(tokenizer, "b")
    assert tokenizer.decode(ids) == "|a|b</s>"
    tokenizer.chat_template = END_OF_TEXT
    (ids,), _ = encoded(tokenizer, "b")
    assert tokenizer.decode(ids).endswith("\nb[END]</s>")


@pytest.mark.parametrize("format", ["chat", "plain"])
def test_a_sample_stops_at_the_end_of_the_template_and_its_text_is_without(format, tokenizer):
    run = run_of(tokenizer, format)
    assert run.eos_ids == (EOS, 2, IM_END) == run.encoder.eos_ids  # the model's is 2
    ids = tokenizer("AB.<|im_end|>", add_special_tokens=False)["input_ids"]
    assert read_response(run, np.array(ids)) == ("AB.", ids, True)
    assert read_response(run, np.array(ids[:-1])) == ("AB.", ids[:-1], False)


def test_a_sample_is_without_what_the_template_says_before_the_end(tokenizer):
    tokenizer.chat_template = END_OF_TEXT
    run = run_of(tokenizer, "chat")
    ids = tokenizer("AB.[END]</s>", add_special_tokens=False)["input_ids"]
    assert read_response(run, np.array(ids)) == ("AB.", ids, True)


def run_of(tokenizer, format: str) -> build.Run:
    config = SimpleNamespace(
        data=data_config(format=format),
        loss=SimpleNamespace(name="nca"),
        generate=SimpleNamespace(stop=""),
    )
    turn = usual_turn(tokenizer, DENSE.eos_ids)
    return build.Run(config, None, SimpleNamespace(config=DENSE), tokenizer, turn)


@pytest.mark.parametrize(
    ("format", "end"), [("chat", "<|im_end|>"), ("chat", "</s>"), ("plain", "</s>")]
)
def test_a_response_that_names_an_end_of_turn_is_refused(format, end, tokenizer):
    for more in ({}, {"finished": [False, True]}):
        row = record(f"write {end} last", "b", **more)
        with pytest.raises(RecordError, match=f"f:1: a response names '{end}'") as error:
            encode_one(row, data_config(**LONG | {"format": format}), tokenizer)
        assert error.value.reason == "special"
    encode_one(record("write <|im_start|> last", "b"), data_config(**LONG), tokenizer)
    encode_one(
        record("write </s> last", "b"), data_config(**LONG | {"format": "released"}), tokenizer
    )


# What a template changes


def test_white_space_that_a_template_changes_is_counted(tokenizer, tmp_path):
    tokenizer.chat_template = TRIMMED
    rows = [record(" b", "c\n"), record("d", " ")]
    encoder = make_encoder(data_config(bad_rows="skip", **LONG), tokenizer)
    (examples,), counts = load_examples(write(tmp_path / "a.jsonl", rows), encoder)
    assert [tokenizer.decode(ids) for ids in examples[0].group.responses] == [
        "b<|im_end|>",
        "c<|im_end|>",
    ]
    assert counts == {
        "responses whose white space the chat template changes": 2,
        "records skipped: response": 1,  # nothing is left of it
    }


@pytest.mark.parametrize(
    ("template", "response", "said"),
    [
        (DROPS_THOUGHTS, THOUGHT, "does not write a response as it is"),
        (BEGINS_THOUGHTS, "Red", "begins a response with '<think>\\\\n', and this one begins"),
        (CHATML.replace("m.content", "m.content | upper"), "Red", "does not write a response as"),
        ("{{ messages | length }}", "Red", "leaves the response out"),
        ("{{ messages[-1].content }}", "Red", "not prefix-stable"),
        ("{{ raise_exception('no system role') }}", "Red", r"refuses it \(no system role\)"),
        ("{{ 'a' + 1 }}", "Red", "the chat template refuses it"),
    ],
)
def test_a_response_that_a_template_drops_or_rewrites_is_refused_with_its_place(
    template, response, said, tokenizer, tmp_path
):
    tokenizer.chat_template = template
    path = write(tmp_path / "a.jsonl", [record(response, "b")])
    with pytest.raises(RecordError, match=rf"a\.jsonl:1: .*{said}") as error:
        load_examples(path, make_encoder(data_config(**LONG), tokenizer))
    assert error.value.reason == "template"


def test_a_response_goes_on_from_what_the_template_begins(tokenizer):
    tokenizer.chat_template = BEGINS_THOUGHTS
    (ids,), notes = encoded(tokenizer, THOUGHT)
    assert notes == () and tokenizer.decode(ids).endswith(f"assistant\n{THOUGHT}<|im_end|>")
    (cut, silent), _ = encoded(tokenizer, "why", "", finished=[False, True])
    assert tokenizer.decode(cut).endswith("<think>\nwhy")
    assert tokenizer.decode(silent).endswith("<think>\n<|im_end|>")


def test_a_response_that_was_cut_off_gets_no_empty_thought(tokenizer):
    tokenizer.chat_template = THINKS
    (cut, whole), _ = encoded(tokenizer, "<think>\nwh", "Red", finished=[False, True])
    assert tokenizer.decode(cut).endswith("assistant\n<think>\nwh")
    assert tokenizer.decode(whole).endswith("assistant\n<think>\n\n</think>\n\nRed<|im_end|>")


def test_a_prompt_may_hold_what_marks_a_response(tokenizer):
    (ids,), _ = encoded(tokenizer, "Red", prompt="RESPONSE RESPONSEE")
    assert ids == of_transformers(tokenizer, "Red", "RESPONSE RESPONSEE")[: len(ids)]


def test_inspect_says_what_a_template_adds(tokenizer, capsys):
    tokenizer.chat_template = THINKS
    print_turn(usual_turn(tokenizer, ()))
    thought = r"'<think>\n\n</think>\n\n'"
    wanted = f"writes {thought} before a response and '<|im_end|>' after it; id {IM_END} ends"
    assert wanted in capsys.readouterr().out


# The day


def test_a_template_writes_the_day_of_the_run(tokenizer):
    tokenizer.chat_template = DATED
    encoder = make_encoder(data_config(**LONG), tokenizer, date="2024-07-06")
    example = encoder.record("f:1", record("b", "c"))
    assert tokenizer.decode(example.group.prompt).startswith("06 Jul 2024\n<|im_start|>user\n")
    assert encoder.prompt("a").tolist() == example.group.prompt.tolist()
    assert len(example.group.responses) == 2


def test_a_run_has_one_day_which_is_today_or_a_given_one():
    smoke = "--config=configs/jsonl.py:files=x.jsonl,smoke"
    config, _ = parse_flags(["train", smoke, "--config.data.rows=8"])
    given = build.build(config, date="2024-07-06")
    assert given.date == given.encoder.date == "2024-07-06"
    before = datetime.date.today().isoformat()
    assert before <= build.build(config).date <= datetime.date.today().isoformat()


@pytest.mark.parametrize("start", ["", "\n", "  ", "\n  \n"])
def test_a_dated_template_differs_in_its_day_alone(start, tokenizer):
    tokenizer.chat_template = start + "{% if strftime_now is defined %}"
    tokenizer.chat_template += "{{ strftime_now('%Y-%m-%d, %A %-d %B %y, 5%%') }}{% endif %}\n b"
    dated, today = (
        apply_template([{"role": "user", "content": "a"}], tokenizer, generate=True, date=date)
        for date in ("2024-07-06", "")
    )
    day = "2024-07-06, Saturday 6 July 24, 5%"
    assert day in dated and dated.split(day)[1] == today.split("5%")[1]
    assert dated.split(day)[0] == today[: today.index("2")]


def test_a_tokenizer_without_a_template_is_refused_with_a_word_about_plain(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"no chat template; set data\.format=plain"):
        chat.encode_prompt("p", tokenizer, "chat")
    assert usual_turn(tokenizer, ()) is None
