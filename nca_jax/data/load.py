"""Every record of the files as an example in memory, each process encoding its share."""

import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import grain
import numpy as np

from nca_jax.checks import UserError
from nca_jax.data.encode import TOO_FEW_LEFT, Encoder, Example, Prompt
from nca_jax.data.group import Group
from nca_jax.data.sources import (
    JsonlSource,
    RecordError,
    file_digests,
    open_source,
    split_globs,
)
from nca_jax.data.tfds_source import TfdsSource
from nca_jax.protocols import DataSection

Item = TypeVar("Item", Example, Prompt)  # what a record is read as

READ_THREADS, READ_AHEAD = 2, 64  # records
SAME_UNIT = 2  # scores whose spans differ by a larger factor are taken to be of different units
# What of an Example is a JSON value.
_SIMPLE = ("where", "record", "prompt_hash", "num_tokens", "num_cut", "is_pair", "notes")


class Examples(NamedTuple):
    """What files gave: one list of examples an entry, and what is to be said of the others."""

    sources: list[list[Example]]
    counts: Counter[str]  # "records skipped: json" -> how many, see `notes_of`


class Prompts(NamedTuple):
    """The prompts of files, and what is to be said of the others, as in Examples."""

    prompts: list[Prompt]
    counts: Counter[str]


class Share(NamedTuple):
    """Which records this process reads and encodes, and how it gets those that the others do."""

    process: int
    num_processes: int
    gather: Callable[[bytes], list[bytes]]  # from its own bytes to those of every process


ALONE = Share(0, 1, lambda mine: [mine])


def load_examples(files: str, encoder: Encoder, *, share: Share = ALONE) -> Examples:
    """Reads and encodes every record of comma-separated entries, all of it into memory.

    Process p of n reads the records p, p + n, p + 2 n, ... and all of them get every example, in
    the order of the records. The encoder's config says which of them stop and which are skipped.

    Raises:
      UserError: no glob is named, a file or a record is unusable, no record of an entry is left, or
        the processes do not see the same files.
    """
    patterns = split_globs(files)
    if not patterns:
        raise UserError("No data is named; set data.files to one or more globs or tfds: entries.")
    counts: Counter[str] = Counter()
    sources = [
        _usable(_read(pattern, share, encoder), repr(pattern), encoder.config, counts)
        for pattern in patterns
    ]
    _count_units(patterns, sources, counts)
    return Examples(sources, counts)


def load_prompts(pattern: str, encoder: Encoder) -> Prompts:
    """Reads and encodes the prompts of the JSON lines that match a glob, in order.

    Raises:
      UserError: a file or a prompt is unusable, or none is left.
    """
    source, counts = JsonlSource(pattern), Counter()
    items = (_attempt(encoder.question, source, i) for i in range(len(source)))
    return Prompts(_usable(items, repr(pattern), encoder.config, counts), counts)


def notes_of(counts: Counter[str]) -> list[str]:
    """Returns what is said of records that were not read as they are, a line for each kind."""
    return [f"{number} {what}" for what, number in counts.items()]


def _usable(
    items: Iterable[Item | RecordError], who: str, config: DataSection, counts: Counter[str]
) -> list[Item]:
    """Returns the items that are no RecordError; raises such an error, or counts it as skipped.

    What is wrong with a record stops by `config.bad_rows`, its length by `config.too_long`; a
    record of samples that hold nothing is no one's mistake.
    """
    usable = []
    for item in items:
        if not isinstance(item, RecordError):
            usable.append(item)
            counts.update(item.notes)
            continue
        rules = {"too_long": config.too_long, TOO_FEW_LEFT: "skip"}
        if rules.get(item.reason, config.bad_rows) == "stop":
            raise item
        counts[f"records skipped: {item.reason}"] += 1
    if not usable:
        raise UserError(f"No record of {who} is left: {', '.join(notes_of(counts))}.")
    return usable


def _count_units(
    patterns: Sequence[str], sources: Sequence[Sequence[Example]], counts: Counter[str]
) -> None:
    """Counts the records of each entry and kind where their scores seem to be of several units.

    The losses know one unit, that of alpha: scores that span 0 to 10 outweigh those of 0 to 1.
    """
    found: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    for pattern, source in zip(patterns, sources, strict=True):
        for example in source:
            found["pairs" if example.is_pair else "records", pattern].append(example.scores)
    told = {}
    for (kind, pattern), scores in found.items():
        low, high = min(map(np.min, scores)), max(map(np.max, scores))
        what = f"{kind} of {pattern!r} have scores from {low:g} to {high:g}: of several units?"
        told[what] = (len(scores), float(high) - float(low))
    spans = [span for _, span in told.values() if span > 0]
    if spans and max(spans) > SAME_UNIT * min(spans):
        counts.update({what: number for what, (number, _) in told.items()})


def _attempt(
    encode: Callable[[str, dict[str, Any]], Item], source: JsonlSource | TfdsSource, index: int
) -> Item | RecordError:
    """Returns `encode` of a record of a source or, where it is at fault, its RecordError."""
    try:
        return encode(*source[index])
    except RecordError as error:
        return error


def _read(pattern: str, share: Share, encoder: Encoder) -> Iterable[Example | RecordError]:
    """Returns one entry in order: an Example or, for a record at fault, its RecordError."""
    source = open_source(pattern)
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD)
    mine = grain.MapDataset.range(share.process, len(source), share.num_processes)
    read = mine.map(lambda index: _attempt(encoder.record, source, index))
    items = read.to_iter_dataset(options)
    return items if share.num_processes == 1 else _gathered(pattern, len(source), items, share)


def _gathered(
    pattern: str, num_records: int, items: Iterable[Example | RecordError], share: Share
) -> list[Example | RecordError]:
    """Returns the items of all processes in the order of the records.

    Raises:
      UserError: a process has other files than the first.
    """
    files = [list(pair) for pair in file_digests(pattern)]  # as JSON has them
    seen = {"records": num_records, "files": files}
    parts = [_from_bytes(part) for part in share.gather(_to_bytes(seen, items))]
    first, _ = parts[0]
    for process, (theirs, _) in enumerate(parts):
        if theirs != first:
            other = [file[0] for file in theirs["files"] if file not in first["files"]]
            raise UserError(
                f"Process {process} sees other files of {pattern!r} than process 0: "
                f"{', '.join(other) or 'fewer'}, {theirs['records']} records there, "
                f"{first['records']} here; give all of them the same files."
            )
    n = share.num_processes
    return [parts[i % n][1][i // n] for i in range(num_records)]


def _to_bytes(seen: dict[str, Any], items: Iterable[Example | RecordError]) -> bytes:
    """Returns what a process has seen and encoded, as arrays of ids and JSON; no pickle."""
    told, ids, keys = [], [np.zeros(0, np.int32)], [np.zeros(0, bool)]
    for item in items:
        if isinstance(item, RecordError):
            told.append({"message": item.message, "reason": item.reason, "where": item.where})
            continue
        prompt, responses, key_on = item.group
        ids += [prompt, *responses]
        if key_on:
            keys += [key_on[0], *key_on[1]]
        simple = {name: getattr(item, name) for name in _SIMPLE}
        lengths, scores = item.group.lengths(), item.scores.tolist()
        more = {"lengths": lengths, "scores": scores, "keys": bool(key_on)}
        told.append(simple | more)
    file = io.BytesIO()
    text = np.frombuffer(json.dumps([seen, told]).encode(), np.uint8)
    np.savez(file, text=text, ids=np.concatenate(ids), keys=np.concatenate(keys))
    return file.getvalue()


def _from_bytes(content: bytes) -> tuple[dict[str, Any], list[Example | RecordError]]:
    """Returns what `_to_bytes` was given."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        ids, keys = arrays["ids"], arrays["keys"]
        seen, told = json.loads(arrays["text"].tobytes())
    items, num_ids, num_keys = [], 0, 0
    for item in told:
        if "lengths" not in item:
            items.append(RecordError(**item))
            continue
        ends = np.cumsum(item["lengths"])
        prompt, *responses = np.split(ids[num_ids : num_ids + ends[-1]], ends[:-1])
        key_on, num_ids = None, num_ids + ends[-1]
        if item["keys"]:
            first, *rest = np.split(keys[num_keys : num_keys + ends[-1]], ends[:-1])
            key_on, num_keys = (first, tuple(rest)), num_keys + ends[-1]
        scores = np.array(item["scores"], np.float32)
        simple: dict[str, Any] = {name: item[name] for name in _SIMPLE} | {
            "notes": tuple(item["notes"])
        }
        group = Group(prompt, tuple(responses), key_on)
        items.append(Example(group=group, scores=scores, **simple))
    return seen, items
