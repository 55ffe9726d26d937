"""Rewards for generated text, by name in `SCORERS`, or a command of one's own.

One that is a model, REWARD_MODEL, is opened by `nca_jax.rollout`.
A scorer takes N records and N responses, records[i] being what response i answers: a dict that has
the "prompt" and what else the data gives, such as an "answer". It gives N scores, of float32.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from nca_jax.checks import UserError
from nca_jax.rewards import checkers
from nca_jax.rewards.command import ask

Record = dict[str, Any]  # JSON

COMMAND = "command:"
REWARD_MODEL = "reward_model:"
NUMBER = re.compile(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?")  # 12, -0.5, 1,000; in 7-5 a 7 and a 5


class Scorer(NamedTuple):
    """How responses are scored, and what is wanted of their records."""

    # N records, N responses -> N scores, one by one as they are known
    score: Callable[[Sequence[Record], Sequence[str]], Iterable[float]]
    lacks: Callable[[Record], str] = lambda record: ""  # what a record lacks to be scored, or ""
    digest: str = ""  # of the model that it is: every process of a run computes its part of it

    def __call__(self, records: Sequence[Record], responses: Sequence[str]) -> np.ndarray:
        return np.fromiter(self.score(records, responses), np.float32)

    def check(self, where: str, record: Record) -> None:
        """Raises UserError, naming its place, if the responses to a record cannot be scored."""
        if lack := self.lacks(record):
            raise UserError(f"{where}: {lack}.")


def vader(records: Sequence[Record], responses: Sequence[str]) -> np.ndarray:
    """How positive a text is, in [-1, 1]: VADER's compound score, averaged over its sentences.

    One compound score of a whole text saturates after a few positive words; the mean over
    sentences does not. (Hutto and Gilbert 2014; the package vaderSentiment.)
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError("The scorer 'vader' needs: pip install nca_jax[demo].") from None
    analyzer = SentimentIntensityAnalyzer()

    def score(text: str) -> float:
        sentences = [s for s in re.split(r"(?<=[.!?])\s+|\n+", text) if s.strip()]
        compounds = [analyzer.polarity_scores(sentence)["compound"] for sentence in sentences]
        return float(np.mean(compounds)) if compounds else 0.0

    return np.array([score(text) for text in responses], np.float32)


def length(records: Sequence[Record], responses: Sequence[str]) -> np.ndarray:
    """How many words a text has, as white space parts them."""
    return np.array([len(text.split()) for text in responses], np.float32)


def answer(records: Sequence[Record], responses: Sequence[str]) -> np.ndarray:
    """1 where a response ends in the record's "answer", else 0: a reward that can be verified.

    An answer that is a number is compared, as a number, with the last number of the response;
    any other with its last line, without outer white space, quotes and full stop, in lower case.
    """
    scores = [
        _ends_in(text, str(record["answer"]))
        for record, text in zip(records, responses, strict=True)
    ]
    return np.array(scores, np.float32)


def lacks_answer(record: Record) -> str:
    """Returns what "answer" and "math" miss in a record: an "answer", a text or a number."""
    if type(record.get("answer")) in (str, int, float):
        return ""
    return (
        'the scorer wants an "answer" of text or a number, got '
        f"{record.get('answer')!r:.40} in the keys {sorted(record)}"
    )


def _ends_in(text: str, want: str) -> bool:
    if NUMBER.fullmatch(want.strip()):
        return _numbers(text)[-1:] == _numbers(want)
    lines = [line for line in text.splitlines() if line.strip()]
    return bool(lines) and _plain(lines[-1]) == _plain(want)


def _numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def _plain(line: str) -> str:
    return line.strip().strip("\"'`*").rstrip(".").strip("\"'`* ").lower()


def by_command(
    command: str, records: Sequence[Record], responses: Sequence[str]
) -> Iterator[float]:
    """Scores by a command of one's own, started once for all responses, without a shell.

    It reads one JSON object a response from stdin, the record with its "response", and writes one
    JSON object with a "score" a line to stdout, in the same order.

    Raises:
      UserError: it cannot be started or fails, or what it writes is not that.
    """
    asked = [record | {"response": text} for record, text in zip(records, responses, strict=True)]
    who, wanted = f"The scorer {COMMAND}{command}", '{"score": a finite number}'
    return ask(who, command, asked, _read_score, what="responses", wanted=wanted)


def _read_score(said: Any) -> float | None:
    score = said.get("score") if isinstance(said, dict) else None
    if isinstance(score, int | float) and type(score) is not bool:
        if np.isfinite(np.float32(score)):
            return float(score)
    return None


SCORERS = {
    "vader": Scorer(vader),
    "length": Scorer(length),
    "answer": Scorer(answer, lacks_answer),
    "math": Scorer(checkers.math, lacks_answer),
    "ifeval": Scorer(checkers.ifeval, checkers.lacks_instructions),
}
KNOWN = f"{', '.join(SCORERS)}, {COMMAND}CMD, {REWARD_MODEL}DIR"


def check_scorer(name: str) -> None:
    """Raises UserError, before a device is touched, unless a scorer may have that name."""
    if not name.startswith(REWARD_MODEL):  # whether that is there is seen when it is opened
        get_scorer(name)


def get_scorer(name: str) -> Scorer | None:
    """Returns the scorer of a name, or of "command:CMD"; None for "".

    Raises:
      UserError: no scorer has that name.
    """
    if name.strip() == COMMAND:
        raise UserError(f"The scorer {COMMAND} names no command: write {COMMAND}CMD.")
    if name.startswith(COMMAND):
        return Scorer(functools.partial(by_command, name.removeprefix(COMMAND)))
    if name and name not in SCORERS:
        raise UserError(f"The scorer {name!r} is not one of {KNOWN}.")
    return SCORERS.get(name)


def score_each(
    scorer: Scorer, records: Sequence[Record], responses: Sequence[Sequence[str]]
) -> Iterator[list[float]]:
    """Yields the scores of each record's responses, rounded to 6 decimals, as they are known."""
    asked = [record for record, texts in zip(records, responses, strict=True) for _ in texts]
    scores = iter(scorer.score(asked, [text for texts in responses for text in texts]))
    for texts in responses:
        yield [round(float(score), 6) for score in itertools.islice(scores, len(texts))]
    for _ in scores:  # the last word of a command comes after its scores
        pass


def score_all(
    scorer: Scorer, records: Sequence[Record], responses: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Returns all that `score_each` yields."""
    return list(score_each(scorer, records, responses))
