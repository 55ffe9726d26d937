"""What runs left behind is averaged as it says, and a page holds all of it."""

import json
import re
from pathlib import Path

import pytest

from experiments import results
from nca_jax.checks import UserError

pytest.importorskip("matplotlib")
from experiments import plots, report  # noqa: E402  (they plot)


def write_run(workdir: Path, *, steps: int = 3, offset: float = 0.0, kl: float | None = None):
    """Writes what train and, with a kl, evaluate leave."""
    workdir.mkdir(parents=True)
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
