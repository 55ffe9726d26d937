"""The question files of the field's judges, and the answer files that these read.

--format     questions                                 answers
alpaca_eval  alpaca_eval.json of AlpacaEval            a JSON list, as example/outputs.json there
mt_bench     question.jsonl of FastChat's llm_judge    model_answer/MODEL.jsonl, of two turns
arena_hard   question.jsonl of Arena-Hard-Auto         model_answer/MODEL.jsonl
ifeval       input_data.jsonl of IFEval                JSON lines of a prompt and a response

A question may have several turns, each asked with the answers to those before it.
"""

import functools
import hashlib
import itertools
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nca_jax.checks import UserError
from nca_jax.data.encode import Encoder, Prompt
from nca_jax.data.sources import JsonlSource, RecordError

Record = dict[str, Any]  # JSON

TEMPERATURES = dict(  # MT-bench's, by category
    writing=0.7, roleplay=0.7, stem=0.1, humanities=0.1, extraction=0.0, math=0.0, coding=0.0
) | {"reasoning": 0.0}
OTHER = 0.7  # of a category that is not among these


class Format(NamedTuple):
    """What a judge asks, and how it wants to be answered."""

    keys: tuple[str, ...]  # of a question
    turns: Callable[[Record], list[str]]  # what the user says, one after the other
    # (question, records of its answers by turn, the model's name) -> what the judge reads of it
    answer: Callable[[Record, Sequence[Record], str], Record]
    temperature: Callable[[Record], float] | None = None  # None: as the config says
    is_list: bool = False  # answers are one JSON list, else JSON lines


class Question(NamedTuple):
    where: str  # "path:line"
    record: Record  # as its file has it
    turns: list[str]
    temperature: float


class Round(NamedTuple):
    """Prompts that are sampled together."""

    temperature: float
    # Records of all rounds before, in their order -> the prompts of this one
    prompts: Callable[[Sequence[Record]], list[Prompt]]


def get_format(name: str) -> Format | None:
    """Returns the format of a name; None for "". Raises UserError if there is none."""
    if name and name not in FORMATS:
        raise UserError(f"--format={name}: wanted one of {', '.join(FORMATS)}.")
    return FORMATS.get(name)


def read_questions(pattern: str, format: Format, temperature: float) -> list[Question]:
    """Returns the questions of the files that match a glob, in order.

    Args:
      temperature: where the format has none of its own.
    Raises:
      UserError: a file cannot be read, or a question lacks what one of the format has.
    """
    source = JsonlSource(pattern)
    return [_question(*source[i], format, temperature) for i in range(len(source))]


def _question(where: str, record: Record, format: Format, temperature: float) -> Question:
    if lacks := [key for key in format.keys if key not in record]:
        raise RecordError(
            f"wanted a question with {', '.join(format.keys)}, got the keys {sorted(record)}: "
            f"there is no {', '.join(lacks)}",
            reason="keys",
            where=where,
        )
    turns = format.turns(record)
    if not isinstance(turns, list) or not turns or not all(isinstance(x, str) for x in turns):
        raise RecordError("wanted turns of text", reason="text", where=where)
    chosen = format.temperature(record) if format.temperature else temperature
    return Question(where, record, turns, chosen)


def rounds_of(questions: Sequence[Question], encoder: Encoder) -> list[Round]:
    """Returns the rounds that answer all turns: by turn, then by temperature."""
    return [
        Round(temperature, functools.partial(_prompts, questions, encoder, n))
        for n, (_, temperature) in enumerate(_rounds(questions))
    ]


def answers_of(questions: Sequence[Question], records: Sequence[Record]) -> list[list[Record]]:
    """Returns the records of each question by turn, of those of all rounds so far in order."""
    members = itertools.chain.from_iterable(
        _members(questions, *which) for which in _rounds(questions)
    )
    found: list[list[Record]] = [[] for _ in questions]
    for i, record in zip(members, records, strict=False):
        found[i].append(record)
    return found


def _rounds(questions: Sequence[Question]) -> list[tuple[int, float]]:
    """Returns (turn, temperature) of each round."""
    return sorted({(t, asked.temperature) for asked in questions for t in range(len(asked.turns))})


def _members(questions: Sequence[Question], turn: int, temperature: float) -> list[int]:
    """Returns which questions are in a round."""
    return [
        i
        for i, asked in enumerate(questions)
        if turn < len(asked.turns) and asked.temperature == temperature
    ]


def _prompts(
    questions: Sequence[Question], encoder: Encoder, number: int, records: Sequence[Record]
) -> list[Prompt]:
    """Returns the prompts of round `number`. Raises RecordError if one is too long, or empty."""
    turn, temperature = _rounds(questions)[number]
    answers, prompts = answers_of(questions, records), []
    for i in _members(questions, turn, temperature):
        said = questions[i].turns[: turn + 1]
        messages = [{"role": "user", "content": said[0]}]
        for answer, then in zip(answers[i][:turn], said[1:], strict=True):
            messages.append({"role": "assistant", "content": answer["responses"][0].strip()})
            messages.append({"role": "user", "content": then})
        prompt = messages if turn else said[0]
        prompts.append(encoder.question(questions[i].where, {"prompt": prompt}))
    return prompts


def _text(answers: Sequence[Record]) -> str:
    return answers[0]["responses"][0]


def _id(*parts: Any) -> str:
    """Returns an id of an answer: the same for the same model, question and text."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:22]


def _alpaca_eval(asked: Record, answers: Sequence[Record], model: str) -> Record:
    about = {key: asked[key] for key in ("dataset", "datasplit") if key in asked}
    said = {"instruction": asked["instruction"], "output": _text(answers), "generator": model}
    return said | about


def _mt_bench(asked: Record, answers: Sequence[Record], model: str) -> Record:
    turns = [answer["responses"][0].strip() for answer in answers]
    return {
        "question_id": asked["question_id"],
        "answer_id": _id(model, asked["question_id"], turns),
        "model_id": model,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": time.time(),
    }


def _arena_hard(asked: Record, answers: Sequence[Record], model: str) -> Record:
    text, ids = _text(answers), answers[0]["response_ids"][0]
    return {
        "uid": asked["uid"],
        "ans_id": _id(model, asked["uid"], text),
        "model": model,
        "messages": [
            {"role": "user", "content": asked["prompt"]},
            {"role": "assistant", "content": {"answer": text}},
        ],
        "tstamp": time.time(),
        "metadata": {"token_len": len(text.split()) if ids is None else len(ids), **_style(text)},
    }


def _style(text: str) -> dict[str, dict[str, int]]:
    """Returns what Arena-Hard controls the style of an answer by: marks outside of its code."""
    for code in re.findall(r"```([^`]*)```", text):
        text = text.replace(code, "")

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text, re.MULTILINE))

    return {
        "header_count": {f"h{n}": count(rf"^#{{{n}}}\s") for n in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def _ifeval(asked: Record, answers: Sequence[Record], model: str) -> Record:
    return {"prompt": asked["prompt"], "response": _text(answers)}


FORMATS = {
    "alpaca_eval": Format(
        ("instruction",), lambda asked: [asked["instruction"]], _alpaca_eval, is_list=True
    ),
    "mt_bench": Format(
        ("question_id", "category", "turns"),
        lambda asked: asked["turns"],
        _mt_bench,
        lambda asked: TEMPERATURES.get(asked["category"], OTHER),
    ),
    "arena_hard": Format(("uid", "prompt"), lambda asked: [asked["prompt"]], _arena_hard),
    "ifeval": Format(("prompt",), lambda asked: [asked["prompt"]], _ifeval),
}
