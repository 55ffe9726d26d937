"""From a row of JSON to a checked example of token ids.

A row has one of these forms; other keys are ignored:
    {"prompt": text or messages, "responses": [text or messages, ..], "scores": [number, ..]}
    {"prompt": text or messages, "chosen": text or messages, "rejected": text or messages}
    {"prompt_ids": [id, ..], "response_ids": [[id, ..], ..], "scores": [number, ..]}
A pair has the scores 1 and 0. Ids are used as they are: nothing is appended.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nca_jax.checks import UserError
from nca_jax.data import chat, released
from nca_jax.data.sources import RecordError

FORMS = (
    ("prompt_ids", "response_ids", "scores"),
    ("prompt", "responses", "scores"),
    ("prompt", "chosen", "rejected"),
)


@dataclass(frozen=True, eq=False)
class Example:
    """A prompt and all responses of its row, encoded and cut to length."""

    where: str  # "path:line", or "tfds:NAME:SPLIT:index"
    prompt: np.ndarray  # [P] int32
    responses: tuple[np.ndarray, ...]  # each [its length] int32
    scores: np.ndarray  # [n] float32, in the data's unit, data.first_bonus added to the first
    prompt_text: str | list[dict] | None  # as the row has it, for generation; None: it has ids
    prompt_hash: float  # in [0, 1), of the whole prompt: what is held out goes by it
    num_tokens: int  # of prompt and responses, before cutting
    num_cut: int  # how many of these were cut off
    # Which tokens may be attended to, as (prompt's, each response's) bools; None: all.
    key_on: tuple[np.ndarray, tuple[np.ndarray, ...]] | None = None


def encode_record(
    where: str,
    row: dict[str, Any],
    *,
    tokenizer,
    config,
    vocab_size: int,
    eos_ids: Sequence[int],
) -> Example:
    """Encodes, checks and cuts one row.

    Raises:
      RecordError: "path:line: what is wrong; what to do", also for a row that is too long unless
        `config.too_long` is truncate or drop.
      UserError: what is wrong is not the row but the tokenizer.
    """
    try:
        return _encode(where, row, tokenizer, config, vocab_size, eos_ids)
    except RecordError as error:
        raise error.at(where) from None


def _encode(where, row, tokenizer, config, vocab_size, eos_ids) -> Example:
    prompt, responses, scores, is_ids = _normalise(row)
    scores = _check_scores(scores, responses)
    scores[0] += config.first_bonus
    if is_ids:
        prompt_ids, response_ids = prompt, responses
    elif tokenizer is None:
        raise UserError(f"{where}: the rows hold text; set data.tokenizer.")
    else:
        prompt_ids = chat.encode_prompt(prompt, tokenizer, config.format)
        response_ids = chat.encode_responses(prompt, responses, tokenizer, config.format, eos_ids)
    whole_prompt = _as_ids(prompt_ids, "the prompt", vocab_size)
    whole_responses = [
        _as_ids(ids, f"response {k}", vocab_size) for k, ids in enumerate(response_ids)
    ]
    of_prompt, of_response = _cuts(len(whole_prompt), [*map(len, whole_responses)], config)
    # Copies, so that what was cut off does not stay in memory.
    cut_prompt = whole_prompt[of_prompt].copy()
    cut_responses = tuple(ids[of_response].copy() for ids in whole_responses)
    key_on = None
    if config.format == "released":
        off_ids = released.key_off_ids(tokenizer, eos_ids)
        key_on = (
            released.prompt_keys(cut_prompt, off_ids),
            tuple(released.response_keys(ids, off_ids)[of_response] for ids in whole_responses),
        )
    num_tokens = len(whole_prompt) + sum(map(len, whole_responses))
    return Example(
        where=where,
        prompt=cut_prompt,
        responses=cut_responses,
        scores=scores,
        prompt_text=None if is_ids else prompt,
        prompt_hash=hash_prompt(prompt),
        num_tokens=num_tokens,
        num_cut=num_tokens - len(cut_prompt) - sum(map(len, cut_responses)),
        key_on=key_on,
    )


def hash_prompt(prompt: Any) -> float:
    """Returns sha256 of the prompt's canonical JSON as a number in [0, 1)."""
    text = json.dumps(prompt, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # 53 bits: exact in a float64


def _normalise(row: dict[str, Any]) -> tuple[Any, list, list, bool]:
    """Returns (prompt, responses, scores, whether they are ids) of a row of any form."""
    form = next((keys for keys in FORMS if all(key in row for key in keys)), None)
    if form is None:
        wanted = " or ".join(f"({', '.join(keys)})" for keys in FORMS)
        raise RecordError(f"wanted keys {wanted}, got ({', '.join(row)})", reason="keys")
    prompt, second, third = (row[key] for key in form)
    if "chosen" in form:
        return prompt, [second, third], [1.0, 0.0], False
    for key, values in zip(form[1:], (second, third), strict=True):
        if not isinstance(values, list):
            raise RecordError(f"{key} is not a list, but {type(values).__name__}", reason=key)
    return prompt, second, third, "prompt_ids" in form


def _check_scores(scores: list, responses: list) -> np.ndarray:
    """Returns the scores as [n] float32. RecordError unless n >= 2 responses have one each."""
    if len(responses) < 2:
        raise RecordError(
            f"has {len(responses)} response(s), which teach nothing; give two or more, or set "
            "data.bad_rows=skip",
            reason="responses",
        )
    if len(scores) != len(responses):
        raise RecordError(
            f"has {len(responses)} responses but {len(scores)} scores; give each response one",
            reason="scores",
        )
    largest = float(np.finfo(np.float32).max)
    for k, score in enumerate(scores):
        # The comparison is False for NaN, and exact for integers too large for any float.
        if type(score) not in (int, float) or not -largest <= score <= largest:
            raise RecordError(
                f"score {k} is {str(score)[:40]}; give a finite number", reason="scores"
            )
    return np.asarray(scores, np.float32)


def _as_ids(ids: Any, who: str, vocab_size: int) -> np.ndarray:
    """Returns ids as int32. RecordError unless they are one or more ints in [0, vocab_size)."""
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise RecordError(f"{who} is not a list of token ids", reason="ids")
    if not ids:
        raise RecordError(f"{who} has no tokens; write something or leave it out", reason="empty")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise RecordError(
            f"{who} has ids from {min(ids)} to {max(ids)}, wanted [0, {vocab_size}); use the "
            "model's own tokenizer",
            reason="ids",
        )
    return np.asarray(ids, np.int32)


def _cuts(prompt_len: int, response_lens: list[int], config) -> tuple[slice, slice]:
    """Returns what is kept of the prompt and of each response.

    A response keeps its first tokens, so a cut one has no end-of-turn token to learn from.

    Raises:
      RecordError: something is too long, and `config.too_long` is skip or stop.
    """
    limits = dict(max_prompt_len=config.max_prompt_len, max_response_len=config.max_response_len)
    longest = dict(max_prompt_len=prompt_len, max_response_len=max(response_lens))
    if config.format == "released":
        return released.cuts(prompt_len, max(response_lens), **limits)
    for name, limit in limits.items():
        if longest[name] > limit and config.too_long in ("skip", "stop"):
            raise RecordError(
                f"has {longest[name]} tokens where data.{name} is {limit}; raise it, or set "
                "data.too_long to truncate or skip",
                reason="too_long",
            )
    start = max(0, prompt_len - config.max_prompt_len) if config.prompt_keep == "end" else 0
    return slice(start, start + config.max_prompt_len), slice(config.max_response_len)
