"""Every row of the files as an example in memory, each process reading and encoding its share."""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import grain
import numpy as np

from nca_jax.checks import UserError
from nca_jax.data.encode import Example, encode_record
from nca_jax.data.sources import RecordError, file_sizes, open_source, split_globs

READ_THREADS, READ_AHEAD = 2, 64  # rows
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
) -> Iterable[Example | RecordError]:
    """Returns one entry in order: an Example or, for a row that is at fault, its RecordError."""
    source = open_source(pattern)

    def read(index: int) -> Example | RecordError:
        try:
            return encode_record(
                *source[index],
                tokenizer=tokenizer,
                config=config,
                vocab_size=vocab_size,
                eos_ids=eos_ids,
            )
        except RecordError as error:
            return error

    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD)
    mine = grain.MapDataset.range(share.process, len(source), share.num_processes)
    items = mine.map(read).to_iter_dataset(options)
    return items if share.num_processes == 1 else _gathered(pattern, len(source), items, share)


def _gathered(
    pattern: str, num_rows: int, items: Iterable[Example | RecordError], share: Share
) -> list[Example | RecordError]:
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


def _to_bytes(seen: dict, items: Iterable[Example | RecordError]) -> bytes:
    """Returns what a process has seen and encoded, as arrays of ids and JSON; no pickle."""
    told, ids, keys = [], [np.zeros(0, np.int32)], [np.zeros(0, bool)]
    for item in items:
        if isinstance(item, RecordError):
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


def _from_bytes(content: bytes) -> tuple[dict, list[Example | RecordError]]:
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
        simple = {name: item[name] for name in _SIMPLE}
        arrays = dict(prompt=prompt, responses=tuple(responses), scores=scores, key_on=key_on)
        items.append(Example(**arrays, **simple))
    return seen, items
