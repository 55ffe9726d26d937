"""Encoded records on disk, of which every later start reads what its steps take.

A store is a folder under `Keep.folder`, named by a digest of all that it is made from: the names
and contents of the files, the tokenizer, the format and lengths, and the code that encodes.
    made_from.json   this, in words; and how many parts there are
    00000.index      SHA-256 of what follows, then entries, lengths, scores and counts (.npz)
    00000.bytes      ids, keys and records, see `table`
It is whole or absent: parts are made one after the other in NAME.making, where a start after a stop
goes on, and which becomes NAME at last. An index is checked whole when the store is opened, and the
bytes of an example when it is read.

Plain arrays, and not array_record: order, lengths and choice are columns that numpy reads at once,
an example is one slice of a file, and nothing has to be parsed to find either.

What is trusted: that a file whose name, size and time of change are the same has the contents that
it had when it was read whole (`digests/`). A data set of the hub goes by the commit that it has.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nca_jax.checks import UserError
from nca_jax.data import hub
from nca_jax.data.chunks import Chunk, encoded
from nca_jax.data.encode import Encoder
from nca_jax.data.sources import list_files, split_globs, stream
from nca_jax.data.table import Blob, Table, joined
from nca_jax.files import absolute, as_path, read_json, remove, stamp, write_json, write_whole

PART = 2**14  # records: what a stop can lose
SMALL = 16 << 20  # bytes of files that are encoded at every start, which takes seconds
MADE_FROM = "made_from.json"


class Keep(NamedTuple):
    """Where stores are, and what this process does while it makes one."""

    folder: Path
    alone: Callable[[Path], contextlib.AbstractContextManager[None]]  # others wait meanwhile
    progress: Callable[[str, int, float], None]  # (entry, records, how much of the entry is done)


def read_stored(entry: str, encoder: Encoder, keep: Keep) -> tuple[Table, Counter[str]]:
    """Returns the examples of an entry and what is said of its records, made if need be.

    Raises:
      UserError: a file or a record is unusable, or the store is damaged.
    """
    made_from = {
        "entry": entry,
        "files": file_digests(entry, keep),
        **encoder.identity(),
        "code": _code(),
        "tokenizers": version("tokenizers"),
    }
    name = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    folder = keep.folder / name
    if not folder.exists():
        keep.folder.mkdir(parents=True, exist_ok=True)
        with keep.alone(keep.folder / f"{name}.lock"):
            if not folder.exists():  # nor has another process made it by now
                _make(folder, entry, encoder, keep, made_from)
    parts = [_read_part(folder, part) for part in range(read_json(folder / MADE_FROM)["parts"])]
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    return joined([part.table for part in parts]), counts


def is_small(entry: str) -> bool:
    """Whether an entry is encoded at every start."""
    sizes = [stamp(path)[0] for path in list_files(entry)]
    return not entry.startswith(hub.PREFIX) and sum(sizes) < SMALL


def file_digests(entry: str, keep: Keep | None) -> list[tuple[str, str]]:
    """Returns (path, SHA-256) of every file of an entry; of one of the hub its commit.

    Args:
      keep: has digests of files as they were last; None: all files are read.
    """
    files = list_files(entry)
    if files or not entry.startswith(hub.PREFIX):
        return [(path, _digest(path, keep)) for path in files]
    remembered = keep and keep.folder / "digests" / _named(entry)
    try:
        found = hub.revision(entry)
    except UserError as error:
        if not (remembered and remembered.exists()):
            raise
        print(f"{error} The commit that it had last is taken.")
        return [(entry, read_json(remembered)["sha256"])]
    if remembered:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_json(remembered, {"path": entry, "sha256": found})
    return [(entry, found)]


def contents_fingerprint(files: str, keep: Keep | None) -> str:
    """A digest of the contents of all files of the entries of a list, in their order."""
    digest = hashlib.sha256()
    for entry in split_globs(files):
        for _, found in file_digests(entry, keep):
            digest.update(bytes.fromhex(found))
    return digest.hexdigest()[:16]


def _digest(path: str, keep: Keep | None) -> str:
    size, changed = stamp(path)
    seen = {"path": os.fspath(absolute(as_path(path))), "size": size, "changed": changed}
    remembered = None
    if keep and size >= SMALL:
        remembered = keep.folder / "digests" / _named(seen["path"])
    if remembered and remembered.exists():
        last = read_json(remembered)
        if seen.items() <= last.items():
            return last["sha256"]
    with as_path(path).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if remembered:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_json(remembered, seen | {"sha256": found})
    return found


def _named(what: str) -> str:
    return f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


def _code() -> str:
    """A digest of the code that makes examples of records: what another version encodes anew."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _make(
    folder: Path, entry: str, encoder: Encoder, keep: Keep, made_from: dict[str, Any]
) -> None:
    """Makes a store, from where a start before this one has stopped."""
    making = folder.with_name(f"{folder.name}.making")
    making.mkdir(exist_ok=True)
    num_parts, num_records = _parts_made(making)
    raws = itertools.islice(stream(entry), num_records, None)
    chunks = encoded(raws, encoder, num_processes=len(os.sched_getaffinity(0)))
    with contextlib.closing(chunks):
        for part in _batches(chunks):
            _write_part(making, num_parts, part)
            num_parts += 1
            num_records += sum(chunk.num_records for chunk in part)
            keep.progress(entry, num_records, part[-1].done)
    write_json(making / MADE_FROM, made_from | {"parts": num_parts, "records": num_records})
    making.replace(folder)


def _batches(chunks: Iterator[Chunk]) -> Iterator[list[Chunk]]:
    """Iterates over as many chunks as are a part."""
    batch: list[Chunk] = []
    for chunk in chunks:
        batch.append(chunk)
        if sum(one.num_records for one in batch) >= PART:
            yield batch
            batch = []
    if batch:
        yield batch


def _parts_made(making: Path) -> tuple[int, int]:
    """Returns how many parts are whole, and of how many records; what follows them is removed."""
    num_parts, num_records = 0, 0
    with contextlib.suppress(UserError):
        while (making / f"{num_parts:05d}.index").exists():
            num_records += _read_part(making, num_parts).num_records
            num_parts += 1
    for path in making.iterdir():
        if not path.name.split(".")[0].isdecimal() or int(path.name.split(".")[0]) >= num_parts:
            remove(path)
    return num_parts, num_records


def _write_part(folder: Path, part: int, chunks: list[Chunk]) -> None:
    table = joined([chunk.table for chunk in chunks])
    contents = [blob.content[:] for blob in table.blobs]  # in memory: they were just made
    starts = np.cumsum([0, *map(len, contents)])
    entries = table.entries.copy()
    entries["start"] += starts[entries["blob"]]
    entries["blob"] = 0
    counts: Counter[str] = Counter()
    for chunk in chunks:
        counts.update(chunk.counts)
    said = {
        "counts": list(counts.items()),
        "records": sum(chunk.num_records for chunk in chunks),
        "bytes": int(starts[-1]),
    }
    file = io.BytesIO()
    text = np.frombuffer(json.dumps(said).encode(), np.uint8)
    np.savez(file, entries=entries, lengths=table.lengths, scores=table.scores, text=text)
    index = file.getvalue()
    write_whole(folder / f"{part:05d}.bytes", b"".join(contents))
    write_whole(folder / f"{part:05d}.index", hashlib.sha256(index).digest() + index)


def _read_part(folder: Path, part: int) -> Chunk:
    """Returns one part, its bytes still on the disk.

    Raises:
      UserError: it is not what was written.
    """
    path = folder / f"{part:05d}.bytes"
    try:
        index = path.with_suffix(".index").read_bytes()
        if hashlib.sha256(index[32:]).digest() != index[:32]:
            raise ValueError("its index changed since it was written")
        with np.load(io.BytesIO(index[32:]), allow_pickle=False) as arrays:
            said = json.loads(arrays["text"].tobytes())
            entries, lengths, scores = (arrays[x] for x in ("entries", "lengths", "scores"))
        if path.stat().st_size != said["bytes"]:
            raise ValueError(f"{path.stat().st_size} bytes, of {said['bytes']}")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is damaged ({error}). Remove {folder}, and the next start encodes the records "
            "anew; then look at the disk."
        ) from None
    blob = Blob(_File(path), str(path))
    table = Table(entries, lengths, scores, (blob,))
    return Chunk(table, Counter(dict(said["counts"])), said["records"], 1.0)


class _File:
    """The bytes of a file, read where it is sliced; fewer where it has been cut off since.

    Mapped into memory, its pages would count as memory of this process, and one that is gone would
    end it.
    """

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __getitem__(self, at: slice) -> bytes:
        return os.pread(self._file, at.stop - at.start, at.start)
