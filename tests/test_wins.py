"""Who wins: by a judge in both orders, by subset, and at equal lengths."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import write

from nca_jax import evaluate, wins
from nca_jax.checks import UserError
from nca_jax.data.encode import Example
from nca_jax.data.group import Group
from nca_jax.evaluators import Heldout
from nca_jax.flags import parse_flags
from nca_jax.losses import Responses
from nca_jax.rewards.judge import win_shares

LONGER = (
    "import json, sys\n"
    "for line in sys.stdin:\n"
    "    pair = json.loads(line)\n"
    "    assert set(pair) == {'prompt', 'a', 'b'}\n"
    "    a, b = len(pair['a']), len(pair['b'])\n"
    "    print(json.dumps({'winner': 'tie' if a == b else 'ab'[a < b]}))\n"
)


def judge(tmp_path, program: str) -> str:
    (tmp_path / "judge.py").write_text(program)
    return f"{sys.executable} {tmp_path / 'judge.py'}"


def example(subset: str, n: int = 2) -> Example:
    ids = np.array([3], np.int32)
    record = {"prompt": "p", "subset": subset}
    return Example("f:1", Group(ids, [ids] * n), np.arange(n, 0, -1.0), record, 0.5, 3, 0)


def heldout(logps, lengths, mask=None) -> Heldout:
    """Pairs, the better one first, under a reference of 0."""
    logps = jnp.asarray(logps, jnp.float32)
    scores = jnp.broadcast_to(jnp.arange(logps.shape[1], 0, -1.0), logps.shape)
    mask = jnp.ones(logps.shape, bool) if mask is None else jnp.asarray(mask)
    found = Responses(logps, jnp.zeros_like(logps), jnp.asarray(lengths), scores, mask)
    return Heldout(found, has_reference=True)


@pytest.fixture(scope="module")
def config():
    return parse_flags(["x", "--config=configs/jsonl.py:files=none,smoke"])[0]


# A judge


def test_a_judge_is_asked_in_both_orders_so_that_one_who_prefers_a_place_gives_halves(tmp_path):
    first = judge(tmp_path, LONGER.replace("'tie' if a == b else 'ab'[a < b]", "'a'"))
    assert win_shares(first, ["p"] * 2, ["x", "y"], ["z", "w"]).tolist() == [0.5, 0.5]
    longer = judge(tmp_path, LONGER)
    found = win_shares(longer, ["p", [], "r"], ["long", "a", "é\u2028"], ["x", "bb", "yy"])
    assert found.tolist() == [1, 0, 0.5]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit('no key')", "stopped with status 1: no key"),
        ('print(\'{"winner": "A"}\\n{}\')', 'as line 1; wanted {"winner": "a", "b" or "tie"}'),
        ("print(1)", "wrote 1 lines for 2 pairs"),
    ],
)
def test_a_judge_that_fails_or_names_no_winner_is_named(tmp_path, program, said):
    with pytest.raises(UserError) as error:
        win_shares(judge(tmp_path, program), ["p"], ["x"], ["y"])
    assert said in str(error.value) and "The judge " in str(error.value)


# Subsets


def test_the_best_wins_by_its_implicit_reward_and_absent_responses_are_no_pairs(config):
    mask = [[True, True, True], [True, True, False]]
    given = heldout([[3, 2, 3], [1, 2, 0]], [[9, 4, 9], [3, 5, 0]], mask)
    found, longer = wins.wins_of_best(given, config)
    np.testing.assert_array_equal(found, [[1, 0.5], [0, np.nan]])
    np.testing.assert_array_equal(longer, [[5, 0], [-2, np.nan]])


@pytest.mark.torch
def test_accuracy_is_by_subset_and_its_mean_is_over_subsets(config):
    pytest.importorskip("sklearn")
    examples = [example(name) for name in ("chat", "chat", "chat", "code")]
    given = heldout([[1, 0], [1, 0], [0, 1], [0, 1]], [[2, 3], [3, 2], [2, 2], [4, 1]])
    found, sizes = wins.accuracy_by_subset("subset", examples, given, config)
    assert sizes == {"accuracy/chat": 3, "accuracy/code": 1}
    assert found["accuracy/chat"] == pytest.approx(2 / 3)
    assert found["accuracy/code"] == 0 and "accuracy/code_se" not in found
    assert found["accuracy/mean"] == pytest.approx(1 / 3)
    assert 0 < found["accuracy_length_controlled"] < 1


def test_a_record_of_no_subset_or_of_one_response_is_refused_by_its_place():
    with pytest.raises(UserError, match="f:1: has no 'section' to be counted by"):
        wins.check_subset("section", [example("chat")])
    with pytest.raises(UserError, match="f:1: has one response"):
        wins.check_subset("subset", [example("chat", n=1)])


# Length


@pytest.mark.torch
def test_wins_by_length_alone_are_a_half_at_equal_lengths():
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    longer = rng.normal(60, 40, (4000, 1))  # mostly longer
    chance = 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std())))
    won = (rng.random(longer.shape) < chance) * 1.0
    found = wins.with_length_controlled("win_rate", won, longer)
    assert found["win_rate"] > 0.65
    error = found["win_rate_length_controlled_se"]
    assert abs(found["win_rate_length_controlled"] - 0.5) < 3 * error < 0.06


@pytest.mark.torch
def test_the_fit_has_no_penalty_and_its_error_counts_prompts():
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(1)
    longer = rng.normal(5, 9, (60, 1))
    won = rng.choice([0, 0.25, 0.5, 1], (60, 1), p=[0.2, 0.1, 0.2, 0.5])
    name = "w"
    found = wins.length_controlled(name, won, longer)
    # The maximum of the likelihood: the residuals are orthogonal to both columns.
    x = np.stack([np.ones(60), np.tanh(longer[:, 0] / longer.std())], axis=1)
    intercept = np.log(found[name] / (1 - found[name]))
    slopes = np.linspace(-5, 5, 200001)
    residual = won[:, 0] - 1 / (1 + np.exp(-(intercept + np.outer(slopes, x[:, 1]))))
    assert np.abs(np.stack([residual.sum(1), residual @ x[:, 1]])).max(axis=0).min() < 1e-3
    # Each prompt asked twice says no more than once.
    twice = wins.length_controlled(name, np.repeat(won, 2, 1), np.repeat(longer, 2, 1))
    assert twice == pytest.approx(found, rel=1e-5)


def test_where_lengths_are_equal_or_all_is_won_there_is_nothing_to_control():
    won, longer = np.array([[1.0], [0.0], [1.0]]), np.array([[1.0], [2.0], [3.0]])
    assert wins.length_controlled("w", won, np.ones((3, 1)))["w"] == pytest.approx(2 / 3)
    assert wins.length_controlled("w", np.ones((3, 1)), longer) == {"w": 1, "w_se": 0}


# The command


@pytest.mark.torch
def test_evaluate_says_win_rate_and_accuracy_by_subset_and_asks_for_what_they_want(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("sklearn")
    pairs = [
        {"prompt": f"Say {i}", "chosen": "a" * (1 + i % 3), "rejected": "bb"}
        | {"subset": "even" if i % 2 == 0 else "odd"}
        for i in range(6)
    ]
    rows = write(tmp_path / "rows.jsonl", [x | {"prompt": x["prompt"] + "."} for x in pairs])
    heldout = write(tmp_path / "rewardbench.jsonl", pairs)
    argv = ["evaluate", f"--config=configs/jsonl.py:files={rows},smoke,k=2", "--num_prompts=4"]
    argv += ["--config.data.rows=8", f"--config.data.eval_files=bench={heldout}"]
    argv += ["--config.data.eval_fraction=0", "--config.generate.max_new_tokens=3"]
    argv += [f"--out={tmp_path / 'e.json'}", f"--judge_command={judge(tmp_path, LONGER)}"]
    with pytest.raises(UserError, match="has no 'section' to be counted by"):
        evaluate.main([*argv, "--subset=section"])
    evaluate.main([*argv, "--subset=subset"])
    metrics = json.loads((tmp_path / "e.json").read_text())["metrics"]
    # An untrained policy is its reference: all is tied.
    assert metrics["bench/accuracy/even"] == metrics["bench/accuracy/odd"] == 0.5
    assert metrics["bench/accuracy/mean"] == metrics["bench/accuracy_length_controlled"] == 0.5
    assert metrics["win_rate"] == metrics["win_rate_length_controlled"] == 0.5
    said = capsys.readouterr().out
    assert "bench/accuracy/even              0.5000" in said and "win_rate  " in said
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError):
        evaluate.main(argv)
