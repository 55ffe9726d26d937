"""Sources of records, one after the other or at a place, and the error that says which is at fault.

An entry of data.files is a file, a glob of them, tfds:NAME[/BUILDER_CONFIG]:SPLIT or
hf:NAME[:CONFIG]:SPLIT. A file is JSON lines, an array of JSON (.json) or .parquet, and may be .gz.
Entries are parted by commas, or by + as in a.jsonl+b.jsonl.
"""

import functools
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

from nca_jax.checks import UserError
from nca_jax.data import hub
from nca_jax.data.tfds_source import PREFIX, TfdsSource, record_files
from nca_jax.files import as_path, find_files, is_file, stamp, write_whole

LINE_BYTES = 64 << 20  # of one record
SURROGATE = (b"\\u", b"\xed", b"\0")  # one of these is in whatever JSON may have a lone one
# Of entries.
SEPARATOR = re.compile(
    r"(,|(?<=\.jsonl)\+|(?<=\.json)\+|(?<=\.gz)\+|(?<=\.parquet)\+|\+(?=tfds:|hf:))"
)


class RecordError(UserError):
    """One record cannot be used; `reason` is the word that it is counted under if skipped."""

    def __init__(self, message: str, *, reason: str, where: str = ""):
        super().__init__(f"{where}: {message}" if where else message)
        self.message, self.reason, self.where = message, reason, where

    def __reduce__(self):  # between processes: other exceptions go by their arguments alone
        again = functools.partial(RecordError, reason=self.reason, where=self.where)
        return again, (self.message,)

    def at(self, where: str) -> "RecordError":
        """Returns the same error with the place ("path:line") in front."""
        return RecordError(self.message, reason=self.reason, where=where)


class Raw(NamedTuple):
    """A record before it is parsed."""

    where: str  # "path:line", "path:number", "tfds:NAME:SPLIT:index" or "hf:NAME:SPLIT:index"
    content: Any  # bytes of JSON, or what another kind of file holds: a dict, if it is a record
    done: float  # how much of the entry has been read with it, up to 1; 0: not known


class JsonlSource:
    """The records of all files that match one glob: `len` and `[i]`.

    Files are sorted by name, records keep their order, blank lines are none. The lines are held as
    bytes and parsed when asked for: a .gz file has no other random access.

    Raises:
      UserError: no file matches, a file cannot be read or is more than the memory, or a file has no
        records.
    """

    def __init__(self, pattern: str):
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._lines = []
        for raw in _of_files(pattern):
            room -= len(raw.content) if isinstance(raw.content, bytes) else 0
            if room < 0:
                path = raw.where.rpartition(":")[0]
                raise UserError(f"{path}: holds more than this machine's memory; use a part of it.")
            self._lines.append(raw)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> tuple[str, dict[str, Any]]:
        """Returns ("path:line", the record). Raises RecordError as `parse`."""
        return parse(self._lines[index])


def stream(entry: str) -> Iterator[Raw]:
    """Iterates over the records of one entry, in order; none of them stays in memory.

    Raises:
      UserError: it names nothing that can be read.
    """
    if entry.startswith(hub.PREFIX):
        for index, record, done in hub.records(entry):
            yield Raw(f"{entry}:{index}", record, done)
    elif entry.startswith(PREFIX):
        source = TfdsSource(entry)
        for index in range(len(source)):
            yield Raw(*source[index], (index + 1) / len(source))
    else:
        yield from _of_files(entry)


def parse(raw: Raw) -> tuple[str, dict[str, Any]]:
    """Returns (where, the record).

    Raises:
      RecordError: it is not a JSON object, or a text in it is not Unicode (a lone surrogate).
    """
    where, record = raw.where, raw.content
    try:
        if isinstance(record, bytes):
            record = json.loads(record)
        if not isinstance(raw.content, bytes) or any(mark in raw.content for mark in SURROGATE):
            json.dumps(record, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        what = f"text is not Unicode ({error})"
        raise RecordError(what, reason="text", where=where) from None
    except UnicodeDecodeError as error:
        what = f"not UTF-8 ({error}); write the file anew as that"
        raise RecordError(what, reason="json", where=where) from None
    except (ValueError, RecursionError) as error:  # bad JSON; nested too deep
        what = f"not JSON ({error}); wanted a JSON object on each line"
        raise RecordError(what, reason="json", where=where) from None
    if not isinstance(record, dict):
        raise RecordError(
            f"wanted a JSON object, got {type(record).__name__}", reason="json", where=where
        )
    return where, record


def write_records(path: str | os.PathLike, records: Iterable[dict[str, Any]]) -> None:
    """Writes a .jsonl file that is whole or absent."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_whole(as_path(path), "".join(lines).encode())


def split_globs(files: str) -> list[str]:
    """Returns the entries of a list, parted by commas or, after a file's ending, by +.

    A + serves where a comma parts other things: in the argument of a config file. The name of a
    file that is there may hold both.
    """
    parts, entries = SEPARATOR.split(files), []  # entry, separator, entry, ...
    while parts:
        names = {n: "".join(parts[:n]).strip() for n in range(len(parts), 1, -2)}
        n = next((n for n, name in names.items() if is_file(name)), 1)
        entries.append("".join(parts[:n]).strip())
        parts = parts[n + 1 :]
    return [entry for entry in entries if entry]


def split_named(files: str) -> dict[str, str]:
    """Returns {name: its entries}: an entry may be NAME=ENTRY, and belongs to "" where it is not.

    An entry that is a file, whatever marks it holds, has no name.
    """
    named: dict[str, list[str]] = {}
    for whole in split_globs(files):
        found = None if is_file(whole) else re.fullmatch(r"(\w[\w.-]*)=(.+)", whole)
        name, entry = found.groups() if found else ("", whole)
        named.setdefault(name, []).append(entry)
    return {name: ",".join(entries) for name, entries in named.items()}


def list_files(files: str) -> list[str]:
    """Returns the files of the entries of a list: entry by entry, sorted within each."""
    return [path for entry in split_globs(files) for path in _files_of(entry)]


def _files_of(entry: str) -> list[str]:
    if entry.startswith(PREFIX):
        return record_files(entry)
    return hub.local_files(entry) if entry.startswith(hub.PREFIX) else find_files(entry)


def _of_files(pattern: str) -> Iterator[Raw]:
    """Iterates over the records of all files that match a glob. Raises UserError as JsonlSource."""
    paths = _files_of(pattern)
    if not paths:
        within = f": a folder's are {pattern}/*.jsonl" if os.path.isdir(pattern) else ""
        raise UserError(f"No file matches {pattern!r}; wanted .jsonl or .jsonl.gz files{within}.")
    sizes = [stamp(path)[0] for path in paths]
    before, total = 0, max(1, sum(sizes))
    for path, size in zip(paths, sizes, strict=True):
        number = None
        try:
            with as_path(path).open("rb") as file:
                for number, content in _contents(path, file):
                    yield Raw(f"{path}:{number}", content, (before + file.tell()) / total)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); write it anew or leave it out."
            ) from None
        if number is None:
            raise UserError(f"{path}: has no records; write it anew or leave it out.")
        before += size


def _contents(path: str, raw: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """Iterates over (number from 1, record) of one open file; of lines that of the line."""
    name = path.removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from enumerate(hub.parquet_records(path, raw), start=1)
        return
    file = gzip.open(raw) if name != path else raw
    if name.endswith(".json") and file.read(1024).lstrip()[:1] == b"[":
        file.seek(0)
        try:
            yield from enumerate(json.load(file), start=1)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: is no array of JSON ({error}); write it anew.") from None
        return
    if name.endswith(".json"):
        file.seek(0)
    numbered = enumerate(_lines(path, file), start=1)
    yield from ((number, line) for number, line in numbered if line.strip())


def _lines(path: str, file: gzip.GzipFile | IO[bytes]) -> Iterator[bytes]:
    """Yields the lines. UserError if one is no record: a .gz hides it."""
    while line := file.readline(LINE_BYTES + 1):
        if len(line) > LINE_BYTES:
            raise UserError(f"{path}: has a line of more than {LINE_BYTES} bytes; leave it out.")
        yield line
