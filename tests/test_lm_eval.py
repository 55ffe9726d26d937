"""Tasks of lm-eval give the digits that its own model of transformers gives of the same folder.

The tasks are its own: their files are included as they are, over documents that are made here.
"""

import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from test_readme import write_chat_model

from nca_jax import build, lm_eval
from nca_jax.checks import UserError
from nca_jax.flags import parse_flags
from nca_jax.params import policy_params

WORDS = "sun moon river stone cloud ember wind salt glass iron".split()
# {task: (the file of lm-eval, its split, what is changed in it)}
TASKS = {
    "ours_arithmetic": ("arithmetic/arithmetic_1dc.yaml", "validation", ""),
    "ours_choices": ("arc/arc_easy.yaml", "test", "num_fewshot: 2\nfewshot_split: train\n"),
    "ours_words": ("gsm8k/gsm8k.yaml", "test", "num_fewshot: 1\n"),
    "ours_text": ("wikitext/wikitext.yaml", "test", ""),
}
SHORT = "generation_kwargs:\n  until: ['s', 'Question:', '\\n\\n']\n  max_gen_toks: 24\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns a folder with a model HF, and tasks over documents of its own."""
    pytest.importorskip("lm_eval")
    where = tmp_path_factory.mktemp("lm_eval")
    write_chat_model(where / "HF")
    write_tasks(where / "tasks")
    return where


def write_tasks(folder: Path) -> None:
    import lm_eval as theirs

    theirs_folder = Path(theirs.__file__).parent / "tasks"
    folder.mkdir()
    for name, (file, split, changed) in TASKS.items():
        documents = documents_of(name)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in documents))
        splits = "".join(f"    {x}: {folder / name}.jsonl\n" for x in {split, "train", "validation"})
        (folder / f"{name}.yaml").write_text(
            f"include: {theirs_folder / file}\ntask: {name}\ntag: null\ndataset_path: json\n"
            f"dataset_name: null\ndataset_kwargs:\n  data_files:\n{splits}{changed}"
            + (SHORT if name == "ours_words" else "")
        )


def documents_of(name: str) -> list[dict]:
    draw = random.Random(name)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    if name == "ours_arithmetic":
        return [
            {"context": f"Question: What is {i} * 3?\nAnswer:", "completion": end}
            for i in range(4)
            for end in (f" {3 * i}", " ", "\n", "s", f" {i}")
        ]
    if name == "ours_choices":
        return [
            {"id": str(i), "question": text(3, 12), "answerKey": "ABCD"[i % 4]}
            | {"choices": {"text": [text(1, 4) for _ in range(4)], "label": list("ABCD")}}
            for i in range(12)
        ]
    if name == "ours_words":
        return [{"question": text(2, 9), "answer": f"{text(2, 4)} #### {i}"} for i in range(6)]
    return [{"page": text(*sizes)} for sizes in ((1, 1), (20, 30), (300, 300))]


def flags_of(folder: Path, *flags: str) -> list[str]:
    config = f"--config=configs/jsonl.py:files=none,init_from={folder / 'HF'}"
    fixed = ("--config.data.rows=8", "--config.data.block=32", "--config.loss.logits_chunk=32")
    return ["lm_eval", config, *fixed, f"--include_path={folder / 'tasks'}", *flags]


def asked(model, folder: Path, **how) -> dict:
    """Returns what lm-eval says of a model, samples included."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    return simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager, **how)


@pytest.fixture(scope="module")
def ours(folder):
    from nca_jax.harness import Policy

    run = build.build(parse_flags(flags_of(folder)[:4], sections=("generate",))[0])
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
@pytest.mark.parametrize("chat", [False, True])
def test_tasks_of_lm_eval_give_the_digits_of_its_own_model(folder, ours, theirs, chat):
    how = dict(apply_chat_template=chat, bootstrap_iters=0)
    found, expected = (asked(model, folder, **how) for model in (ours, theirs))
    for task, wanted in expected["results"].items():
        numbers = {name: x for name, x in wanted.items() if isinstance(x, float)}
        assert {x: found["results"][task][x] for x in numbers} == pytest.approx(numbers, rel=1e-5)
    said, wanted = responses(found), responses(expected)
    assert said["ours_words"] == wanted["ours_words"] and any(map(str, said["ours_words"]))
    for task in set(TASKS) - {"ours_words"}:
        np.testing.assert_allclose(as_numbers(said[task]), as_numbers(wanted[task]), atol=2e-4)


@pytest.mark.torch
def test_the_choices_of_a_context_are_one_group_and_what_is_greedy_is_said(ours, monkeypatch):
    from lm_eval.api.instance import Instance

    from nca_jax import harness

    (context,) = ["Say:"]
    (first,) = ours.generate_until([request(context, {"until": [], "max_gen_toks": 2})])
    seen, score = [], harness.score_responses
    monkeypatch.setattr(
        harness, "score_responses", lambda f, groups, *a, **k: seen.append(groups) or score(f, groups, *a, **k)
    )
    asked = [Instance("loglikelihood", {}, (context, text), 0) for text in (first, "x", first)]
    asked.append(Instance("loglikelihood", {}, ("Other:", "x"), 0))
    found = ours.loglikelihood(asked, disable_tqdm=True)
    assert [len(group.responses) for group in seen[0]] == [3, 1]
    assert [is_greedy for _, is_greedy in found] == [True, False, True, False]
    assert found[0] == found[2] and found[1] != found[3]
