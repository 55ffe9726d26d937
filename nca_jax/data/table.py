"""Many examples as arrays: what a run keeps of its records, in memory or in the files of a store.

A table has one entry an example (`ENTRY`), the lengths and scores of all segments, and blobs with
the rest: of each example its ids, its keys and, as JSON, its place and its record. Order, lengths,
choice and counts read the arrays; `table[i]` reads an example, and what is taken of a table, put
together or divided shares its blobs. Axes: N examples, n responses of one.
"""

import dataclasses
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, overload

import numpy as np

from nca_jax.checks import UserError
from nca_jax.data.encode import Example
from nca_jax.data.group import Group

ENTRY = np.dtype(
    [
        ("blob", np.int32),  # which of the table's
        ("start", np.int64),  # in it, bytes
        ("size", np.int32),  # bytes
        ("crc", np.uint32),  # CRC-32 of these bytes: a disk that changes one is found out
        ("first", np.int64),  # of its segments: the prompt, then the n responses
        ("count", np.int32),  # n
        ("key", np.uint64),  # digest of its ids, see `example_key`
        ("prompt_hash", np.float64),
        ("num_tokens", np.int32),
        ("num_cut", np.int32),
        ("is_pair", bool),
        ("repeats", bool),  # two of its responses are equal, and so are their scores
        ("has_keys", bool),
        ("has_scored", bool),
    ]
)


class Sliced(Protocol):
    """Bytes that are sliced, start and stop given: those of a file, or `bytes`."""

    def __getitem__(self, at: slice, /) -> bytes: ...


class Blob(NamedTuple):
    """Where the bytes of examples are, and what that is called in an error."""

    content: Sliced
    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Table(Sequence[Example]):
    """A sequence of examples. Of one that is read `notes` are gone: they were counted.

    Attributes:
      entries: [N] ENTRY.
      lengths: [segments] int32 tokens; entries say which are theirs, and some are no entry's.
      scores: [segments] float32; that of a prompt means nothing.
      blobs: what `entries["blob"]` counts.
    """

    entries: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray
    blobs: tuple[Blob, ...]

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Table": ...
    def __getitem__(self, index: int | slice) -> "Example | Table":
        """Returns one example, or a table of some.

        Raises:
          UserError: the bytes of the example are not those that were written.
        """
        if isinstance(index, slice):
            return dataclasses.replace(self, entries=self.entries[index])
        return self._read(self.entries[index])

    def take(self, indices: np.ndarray) -> "Table":
        """Returns the examples at these places, in this order, or those that a mask says."""
        return dataclasses.replace(self, entries=self.entries[indices])

    def lengths_of(self, index: int) -> list[int]:
        """Returns the tokens of the prompt and of each response of one example."""
        first, n = int(self.entries["first"][index]), int(self.entries["count"][index])
        return self.lengths[first : first + 1 + n].tolist()

    def by_count(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Iterates over the numbers of responses n that there are.

        Yields:
          (places [M] of the examples that have n, lengths [M, 1 + n] of prompt and responses,
          scores [M, n]).
        """
        counts = self.entries["count"]
        for n in np.unique(counts).tolist():
            at = np.flatnonzero(counts == n)
            segments = self.entries["first"][at][:, None] + np.arange(1 + n)
            yield at, self.lengths[segments], self.scores[segments[:, 1:]]

    def _read(self, entry: np.void) -> Example:
        said = dict(zip(ENTRY.names or (), entry.item(), strict=True))
        content, name = self.blobs[said["blob"]]
        start, first, n = said["start"], said["first"], said["count"]
        found = content[start : start + said["size"]]
        if zlib.crc32(found) != said["crc"]:
            raise UserError(
                f"{name} is damaged at byte {start}: it is not what was written there. Remove its "
                "folder, and the next start encodes the records anew; then look at the disk."
            )
        ends = [0, *itertools.accumulate(self.lengths[first : first + 1 + n].tolist())]
        spans = [slice(*span) for span in itertools.pairwise(ends)]
        at, key_on, scored = 4 * ends[-1], None, None
        ids = np.frombuffer(found, np.int32, ends[-1])
        if said["has_keys"]:
            keys = np.frombuffer(found, bool, ends[-1], at)
            at, key_on = at + ends[-1], (keys[spans[0]], tuple(keys[span] for span in spans[1:]))
        if said["has_scored"]:
            flags = np.frombuffer(found, bool, ends[-1] - ends[1], at)
            at += len(flags)
            scored = tuple(flags[x.start - ends[1] : x.stop - ends[1]] for x in spans[1:])
        where, record = json.loads(found[at:])
        return Example(
            where=where,
            group=Group(ids[spans[0]], tuple(ids[span] for span in spans[1:]), key_on, scored),
            scores=self.scores[first + 1 : first + 1 + n],
            record=record,
            prompt_hash=said["prompt_hash"],
            num_tokens=said["num_tokens"],
            num_cut=said["num_cut"],
            is_pair=bool(said["is_pair"]),
        )


def table_of(examples: Iterable[Example]) -> Table:
    """Returns examples as a table in memory."""
    entries, lengths, scores, blob, start = [], [], [], [], 0
    for example in examples:
        prompt, responses, key_on, scored = example.group
        parts = [prompt, *responses] + ([key_on[0], *key_on[1]] if key_on else [])
        parts += scored or ()
        text = json.dumps([example.where, example.record], ensure_ascii=False, default=str)
        content = b"".join([part.tobytes() for part in parts] + [text.encode()])
        entries.append(
            (
                0,
                start,
                len(content),
                zlib.crc32(content),
                len(lengths),
                len(responses),
                example_key(example),
                example.prompt_hash,
                example.num_tokens,
                example.num_cut,
                example.is_pair,
                _repeats(example),
                key_on is not None,
                scored is not None,
            )
        )
        lengths += example.group.lengths()
        scores += [0.0, *example.scores.tolist()]
        blob.append(content)
        start += len(content)
    return Table(
        np.array(entries, ENTRY),
        np.array(lengths, np.int32),
        np.array(scores, np.float32),
        (Blob(b"".join(blob), "the memory of this process"),),
    )


def joined(tables: Sequence[Table]) -> Table:
    """Returns one table of the examples of several, in order."""
    if len(tables) == 1:
        return tables[0]
    entries, num_segments, num_blobs = [np.zeros(0, ENTRY)], 0, 0
    for table in tables:
        mine = table.entries.copy()
        mine["first"] += num_segments
        mine["blob"] += num_blobs
        entries.append(mine)
        num_segments, num_blobs = num_segments + len(table.lengths), num_blobs + len(table.blobs)
    return Table(
        np.concatenate(entries),
        np.concatenate([np.zeros(0, np.int32), *(table.lengths for table in tables)]),
        np.concatenate([np.zeros(0, np.float32), *(table.scores for table in tables)]),
        tuple(blob for table in tables for blob in table.blobs),
    )


def example_key(example: Example) -> int:
    """A digest of the example's tokens, and of which are scored, 64 bits."""
    digest, group = hashlib.blake2b(digest_size=8), example.group
    for part in (group.prompt, *group.responses, *(group.scored or ())):
        digest.update(np.int32(len(part)).tobytes() + part.tobytes())
    return int.from_bytes(digest.digest(), "little")


def _repeats(example: Example) -> bool:
    said = [ids.tobytes() for ids in example.group.responses]
    return len(set(zip(said, example.scores.tolist(), strict=True))) < len(said)
