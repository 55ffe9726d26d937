"""Every record of the files as an example: in memory, or in a store that maps them."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nca_jax.checks import UserError
from nca_jax.data.chunks import encoded, note_fault
from nca_jax.data.encode import Encoder, Prompt
from nca_jax.data.sources import JsonlSource, RecordError, split_globs, stream
from nca_jax.data.store import Keep, file_digests, is_small, read_stored
from nca_jax.data.table import Table, joined

SAME_UNIT = 2  # scores whose spans differ by a larger factor are taken to be of different units

Gather = Callable[[bytes], list[bytes]]  # from a process's own bytes to those of every process


class Examples(NamedTuple):
    """What files gave: one table of examples an entry, and what is to be said of the others."""

    sources: list[Table]
    counts: Counter[str]  # "records skipped: json" -> how many, see `notes_of`


class Prompts(NamedTuple):
    """The prompts of files, and what is to be said of the others, as in Examples."""

    prompts: list[Prompt]
    counts: Counter[str]


def load_examples(
    files: str, encoder: Encoder, *, keep: Keep | None = None, gather: Gather | None = None
) -> Examples:
    """Returns every record of comma-separated entries, encoded.

    The encoder's config says which records stop and which are skipped.

    Args:
      keep: where large entries are stored; None: all are in memory.
      gather: of the processes of a run, which have to see the same files; None: it is alone.
    Raises:
      UserError: no glob is named, a file or a record is unusable, no record of an entry is left, or
        the processes do not see the same files.
    """
    patterns = split_globs(files)
    if not patterns:
        raise UserError("No data is named; set data.files to one or more globs or tfds: entries.")
    counts: Counter[str] = Counter()
    sources = []
    for pattern in patterns:
        if gather:
            _check_same_files(pattern, file_digests(pattern, keep), gather)
        table, said = _read(pattern, encoder, keep)
        counts.update(said)
        if not len(table):
            raise UserError(f"No record of {pattern!r} is left: {', '.join(notes_of(said))}.")
        sources.append(table)
    _count_units(patterns, sources, counts)
    return Examples(sources, counts)


def load_prompts(pattern: str, encoder: Encoder) -> Prompts:
    """Reads and encodes the prompts of the files that match a glob, in order.

    Raises:
      UserError: a file or a prompt is unusable, or none is left.
    """
    source, prompts, counts = JsonlSource(pattern), [], Counter()
    for index in range(len(source)):
        try:
            prompt = encoder.question(*source[index])
        except RecordError as error:
            note_fault(error, encoder.config, counts)
            continue
        prompts.append(prompt)
        counts.update(prompt.notes)
    if not prompts:
        raise UserError(f"No record of {pattern!r} is left: {', '.join(notes_of(counts))}.")
    return Prompts(prompts, counts)


def notes_of(counts: Counter[str]) -> list[str]:
    """Returns what is said of records that were not read as they are, a line for each kind."""
    return [f"{number} {what}" for what, number in counts.items()]


def _read(pattern: str, encoder: Encoder, keep: Keep | None) -> tuple[Table, Counter[str]]:
    """Returns one entry in order, and what is said of its records."""
    if keep and not is_small(pattern):
        return read_stored(pattern, encoder, keep)
    chunks = list(encoded(stream(pattern), encoder))
    counts: Counter[str] = Counter()
    for chunk in chunks:
        counts.update(chunk.counts)
    return joined([chunk.table for chunk in chunks]), counts


def _check_same_files(pattern: str, files: list[tuple[str, str]], gather: Gather) -> None:
    """Raises UserError, naming it, if a process has another file than the first."""
    mine = [[path.rpartition("/")[2], digest] for path, digest in files]
    first, *others = map(json.loads, gather(json.dumps(mine).encode()))
    for process, theirs in enumerate(others, start=1):
        if theirs != first:
            other = [name for name, digest in theirs if [name, digest] not in first]
            raise UserError(
                f"Process {process} sees other files of {pattern!r} than process 0: "
                f"{', '.join(other) or 'fewer'}; give all of them the same files."
            )


def _count_units(patterns: Sequence[str], sources: Sequence[Table], counts: Counter[str]) -> None:
    """Counts the records of each entry and kind where their scores seem to be of several units.

    The losses know one unit, that of alpha: scores that span 0 to 10 outweigh those of 0 to 1.
    """
    found: dict[tuple[str, str], list[tuple[int, float, float]]] = defaultdict(list)
    for pattern, source in zip(patterns, sources, strict=True):
        is_pair = source.entries["is_pair"]
        for kind, mask in (("records", ~is_pair), ("pairs", is_pair)):
            for at, _, scores in source.take(mask).by_count():
                found[kind, pattern].append((len(at), float(scores.min()), float(scores.max())))
    told = {}
    for (kind, pattern), several in found.items():
        numbers, lows, highs = zip(*several, strict=True)
        low, high = min(lows), max(highs)
        what = f"{kind} of {pattern!r} have scores from {low:g} to {high:g}: of several units?"
        told[what] = (sum(numbers), high - low)
    spans = [span for _, span in told.values() if span > 0]
    if spans and max(spans) > SAME_UNIT * min(spans):
        counts.update({what: number for what, (number, _) in told.items()})
