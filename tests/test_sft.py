"""Supervised fine-tuning: conversations, which of their tokens are learned, a mean over them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import metric_lines
from helpers import data_config, encode_one, make_encoder
from test_templates import CHATML, DROPS_THOUGHTS, IM_END, LONG, THINKS
from transformers import ByT5Tokenizer

from nca_jax import export, train
from nca_jax.checks import UserError
from nca_jax.data.pipeline import Dataset
from nca_jax.data.sources import RecordError
from nca_jax.data.table import table_of
from nca_jax.flags import parse_flags
from nca_jax.losses import LOSSES, Responses
from nca_jax.losses.likelihood import num_tokens
from nca_jax.model_config import MODELS
from nca_jax.models.decoder import Model
from nca_jax.train_step import make_step_logps

TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "two"},
]
ALL = dict(LONG, train_on="all_assistant", num_responses=1, choose="first")
LAST = ALL | dict(train_on="last_assistant")


@pytest.fixture
def tokenizer():
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    return tokenizer


def sft_one(record, config, tokenizer):
    return encode_one(record, data_config(**config), tokenizer, least_responses=1)


def test_a_response_and_messages_are_one_example(tokenizer):
    forms = (
        {"prompt": "a", "response": "one"},
        {"prompt": "a", "response": TURNS[:2]},
        {"messages": TURNS[:2]},
        {"prompt": "a", "messages": TURNS[:2], "source": "other keys"},
        {"prompt": "a", "responses": ["one"], "scores": [0]},
    )
    found = [sft_one(record, LAST, tokenizer).group for record in forms]
    for group in found:
        np.testing.assert_array_equal(group.prompt, found[0].prompt)
        np.testing.assert_array_equal(group.responses[0], found[0].responses[0])


@pytest.mark.parametrize("join", ["together", "apart"])
def test_all_answers_are_scored_with_their_end_of_turn_and_nothing_else_is(tokenizer, join):
    last = sft_one({"messages": TURNS}, LAST | dict(join=join), tokenizer).group
    group = sft_one({"messages": TURNS}, ALL | dict(join=join), tokenizer).group
    whole = np.concatenate([group.prompt, group.responses[0]])
    np.testing.assert_array_equal(whole, np.concatenate([last.prompt, last.responses[0]]))
    assert tokenizer.decode(group.prompt).endswith("a<|im_end|>\n<|im_start|>assistant\n")
    scored = [x for x, yes in zip(group.responses[0], group.scored[0], strict=True) if yes]
    wanted = [*tokenizer.encode("one", add_special_tokens=False), IM_END]
    assert scored == [*wanted, *tokenizer.encode("two", add_special_tokens=False), IM_END]
    assert group.num_scored() == [8] and last.num_scored() == [4]


def test_a_template_that_writes_earlier_turns_otherwise_is_refused_for_all_answers(tokenizer):
    tokenizer.chat_template = THINKS  # the last answer alone gets a thought
    with pytest.raises(RecordError, match=r"^f:1: .*data\.train_on=last_assistant"):
        sft_one({"messages": TURNS}, ALL, tokenizer)
    tokenizer.chat_template = DROPS_THOUGHTS  # whatever follows, so that nothing changes later
    assert sft_one({"messages": TURNS}, ALL, tokenizer).group.num_scored() == [8]


def test_all_answers_are_of_one_response(tokenizer):
    with pytest.raises(RecordError, match="wants records of messages"):
        sft_one({"prompt": "a", "responses": ["b", "c"], "scores": [0, 1]}, ALL, tokenizer)


def test_which_tokens_are_scored_survives_cutting_the_table_and_the_key(tokenizer):
    long = sft_one({"messages": TURNS}, ALL, tokenizer)
    cut = sft_one({"messages": TURNS}, ALL | dict(max_response_len=6), tokenizer)
    assert cut.group.scored[0].tolist() == long.group.scored[0][:6].tolist()
    again = table_of([cut, long])
    for i, example in enumerate((cut, long)):
        np.testing.assert_array_equal(again[i].group.scored[0], example.group.scored[0])
    plain = dataclasses.replace(long, group=long.group._replace(scored=None))
    assert len(set(table_of([long, plain]).entries["key"].tolist())) == 2


def packed(tokenizer, config, num_records=5):
    """Returns a packed batch of conversations of different lengths, and their groups."""
    config = data_config(**config, batch_size=num_records, row_len=128, rows=1)
    encoder = make_encoder(config, tokenizer, least_responses=1)
    examples = [
        encoder.record(
            f"f:{i}",
            {"messages": [*TURNS[:3], {"role": "assistant", "content": "x" * (1 + 3 * i)}]},
        )
        for i in range(num_records)
    ]
    dataset = Dataset([table_of(examples)], config, seed=0)
    return config, dataset.batch_at(0).batch, [example.group for example in examples]


def test_packed_log_probabilities_are_those_of_the_scored_tokens_alone(tokenizer):
    config, batch, groups = packed(tokenizer, ALL | dict(shuffle=False))
    model = Model(dataclasses.replace(MODELS["tiny"], vocab_size=400))
    params = model.init(jax.random.key(0))
    run = parse_flags(["x", "--config=configs/sft.py:files=x,model=tiny"])[
        0
    ].copy_and_resolve_references()
    with run.unlocked():
        run.data.block, run.loss.logits_chunk = config.block, 16
    found = jax.jit(make_step_logps(model, run))(params, batch)[:, 0]
    texts = [np.concatenate([group.prompt, *group.responses]) for group in groups]
    ids = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for b, text in enumerate(texts):
        ids[b, : len(text)] = text
    place = jnp.arange(ids.shape[1])
    distance = (place[:, None] - place[None])[None]
    attends = model.over_prompts(distance >= 0, distance)
    positions = jnp.broadcast_to(place[None], ids.shape)
    hidden, _ = model.hidden(params, ids, positions, attends)
    logps = jax.nn.log_softmax(model.logits(params, hidden))
    for b, group in enumerate(groups):
        at = len(group.prompt) + np.flatnonzero(group.scored[0])
        np.testing.assert_allclose(found[b], logps[b, at - 1, ids[b, at]].sum(), rtol=1e-5)
        assert batch.lengths[b, 0] == len(at)


def test_reduce_tokens_is_a_mean_over_the_tokens_of_the_step():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, (6, 1))
    logps = jnp.asarray(-rng.random((6, 1)) * lengths)
    zeros, mask = jnp.zeros((6, 1)), jnp.arange(6)[:, None] < 5
    given = Responses(logps, zeros, jnp.asarray(lengths), zeros, mask)
    loss = LOSSES["likelihood"]
    fields = loss.defaults(per_token=True, reduce="tokens")
    weights = jnp.where(mask[:, 0], loss.weight(given, fields), 0)
    found = jnp.sum(weights * loss.per_prompt(given, fields)) / jnp.sum(weights)
    np.testing.assert_allclose(found, -logps[:5].sum() / lengths[:5].sum(), rtol=1e-6)
    np.testing.assert_array_equal(num_tokens(given, fields)[:5], lengths[:5, 0])


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--config.data.num_responses=2", "with one response"),
        ("--config.loss.per_token=False", "config.loss.per_token=True"),
        ("--config.checkpoint.best_metric=accuracy", "there is one a prompt"),
    ],
)
def test_what_one_response_has_no_use_for_is_refused(flag, said):
    config = "--config=configs/sft.py:files=x,model=tiny,train_on=all_assistant"
    with pytest.raises(UserError, match=said):
        parse_flags(["x", config, flag])


@pytest.mark.slow
def test_nca_goes_on_from_a_fine_tuned_checkpoint_in_two_commands(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    records = [{"prompt": f"Say {i}:", "response": "sun " * (1 + i % 4)} for i in range(24)]
    rows.write_text("".join(json.dumps(record) + "\n" for record in records))
    arg = f"--config=configs/sft.py:files={rows},smoke"
    more = ["--config.data.eval_fraction=0.2", "--config.optim.lr=1e-3", "--config.data.rows=8"]
    sft, folder = tmp_path / "sft", tmp_path / "folder"
    assert train.main(["train", arg, *more, f"--workdir={sft}"]) == 0
    first, *_, last = metric_lines(sft, "eval")
    assert last["perplexity"] < first["perplexity"] and "accuracy" not in last
    np.testing.assert_allclose(np.exp(last["loss"]), last["perplexity"], rtol=1e-5)
    assert export.main(["export", f"--workdir={sft}", f"--out={folder}"]) == 0
    scored = tmp_path / "scored.jsonl"
    lines = [
        {"prompt": f"Say {i}:", "responses": ["sun", "moon"], "scores": [1, 0]} for i in range(9)
    ]
    scored.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arg = f"--config=configs/jsonl.py:files={scored},algo=nca,k=2,smoke"
    flags = [f"--config.model.init_from={folder}", "--config.model.name=", "--config.steps=2"]
    flags += ["--config.eval_every=0", "--config.data.eval_fraction=0", "--config.data.rows=8"]
    assert train.main(["train", arg, *flags, f"--workdir={tmp_path / 'nca'}"]) == 0
    assert metric_lines(tmp_path / "nca", "train")[0]["start_loss"] == pytest.approx(2 * np.log(2))
