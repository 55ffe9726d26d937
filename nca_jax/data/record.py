"""A record, one line of data, and what is read of it: its forms and the checks of its shape.

A record has one of these forms:
    {"prompt": text or messages, "responses": [text or messages, ..], "scores": [number, ..]}
    {"prompt": text or messages, "chosen": text or messages, "rejected": text or messages}
    {"prompt_ids": [id, ..], "response_ids": [[id, ..], ..], "scores": [number, ..]}
A pair has the scores 1 and 0. Ids are used as they are: nothing is appended.

A rollout has the first form, and beside its text
    "prompt_ids", "response_ids"  what was sampled after what; null for a response whose text says
                                  something else, since it was cut at generate.stop
    "tokenizer"                   a digest of the tokenizer whose ids these are
    "finished"                    for each response, whether it ended its turn
Its ids are used where the tokenizer is the reader's own, else its text. "finished" may be in a
record of any form; without it all responses are. Every other key goes along to the scorers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nca_jax.data.sources import RecordError

FORMS = (
    ("prompt_ids", "response_ids", "scores"),
    ("prompt", "responses", "scores"),
    ("prompt", "chosen", "rejected"),
)
ANSWERS = ("responses", "scores", "chosen", "rejected")
ROLLOUT = ("prompt_ids", "response_ids", "finished", "tokenizer")
OTHER_TOKENIZER = "records of another tokenizer: their text is encoded"


class Parts(NamedTuple):
    """What a record of any form says of its n responses."""

    prompt: Any  # as it came, which should be text or messages; None: it has ids
    prompt_ids: list[int] | None  # None: the text is to be encoded
    texts: list | None  # [n] texts or messages; None: there are ids alone
    ids: list  # [n] lists of ids, or None where the text is to be encoded
    scores: np.ndarray  # [n] float32
    finished: Sequence[bool] | None  # [n]; None: the record does not say, so all are
    notes: tuple[str, ...]  # what is to be counted and said of it


def question(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the record without its responses: what is answered, and what a scorer is given."""
    return {key: value for key, value in record.items() if key not in ANSWERS + ROLLOUT}


def read_parts(record: dict[str, Any], *, digest: str, least_responses: int) -> Parts:
    """Returns what a record says, its shape checked; texts and ids are as they came.

    Args:
      digest: of the reader's tokenizer.
    Raises:
      RecordError: it has no form, too few responses, or not a score or `finished` for each.
    """
    digest_there = record.get("tokenizer")
    is_rollout, is_own = digest_there is not None, digest_there == digest
    forms = FORMS[1:] if is_rollout else FORMS
    form = next((keys for keys in forms if all(key in record for key in keys)), None)
    if form is None:
        wanted = " or ".join(f"({', '.join(keys)})" for keys in forms)
        raise RecordError(f"wanted keys {wanted}, got ({', '.join(record)})", reason="keys")
    if "chosen" in form:
        responses, scores = [record["chosen"], record["rejected"]], [1.0, 0.0]
    else:
        responses, scores = _list_of(record, form[1]), _list_of(record, form[2])
    n = len(responses)
    _check_number(n, least_responses)
    checked = _check_scores(scores, n)
    finished = _check_finished(record.get("finished"), n)
    if "prompt_ids" in form:
        return Parts(None, record["prompt_ids"], None, responses, checked, finished, ())
    has_ids = "prompt_ids" in record and "response_ids" in record
    if not (is_own and has_ids):
        notes = (OTHER_TOKENIZER,) if is_rollout and not is_own else ()
        return Parts(record["prompt"], None, responses, [None] * n, checked, finished, notes)
    ids = _list_of(record, "response_ids")
    if len(ids) != n:
        raise RecordError(
            f"has {n} responses but {len(ids)} response_ids; give each response its own or null",
            reason="response_ids",
        )
    return Parts(record["prompt"], record["prompt_ids"], responses, ids, checked, finished, ())


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
    largest = float(np.finfo(np.float32).max)
    for k, score in enumerate(scores):
        # The comparison is False for NaN, and exact for integers too large for any float.
        if type(score) not in (int, float) or not -largest <= score <= largest:
            raise RecordError(
                f"score {k} is {str(score)[:40]}; give a finite number", reason="scores"
            )
    return np.asarray(scores, np.float32)


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
