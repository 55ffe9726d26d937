"""Claims (b) to (f): what their rows, tables and second judge are made of; smoke runs of each."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import QUICK, ROOT

pytest.importorskip("matplotlib")
from experiments import results  # noqa: E402  (they plot)
from experiments.claims import (  # noqa: E402
    chosen,
    collect,
    judge,
    pairs,
    real,
    reasoning,
    responses,
    reward_model,
    rows,
    study,
    temperatures,
)
from nca_jax.checks import UserError  # noqa: E402
from nca_jax.files import whole_lines  # noqa: E402
from nca_jax.flops import needed_flops  # noqa: E402
from nca_jax.model_config import MODELS  # noqa: E402

ROW = {"prompt": "x", "responses": ["a", "b", "c", "d"], "scores": [0.1, 0.9, 0.1, 0.5]}


# Rows


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("best_worst", ["bc"]),
        ("best_each", ["bd", "ba", "bc"]),
        ("all", ["bd", "ba", "bc", "da", "dc"]),  # a and c are equal: no pair
    ],
)
def test_pairs_are_the_better_first_and_equal_scores_make_none(how, expected):
    made = rows.pairs(ROW, how)
    assert ["".join(pair["responses"]) for pair in made] == expected
    assert all(pair["scores"][0] > pair["scores"][1] for pair in made)
    assert rows.pairs(ROW | {"scores": [1.0] * 4}, how) == []


def test_seeds_train_on_other_rows_and_none_on_those_that_are_held_out():
    all_rows = [{"prompt": str(i)} for i in range(20)]
    heldout, training = rows.split_rows(all_rows, 4, 5, 3)
    parts = [[row["prompt"] for row in part] for part in (heldout, *training)]
    assert list(map(len, parts)) == [4, 5, 5, 5]
    assert len(set(sum(parts, []))) == 19
    assert rows.split_rows(all_rows, 4, 5, 1) == (heldout, training[:1])  # more seeds may follow
    with pytest.raises(UserError, match="4 seeds want 24 rows, and there are 20"):
        rows.split_rows(all_rows, 4, 5, 4)


def test_rows_that_runs_were_made_with_are_not_written_over(tmp_path):
    path = tmp_path / "rows/train-0.jsonl"
    rows.write_new(path, [ROW])
    rows.write_new(path, [ROW])
    with pytest.raises(UserError, match="holds other rows"):
        rows.write_new(path, [ROW, ROW])


def test_more_responses_hold_all_of_fewer_and_the_same_best():
    row = {"prompt": "x", "responses": list("abcdefgh"), "scores": [0, 1, 2, 9, 4, 5, 6, 7]}
    made = [responses.with_k(row, k, seed=0) for k in (2, 4, 8)]
    assert [len(x["responses"]) for x in made] == [2, 4, 8]
    assert all(x["responses"][0] == "d" and x["scores"][0] == 9 for x in made)
    assert set(made[0]["responses"]) < set(made[1]["responses"]) < set(made[2]["responses"])
    assert {x: row["scores"][row["responses"].index(x)] for x in made[1]["responses"]} == dict(
        zip(made[1]["responses"], made[1]["scores"], strict=True)
    )
    assert responses.with_k(row, 4, seed=1) != made[1]


def scored_rows(path, num: int, chars: int = 10) -> str:
    """Writes rows of ten answers of so many characters, as experiments/data makes them."""
    row = {"responses": ["x" * chars] * 10, "scores": [i / 10 for i in range(10)], "models": [""]}
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"prompt": f"say x {i}"} | row) + "\n" for i in range(num))
    return str(path)


def test_real_rows_are_the_short_ones_and_too_few_of_them_are_refused(tmp_path):
    wanted = real.NUM_HELDOUT + real.NUM_TRAIN
    found = real.read_short(Path(scored_rows(tmp_path / "a.gz", wanted)), wanted)
    assert len(found) == wanted and set(found[0]) == {"prompt", "responses", "scores"}
    with pytest.raises(UserError, match=f"has 0 rows.*wanted {wanted}"):
        real.read_short(Path(scored_rows(tmp_path / "b.gz", wanted, chars=real.MAX_CHARS)), wanted)
    with pytest.raises(UserError, match="is not there"):
        real.read_short(tmp_path / "c.gz", wanted)


def test_problems_of_rounds_differ_from_those_that_are_held_out():
    heldout = {row["prompt"] for row in reasoning.make_problems(reasoning.NUM_HELDOUT, -1)}
    rounds = [{x["prompt"] for x in reasoning.make_problems(64, seed)} for seed in (1, 2, 11)]
    assert len(heldout) == reasoning.NUM_HELDOUT and all(len(x) == 64 for x in rounds)
    assert not any(heldout & x for x in rounds) and rounds[0] != rounds[1] != rounds[2]


def test_the_checker_knows_the_answer_from_the_prompt_alone(monkeypatch, capsys):
    problem = reasoning.make_problems(1, 5)[0]
    a, b = sorted(map(int, re.findall(r"\d+", problem["prompt"])))
    assert problem["answer"] == b
    said = [f"{b}", f"It is {b}.", f"{a}", f"{b} is larger than {a}", ""]
    lines = [json.dumps({"prompt": problem["prompt"], "response": x}) + "\n" for x in said]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(lines)))
    assert reasoning.main(["reasoning", "--check"]) == 0
    got = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    assert got == [1, 1, 0, 0, 0]


def test_an_accuracy_is_naming_one_of_the_two_times_choosing_the_right_one():
    prompt = reasoning.PROBLEM.format(a=12, b=57)
    said = ["57", "It is 57.", "12", "neither", "575", "57 > 12.5"]
    samples = {"policy": {prompt: [(text, None) for text in said]}}
    assert reasoning.named(results.Run("nca", [], {}, samples)) == (3 / 6, 2 / 3)
    none = {"policy": {prompt: [("neither", None)]}}
    assert reasoning.named(results.Run("nca", [], {}, none)) == (0, None)
    assert reasoning.named(results.Run("nca", [], {}, {})) == (None, None)


def test_only_problems_with_right_and_wrong_answers_are_trained_on():
    made = [{"responses": ["a", "b"], "scores": x} for x in ([0, 0], [1, 1], [0, 1])]
    assert reasoning.teaching(made) == made[2:]
    made[2]["responses"][0] = " "  # which nobody can be trained on
    assert reasoning.teaching(made) == []


# Tables


def run_of(setting: str, seed: int, k: int = 4, steps: int = 4) -> results.Run:
    """A run whose log-ratio at rank k and step s is s - 10 k + seed."""
    ratios = [{f"logratio/{i}": s - 10 * i + seed for i in range(k)} for s in range(1, steps + 1)]
    lines = [
        {"step": s, "split": split, "needed_tokens": 100.0, "scored_tokens": 60.0, **ratios[s - 1]}
        for s in range(1, steps + 1)
        for split in ("train", "eval")
    ]
    metrics = {"reward": 0.5, "kl": 1.0 + seed, "length": 20.0, **ratios[-1]}
    metrics |= {"reward_reference": seed / 8, "length_reference": 25.0}
    return results.Run(setting, lines, metrics, {})


def test_best_and_worst_are_the_first_and_the_last_rank_whatever_k_is():
    for k in (2, 4):
        run = run_of("a", 0, k)
        assert chosen.worst(study.evaluated)(run) == 4 - 10 * (k - 1)
        assert chosen.held_out_margin(run) == 10 * (k - 1)


def test_the_last_half_is_the_mean_over_its_steps():
    assert study.last_half("logratio/0")(run_of("a", 0)) == 3.5
    assert study.last_half("logratio/0")(results.Run("a", [], {}, {})) is None


def test_a_table_has_means_over_the_seeds_that_are_there_and_a_row_of_the_reference():
    runs = [run_of("nca", seed) for seed in (0, 1)] + [results.Run("dpo", [], {}, {})]
    header, nca, dpo = study.table(runs, study.REWARD_COLUMNS)
    assert header[:5] == ["arm", "seeds", "reward", "gain", "KL, nats"]
    assert nca[:5] == ["nca", "2", "0.5 ± 0", "0.438 ± 0.088", "1.50 ± 0.71"]
    assert dpo == ["dpo", "0", *["-"] * 7]
    reference = study.reference_row(runs)
    assert reference[:5] == ["reference", "2", "0.062 ± 0.088", "0", "0"]
    assert len(reference) == len(header)


def test_operations_are_those_of_flops_but_for_attention():
    line = {"split": "train", "needed_tokens": 50.0 + 4 * 20, "scored_tokens": 4 * 20.0}
    counted = study.train_flops(results.Run("a", [line, line], {}, {}))
    needed = needed_flops(MODELS["smollm2_135m"], 50, [20] * 4)
    assert counted == 2 * (needed.trunk + needed.head)


def test_pairs_at_equal_operations_take_fewer_steps():
    steps = {arm.name: arm.changes["steps"] for arm in pairs.ARMS}
    assert steps["nca"] == steps["dpo-all-pairs"] == 24
    assert [steps[f"dpo-{x}-flops"] for x in ("best-worst", "best-each", "all-pairs")] == [
        36,
        12,
        6,
    ]


def test_every_claim_draws_what_it_has(tmp_path):
    for plot, names in (
        (chosen.plot, [arm.name for arm in chosen.ARMS]),
        (temperatures.plot, [arm.name for arm in temperatures.make_arms()]),
    ):
        plot(tmp_path / "x.png", [run_of(name, seed) for name in names for seed in (0, 1)])
        assert (tmp_path / "x.png").stat().st_size > 10_000
    (likelihoods, rewards) = chosen.tables([run_of(arm.name, 0) for arm in chosen.ARMS])
    assert likelihoods[1][:4] == ["nca", "1", "4", "-26"]
    assert [row[0] for row in rewards] == ["arm", "nca", "infonca", "dpo-best-worst", "reference"]


def test_the_evaluations_of_a_claim_are_gathered_a_line_a_run(tmp_path, capsys):
    for seed, reward in ((1, 0.1234567), (0, 2.0)):
        workdir = tmp_path / f"demo/nca/seed={seed}"
        workdir.mkdir(parents=True)
        content = {"metrics": {"reward": reward}, "samples": []}
        (workdir / "evaluation.json").write_text(json.dumps(content))
    out = tmp_path / "results.jsonl"
    assert collect.main(["collect", str(tmp_path / "demo"), f"--out={out}"]) == 0
    assert whole_lines(out) == [
        {"run": "demo/nca/seed=0", "metrics": {"reward": 2.0}},
        {"run": "demo/nca/seed=1", "metrics": {"reward": 0.123457}},
    ]
    with pytest.raises(UserError, match="holds no evaluation.json"):
        list(collect.evaluations([tmp_path / "other"]))


def test_what_a_rollout_says_of_each_response_goes_where_the_response_goes():
    row = {"prompt": "x", "responses": ["a", " ", "c"], "scores": [1, 2, 3], "prompt_ids": [7]}
    row |= {"response_ids": [[8], [9], None], "finished": [True, False, False]}
    kept = {"responses": ["a", "c"], "scores": [1, 3], "response_ids": [[8], None]}
    assert rows.without_empty(row) == row | kept | {"finished": [True, False]}


# The second judge


def test_the_judge_is_the_ridge_regression_of_its_formula():
    texts = ["good film", "bad film", "good good plot", "bad plot"] * judge.MIN_TEXTS
    ratings = np.array([2.0, -2.0, 3.0, -1.0] * judge.MIN_TEXTS)
    learned = judge.fit(texts, ratings, ridge=0.5)
    known = sorted(learned["word"])
    assert known == ["bad", "film", "good", "plot"]
    x = np.array([[judge.features(t, learned["idf"]).get(w, 0) for w in known] for t in texts])
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1)
    weights = np.linalg.solve(x.T @ x + 0.5 * np.eye(4), x.T @ (ratings - ratings.mean()))
    np.testing.assert_allclose([learned["word"][w] for w in known], weights, atol=2e-3)
    assert judge.score("nothing known", learned) == pytest.approx(0.5)


def test_the_judge_tells_praise_from_blame_as_a_scorer():
    from nca_jax.rewards.scorers import get_scorer

    good, bad = get_scorer(study.JUDGE)([{}] * 2, ["A wonderful film.", "A dull, awful film."])
    assert good > 1 > -1 > bad


# The commands


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("claim", ["chosen", "reasoning", "responses"])
def test_a_claim_runs_in_its_smoke_form(claim, tmp_path):
    pytest.importorskip("vaderSentiment")
    command = [sys.executable, "-m", f"experiments.claims.{claim}", f"--out={tmp_path}"]
    env = os.environ | {"XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, "--smoke", "--seeds=1"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    arm = {"chosen": "| nca | 1 |", "reasoning": "| 2 | dpo | 1 |", "responses": "| K=16 | 1 |"}
    assert arm[claim] in (tmp_path / f"{claim}.md").read_text()
    assert (tmp_path / f"{claim}.png").exists()


def test_the_longest_answer_as_a_reward_is_counted_with_halves_for_ties():
    rows = [
        {"responses": ["abc", "a", "abcd"], "scores": [3, 2, 1]},
        {"responses": ["a", "bb", "c"], "scores": [0, 2, 1]},
        {"responses": ["a", "b", "cc"], "scores": [0, 1, 0]},
    ]
    assert reward_model.accuracy_of_length(rows) == pytest.approx((1 / 2 + 1 + 1 / 4) / 3)


@pytest.mark.slow
@pytest.mark.long
def test_the_claim_on_reward_models_runs_in_its_smoke_form(monkeypatch, tmp_path):
    arm = "reward model, dpo (Bradley-Terry), K=2"  # one, for time
    monkeypatch.setattr(reward_model, "ARMS", {arm: reward_model.ARMS[arm]})
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("XLA_FLAGS", QUICK)
    monkeypatch.chdir(ROOT)
    rows_file = scored_rows(tmp_path / "rows.gz", real.NUM_HELDOUT + real.NUM_TRAIN)
    argv = ["reward_model", f"--rows={rows_file}", f"--out={tmp_path}", "--smoke", "--seeds=1"]
    assert reward_model.main(argv) == 0
    text = (tmp_path / "reward_model.md").read_text()
    assert all(f"| {name} | 1 | 0." in text for name in (arm, "the longest answer"))


@pytest.mark.long
@pytest.mark.slow
def test_the_claim_on_real_answers_runs_in_its_smoke_form(monkeypatch, tmp_path):
    monkeypatch.setattr(real, "ARMS", {"dpo, K=2": ("dpo", 2)})  # one arm, for time
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("XLA_FLAGS", QUICK)
    monkeypatch.chdir(ROOT)
    rows_file = scored_rows(tmp_path / "rows.gz", real.NUM_HELDOUT + real.NUM_TRAIN)
    argv = ["real", f"--rows={rows_file}", f"--out={tmp_path}", "--smoke", "--seeds=1"]
    assert real.main(argv) == 0
    assert "| dpo, K=2 | 1 | 0." in (tmp_path / "real.md").read_text()
    (run,) = results.find_runs([tmp_path / "dpo, K=2"])
    # Evaluated on all ten, though it learns from two.
    assert real.COLUMNS["worst"](run) == run.evaluation["logratio/9"]
    assert (tmp_path / "real.png").exists()
