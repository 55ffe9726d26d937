"""A record, one line of data, and what is read of it: its forms and the checks of its shape.

A record has one of these forms:
    {"prompt": text or messages, "responses": [text or messages, ..], "scores": [number, ..]}
    {"prompt": text or messages, "chosen": text or messages, "rejected": text or messages}
    {"prompt_ids": [id, ..], "response_ids": [[id, ..], ..], "scores": [number, ..]}
    {"prompt": text or messages, "response": text or messages} or {"messages": messages}
A response that is messages is a whole conversation, which makes "prompt" unnecessary: see
`conversation`. A number may be a text that says one. A pair has the scores 1 and 0, a response
without a score has 0. Ids are used as they are: nothing is appended.

A rollout has the first form, and beside its text
    "prompt_ids", "response_ids"  what was sampled after what; null for a response whose text says
                                  something else, since it was cut at generate.stop
    "tokenizer"                   a digest of the tokenizer whose ids these are
    "finished"                    for each response, whether it ended its turn
    "response_logps"              log-probability of each token when it was sampled, nats; where
                                  generate.logps asked for it
Its ids are used where the tokenizer is the reader's own, else its text. "finished" may be in a
record of any form; without it all responses are, but empty ones, which hold nothing to learn from.
Every other key goes along to the scorers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nca_jax.data.conversation import read_responses
from nca_jax.data.sources import RecordError

FORMS: tuple[tuple[str, ...], ...] = (
    ("prompt_ids", "response_ids", "scores"),
    ("prompt", "responses", "scores"),
    ("prompt", "chosen", "rejected"),
    ("prompt", "response"),
    ("messages",),
)
ANSWERS = ("responses", "scores", "chosen", "rejected")
CHOICES = ("chosen", "rejected")
ROLLOUT = ("prompt_ids", "response_ids", "response_logps", "finished", "tokenizer")
OTHER_TOKENIZER = "records of another tokenizer: their text is encoded"
EQUAL = "records with equal responses of different scores"
UNREAD_SCORES = (
    "pairs have the scores 1 and 0, not their score_chosen and score_rejected: for these write "
    "responses and scores"
)
REVERSED = "pairs with a score_chosen below their score_rejected"


class Parts(NamedTuple):
    """What a record of any form says of its n responses."""

    prompt: Any  # text or messages, see `conversation`; None: it has ids alone
    prompt_ids: list[int] | None  # None: the text is to be encoded
    texts: list | None  # [n] texts, in released format also messages; None: there are ids alone
    ids: list  # [n] lists of ids, or None where the text is to be encoded
    scores: np.ndarray  # [n] float32
    finished: Sequence[bool] | None  # [n]; None: the record does not say, so all are
    is_pair: bool  # its scores are 1 and 0 since it has none
    notes: tuple[str, ...]  # what is to be counted and said of it


def question(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the record without its responses: what is answered, and what a scorer is given."""
    return {key: value for key, value in record.items() if key not in ANSWERS + ROLLOUT}


def read_parts(
    record: dict[str, Any], *, digest: str, least_responses: int, released: bool = False
) -> Parts:
    """Returns what a record says, its shape checked.

    Args:
      digest: of the reader's tokenizer.
      released: the format, see `conversation`.
    Raises:
      RecordError: it has no form, too few responses, or not a score or `finished` for each; its
        prompt or a response is malformed; it is a pair of equals.
    """
    digest_there = record.get("tokenizer")
    is_rollout, is_own = digest_there is not None, digest_there == digest
    forms = FORMS[1:] if is_rollout else FORMS
    form = next((keys for keys in forms if record.keys() >= set(keys) - {"prompt"}), None)
    if form is None:
        wanted = " or ".join(f"({', '.join(keys)})" for keys in forms)
        raise RecordError(f"wanted keys {wanted}, got ({', '.join(record)})", reason="keys")
    is_pair = "chosen" in form
    if is_pair:
        responses, scores = [record[key] for key in CHOICES], [1.0, 0.0]
    elif "scores" not in form:
        responses, scores = [record[form[-1]]], [0.0]
    else:
        responses, scores = _list_of(record, form[1]), _list_of(record, form[2])
    n = len(responses)
    _check_number(n, least_responses)
    checked = _check_scores(scores, n)
    finished = _check_finished(record.get("finished"), n)
    if "prompt_ids" in form:
        notes = _notes_of(responses, checked, finished)
        return Parts(None, record["prompt_ids"], None, responses, checked, finished, False, notes)
    prompt, texts = read_responses(record.get("prompt"), responses, released=released)
    notes = _notes_of(texts, checked, finished)
    if is_pair:
        notes += _notes_of_pair(record, texts)
    has_ids = "prompt_ids" in record and "response_ids" in record
    if not (is_own and has_ids):
        notes += (OTHER_TOKENIZER,) if is_rollout and not is_own else ()
        if finished is None and "" in texts:
            finished = _left_out(texts, least_responses)
        return Parts(prompt, None, texts, [None] * n, checked, finished, is_pair, notes)
    ids = _list_of(record, "response_ids")
    if len(ids) != n:
        raise RecordError(
            f"has {n} responses but {len(ids)} response_ids; give each response its own or null",
            reason="response_ids",
        )
    return Parts(prompt, record["prompt_ids"], texts, ids, checked, finished, is_pair, notes)


def read_score(score: Any, who: str) -> float:
    """Returns a number, or that of a text. RecordError, naming `who`, unless float32 holds it."""
    largest = float(np.finfo(np.float32).max)
    number = score
    if isinstance(score, str):
        try:
            number = float(score)
        except ValueError:
            pass
    # The comparison is False for NaN, and exact for integers too large for any float.
    if type(number) not in (int, float) or not -largest <= number <= largest:
        raise RecordError(f"{who} is {str(score)[:40]}; give a finite number", reason="scores")
    return float(number)


def _notes_of(
    responses: list, scores: np.ndarray, finished: Sequence[bool] | None
) -> tuple[str, ...]:
    """Returns what is said of a record that scores one response in two ways."""
    said = list(map(str, zip(responses, finished or [True] * len(responses), strict=True)))
    differ = len(set(zip(said, scores.tolist(), strict=True))) > len(set(said))
    return (EQUAL,) if differ else ()


def _notes_of_pair(record: dict[str, Any], texts: list) -> tuple[str, ...]:
    """Returns what is said of a pair. Raises RecordError if it teaches nothing."""
    if texts[0] == texts[1]:
        raise RecordError("chosen and rejected are the same", reason="same response")
    try:
        chosen, rejected = (read_score(record.get(f"score_{x}"), x) for x in CHOICES)
    except RecordError:  # none, or of another meaning
        return ()
    return (UNREAD_SCORES, REVERSED) if chosen < rejected else (UNREAD_SCORES,)


def _left_out(texts: list, least: int) -> list[bool]:
    """Returns `finished` where no one says how empty responses ended: cut off, so left out.

    Raises:
      RecordError: of the others there are too few; where all are empty, a policy was silent.
    """
    finished = [text != "" for text in texts]
    if 0 < sum(finished) < least:
        raise RecordError(f"response {texts.index('')} is empty; leave it out", reason="response")
    return finished


def _list_of(record: dict[str, Any], key: str) -> list:
    values = record[key]
    if not isinstance(values, list):
        raise RecordError(f"{key} is not a list, but {type(values).__name__}", reason=key)
    return values


def _check_number(n: int, least: int) -> None:
    """Raises RecordError unless there are enough responses to learn from."""
    if n < least:
        raise RecordError(
            f"has {n} response(s), which teach nothing; give {least} or more, or set "
            "data.bad_rows=skip",
            reason="responses",
        )


def _check_scores(scores: list, n: int) -> np.ndarray:
    """Returns the scores as [n] float32. RecordError unless they are n finite numbers."""
    if len(scores) != n:
        raise RecordError(
            f"has {n} responses but {len(scores)} scores; give each response one", reason="scores"
        )
    return np.array([read_score(score, f"score {k}") for k, score in enumerate(scores)], np.float32)


def _check_finished(finished: Any, n: int) -> Sequence[bool] | None:
    """Returns `finished`. RecordError unless it is None or n bools."""
    if finished is None:
        return None
    is_bools = isinstance(finished, list) and all(type(value) is bool for value in finished)
    if not is_bools or len(finished) != n:
        raise RecordError(
            f"finished is {str(finished)[:40]}; give true or false for each of the {n} responses, "
            "or leave it out",
            reason="finished",
        )
    return finished
