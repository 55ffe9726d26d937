"""Lanes that are refilled: what a prompt gets does not depend on its company, and ends in time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lora import random_adapters
from test_nf4 import quantised

from nca_jax.data.group import Group
from nca_jax.data.pack import RowLayout, pack
from nca_jax.data.plan import causal_bound
from nca_jax.infra.optim import merge_trained
from nca_jax.logprobs import sequence_logps
from nca_jax.model_config import MODELS, LayerKind
from nca_jax.models.decoder import Model
from nca_jax.models.formats.pretrained import load_tokenizer
from nca_jax.models.lora import Lora
from nca_jax.sampling import refill
from nca_jax.sampling.draw import How, allowed, draw
from nca_jax.sampling.sampler import make_sampler
from nca_jax.sampling.stops import stop_at

KINDS = dict(num_layers=3, kinds=(LayerKind(5), LayerKind(rope=None)), attn_cap=2.0, logit_cap=3.0)
LENGTHS = (70, 3, 9, 66, 1, 20, 5, 12, 2, 40)
NEW = 11
ENDS = tuple(range(3, MODELS["tiny"].vocab_size, 9))  # some sample has one every few tokens


def tiny(**changes) -> tuple[Model, dict]:
    """A model whose greedy tokens vary: random weights, made a few times larger."""
    model = Model(dataclasses.replace(MODELS["tiny"], **changes))
    params = model.init(jax.random.key(0))
    return model, jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, params)


def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 259, length).astype(np.int32) for length in LENGTHS]


def refilled(
    model: Model, params: dict, how: How, *, num_lanes=3, at_once=1, start=0, stop=None, ends=ENDS
) -> list[list[refill.Sampled]]:
    """Returns the batches of `sample_batches`, two samples of each prompt."""
    sampler = make_sampler(
        model, num_samples=2, max_new_tokens=NEW, how=how, eos_ids=ends, logps=True
    )
    programs = refill.Programs(
        empty=lambda width: sampler.empty(num_lanes, width),
        resize=jax.jit(sampler.resize, static_argnums=1),
        prefill=jax.jit(sampler.prefill),
        decode=jax.jit(sampler.decode),
        put=jnp.asarray,
        num_lanes=num_lanes,
        num_samples=2,
        at_once=at_once,
    )
    return list(refill.sample_batches(programs, params, prompts(), 5, start, stop))


def ids_of(batches) -> list[list[list[int]]]:
    return [[ids.tolist() for ids in sampled.ids] for batch in batches for sampled in batch]


def greedy_and_logps(model: Model, params: dict, batches) -> set[int]:
    """Asserts that samples are greedy and their logps those of one dense forward; their sizes."""

    @jax.jit
    def dense(params, ids):
        place = jnp.arange(len(ids))
        distance = (place[:, None] - place[None])[None]
        attends = model.over_prompts(distance >= 0, distance)
        hidden, _ = model.hidden(params, ids[None], place[None], attends)
        return jax.nn.log_softmax(model.logits(params, hidden)[0])

    sizes, found = set(), [sampled for batch in batches for sampled in batch]
    for prompt, sampled in zip(prompts(), found, strict=True):
        for ids, logps in zip(sampled.ids, sampled.logps, strict=True):
            whole = np.pad([*prompt, *ids], (0, 96 - len(prompt) - len(ids)))
            want = np.asarray(dense(params, whole))[len(prompt) - 1 :][: len(ids)]
            assert ids.tolist() == want.argmax(axis=1).tolist()
            np.testing.assert_allclose(logps, want.max(axis=1), atol=1e-4)
            assert not set(ids[:-1].tolist()) & set(ENDS)
            assert len(ids) == NEW or ids[-1] in ENDS
            sizes.add(len(ids))
    return sizes


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(dict(), marks=pytest.mark.slow, id="one kind"),
        pytest.param(KINDS, id="windows"),
    ],
)
def test_greedy_samples_of_refilled_lanes_are_those_of_a_dense_forward(changes):
    model, params = tiny(**changes)
    sizes = greedy_and_logps(model, params, refilled(model, params, How(0.0)))
    assert len(sizes) > 2  # lanes ended apart


@pytest.mark.slow
def test_adapters_over_a_base_in_4_bits_are_sampled_as_a_dense_forward_has_them():
    config = MODELS["tiny"]
    _, base = quantised(config)
    model = Model(config, Lora(2, 4.0, ("q", "down")))
    adapters = random_adapters(jax.jit(model.init_adapters)(jax.random.key(1), base))
    params = merge_trained(adapters, base)
    greedy_and_logps(model, params, refilled(model, params, How(0.0)))


def test_samples_do_not_depend_on_lanes_prompts_at_once_or_where_a_command_goes_on():
    model, params = tiny()
    want = ids_of(refilled(model, params, How()))
    assert want[1][0] != want[1][1]
    assert ids_of(refilled(model, params, How(), num_lanes=10, at_once=4)) == want
    batches = refilled(model, params, How(), num_lanes=4, start=2)
    assert [*map(len, batches)] == [4, 4] and ids_of(batches) == want[2:]


@pytest.mark.slow
def test_the_log_probabilities_of_a_sample_sum_to_those_that_training_has_whatever_it_is_drawn_by():
    model, params = tiny()
    batches = refilled(model, params, How(0.7, top_k=20, top_p=0.9, min_p=0.01))
    samples = [sampled for batch in batches for sampled in batch]
    groups = [Group(ids, x.ids) for ids, x in zip(prompts(), samples, strict=True)]
    layout = RowLayout(row_len=96, rows=8, block=16, num_pairs=causal_bound(96, 16), align=1)
    slots = [range(2 * b, 2 * b + 2) for b in range(len(groups))]
    rows, _, _ = pack(groups, layout, slots=slots, num_slots=2 * len(groups), num_micro=1)
    rows = jax.tree.map(lambda x: jnp.asarray(x)[0], rows)
    shape = (len(groups), 2)
    want = jax.jit(
        lambda rows: sequence_logps(model, params, rows, shape=shape, block=16, chunk=32)
    )(rows)
    found = [[logps.sum() for logps in sampled.logps] for sampled in samples]
    np.testing.assert_allclose(found, want, atol=1e-3)


@pytest.mark.slow
def test_a_stop_string_ends_a_sample_at_the_token_that_completes_it_across_tokens():
    model, params = tiny()
    tokenizer = load_tokenizer("byte")
    free = ids_of(refilled(model, params, How(), ends=()))
    stops = [tokenizer.decode(free[0][0][3:6]), tokenizer.decode(free[4][1][7:9])]
    stop = stop_at(["", *stops], tokenizer.decode)
    found = ids_of(refilled(model, params, How(), stop=stop, ends=()))
    for wanted, of_prompt in zip(free, found, strict=True):
        for whole, ids in zip(wanted, of_prompt, strict=True):
            ended = [
                n
                for n in range(1, NEW + 1)
                if any(stop in tokenizer.decode(whole[:n]) for stop in stops)
            ]
            assert ids == whole[: ended[0] if ended else NEW]
    assert len(found[0][0]) < NEW
    assert stop_at([""], tokenizer.decode) is None


def test_top_k_top_p_and_min_p_leave_the_tokens_that_they_say():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.05, 0.3, 0.15]]))

    def left(how: How) -> list[int]:
        return np.flatnonzero(np.isfinite(allowed(logits, how)[0])).tolist()

    assert left(How()) == left(How(top_k=9)) == [0, 1, 2, 3, 4]
    assert left(How(top_k=2)) == [1, 3]
    assert left(How(top_p=0.69)) == [1, 3] and left(How(top_p=0.71)) == [1, 3, 4]
    # Of the three likeliest the first two have 0.7 / 0.85.
    assert left(How(top_k=3, top_p=0.82)) == [1, 3] and left(How(top_k=3, top_p=0.83)) == [1, 3, 4]
    assert left(How(min_p=0.3)) == [1, 3, 4] and left(How(min_p=0.5)) == [1, 3]
    # At temperature 1/2 the shares are squared.
    assert left(How(0.5, min_p=0.3)) == [1, 3]


def test_draws_have_the_shares_of_the_logits_in_any_group_and_never_a_token_that_may_not_come():
    rng, num = np.random.default_rng(0), 20_000
    logits = rng.normal(size=1000).astype(np.float32)  # not a multiple of the groups
    logits[rng.choice(1000, 900, replace=False)] = -np.inf  # whole groups have none
    keys = jax.random.split(jax.random.key(0), num)
    rows = jnp.broadcast_to(logits, (num, 1000))
    drawn = np.bincount(jax.jit(draw, static_argnums=2)(rows, keys, How()), minlength=1000) / num
    probs = np.exp(logits) / np.exp(logits).sum()
    # Five standard deviations of a binomial frequency.
    assert (np.abs(drawn - probs) <= 5 * np.sqrt(probs * (1 - probs) / num)).all()
