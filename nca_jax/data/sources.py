"""Sources of records as grain reads them, and the error that says which record is at fault.

An entry of data.files is a file of JSON lines, a glob of them, or tfds:NAME[/BUILDER_CONFIG]:SPLIT.
Entries are parted by commas, or by + as in a.jsonl+b.jsonl.
"""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

from nca_jax.checks import UserError
from nca_jax.data.tfds_source import PREFIX, TfdsSource, record_files
from nca_jax.files import as_path, find_files, is_file, write_whole

LINE_BYTES = 64 << 20  # of one record
SEPARATOR = re.compile(r"(,|(?<=\.jsonl)\+|(?<=\.json)\+|(?<=\.gz)\+|\+(?=tfds:))")  # of entries


class RecordError(UserError):
    """One record cannot be used; `reason` is the word that it is counted under if skipped."""

    def __init__(self, message: str, *, reason: str, where: str = ""):
        super().__init__(f"{where}: {message}" if where else message)
        self.message, self.reason, self.where = message, reason, where

    def at(self, where: str) -> "RecordError":
        """Returns the same error with the place ("path:line") in front."""
        return RecordError(self.message, reason=self.reason, where=where)


class JsonlSource:
    """The records of all files that match one glob, as grain reads them: `len` and `[i]`.

    Files are sorted by name, records keep their order, blank lines are none. The lines are held as
    bytes and parsed when asked for: a .gz file has no other random access.

    Raises:
      UserError: no file matches, a file cannot be read, or a file has no records.
    """

    def __init__(self, pattern: str):
        paths = _files_of(pattern)
        if not paths:
            within = f": a folder's are {pattern}/*.jsonl" if os.path.isdir(pattern) else ""
            raise UserError(
                f"No file matches {pattern!r}; wanted .jsonl or .jsonl.gz files{within}."
            )
        self._lines = [(path, *line) for path in paths for line in _read_lines(path)]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> tuple[str, dict[str, Any]]:
        """Returns ("path:line", the record).

        Raises:
          RecordError: it is not a JSON object, or a text in it is not Unicode (a lone surrogate).
        """
        path, number, line = self._lines[index]
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()
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


def open_source(entry: str) -> JsonlSource | TfdsSource:
    """Returns the records of one entry of data.files: `len`, and `[i]` -> (where, record).

    Raises:
      UserError: it names nothing that can be read.
    """
    return TfdsSource(entry) if entry.startswith(PREFIX) else JsonlSource(entry)


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


def file_digests(entry: str) -> list[tuple[str, str]]:
    """Returns (name, SHA-256) of every file of one entry: what tells other files from the same."""
    digests = []
    for path in map(as_path, _files_of(entry)):
        with path.open("rb") as file:
            digests.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    return digests


def _files_of(entry: str) -> list[str]:
    if entry.startswith(PREFIX):
        return record_files(entry)
    return find_files(entry)


def _lines_within_limits(path: str, file: gzip.GzipFile | IO[bytes]) -> Iterator[bytes]:
    """Yields the lines. UserError if one is no record, or all are too many: a .gz hides it."""
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    while line := file.readline(LINE_BYTES + 1):
        room -= len(line)
        if len(line) > LINE_BYTES:
            raise UserError(f"{path}: has a line of more than {LINE_BYTES} bytes; leave it out.")
        if room < 0:
            raise UserError(f"{path}: holds more than this machine's memory; use a part of it.")
        yield line


def _read_lines(path: str) -> list[tuple[int, bytes]]:
    """Returns (line number from 1, line) for every line that is not blank."""
    try:
        with as_path(path).open("rb") as raw:
            file = gzip.open(raw) if path.endswith(".gz") else raw
            numbered = enumerate(_lines_within_limits(path, file), start=1)
            lines = [(n, line) for n, line in numbered if line.strip()]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); write it anew or leave it out."
        ) from None
    if not lines:
        raise UserError(f"{path}: has no records; write it anew or leave it out.")
    return lines
