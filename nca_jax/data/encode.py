"""From rows of JSON to checked examples of token ids.

A row has one of these forms; other keys are ignored:
    {"prompt": text or messages, "responses": [text or messages, ..], "scores": [number, ..]}
    {"prompt": text or messages, "chosen": text or messages, "rejected": text or messages}
    {"prompt_ids": [id, ..], "response_ids": [[id, ..], ..], "scores": [number, ..]}
A pair has the scores 1 and 0. Ids are used as they are: nothing is appended.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np

from nca_jax.checks import UserError
from nca_jax.data import chat, released
from nca_jax.data.sources import RowError, file_sizes, open_source, split_globs

FORMS = (
    ("prompt_ids", "response_ids", "scores"),
    ("prompt", "responses", "scores"),
    ("prompt", "chosen", "rejected"),
)
READ_THREADS, READ_AHEAD = 2, 64  # rows


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


# What of an Example is a JSON value.
_SIMPLE = ("where", "prompt_text", "prompt_hash", "num_tokens", "num_cut")


class Examples(NamedTuple):
    """What files gave: one list of examples an entry, and how many rows were skipped by reason."""

    sources: list[list[Example]]
    skipped: dict[str, int]


class Share(NamedTuple):
    """Which rows this process reads and encodes, and how it gets those that the others do."""

    process: int
    num_processes: int
    gather: Callable[[bytes], list[bytes]]  # from its own bytes to those of every process


ALONE = Share(0, 1, lambda mine: [mine])


def load_examples(
    files: str,
    *,
    tokenizer,
    config,
    vocab_size: int,
    eos_ids: Sequence[int],
    share: Share = ALONE,
) -> Examples:
    """Reads and encodes every row of comma-separated entries, all of it into memory.

    Process p of n reads the rows p, p + n, p + 2 n, ... and all of them get every example, in the
    order of the rows.

    Args:
      tokenizer: None will do where all rows are ids.
      config: the `data` section; `bad_rows` and `too_long` say which rows stop or are skipped.
      eos_ids: ids that end a turn; empty: the tokenizer's eos.
    Raises:
      UserError: no glob is named, a file or a row is unusable, no row of an entry is left, or the
        processes do not see the same files.
    """
    patterns = split_globs(files)
    if not patterns:
        raise UserError("No data is named; set data.files to one or more globs or tfds: entries.")
    skipped: Counter[str] = Counter()
    sources = []
    for pattern in patterns:
        examples = []
        for item in _read(pattern, share, tokenizer, config, vocab_size, eos_ids):
            if isinstance(item, Example):
                examples.append(item)
                continue
            if (config.too_long if item.reason == "too_long" else config.bad_rows) == "stop":
                raise item
            skipped[item.reason] += 1
        if not examples:
            raise UserError(f"No row of {pattern!r} is left; skipped so far: {dict(skipped)}.")
        sources.append(examples)
    return Examples(sources, dict(skipped))


def _read(
    pattern: str, share: Share, tokenizer, config, vocab_size: int, eos_ids: Sequence[int]
) -> Iterable[Example | RowError]:
    """Returns one entry in order: an Example or, for a row that is at fault, its RowError."""
    source = open_source(pattern)

    def read(index: int) -> Example | RowError:
        try:
            return encode_row(
                *source[index],
                tokenizer=tokenizer,
                config=config,
                vocab_size=vocab_size,
                eos_ids=eos_ids,
            )
        except RowError as error:
            return error

    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD)
    mine = grain.MapDataset.range(share.process, len(source), share.num_processes)
    items = mine.map(read).to_iter_dataset(options)
    return items if share.num_processes == 1 else _gathered(pattern, len(source), items, share)


def _gathered(
    pattern: str, num_rows: int, items: Iterable[Example | RowError], share: Share
) -> list[Example | RowError]:
    """Returns the items of all processes in the order of the rows.

    Raises:
      UserError: a process has other files than the first.
    """
    seen = {"rows": num_rows, "sizes": file_sizes(pattern)}
    parts = [_from_bytes(part) for part in share.gather(_to_bytes(seen, items))]
    for process, (theirs, _) in enumerate(parts):
        if theirs != parts[0][0]:
            raise UserError(
                f"Process {process} sees other files of {pattern!r} than process 0: "
                f"{theirs['rows']} rows there, {parts[0][0]['rows']} here; give all of them the "
                "same files."
            )
    n = share.num_processes
    return [parts[i % n][1][i // n] for i in range(num_rows)]


def _to_bytes(seen: dict, items: Iterable[Example | RowError]) -> bytes:
    """Returns what a process has seen and encoded, as arrays of ids and JSON; no pickle."""
    told, ids, keys = [], [np.zeros(0, np.int32)], [np.zeros(0, bool)]
    for item in items:
        if isinstance(item, RowError):
            told.append({"message": item.message, "reason": item.reason, "where": item.where})
            continue
        ids += [item.prompt, *item.responses]
        if item.key_on:
            keys += [item.key_on[0], *item.key_on[1]]
        simple = {name: getattr(item, name) for name in _SIMPLE}
        lengths = [len(item.prompt), *map(len, item.responses)]
        more = {"lengths": lengths, "scores": item.scores.tolist(), "keys": bool(item.key_on)}
        told.append(simple | more)
    file = io.BytesIO()
    text = np.frombuffer(json.dumps([seen, told]).encode(), np.uint8)
    np.savez(file, text=text, ids=np.concatenate(ids), keys=np.concatenate(keys))
    return file.getvalue()


def _from_bytes(content: bytes) -> tuple[dict, list[Example | RowError]]:
    """Returns what `_to_bytes` was given."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        ids, keys = arrays["ids"], arrays["keys"]
        seen, told = json.loads(arrays["text"].tobytes())
    items, num_ids, num_keys = [], 0, 0
    for item in told:
        if "lengths" not in item:
            items.append(RowError(**item))
            continue
        ends = np.cumsum(item["lengths"])
        prompt, *responses = np.split(ids[num_ids : num_ids + ends[-1]], ends[:-1])
        key_on, num_ids = None, num_ids + ends[-1]
        if item["keys"]:
            first, *rest = np.split(keys[num_keys : num_keys + ends[-1]], ends[:-1])
            key_on, num_keys = (first, tuple(rest)), num_keys + ends[-1]
        scores = np.array(item["scores"], np.float32)
        simple = {name: item[name] for name in _SIMPLE}
        arrays = dict(prompt=prompt, responses=tuple(responses), scores=scores, key_on=key_on)
        items.append(Example(**arrays, **simple))
    return seen, items


def encode_row(
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
      RowError: "path:line: what is wrong; what to do", also for a row that is too long unless
        `config.too_long` is truncate or drop.
      UserError: what is wrong is not the row but the tokenizer.
    """
    try:
        return _encode(where, row, tokenizer, config, vocab_size, eos_ids)
    except RowError as error:
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
        raise RowError(f"wanted keys {wanted}, got ({', '.join(row)})", reason="keys")
    prompt, second, third = (row[key] for key in form)
    if "chosen" in form:
        return prompt, [second, third], [1.0, 0.0], False
    for key, values in zip(form[1:], (second, third), strict=True):
        if not isinstance(values, list):
            raise RowError(f"{key} is not a list, but {type(values).__name__}", reason=key)
    return prompt, second, third, "prompt_ids" in form


def _check_scores(scores: list, responses: list) -> np.ndarray:
    """Returns the scores as [n] float32. Raises RowError unless n >= 2 responses have one each."""
    if len(responses) < 2:
        raise RowError(
            f"has {len(responses)} response(s), which teach nothing; give two or more, or set "
            "data.bad_rows=skip",
            reason="responses",
        )
    if len(scores) != len(responses):
        raise RowError(
            f"has {len(responses)} responses but {len(scores)} scores; give each response one",
            reason="scores",
        )
    largest = float(np.finfo(np.float32).max)
    for k, score in enumerate(scores):
        # The comparison is False for NaN, and exact for integers too large for any float.
        if type(score) not in (int, float) or not -largest <= score <= largest:
            raise RowError(f"score {k} is {str(score)[:40]}; give a finite number", reason="scores")
    return np.asarray(scores, np.float32)


def _as_ids(ids: Any, who: str, vocab_size: int) -> np.ndarray:
    """Returns ids as int32. Raises RowError unless they are one or more ints in [0, vocab_size)."""
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise RowError(f"{who} is not a list of token ids", reason="ids")
    if not ids:
        raise RowError(f"{who} has no tokens; write something or leave it out", reason="empty")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise RowError(
            f"{who} has ids from {min(ids)} to {max(ids)}, wanted [0, {vocab_size}); use the "
            "model's own tokenizer",
            reason="ids",
        )
    return np.asarray(ids, np.int32)


def _cuts(prompt_len: int, response_lens: list[int], config) -> tuple[slice, slice]:
    """Returns what is kept of the prompt and of each response.

    A response keeps its first tokens, so a cut one has no end-of-turn token to learn from.

    Raises:
      RowError: something is too long, and `config.too_long` is skip or stop.
    """
    limits = dict(max_prompt_len=config.max_prompt_len, max_response_len=config.max_response_len)
    longest = dict(max_prompt_len=prompt_len, max_response_len=max(response_lens))
    if config.format == "released":
        return released.cuts(prompt_len, max(response_lens), **limits)
    for name, limit in limits.items():
        if longest[name] > limit and config.too_long in ("skip", "stop"):
            raise RowError(
                f"has {longest[name]} tokens where data.{name} is {limit}; raise it, or set "
                "data.too_long to truncate or skip",
                reason="too_long",
            )
    start = max(0, prompt_len - config.max_prompt_len) if config.prompt_keep == "end" else 0
    return slice(start, start + config.max_prompt_len), slice(config.max_response_len)
