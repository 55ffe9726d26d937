"""The bake-off: what its runs differ in, how the best is told, and what its intervals say."""

import gzip
import json

import numpy as np
import pytest
from commands import QUICK, ROOT

pytest.importorskip("matplotlib")
from experiments.bakeoff import run, settings, table  # noqa: E402  (they plot)
from experiments.bakeoff.settings import ARMS, NUM_HELDOUT, NUM_TUNE, K, Setting  # noqa: E402
from experiments.results import find_runs  # noqa: E402
from nca_jax.checks import UserError  # noqa: E402
from nca_jax.files import whole_lines  # noqa: E402
from nca_jax.flags import parse_flags  # noqa: E402


def write_real(path, num: int, chars: int = 8) -> str:
    """Writes rows of ten answers, the later the better."""
    row = {"responses": [f"{i} " + "x" * chars for i in range(10)], "scores": [*range(10)]}
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"prompt": f"say {i}"} | row) + "\n" for i in range(num))
    return str(path)


def test_real_rows_have_the_best_the_worst_and_two_between(tmp_path):
    write_real(tmp_path / "rows.gz", 3)
    rows = settings.real_rows(tmp_path / "rows.gz")
    assert [row["scores"] for row in rows] == [[9, 6, 3, 0]] * 3
    assert [text[0] for text in rows[0]["responses"]] == ["9", "6", "3", "0"]
    with pytest.raises(UserError, match="Wanted 84 rows or more; there are 3"):
        settings.write_rows(tmp_path, rows, 1)


def test_seeds_train_on_rows_of_their_own_and_none_that_is_held_out(tmp_path):
    settings.write_rows(tmp_path, settings.own_rows(), 3)
    heldout, *training = (
        {row["prompt"] for row in whole_lines(tmp_path / f"{name}.jsonl")}
        for name in ("heldout", "train-0", "train-1", "train-2")
    )
    assert not any(heldout & prompts for prompts in training)
    assert training[0] != training[1] != training[2]
    settings.write_rows(tmp_path, settings.own_rows(), 4)  # more seeds may follow


@pytest.mark.parametrize("prompts", [settings.OWN, settings.REAL], ids=lambda prompts: prompts.name)
@pytest.mark.parametrize("arm", ARMS)
def test_a_point_is_a_config_with_a_cached_reference_where_its_loss_reads_one(arm, prompts):
    setting = Setting(arm, ARMS[arm].values[1], 3e-4)
    fields = settings.point_of(prompts, setting)
    assert fields[f"loss.{ARMS[arm].field}"] == ARMS[arm].values[1]
    assert ("reference.kind" in fields) == (arm not in ("simpo", "likelihood"))
    of_pair = arm in ("dpo", "simpo", "apo_zero")
    assert fields["data.row_len"] == prompts.row_lens[2 if of_pair else K]
    if "reference.kind" in fields:
        fields["reference.cache"] = "x"
    where = f"--config={prompts.config}files=x,algo={fields.pop('config.algo')}"
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    config, _ = parse_flags(["x", where, *prompts.flags, *flags])
    assert config.data.num_responses == (2 if of_pair else K)
    assert config.reference.kind == ("cached" if "reference.kind" in fields else "none")


def write_evaluation(out, setting: Setting, seed: int, rewards: np.ndarray) -> None:
    folder = out / setting.name / f"seed={seed}"
    folder.mkdir(parents=True)
    by_prompt = {"reward": rewards, "kl": 2 * rewards, "reward_reference": np.zeros(NUM_HELDOUT)}
    content = {"metrics": {"text_perplexity": 30.0}, "samples": []}
    content["by_prompt"] = {name: values.tolist() for name, values in by_prompt.items()}
    (folder / "evaluation.json").write_text(json.dumps(content))


def test_the_best_is_told_by_a_third_of_the_prompts_and_reported_on_the_rest(tmp_path):
    where = np.arange(NUM_HELDOUT) < NUM_TUNE
    one, other = (Setting("nca", value, 1e-3) for value in (0.1, 0.3))
    write_evaluation(tmp_path, one, 0, np.where(where, 1.0, 5.0))
    write_evaluation(tmp_path, other, 0, np.where(where, 2.0, 0.5))
    write_evaluation(tmp_path, other, 1, np.where(where, 9.0, 0.7))
    best = table.best_first(tmp_path, settings.OWN, [one, other])
    assert best == [other, one]
    found = table.read(tmp_path, {"nca": best, "infonca": best})
    text = table.markdown_of(settings.OWN, found)
    assert "| nca | beta 0.3 | 2 | 0.600 [0.500, 0.700] |  | 1.200 [1.000, 1.400] |" in text
    assert "| infonca | beta 0.3 | 2 | 0.600 [0.500, 0.700] | 0.000 [0.000, 0.000] |" in text
    table.plot(tmp_path / "x.png", [(settings.OWN, found)])
    assert (tmp_path / "x.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="No run of nca,beta=1,lr=0.001"):
        table.best_first(tmp_path, settings.OWN, [Setting("nca", 1.0, 1e-3)])


def test_an_interval_covers_a_mean_as_often_as_it_says_and_sees_the_spread_of_seeds():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(50):
        found = table.interval(rng.normal(size=(1, 40)))
        hits += found.low < 0 < found.high
    assert 43 <= hits <= 50
    of_seeds = table.interval(np.repeat([[0.0], [1.0], [2.0]], 40, axis=1))
    assert of_seeds.high - of_seeds.low > 1  # prompts alone would say 0


def test_real_answers_want_their_rows(tmp_path):
    with pytest.raises(UserError, match="set --sets=own"):
        run.parse_arguments(["run", f"--out={tmp_path}"])
    with pytest.raises(UserError, match="there are own, real"):
        run.parse_arguments(["run", "--sets=mine"])


@pytest.mark.slow
@pytest.mark.long
def test_the_bakeoff_runs_in_its_smoke_form_and_again_does_nothing(monkeypatch, tmp_path, capsys):
    few = {"nca": ARMS["nca"]._replace(values=(0.1, 0.3)), "simpo": ARMS["simpo"]}
    few["simpo"] = few["simpo"]._replace(values=(2.5,))
    monkeypatch.setattr(settings, "ARMS", few)
    for module in (run, table):
        monkeypatch.setattr(module, "ARMS", few)
    monkeypatch.setattr(settings, "RATES", (1e-3,))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("XLA_FLAGS", QUICK)
    monkeypatch.chdir(ROOT)
    rows = write_real(tmp_path / "rows.gz", 90)
    argv = ["run", f"--rows={rows}", f"--out={tmp_path}", "--sets=real", "--seeds=1", "--smoke"]
    assert run.main(argv) == 0
    said = (tmp_path / "bakeoff.md").read_text()
    assert "| nca | beta " in said and "| simpo | beta 2.5 | 1 |" in said
    assert (tmp_path / "bakeoff.png").exists()
    runs = find_runs([tmp_path / "real"])
    assert len(runs) == 3 and all(x.evaluation["kl"] >= 0 for x in runs)
    assert all("logratio/3" in x.evaluation for x in runs)  # all four answers, a reference or not
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("evaluation.json")}
    assert run.main(argv) == 0 and (tmp_path / "bakeoff.md").read_text() == said
    assert times == {path: path.stat().st_mtime_ns for path in times}
