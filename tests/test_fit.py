"""The training loop on its own, with a step that computes nothing: when it reads, writes, saves."""

import gc
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import write_records
from ml_collections import ConfigDict

import nca_jax
from nca_jax import build
from nca_jax.checks import UserError
from nca_jax.data.pipeline import Dataset
from nca_jax.fit import Evaluator, fit, is_time
from nca_jax.flags import parse_flags
from nca_jax.train_step import Frozen, TrainState


class Lines:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.lines: list[tuple[int, str, dict]] = []

    def write(self, step, split, metrics):
        self.lines.append((step, split, metrics))

    def advance(self): ...

    def sync(self): ...

    def steps(self, split: str) -> list[int]:
        return [step for step, of, _ in self.lines if of == split]


class Saves:
    """Checkpoints that keep (step, metrics) of every save."""

    def __init__(self):
        self.saved = []

    def save(self, step, *, args, metrics, custom_metadata):
        self.saved.append((step, metrics))

    def latest_step(self):
        return self.saved[-1][0] if self.saved else None

    def best_step(self):
        known = [(metrics["margin"], step) for step, metrics in self.saved if metrics]
        return max(known)[1] if known else None


@pytest.fixture
def run_of(tmp_path):
    """Returns a function from flags to (run, dataset), of a tiny model on 8 devices."""
    rows = write_records(tmp_path / "rows.jsonl")

    def make(*flags: str):
        arg = f"--config=configs/jsonl.py:files={rows},smoke"
        config, _ = parse_flags(["train", arg, "--config.data.rows=8", *flags])
        run = build.build(config)
        return run, Dataset(build.read_data(run).sources, config.data, seed=0)

    return make


def metrics_at(step: int, **changes) -> dict[str, jax.Array]:
    """The metrics of a step; its loss is its number."""
    found = dict(loss=step, grad_norm=1.0, start_loss=1.0)
    found |= dict(max_abs_logratio_per_token=0.0, mean_logratio_per_token=0.0)
    prompt_loss = {"prompt_loss": jnp.zeros(4)}
    return {name: jnp.float32(x) for name, x in (found | changes).items()} | prompt_loss


def fake_step(**changes_at):
    """A step that counts; `changes_at={step: {metric: value}}`."""
    called = []

    def train_step(state, frozen, batch):
        step = len(called) + 1 + int(state.step) - len(called)
        called.append(step)
        metrics = metrics_at(step, **changes_at.get(f"at_{step}", {}))
        return state._replace(step=state.step + 1), metrics

    train_step.called = called
    return train_step


def train(run, dataset, step, steps, first=0, **how):
    state = TrainState(jnp.int32(first), {}, ())
    with jax.set_mesh(run.mesh):
        batches = dataset.iterate(first, steps)
        return fit(run, state, Frozen(), batches, train_step=step, steps=steps, **how)


def test_a_step_is_written_under_its_own_number_at_every_log_every_and_at_the_end(run_of):
    writer = Lines()
    state = train(*run_of("--config.log_every=5"), fake_step(), 12, writer=writer)
    assert int(state.step) == 12
    assert writer.steps("train") == [1, 5, 10, 12]
    assert [metrics["loss"] for _, _, metrics in writer.lines] == [1, 5, 10, 12]
    assert all(metrics["step_seconds"] > 0 for _, _, metrics in writer.lines)


def test_a_step_that_is_saved_at_once_is_timed_until_it_is_done(run_of):
    class Late:
        def __array__(self):
            time.sleep(0.05)
            return np.float32(0)

    counts, writer = fake_step(), Lines()

    def step(*args):
        state, metrics = counts(*args)
        return state, metrics | {"late": Late()}

    train(*run_of("--config.save_every=1"), step, 3, writer=writer, checkpoints=Saves())
    assert all(metrics["step_seconds"] >= 0.05 for _, _, metrics in writer.lines)


def test_a_bad_step_is_noticed_one_step_later_however_rarely_steps_are_logged(run_of):
    step, saves = fake_step(at_3={"loss": np.nan}), Saves()
    flags = ("--config.log_every=100", "--config.save_every=100")
    with pytest.raises(UserError, match=r"Step 3: loss nan.*rows\.jsonl:\d+.* has no checkpoint"):
        train(*run_of(*flags), step, 50, checkpoints=saves)
    assert len(step.called) == 4 and saves.saved == []


def test_a_bad_step_is_never_saved(run_of):
    saves = Saves()
    said = "Step 4: loss 4.0, gradient norm inf.* of step 2, is good. Lower optim.lr"
    with pytest.raises(UserError, match=said):
        step = fake_step(at_4={"grad_norm": np.inf})
        train(*run_of("--config.save_every=2"), step, 8, checkpoints=saves)
    assert [step for step, _ in saves.saved] == [2]


@pytest.mark.parametrize("part", ["params", "opt_state"])
@pytest.mark.parametrize(
    "flag", ["--config.save_every=3", "--config.checkpoint.best_metric=margin"]
)
def test_an_update_that_is_not_finite_is_never_saved(run_of, part, flag):
    saves, count = Saves(), fake_step()
    evaluators = [Evaluator("eval", 3, lambda params: {"margin": 1.0})]

    def step(state, frozen, batch):
        state, metrics = count(state, frozen, batch)
        bad = jnp.where(state.step < 3, 0.0, jnp.array([1.0, np.inf]))
        return state._replace(**{part: {"a": {"b": bad}, "c": jnp.int32(1)}}), metrics

    flags = (flag, "--config.eval_every=3", "--config.data.eval_fraction=0.3")
    with pytest.raises(UserError, match=f"Step 3: {part}/a/b hold NaN.* it has no checkpoint yet"):
        train(*run_of(*flags), step, 3, checkpoints=saves, evaluators=evaluators)
    assert saves.saved == []


def test_an_evaluation_that_is_not_finite_stops_the_run_before_it_saves(run_of):
    saves, values = Saves(), iter([1.0, 2.0, np.nan])
    evaluators = [Evaluator("eval", 2, lambda params: {"a": 1.0, "b": next(values)})]
    with pytest.raises(UserError, match="Step 4, eval: b is nan. .* of step 2, is good. Lower"):
        run, dataset = run_of("--config.save_every=2")
        train(run, dataset, fake_step(), 4, checkpoints=saves, evaluators=evaluators)
    assert [step for step, _ in saves.saved] == [2]


def test_a_run_that_is_not_finite_before_an_update_does_not_suspect_the_learning_rate(run_of):
    with pytest.raises(UserError, match="Step 1: loss nan.*look at the reference") as stopped:
        first_step(run_of, loss=np.nan)
    assert "optim.lr" not in str(stopped.value)
    evaluators = [Evaluator("eval", 1, lambda params: {"a": np.inf})]
    with pytest.raises(UserError, match="Step 0, eval: a is inf.*look at the reference"):
        train(*run_of(), fake_step(), 1, evaluators=evaluators)


def test_batches_are_not_kept_until_they_are_logged(run_of):
    run, dataset = run_of("--config.log_every=100", "--config.save_every=100")
    alive = []

    def batches():
        for host in dataset.iterate(0, 12):
            alive.append(weakref.ref(host.batch.rows.tokens))
            yield host

    def step(state, frozen, batch):
        if len(alive) > 10:
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 4  # some are made ahead
        return fake(state, frozen, batch)

    fake = fake_step()
    with jax.set_mesh(run.mesh):
        state = TrainState(jnp.int32(0), {}, ())
        fit(run, state, Frozen(), batches(), train_step=step, steps=12)


def test_the_best_checkpoint_is_saved_where_its_metric_is_known(run_of):
    flags = ("--config.eval_every=2", "--config.save_every=5", "--config.data.eval_fraction=0.3")
    saves, writer = Saves(), Lines()
    evaluators = [Evaluator("eval", 2, lambda params: {"margin": 1.0})]
    run, dataset = run_of(*flags, "--config.checkpoint.best_metric=margin")
    train(run, dataset, fake_step(), 6, checkpoints=saves, evaluators=evaluators, writer=writer)
    measured = {"margin": 1.0}
    assert saves.saved == [(2, measured), (4, measured), (5, None), (6, measured)]
    assert writer.steps("eval") == [0, 2, 4, 6]


def test_a_run_without_a_better_evaluation_ends_early_and_does_not_go_on_by_itself(run_of):
    flags = ("--config.eval_every=2", "--config.data.eval_fraction=0.3")
    flags += ("--config.checkpoint.best_metric=margin", "--config.save_every=5")
    run, dataset = run_of(*flags, "--config.eval_patience=2")
    values = iter([9.0, 1.0, 3.0, 2.0, 1.0, 2.0, 2.5])  # the first is of no step that is saved
    how = dict(checkpoints=Saves())
    how["evaluators"] = [Evaluator("eval", 2, lambda params: {"margin": next(values)})]
    step = int(train(run, dataset, fake_step(), 20, **how).step)
    assert step == 8 and how["checkpoints"].saved[-1] == (8, {"margin": 1.0})
    again = fake_step()
    assert int(train(run, dataset, again, 20, first=step, **how).step) == 8 and not again.called
    patient, _ = run_of(*flags, "--config.eval_patience=4")
    assert int(train(patient, dataset, fake_step(), 20, first=step, **how).step) == 12


def test_several_evaluators_each_have_their_own_steps_and_split(run_of):
    writer = Lines()
    evaluators = [
        Evaluator("eval", 2, lambda params: {"a": 1.0}),
        Evaluator("other", 3, lambda params: {"b": 2.0}),
        Evaluator("never", 0, lambda params: pytest.fail("every 0 is never")),
    ]
    train(*run_of(), fake_step(), 5, evaluators=evaluators[:2], writer=writer)
    assert writer.steps("eval") == [0, 2, 4, 5] and writer.steps("other") == [0, 3, 5]
    assert not is_time(5, 0, 5)


def test_a_run_that_goes_on_does_not_evaluate_its_start_again(run_of):
    writer = Lines()
    evaluators = [Evaluator("eval", 2, lambda params: {"a": 1.0})]
    train(*run_of(), fake_step(), 4, first=2, evaluators=evaluators, writer=writer)
    assert writer.steps("eval") == [4] and writer.steps("train") == [3, 4]


def test_a_run_that_is_asked_to_stop_saves_the_step_that_it_is_at(run_of):
    saves, answers = Saves(), iter([False, False, True])
    state = train(*run_of(), fake_step(), 9, checkpoints=saves, asked_to_stop=lambda: next(answers))
    assert int(state.step) == 3 and [step for step, _ in saves.saved] == [3]


# The first step


def first_step(run_of, *flags, **metrics):
    train(*run_of(*flags), fake_step(at_1={"loss": 1.0} | metrics), 1)


@pytest.mark.parametrize(
    ("dtype", "name", "tolerance"),
    [
        ("float32", "max_abs", 1e-3),
        ("float32", "mean", 1e-3),
        ("bfloat16", "max_abs", 0.2),
        ("bfloat16", "mean", 1e-2),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_policy_that_is_not_at_its_reference_stops_the_run(
    run_of, capsys, dtype, name, tolerance, sign
):
    flag = f"--config.model.dtype={dtype}"
    at = sign * tolerance if name == "mean" else tolerance

    def step_that_is(share):
        apart = {f"{name}_logratio_per_token": share * at}
        first_step(run_of, flag, **{"max_abs_logratio_per_token": 1e-9} | apart)

    step_that_is(0.9)
    assert "differ by" in capsys.readouterr().out
    with pytest.raises(UserError, match="policy and reference start equal"):
        step_that_is(1.1)


def test_equal_log_probabilities_are_not_mentioned_and_must_give_the_known_loss(run_of, capsys):
    first_step(run_of)
    assert "differ" not in capsys.readouterr().out
    with pytest.raises(UserError, match="nca loss 1.000000; they are 0.000000 .*, and 1.001"):
        first_step(run_of, loss=1.001)


def test_the_start_is_not_checked_where_policy_and_reference_start_apart(run_of, tmp_path):
    run, dataset = run_of()
    apart = ConfigDict(run.config.to_dict())
    apart.reference.init_from = "elsewhere"
    step = fake_step(at_1={"max_abs_logratio_per_token": 9.0})
    train(run._replace(config=apart), dataset, step, 1)


def test_the_package_gives_the_loop_by_its_name_whatever_was_imported_before():
    assert nca_jax.fit.fit is fit
    with pytest.raises(TypeError, match="fit.. missing"):
        nca_jax.fit()
