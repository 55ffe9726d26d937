"""The question files of judges in their own layouts, and the answer files that they read."""

import json

import numpy as np
import pytest
from helpers import write

from nca_jax import build, generate
from nca_jax.checks import UserError
from nca_jax.data.questions import FORMATS, answers_of, read_questions

# A line or two of each file, cut short.
ALPACA = {
    "instruction": "What are the names of some famous actors that started on Broadway?",
    "output": "Some famous actors that started their careers on Broadway are ...",
    "generator": "text_davinci_003",
    "dataset": "helpful_base",
    "datasplit": "eval",
}
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Compose a travel blog.", "Rewrite it."]},
    {"question_id": 111, "category": "math", "turns": ["The area?", "The radius?"]}
    | {"reference": ["3", "1.5"]},
    {"question_id": 95, "category": "roleplay", "turns": ["Be a poet.", "Now a cook."]},
]
ARENA_HARD = {
    "uid": "2edbb5f36f5b42be",
    "category": "hard_prompt",
    "subcategory": "coding",
    "prompt": "Write me a zig program.",
}
IFEVAL = {
    "key": 1000,
    "prompt": "Write a 300+ word summary. Do not use any commas.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{}, {"relation": "at least", "num_words": 300}],
}
STYLED = "# Title\n\n1. one\n2. two\n- **bold** __too__\n```\n# code\n- x\n```\n"


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Returns a function that answers a file of questions, and the prompts that were sampled.

    What is sampled is said by a stand-in: "temperature: the last turn", with white space around.
    """
    seen = []

    def rollout_batches(run, params, prompts, seed, start):
        for prompt in prompts[start:]:
            seen.append(prompt.record["prompt"])
            turns = seen[-1]
            last = turns if isinstance(turns, str) else turns[-1]["content"]
            text = f" {run.config.generate.temperature:g}: {last}\n"
            sampled = {"responses": [text], "response_ids": [[5, 6, 1]], "finished": [True]}
            yield [prompt.record | sampled]

    monkeypatch.setattr(generate, "rollout_batches", rollout_batches)
    load = build.load_tokenizer

    def load_tokenizer(*where):
        tokenizer = load(*where)
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        return tokenizer

    monkeypatch.setattr(build, "load_tokenizer", load_tokenizer)
    monkeypatch.setattr(generate, "policy_params", lambda *_, **__: {"a": np.zeros(2)})

    def ask(format: str, questions: str, out: str, *flags: str) -> tuple[str, list]:
        argv = ["generate", "--config=configs/jsonl.py:files=none,smoke", "--config.data.rows=8"]
        argv += ["--config.data.format=chat", f"--format={format}", f"--prompts={questions}"]
        generate.main([*argv, f"--out={tmp_path / out}", *flags])
        return (tmp_path / out).read_text(), seen

    return ask


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_alpaca_evals_outputs_are_one_list_with_the_name_of_the_model(asked, tmp_path, capsys):
    (tmp_path / "alpaca_eval.json").write_text(json.dumps([ALPACA, ALPACA | {"instruction": "Hi"}]))
    flags = ("--config.generate.temperature=0.5", "--config.generate.num_samples=4")
    said, _ = asked("alpaca_eval", f"{tmp_path}/alpaca_eval.json", "mine.json", *flags)
    first, second = json.loads(said)
    assert first == ALPACA | {"output": f" 0.5: {ALPACA['instruction']}\n", "generator": "mine"}
    assert second["instruction"] == "Hi"
    assert "one answer to each question" in capsys.readouterr().out


def test_mt_bench_asks_its_second_turn_after_the_first_answer_at_each_categorys_temperature(
    asked, tmp_path
):
    said, seen = asked("mt_bench", write(tmp_path / "q.jsonl", MT_BENCH), "mine.jsonl")
    answers = lines_of(said)
    assert [answer["question_id"] for answer in answers] == [81, 111, 95]
    assert answers[0].keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert {answer["model_id"] for answer in answers} == {"mine"}
    turns = [answer["choices"][0] for answer in answers]
    assert turns[0] == {"index": 0, "turns": ["0.7: Compose a travel blog.", "0.7: Rewrite it."]}
    assert turns[1] == {"index": 0, "turns": ["0: The area?", "0: The radius?"]}
    assert seen[:3] == ["The area?", "Compose a travel blog.", "Be a poet."]
    assert seen[3] == [
        {"role": "user", "content": "The area?"},
        {"role": "assistant", "content": "0: The area?"},
        {"role": "user", "content": "The radius?"},
    ]


def test_two_turns_go_on_after_a_stop_in_any_of_them(asked, tmp_path, monkeypatch):
    questions = write(tmp_path / "q.jsonl", MT_BENCH)
    whole, _ = asked("mt_bench", questions, "whole.jsonl")
    add = generate.pieces.add

    def add_and_stop(*args):
        add(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(generate.pieces, "add", add_and_stop)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            asked("mt_bench", questions, "mine.jsonl")
    with pytest.raises(UserError, match="had other prompts"):
        asked("mt_bench", write(tmp_path / "other.jsonl", MT_BENCH[:2]), "mine.jsonl")
    monkeypatch.setattr(generate.pieces, "add", add)
    said, seen = asked("mt_bench", questions, "mine.jsonl")
    assert len(seen) == 2 * 6
    kept = [[line["choices"] for line in lines_of(text)] for text in (said, whole)]
    assert kept[0] == kept[1]


def test_arena_hards_answers_have_what_it_controls_the_style_by(asked, tmp_path):
    question = ARENA_HARD | {"prompt": STYLED}
    (answer,) = lines_of(asked("arena_hard", write(tmp_path / "q.jsonl", [question]), "m.jsonl")[0])
    assert answer.keys() == {"uid", "ans_id", "model", "messages", "tstamp", "metadata"}
    assert answer["uid"] == ARENA_HARD["uid"] and answer["model"] == "m"
    user, assistant = answer["messages"]
    assert user == {"role": "user", "content": STYLED}
    assert assistant == {"role": "assistant", "content": {"answer": f" 1: {STYLED}\n"}}
    assert answer["metadata"] == {
        "token_len": 3,
        "header_count": dict(h1=0, h2=0, h3=0, h4=0, h5=0, h6=0),
        "list_count": {"ordered": 2, "unordered": 1},
        "bold_count": {"**": 1, "__": 1},
    }


def test_ifevals_responses_go_by_their_prompt(asked, tmp_path):
    said, _ = asked("ifeval", write(tmp_path / "q.jsonl", [IFEVAL]), "responses.jsonl")
    prompt = IFEVAL["prompt"]
    assert lines_of(said) == [{"prompt": prompt, "response": f" 1: {prompt}\n"}]


@pytest.mark.parametrize(
    ("format", "question", "said"),
    [
        ("mt_bench", ARENA_HARD, "q.jsonl:1: wanted a question with question_id, category, turns"),
        ("arena_hard", MT_BENCH[0], "there is no uid, prompt"),
        ("mt_bench", MT_BENCH[0] | {"turns": []}, "q.jsonl:1: wanted turns of text"),
        ("alpaca", ALPACA, "--format=alpaca: wanted one of alpaca_eval, mt_bench"),
    ],
)
def test_questions_of_another_judge_are_refused_by_their_place(
    asked, tmp_path, format, question, said
):
    with pytest.raises(UserError) as error:
        asked(format, write(tmp_path / "q.jsonl", [question]), "mine.jsonl")
    assert said in str(error.value)


def test_questions_of_one_and_of_three_turns_are_answered_each_to_its_end(tmp_path):
    lines = [MT_BENCH[0] | {"turns": list("ab"[:n])} for n in (1, 2)]
    lines.append(MT_BENCH[1] | {"turns": list("abc")})
    questions = read_questions(write(tmp_path / "q.jsonl", lines), FORMATS["mt_bench"], 1.0)
    found = answers_of(questions, [{"n": n} for n in range(6)])
    assert [[record["n"] for record in records] for records in found] == [[1], [2, 4], [0, 3, 5]]
