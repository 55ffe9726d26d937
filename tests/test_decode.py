"""Sampling with a cache is the model without one; evaluation of samples does what it says."""

import dataclasses
import functools
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import write_records
from drawn import sampler_of

from nca_jax import evaluate, evaluators, generate
from nca_jax.data.group import Group
from nca_jax.data.pack import RowLayout
from nca_jax.data.plan import causal_bound
from nca_jax.evaluators import make_kl, repetition, score_responses, text_perplexity
from nca_jax.infra.mesh import make_mesh
from nca_jax.logprobs import sequence_logps
from nca_jax.model_config import MODELS, LayerKind
from nca_jax.models.decoder import Model
from nca_jax.models.formats.pretrained import load_tokenizer
from nca_jax.rollout import Response, read_response

LENGTHS = np.array([9, 4, 1], np.int32)
LAYOUT = RowLayout(row_len=64, rows=8, block=16, num_pairs=causal_bound(64, 16), align=1)


def tiny(**changes) -> tuple[Model, dict]:
    """A model whose greedy tokens vary: random weights, made a few times larger."""
    model = Model(dataclasses.replace(MODELS["tiny"], **changes))
    params = model.init(jax.random.key(0))
    return model, jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, params)


def prompts() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 259, (len(LENGTHS), 9)).astype(np.int32)


def sampler(model, *, num_samples=2, max_new_tokens=6, **how):
    """Returns `sample(...) -> (tokens [N, S, T], sizes [N, S])`."""
    sample = sampler_of(model, num_samples=num_samples, max_new_tokens=max_new_tokens, **how)
    return lambda *args: sample(*args)[:2]


def keys(seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), len(LENGTHS))


@functools.partial(jax.jit, static_argnums=0)
def dense_logits(model: Model, params: dict, ids: jax.Array, key_on: jax.Array) -> jax.Array:
    """[T] int32, [T] bool -> [T, V]: one dense causal forward, no earlier state."""
    place = jnp.arange(len(ids))
    distance = (place[:, None] - place[None])[None]
    attends = model.over_prompts((distance >= 0) & key_on[None, None], distance)
    hidden, _ = model.hidden(params, ids[None], place[None], attends)
    return model.logits(params, hidden)[0]


def uncached_logits(model: Model, params: dict, ids: list[int], key_on=True) -> np.ndarray:
    """[T, V] of T ids; `key_on` [T] as in Rows."""
    fill = (0, -len(ids) % 16)  # few shapes; no earlier token sees what fills it up
    on = np.pad(np.broadcast_to(key_on, len(ids)), fill)
    return np.asarray(dense_logits(model, params, np.pad(np.int32(ids), fill), on))[: len(ids)]


# Three layers of two kinds.
KINDS = dict(num_layers=3, kinds=(LayerKind(5), LayerKind(rope=None)), attn_cap=2.0, logit_cap=3.0)


@pytest.mark.parametrize("changes", [dict(), KINDS, dict(tied_head=True)], ids=str)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_greedy_tokens_are_those_of_an_uncached_forward(changes, scan_layers):
    model, params = tiny(**changes)
    model = dataclasses.replace(model, scan_layers=scan_layers)
    tokens, sizes = sampler(model)(params, prompts(), LENGTHS, keys())
    for n, length in enumerate(LENGTHS):
        ids = prompts()[n, :length].tolist()
        for _ in range(6):
            ids.append(int(np.argmax(uncached_logits(model, params, ids)[-1])))
        for s in range(2):
            assert tokens[n, s].tolist() == ids[length:]
    assert sizes.tolist() == [[6, 6]] * 3


def test_nothing_attends_to_a_prompt_token_that_is_switched_off_as_a_key():
    model, params = tiny()
    off = (int(prompts()[0, 0]), int(prompts()[0, 4]), int(prompts()[1, 3]))
    tokens, _ = sampler(model, num_samples=1, key_off_ids=off)(params, prompts(), LENGTHS, keys())
    free, _ = sampler(model, num_samples=1)(params, prompts(), LENGTHS, keys())
    assert (tokens != free).any()
    for n, length in enumerate(LENGTHS):
        ids = prompts()[n, :length].tolist()
        for _ in range(6):
            on = np.array([i >= length or token not in off for i, token in enumerate(ids)])
            ids.append(int(np.argmax(uncached_logits(model, params, ids, on)[-1])))
        assert tokens[n, 0].tolist() == ids[length:]


def test_a_sample_ends_with_any_end_of_turn_token_and_counts_it():
    model, params = tiny()
    free, _ = sampler(model, num_samples=1)(params, prompts(), LENGTHS, keys())
    ends = (int(free[0, 0, 2]), int(free[1, 0, 4]))
    tokens, sizes = sampler(model, num_samples=1, eos_ids=ends)(params, prompts(), LENGTHS, keys())
    for n in range(3):
        whole = free[n, 0].tolist()
        stops = [t for t, token in enumerate(whole) if token in ends]
        size = stops[0] + 1 if stops else 6
        assert sizes[n, 0] == size
        assert tokens[n, 0].tolist() == whole[:size] + [0] * (6 - size)


def test_what_is_drawn_for_a_prompt_does_not_depend_on_its_batch():
    model, params = tiny()
    draw = sampler(model, temperature=1.0)
    together, _ = draw(params, prompts(), LENGTHS, keys())
    for n in range(3):
        alone, _ = draw(params, prompts()[n : n + 1], LENGTHS[n : n + 1], keys()[n : n + 1])
        np.testing.assert_array_equal(alone[0], together[n])
    assert (together[:, 0] != together[:, 1]).any()


def test_samples_follow_the_model_and_top_p_cuts_its_tail():
    model, params = tiny()
    prompt = prompts()[:1]
    probs = jax.nn.softmax(uncached_logits(model, params, prompt[0].tolist())[-1])
    num = 4000

    def frequencies(top_p: float) -> np.ndarray:
        draw = sampler(model, num_samples=num, temperature=1.0, top_p=top_p, max_new_tokens=1)
        tokens, _ = draw(params, prompt, LENGTHS[:1], keys()[:1])
        return np.bincount(np.asarray(tokens).reshape(-1), minlength=len(probs)) / num

    # Five standard deviations of a binomial frequency.
    spread = 5 * np.sqrt(np.asarray(probs) / num) + 1e-3
    assert (np.abs(frequencies(1.0) - probs) < spread).all()
    best_first = np.argsort(-probs)
    kept = best_first[: int(np.searchsorted(np.cumsum(probs[best_first]), 0.5)) + 1]
    assert set(np.flatnonzero(frequencies(0.5))) <= set(kept.tolist())


def test_kl_of_equal_policies_is_zero_and_its_estimate_is_the_exact_kl():
    model, params = tiny()
    other = jax.tree.map(lambda x: x * 1.05, params)
    num, prompt = 4000, prompts()[0].tolist()
    draw = sampler(model, num_samples=num, temperature=1.0, max_new_tokens=1)
    tokens, _ = draw(params, prompts()[:1], LENGTHS[:1], keys()[:1])
    kl = jax.jit(make_kl(model, num_slots=1024, block=16, chunk=16))
    mesh = make_mesh({"data": -1, "fsdp": 1, "tensor": 1, "expert": 1})

    def estimate(reference) -> np.ndarray:
        groups = [Group(prompt, [[int(t)] for t in np.asarray(tokens).reshape(-1)])]
        return score_responses(
            lambda rows: kl(params, reference, rows),
            groups,
            LAYOUT,
            num_slots=1024,
            mesh=mesh,
        )

    assert (estimate(params) == 0).all()
    p = jax.nn.log_softmax(uncached_logits(model, params, prompt)[-1].astype(np.float64))
    q = jax.nn.log_softmax(uncached_logits(model, other, prompt)[-1].astype(np.float64))
    exact = float(np.sum(np.exp(p) * (p - q), where=np.exp(p) > 0))
    values = estimate(other)
    assert values.shape == (num,) and (values >= 0).all()
    assert np.mean(values) == pytest.approx(exact, abs=5 * float(np.std(values)) / math.sqrt(num))


def test_scores_of_responses_come_in_order_however_they_are_packed():
    model, params = tiny()
    rng = np.random.default_rng(1)
    groups = [
        Group(rng.integers(3, 259, 5).tolist(), [rng.integers(3, 259, n).tolist() for n in sizes])
        for sizes in ((3, 20, 25), (7,), (30, 1, 2, 9))
    ]
    # Of the last group, three keys in four are on.
    sizes = [5, *map(len, groups[-1].responses)]
    on_prompt, *on_responses = (rng.random(size) < 0.75 for size in sizes)
    groups[-1] = groups[-1]._replace(key_on=(on_prompt, on_responses))
    mesh = make_mesh({"data": -1, "fsdp": 1, "tensor": 1, "expert": 1})

    @jax.jit
    def logps(rows):
        return sequence_logps(model, params, rows, shape=(1, 4), block=16, chunk=16)[0]

    got = score_responses(logps, groups, LAYOUT, num_slots=4, mesh=mesh)
    want = []
    for prompt, responses, key_on, _ in groups:
        for k, response in enumerate(responses):
            on = True if key_on is None else np.concatenate([key_on[0], key_on[1][k]])
            logits = uncached_logits(model, params, [*prompt, *response], on)
            all_logps = jax.nn.log_softmax(logits)
            places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
            want.append(sum(float(all_logps[t, x]) for t, x in zip(places, response, strict=True)))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_length_and_repetition_are_means_over_responses():
    responses = [[1, 2, 3, 1, 2, 3, 1], [1, 2], [4, 4, 4, 4, 4]]
    assert evaluators.length(responses) == pytest.approx(14 / 3)
    # 123 231 312 123 231: 2 of 5 said before; none; 444 444 444: 2 of 3.
    assert repetition(responses) == pytest.approx((2 / 5 + 0 + 2 / 3) / 3)


def test_perplexity_is_that_of_a_token_after_the_first_of_each_text():
    logps = np.array([-2 * math.log(8), -math.log(2)])
    got = text_perplexity(logps, [[1, 2, 3], [4, 5]])
    assert got == pytest.approx(math.exp((2 * math.log(8) + math.log(2)) / 3))


def test_a_sample_is_finished_by_its_end_of_turn_token_or_the_stop_string_which_leaves_no_ids():
    tokenizer = load_tokenizer("byte")
    ids = tokenizer("one. two. three", add_special_tokens=False)["input_ids"]

    def read(ids: list[int], stop: str) -> Response:
        config = SimpleNamespace(generate=SimpleNamespace(stop=stop))
        run = SimpleNamespace(config=config, tokenizer=tokenizer, eos_ids=(1,), turn=None)
        return read_response(run, np.array(ids))

    for stop in ("", "four"):
        assert read([*ids, 1], stop) == ("one. two. three", [*ids, 1], True)
        assert read(ids, stop) == ("one. two. three", ids, False)
    for sampled in (ids, [*ids, 1]):
        assert read(sampled, ". ") == ("one", None, True)
    assert read([1], "") == ("", [1], True)


@pytest.mark.slow
def test_generate_writes_rows_that_train_reads_and_evaluate_writes_its_metrics(tmp_path):
    rows = write_records(tmp_path / "rows.jsonl")
    config = (
        f"--config=configs/jsonl.py:files={rows},smoke",
        "--config.data.rows=8",
        "--config.generate.num_samples=2",
        "--config.generate.max_new_tokens=5",
        "--config.data.eval_fraction=0.2",
    )
    out = tmp_path / "out.jsonl"
    generate.main(["generate", *config, f"--prompts={rows}", f"--out={out}"])
    written = [json.loads(line) for line in out.read_text().splitlines()]
    prompts = [json.loads(line)["prompt"] for line in rows.read_text().splitlines()]
    assert [row["prompt"] for row in written] == prompts
    assert all(len(row["responses"]) == 2 for row in written)
    assert all("scores" not in row for row in written)  # those of the responses before

    (tmp_path / "plain.txt").write_text("One two\nthree.\n\nFour five.\n")
    flags = (f"--text={tmp_path / 'plain.txt'}", "--judge=length", "--num_prompts=3")
    evaluate.main(["evaluate", *config, f"--out={tmp_path / 'eval.json'}", *flags])
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["metrics"]["loss"] == pytest.approx(2 * math.log(2), abs=1e-5)
    assert result["metrics"]["kl"] == pytest.approx(0, abs=1e-5)
    metrics = result["metrics"]
    words = [len(text.split()) for row in result["samples"] for text in row["policy"]]
    assert metrics["judge"] == metrics["judge_reference"] == pytest.approx(sum(words) / len(words))
    assert 1 <= metrics["length"] <= 5 and 0 <= metrics["repetition"] < 1
    assert (metrics["n"], metrics["judge_difference"]) == (3, 0)
    assert {"judge_se", "judge_difference_se", "kl_se", "length_se"} <= metrics.keys()
    assert metrics["n_heldout"] > 3
    assert metrics["accuracy_half_ties"] == 0.5 and metrics["accuracy_half_ties_se"] == 0
    assert metrics["text_perplexity"] == pytest.approx(metrics["text_perplexity_reference"])
    assert 50 < metrics["text_perplexity"] < 5000  # random weights on bytes
    assert len(result["samples"]) == 3
    assert all(row["policy"] == row["reference"] for row in result["samples"])
    by_prompt = result["by_prompt"]
    assert {"kl", "judge_reference", "accuracy", "length"} <= by_prompt.keys()
    assert len(by_prompt["kl"]) == 3 and len(by_prompt["accuracy"]) == metrics["n_heldout"]
    for name, values in by_prompt.items():
        assert np.mean(values) == pytest.approx(metrics[name], abs=1e-6)
