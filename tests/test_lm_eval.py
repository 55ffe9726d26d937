"""Tasks of lm-eval give the digits that its own model of transformers gives of the same folder.

The tasks are its own: their files are included as they are, over documents that are made here.
"""

import functools
import itertools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_readme import write_chat_model

from experiments.evals.tasks import TASKS, write_tasks
from nca_jax import build, lm_eval
from nca_jax.checks import UserError
from nca_jax.flags import parse_flags
from nca_jax.infra.mesh import make_mesh
from nca_jax.params import policy_params


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns a folder with a model HF, and tasks over documents of its own."""
    pytest.importorskip("lm_eval")
    where = tmp_path_factory.mktemp("lm_eval")
    write_chat_model(where / "HF")
    path = where / "HF" / "config.json"  # so that texts have several windows, and some are cut
    config = json.loads(path.read_text()) | {"max_position_embeddings": 160}
    path.write_text(json.dumps(config))
    counts = dict.fromkeys(TASKS, 8) | {"made_arithmetic": 15, "made_text": 3}
    how = dict(fewshot=2, until=["s", "Question:", "\n\n"], tokens=24, words=90)
    write_tasks(where / "tasks", counts, **how)
    return where


def flags_of(folder: Path, *flags: str) -> list[str]:
    config = f"--config=configs/jsonl.py:files=none,init_from={folder / 'HF'}"
    fixed = ("--config.data.rows=8", "--config.data.block=32")
    return ["lm_eval", config, *fixed, f"--include_path={folder / 'tasks'}", *flags]


def asked(model, folder: Path, tasks, **how) -> dict:
    """Returns what lm-eval says of a model, samples included."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    return simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, **how)


@pytest.fixture(scope="module")
def ours(folder):
    from nca_jax.harness import Policy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_mesh", lambda sizes, _: make_mesh(sizes, jax.devices()[:2]))
        run = build.build(parse_flags(flags_of(folder)[:3], sections=("generate",))[0])
        with jax.set_mesh(run.mesh):
            yield Policy(run, policy_params(run, ""))


@pytest.fixture(scope="module")
def theirs(folder):
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder / "HF"), device="cpu", dtype="float32", batch_size=4)


def responses(found: dict) -> dict[str, list]:
    """Returns {task: what the model said to each request, document by document}."""
    return {
        task: [answer for document in documents for answer in document["resps"]]
        for task, documents in found["samples"].items()
    }


def as_numbers(answers: list) -> np.ndarray:
    """Returns log-probabilities and greedy flags as an array."""
    flat = json.loads(json.dumps(answers), parse_constant=float)
    return np.array([np.float64(x) for x in np.ravel(np.array(flat, dtype=object))])


@pytest.mark.torch
@pytest.mark.parametrize(
    ("chat", "tasks"), [(False, TASKS), (True, ["made_answers"])], ids=["plain", "chat"]
)
def test_tasks_of_lm_eval_give_the_digits_of_its_own_model(folder, ours, theirs, chat, tasks):
    how = dict(tasks=tasks, apply_chat_template=chat, bootstrap_iters=0)
    found, expected = (asked(model, folder, **how) for model in (ours, theirs))
    for task, wanted in expected["results"].items():
        numbers = {name: x for name, x in wanted.items() if isinstance(x, float)}
        assert {x: found["results"][task][x] for x in numbers} == pytest.approx(numbers, rel=1e-4)
    said, wanted = responses(found), responses(expected)
    assert said["made_answers"] == wanted["made_answers"] and any(map(str, said["made_answers"]))
    for task in set(tasks) - {"made_answers"}:
        np.testing.assert_allclose(
            as_numbers(said[task]), as_numbers(wanted[task]), rtol=3e-6, atol=1e-4
        )


@pytest.mark.torch
def test_the_choices_of_a_context_are_one_group_of_which_the_likeliest_token_is_greedy(
    ours, monkeypatch
):
    from nca_jax import harness

    seen, score = [], harness.score_responses

    def seeing(compute, groups, *rest, **how):
        seen.append([len(group.responses) for group in groups])
        return score(compute, groups, *rest, **how)

    monkeypatch.setattr(harness, "score_responses", seeing)
    context, vocab_size = ours.tok_encode("Say:"), len(ours.tokenizer)
    asked = [("", context, [token]) for token in range(vocab_size)]
    found = ours._loglikelihood_tokens([*asked, ("", context[1:], [5, 6]), asked[7]])
    assert seen == [[vocab_size + 1, 1]] and found[7] == found[-1]
    logps, is_greedy = map(list, zip(*found[:vocab_size], strict=True))
    assert sum(is_greedy) == 1 and is_greedy[int(np.argmax(logps))]
    assert np.exp(logps).sum() == pytest.approx(1, rel=1e-5)


@pytest.mark.torch
def test_tasks_share_programs_where_their_rows_and_their_sampling_agree(ours, monkeypatch):
    from nca_jax import harness

    made, make_misses = [], harness.make_misses

    def misses(model, **how):
        made.append(how["block"])
        return make_misses(model, **how)

    def generator(run, ends):
        made.append(run.config.generate.max_new_tokens)
        return lambda params, prompts, seed: [[np.array([5])] for _ in prompts]

    monkeypatch.setattr(harness, "make_misses", misses)
    monkeypatch.setattr(harness, "make_generator", generator)
    policy = harness.Policy(ours.run, ours.params)
    asked = [("", [1, 2, 3], [4, 5]), ("", [1] * 40, [4] * 20)]
    apart = [*policy._loglikelihood_tokens(asked[:1]), *policy._loglikelihood_tokens(asked[1:])]
    together = policy._loglikelihood_tokens(asked)
    np.testing.assert_allclose(as_numbers(apart), as_numbers(together), rtol=1e-5)
    assert len(made) == 1
    for tokens, _ in itertools.product((4, 8), range(2)):
        policy._answer(["a"], {"until": ["s"], "max_gen_toks": tokens})
    assert made[1:] == [4, 8]


@pytest.mark.torch
def test_rows_hold_what_is_asked_in_few_sizes_of_which_one_is_a_whole_window():
    pytest.importorskip("lm_eval")
    from nca_jax.harness import ROOM, _rounded

    usual = 2049
    sizes = {tokens: _rounded(tokens, usual) for tokens in range(1, 8193)}
    assert all(tokens <= size <= max(1.25 * tokens, ROOM) for tokens, size in sizes.items())
    assert sizes[2049] == usual and len(set(sizes.values())) == 11 + 4 * 3 + 1


@pytest.mark.torch
def test_what_is_longer_than_the_model_loses_its_beginning_and_a_task_that_cannot_be_is_said(ours):
    long = list(range(9)) * 100
    room = ours.max_length + 1 - 3
    asked = [("", long[-room:], [1, 2, 3]), ("", long, [1, 2, 3])]
    assert room < len(long)
    whole, cut = ours._loglikelihood_tokens(asked)
    assert whole == cut
    for length in (0, ours.max_length + 1):
        with pytest.raises(UserError, match=f"a continuation of {length} tokens"):
            ours._loglikelihood_tokens([("", [1], [2] * length)])
    with pytest.raises(UserError, match="num_beams in its generation_kwargs"):
        ours._answer(["a"], {"until": [], "num_beams": 4})
    with pytest.raises(UserError, match="lower max_gen_toks"):
        ours._answer(["a"], {"until": [], "max_gen_toks": ours.max_length})


@pytest.mark.torch
def test_the_command_writes_and_prints_results_and_names_a_task_that_is_not_there(
    folder, fails, tmp_path, capsys, monkeypatch
):
    from lm_eval import tasks

    # Looking through the thousands of its own takes long.
    own_alone = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", own_alone)
    flags = flags_of(folder, "--limit=2", f"--out={tmp_path / 'r.json'}")[1:]
    said = fails("lm_eval", *flags, "--tasks=made_choices,arc_eazy")
    assert "--tasks=arc_eazy: lm-eval has none of that name" in said
    lm_eval.main(["lm_eval", *flags, "--tasks=made_choices"])
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["n-samples"]["made_choices"]["effective"] == 2
    assert 0 <= found["results"]["made_choices"]["acc,none"] <= 1
    out = capsys.readouterr().out
    assert "|made_choices|" in out and "r.json" in out


def test_without_the_extra_it_says_which_one_to_install(fails, monkeypatch):
    for name in [x for x in sys.modules if x.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    config = "--config=configs/jsonl.py:files=none,smoke"
    assert "pip install 'nca_jax[eval]'" in fails("lm_eval", config, "--tasks=arc_easy")
