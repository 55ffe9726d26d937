"""Rewards for generated text, by name in `SCORERS`, or a command of one's own.

A scorer takes N rows and N responses, rows[i] being what response i answers: a dict that has the
"prompt" and what else the data gives, such as an "answer". It returns N float32 scores.
"""

import functools
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence

import numpy as np

from nca_jax.checks import UserError

Scorer = Callable[[Sequence[dict], Sequence[str]], np.ndarray]
COMMAND = "command:"
NUMBER = re.compile(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?")  # 12, -0.5, 1,000; in 7-5 a 7 and a 5


def vader(rows: Sequence[dict], responses: Sequence[str]) -> np.ndarray:
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


def length(rows: Sequence[dict], responses: Sequence[str]) -> np.ndarray:
    """How many words a text has, as white space parts them."""
    return np.array([len(text.split()) for text in responses], np.float32)


def answer(rows: Sequence[dict], responses: Sequence[str]) -> np.ndarray:
    """1 where a response ends in the row's "answer", else 0: a reward that can be verified.

    An answer that is a number is compared, as a number, with the last number of the response;
    any other with its last line, without outer white space, quotes and full stop, in lower case.

    Raises:
      UserError: a row has no "answer" that is a text or a number.
    """
    wanted = [row.get("answer") for row in rows]
    for row, want in zip(rows, wanted, strict=True):
        if type(want) not in (str, int, float):
            raise UserError(
                f"The scorer 'answer' compares with an \"answer\" (text or number) in each row; "
                f"the row of prompt {str(row['prompt'])[:60]!r} has {want!r}."
            )
    scores = [_ends_in(text, str(want)) for text, want in zip(responses, wanted, strict=True)]
    return np.array(scores, np.float32)


def _ends_in(text: str, want: str) -> bool:
    if NUMBER.fullmatch(want.strip()):
        return _numbers(text)[-1:] == _numbers(want)
    lines = [line for line in text.splitlines() if line.strip()]
    return bool(lines) and _plain(lines[-1]) == _plain(want)


def _numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def _plain(line: str) -> str:
    return line.strip().strip("\"'`*").rstrip(".").strip("\"'`* ").lower()


def by_command(command: str, rows: Sequence[dict], responses: Sequence[str]) -> np.ndarray:
    """Scores by a command of one's own, started once for all responses, without a shell.

    It reads one JSON object a response from stdin, the row with its "response", and writes one JSON
    object with a "score" a line to stdout, in the same order.

    Raises:
      UserError: it cannot be started or fails, or what it writes is not that.
    """
    lines = [
        json.dumps(row | {"response": text}, ensure_ascii=False) + "\n"
        for row, text in zip(rows, responses, strict=True)
    ]
    who = f"The scorer {COMMAND}{command}"
    try:
        done = subprocess.run(
            shlex.split(command), input="".join(lines), capture_output=True, encoding="utf-8"
        )
    except (OSError, ValueError, IndexError) as error:  # not there, an open quote, empty
        raise UserError(f"{who} cannot be started: {error}.") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing on stderr"]
        raise UserError(f"{who} stopped with status {done.returncode}: {said[0]}")
    # Not splitlines: a string of JSON may hold other ends of lines, such as U+2028.
    written = done.stdout.removesuffix("\n").split("\n")
    if len(written) != len(lines):
        raise UserError(f"{who} wrote {len(written)} lines for {len(lines)} responses; one each.")
    return np.array([_read_score(who, n, line) for n, line in enumerate(written, 1)], np.float32)


def _read_score(who: str, number: int, line: str) -> float:
    try:
        score = json.loads(line)["score"]
    except (ValueError, KeyError, TypeError):
        score = None
    if type(score) not in (int, float) or not np.isfinite(np.float32(score)):
        raise UserError(
            f'{who} wrote {line[:80]!r} as line {number}; wanted {{"score": a finite number}}.'
        )
    return float(score)


SCORERS: dict[str, Scorer] = {"vader": vader, "length": length, "answer": answer}


def get_scorer(name: str) -> Scorer | None:
    """Returns the scorer of a name, or of "command:CMD"; None for "".

    Raises:
      UserError: no scorer has that name.
    """
    if name.startswith(COMMAND):
        return functools.partial(by_command, name.removeprefix(COMMAND))
    if name and name not in SCORERS:
        raise UserError(f"The scorer {name!r} is not one of {', '.join(SCORERS)}, {COMMAND}CMD.")
    return SCORERS.get(name)


def score_records(rows: Sequence[dict], scorer: Scorer) -> list[dict]:
    """Returns rows of "responses" with the "scores" of all of them, rounded to 6 decimals."""
    asked = [
        {key: x for key, x in row.items() if key != "responses"}
        for row in rows
        for _ in row["responses"]
    ]
    scores = iter(scorer(asked, [text for row in rows for text in row["responses"]]).tolist())
    return [row | {"scores": [round(next(scores), 6) for _ in row["responses"]]} for row in rows]
