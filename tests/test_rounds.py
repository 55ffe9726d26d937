"""Rounds: what is drawn and chosen, and that a stop anywhere changes nothing."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from commands import metric_lines, write_records
from ml_collections import ConfigDict

from nca_jax import one_round, rounds
from nca_jax.checks import UserError
from nca_jax.config import default_config, section
from nca_jax.data import pieces
from nca_jax.infra import checkpoint
from nca_jax.infra.checkpoint import restore_params
from nca_jax.infra.mesh import host_mesh
from nca_jax.model_config import MODELS
from nca_jax.models.decoder import Model
from nca_jax.one_round import chosen_of, drawn


class Killed(BaseException):
    """What ends a run in the middle of things."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_records(folder / "heldout.jsonl", num_rows=40, k=3)
    prompts = [{"prompt": f"Tell me {i}:", "answer": "never said"} for i in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in prompts))
    return folder


def run_rounds(data, workdir, *flags: str, scorer: str = "length") -> int:
    return rounds.main(
        [
            "rounds",
            f"--config=configs/jsonl.py:files={data}/heldout.jsonl,algo=infonca,smoke",
            f"--prompts={data}/prompts.jsonl",
            f"--scorer={scorer}",
            f"--workdir={workdir}",
            "--config.rounds.number=3",
            "--config.rounds.prompts=4",
            "--config.rounds.samples=3",
            "--config.rounds.steps=2",
            "--config.generate.max_new_tokens=8",
            "--config.generate.batch_size=6",
            "--config.optim.lr=1e-2",
            "--config.save_every=1",
            "--config.eval_every=2",
            "--config.mesh.fsdp=1",
            "--config.mesh.data=1",
            *flags,
        ]
    )


def result(workdir) -> tuple:
    params = restore_params(workdir, Model(MODELS["tiny"]).abstract_params(), host_mesh())
    files = sorted(path for path in (workdir / "rounds").rglob("*.json*"))
    texts = {str(path.relative_to(workdir)): path.read_text() for path in files}
    return metric_lines(workdir), [np.asarray(x) for x in jax.tree.leaves(params)], texts


def fail_at(monkeypatch, module, name: str, call: int) -> None:
    """Kills the run at a call of a function, once it has done what it does."""
    whole, calls = getattr(module, name), []

    def killed(*args, **kwargs):
        found = whole(*args, **kwargs)
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return found

    monkeypatch.setattr(module, name, killed)


@pytest.mark.slow
@pytest.mark.parametrize("reference", [pytest.param("start", marks=pytest.mark.long), "previous"])
def test_killed_while_it_samples_scores_or_trains_it_ends_bit_for_bit_the_same(
    data, tmp_path, monkeypatch, use_devices, reference
):
    use_devices(0)
    flags = [
        f"--config.rounds.reference={reference}",
        "--config.rounds.keep_best",
        "--config.rounds.dedupe",
        f"--config.rounds.optimizer={'keep' if reference == 'start' else 'new'}",
    ]
    assert run_rounds(data, tmp_path / "whole", *flags) == 0
    lines = metric_lines(tmp_path / "whole", "rounds")
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert lines[0]["kl"] == 0 and lines[1]["kl"] == (
        0 if reference == "previous" else lines[1]["kl"]
    )

    kills = [
        (pieces, "add", 1),  # while round 1 is sampled
        (one_round, "score_samples", 1),  # after it is scored
        (checkpoint, "save", 1),  # in its training
        (pieces, "add", 2),  # while round 2 is sampled
        (one_round, "write_json", 1),  # before it trains
        (rounds, "load_examples", 2),  # before round 3 trains
        (checkpoint, "save", 1),
    ]
    for module, name, call in kills:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            fail_at(patch, module, name, call)
            run_rounds(data, tmp_path / "killed", *flags)
    assert run_rounds(data, tmp_path / "killed", *flags) == 0
    got, want = result(tmp_path / "killed"), result(tmp_path / "whole")
    assert got[0] == want[0]
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert got[2] == want[2]


@pytest.mark.slow
def test_a_round_without_a_signal_is_over_once_a_later_one_has_trained(
    data, tmp_path, monkeypatch, use_devices
):
    use_devices(0)
    score, calls = one_round.score_samples, []

    def tied_in_the_second(*args):
        calls.append(args)
        scores = [1.0, 1.0, 1.0] if len(calls) == 2 else [0.0, 0.5, 1.0]
        return [x | {"scores": scores} for x in score(*args)]

    flags = ["--config.rounds.reference=previous", "--config.data.files=", "--config.eval_every=0"]
    monkeypatch.setattr(one_round, "score_samples", tied_in_the_second)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        fail_at(patch, checkpoint, "save", 6)  # starts and steps of rounds 1 and 3, start of 2
        run_rounds(data, tmp_path, *flags)
    assert run_rounds(data, tmp_path, *flags) == 0
    assert [line["step"] for line in metric_lines(tmp_path, "train")] == [1, 2, 3, 4]
    assert [line["round"] for line in metric_lines(tmp_path, "rounds")] == [1, 2, 3]


def test_rounds_without_a_signal_say_so_and_train_nothing(data, tmp_path, capsys, use_devices):
    use_devices(0)
    flags = ["--config.rounds.number=2", "--config.data.files=", "--config.eval_every=0"]
    assert run_rounds(data, tmp_path, *flags, scorer="answer") == 0
    said = capsys.readouterr().out
    assert "round 1 has no signal" in said and "round 2 has no signal" in said
    assert "nothing was trained" in said and "next: " not in said
    assert metric_lines(tmp_path, "train") == []
    assert [x["tied"] for x in metric_lines(tmp_path, "rounds")] == [1.0, 1.0]


def test_each_prompt_is_drawn_once_before_any_is_drawn_twice():
    config = ConfigDict({"seed": 3, "rounds": {"prompts": 4}})
    order = [i for number in range(1, 11) for i in drawn(config, 10, number)]
    for lap in range(4):
        assert sorted(order[10 * lap : 10 * lap + 10]) == list(range(10))
    assert order[:10] != order[10:20]
    config.seed = 4
    assert order[:4] != drawn(config, 10, 1)


def record(scores: list[float], texts: list[str]) -> dict:
    ids = [[ord(text)] for text in texts]
    finished = [True] * len(texts)
    return {
        "prompt": "p",
        "responses": texts,
        "response_ids": ids,
        "finished": finished,
        "scores": scores,
    }


def how(**changes) -> SimpleNamespace:
    return SimpleNamespace(**({"dedupe": False, "drop_tied": False} | changes))


def test_the_best_of_earlier_rounds_takes_the_place_of_the_last_of_the_worst():
    now, best = record([2, 1, 1], ["a", "b", "c"]), record([5], ["z"])
    chosen = chosen_of(now, best, how())
    assert chosen == record([2, 1, 5], ["a", "b", "z"])
    assert chosen_of(now, record([1], ["z"]), how()) == now
    assert chosen_of(now, None, how()) == now


def test_equal_responses_count_once_and_tied_prompts_are_dropped_where_asked():
    twice = record([1, 2, 1], ["a", "b", "a"])
    assert chosen_of(twice, None, how(dedupe=True)) == record([1, 2], ["a", "b"])
    assert chosen_of(twice, None, how()) == twice
    tied = record([1, 1], ["a", "b"])
    assert chosen_of(tied, None, how()) == tied
    assert chosen_of(tied, None, how(drop_tied=True)) is None


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"reference.kind": "cached", "reference.cache": "c"}, "knows nothing of samples"),
        ({"reference.kind": "base", "rounds.reference": "previous"}, "set config.reference.kind"),
        ({"eval_patience": 2}, "config.eval_patience"),
        ({"data.score_unit": "spread"}, "config.data.score_unit"),
        ({"generate.max_new_tokens": 4096}, "config.data.max_response_len"),
    ],
)
def test_what_rounds_do_not_have_is_refused_by_name(changes, said):
    config = default_config()
    config.rounds, config.generate = section("rounds"), section("generate")
    config.model.name, config.data.files = "tiny", "rows.jsonl"
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=said):
        rounds.whole_run(config)


def test_train_refuses_a_config_of_rounds(data, tmp_path, fails):
    error = fails(
        "train",
        f"--config=configs/jsonl.py:files={data}/heldout.jsonl,smoke",
        f"--workdir={tmp_path}/x",
        "--config.rounds.number=2",
    )
    assert "nca_jax.rounds" in error
