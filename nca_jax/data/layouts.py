"""From records as the hub's data sets lay them out to one form, and where each data set is found.

Every layout becomes
    {"prompt": [{"role", "content"}, ..], "responses": [text, ..], "scores": [number, ..]}
with two responses or more; the prompt is all that comes before the response, so it may have turns.
A record that cannot is a RecordError with the word that it is counted under; a part that is left
out of a record that stays is counted in `left_out`.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from nca_jax.data.conversation import Messages, as_messages, read_messages, read_responses
from nca_jax.data.record import read_parts, read_score
from nca_jax.data.sources import RecordError

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
NOT_RATED = ("N/A", "", None)

# (the raw record, counts of what is left out) -> the record in the one form
Layout = Callable[[dict[str, Any], Counter], dict[str, Any]]


@dataclass(frozen=True)
class Origin:
    """Where the raw files of a data set are, and how their records are laid out."""

    hub: str  # repository of the Hugging Face Hub; "": the files are the user's own
    splits: dict[str, str]  # split -> how the names of its files, or their folder, begin
    layout: Layout


def numbered_record(record: dict[str, Any], left_out: Counter) -> dict[str, Any]:
    """A0, A1, ..: conversations with one prompt, and score_A0, score_A1, ..: their scores."""
    names = sorted(
        (key for key in record if re.fullmatch(r"A\d+", key)), key=lambda key: int(key[1:])
    )
    _field(record, "A0", list)
    prompt, responses = read_responses(None, [record[name] for name in names])
    return _scored(prompt, responses, [_field(record, f"score_{name}", object) for name in names])


def rated_record(record: dict[str, Any], left_out: Counter, *, score: str) -> dict[str, Any]:
    """instruction and completions, each with a response, an overall_score and ratings by aspect.

    Args:
      score: "overall"; "fine-grained", the mean over the aspects that are rated; or one aspect.
    Returns:
      The record with its best response first; responses without a score are left out.
    """
    rated = []
    for completion in _field(record, "completions", list):
        text = _field(completion, "response", str)
        value = _rating(completion, score, left_out)
        if value is None:
            left_out["responses not rated"] += 1
        elif not text.strip():
            left_out["responses empty"] += 1
        else:
            rated.append((value, text))
    rated.sort(key=lambda pair: -pair[0])  # stable: ties stay in the order of the data
    prompt = _field(record, "instruction", str)
    return _scored(prompt, [text for _, text in rated], [value for value, _ in rated])


def pair_record(
    record: dict[str, Any], left_out: Counter, *, given: bool = False
) -> dict[str, Any]:
    """chosen and rejected: conversations with one prompt. Scores are 1 and 0, or those given."""
    conversations = [_field(record, key, list) for key in ("chosen", "rejected")]
    prompt, responses = read_responses(record.get("prompt"), conversations)
    scores = [1.0, 0.0]
    if given:
        scores = [_field(record, key, object) for key in ("score_chosen", "score_rejected")]
    return _pair(prompt, responses, scores)


def trajectory_record(record: dict[str, Any], left_out: Counter) -> dict[str, Any]:
    """trajectory: turns of {from, value}, the last one the user's; chosen and rejected: texts."""
    turns = read_messages(_field(record, "trajectory", list), "trajectory")
    if turns[-1]["role"] != "user":
        raise RecordError("the last turn is not the user's", reason="role")
    responses = [_field(record, key, str) for key in ("chosen", "rejected")]
    return _pair(turns, responses, [1.0, 0.0])


def own_record(record: dict[str, Any], left_out: Counter) -> dict[str, Any]:
    """A record as `nca_jax.data.record` says, of text, whose responses all ended their turn."""
    parts = read_parts(record, digest="", least_responses=2)
    if parts.prompt is None or parts.texts is None:
        raise RecordError("wanted text, got ids", reason="ids")
    if record.get("finished") and False in record["finished"]:
        raise RecordError("a data set has no responses that were cut off", reason="not finished")
    return _scored(parts.prompt, parts.texts, parts.scores.tolist())


PREFERENCES = {"train_prefs": "train_prefs", "test_prefs": "test_prefs"}
ALL = {"train": ""}

# name -> {score, "" as the data set has it: where it is}
DATA_SETS: dict[str, dict[str, Origin]] = {
    "ultrafeedback_reward": {
        "": Origin("ChenDRAG/ultrafeedback_reward", PREFERENCES, numbered_record),
        **{
            score: Origin("openbmb/UltraFeedback", ALL, partial(rated_record, score=score))
            for score in ("overall", "fine-grained", *ASPECTS)
        },
    },
    "ultrafeedback_preference": {  # HuggingFaceH4/ultrafeedback_binarized is laid out the same
        "": Origin("ChenDRAG/ultrafeedback_preference", PREFERENCES, pair_record),
        "given": Origin(
            "ChenDRAG/ultrafeedback_preference", PREFERENCES, partial(pair_record, given=True)
        ),
    },
    "ultra_interact_pair": {"": Origin("openbmb/UltraInteract_pair", ALL, trajectory_record)},
    "scored_jsonl": {"": Origin("", {"train": "train", "test": "test"}, own_record)},
}


def _rating(completion: dict[str, Any], score: str, left_out: Counter) -> float | None:
    """Returns the score of a completion; None if it has none."""
    if score == "overall":
        value = completion.get("overall_score")
        return None if value in NOT_RATED or value != value else read_score(value, score)
    annotations = _field(completion, "annotations", dict)
    ratings = []
    for aspect in ASPECTS if score == "fine-grained" else (score,):
        found = annotations.get(aspect)
        # Files before the hub's have a list of annotations, of which the first is it.
        match found[0] if isinstance(found, list) and found else found:
            case {"Rating": rating} if rating not in NOT_RATED:
                ratings.append(read_score(rating, aspect))
            case _:
                left_out["ratings N/A"] += 1
    return sum(ratings) / len(ratings) if ratings else None


def _pair(prompt: str | Messages, responses: list, scores: list) -> dict[str, Any]:
    if responses[0] == responses[1]:
        raise RecordError("chosen and rejected are the same", reason="same response")
    return _scored(prompt, responses, scores)


def _scored(prompt: str | Messages, responses: list, scores: list) -> dict[str, Any]:
    """Returns the record in the one form. Raises RecordError if it would teach nothing."""
    if len(responses) < 2:
        raise RecordError(f"has {len(responses)} responses", reason="fewer than 2 responses")
    if len(responses) != len(scores):
        raise RecordError("responses and scores differ in number", reason="scores")
    turns = [{key: turn[key] for key in ("role", "content")} for turn in as_messages(prompt)]
    if not turns[-1]["content"].strip():
        raise RecordError("the prompt is empty", reason="empty prompt")
    if not all(text.strip() for text in responses):
        raise RecordError("a response is empty", reason="empty response")
    numbers = [read_score(score, f"score {k}") for k, score in enumerate(scores)]
    return {"prompt": turns, "responses": responses, "scores": numbers}


def _field(record: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """Returns record[key]. Raises RecordError unless it is there and of its kind."""
    if not isinstance(record, dict) or key not in record or not isinstance(record[key], kind):
        raise RecordError(f"wanted {key}", reason=f"no {key}")
    return record[key]
