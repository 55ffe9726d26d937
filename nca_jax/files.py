"""Files of a run on a local disk or on Google Cloud Storage: the one way to open either.

A name that begins with gs:// is an `etils.epath.Path`, any other a `pathlib.Path`; what is used of
them here is the same in both. What only a local disk can do (weights mapped into memory, records,
event files, traces) is done there: read from a copy, or written and copied.
"""

import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from nca_jax.checks import UserError

GS = "gs://"
AnyPath = Path | epath.Path
STREAMS = 8  # files that are copied at a time


def as_path(name: str | os.PathLike) -> AnyPath:
    """Returns the path of a name that a user gave, "~" expanded.

    Raises:
      UserError: it is neither local nor on gs://, or what reads gs:// is not installed.
    """
    name = os.fspath(name)
    if is_remote(name):
        _check_gcs()
        return epath.Path(name)
    if "://" in name:
        raise UserError(f"{name!r}: files are local or on {GS}.")
    return Path(name).expanduser()


def local_path(name: str | os.PathLike) -> Path:
    """Returns the path of a name. Raises UserError unless it is local, as locks and logs want."""
    if is_remote(name):
        raise UserError(f"{os.fspath(name)!r}: this wants a path on a local disk.")
    return as_path(name)


def is_remote(name: str | os.PathLike) -> bool:
    return os.fspath(name).startswith(GS)


def absolute(path: AnyPath) -> AnyPath:
    """Returns the path from the root; one on gs:// is as it is."""
    return path if is_remote(path) else path.absolute()


def find_files(pattern: str) -> list[str]:
    """Returns the file of this name or else the files that match it as a glob, sorted.

    ** is any folders, on a local disk alone.

    Raises:
      UserError: as `as_path`, or ** on gs://.
    """
    path = as_path(pattern)
    if is_file(pattern):
        return [os.fspath(path)]
    if not is_remote(pattern):
        return sorted(filter(os.path.isfile, glob.glob(os.fspath(path), recursive=True)))
    if "**" in pattern:
        raise UserError(f"{pattern!r}: ** is for a local disk; list the folders on {GS}.")
    return sorted(map(os.fspath, path.parent.glob(path.name)))


def is_file(name: str) -> bool:
    """Whether there is a file of this name, as it stands: neither a glob nor a list of names."""
    if "://" in name.removeprefix(GS):
        return False
    path = as_path(name)
    return path.is_file() if is_remote(name) else os.path.isfile(path)


def stamp(name: str) -> tuple[int, str]:
    """Returns the bytes of a file, and what is another once it is written anew."""
    if is_remote(name):
        filesystem, path = fsspec.core.url_to_fs(name)
        return filesystem.size(path), str(filesystem.ukey(path))
    stat = os.stat(name)
    return stat.st_size, str(stat.st_mtime_ns)


def write_whole(path: AnyPath, content: bytes) -> None:
    """Writes a file that is whole or absent, also after the machine has lost its power."""
    if is_remote(path):  # an object is there once it is closed
        path.write_bytes(content)
        return
    with _made_whole(path) as partial:
        partial.write_bytes(content)


def write_json(path: AnyPath, content: dict[str, Any]) -> None:
    """Writes a JSON file that is whole or absent.

    Raises:
      TypeError: something in it is nothing that JSON has, such as an array or a path.
      ValueError: a number is not finite; JSON has none that are not. Nothing is written.
    """
    write_whole(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: AnyPath) -> dict[str, Any]:
    """Returns the object of a JSON file that `write_json` wrote.

    Raises:
      UserError: it is not there, or damaged: cut, empty or overwritten.
    """
    try:
        content = json.loads(path.read_bytes())
        damage = "" if isinstance(content, dict) else "it is no object"
    except FileNotFoundError:
        raise UserError(f"{path} is not there; restore it, or use another folder.") from None
    except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8
        content, damage = {}, str(error)
    if damage:
        raise UserError(f"{path} is damaged ({damage}); restore it, or use another folder.")
    return content


def read_lines(
    path: AnyPath, is_good: Callable[[dict[str, Any]], bool] = lambda line: True
) -> tuple[list[dict[str, Any]], list[int]]:
    """Returns the good objects of a .jsonl file, and the numbers, from 1, of all other lines.

    Blank lines are none, and neither is a last one that a kill has torn.
    """
    # Not splitlines: a string of JSON may hold other ends of lines, such as U+2028.
    lines = path.read_bytes().split(b"\n")
    good, bad = [], []
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            found = None
            if number == len(lines) and line.startswith(b"{") and b"\0" not in line:
                break
        if isinstance(found, dict) and is_good(found):
            good.append(found)
        elif line.strip():
            bad.append(number)
    return good, bad


def whole_lines(
    path: AnyPath, is_good: Callable[[dict[str, Any]], bool] = lambda line: True
) -> list[dict[str, Any]]:
    """Returns `read_lines` of a file. Raises UserError if one is bad, or there is no such file."""
    if not path.exists():
        raise UserError(f"{path} is not there.")
    good, bad = read_lines(path, is_good)
    if bad:
        raise UserError(f"{path} is damaged ({said_lines(bad)}); restore it, or remove them.")
    return good


def said_lines(numbers: Sequence[int]) -> str:
    """Returns the numbers of lines in words, the first few of many."""
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"line{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:5]))}{more}"


def copy_into(folder: Path, target: AnyPath) -> None:
    """Copies every file of a local folder, however deep, to the same place in `target`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    pairs = [(file, target / file.relative_to(folder).as_posix()) for file in files]
    for parent in {to.parent for _, to in pairs}:
        parent.mkdir(parents=True, exist_ok=True)
    _copy(pairs)


def out_file(name: str | os.PathLike, flag: str = "--out") -> AnyPath:
    """Returns the path of a file that a command will write at its end, its folder made.

    Raises:
      UserError: it cannot be written there.
    """
    path = as_path(name)
    if path.exists() and not path.is_file():  # a folder, or a device, which root would replace
        raise UserError(f"{flag}={path}: a file cannot be written there; give another one.")
    _check_writable(path, f"{flag}={path}")
    return path


def out_folder(name: str | os.PathLike, flag: str = "--out") -> AnyPath:
    """Returns the path of a folder that a command will write into, made.

    Raises:
      UserError: it cannot be made, or nothing can be written there.
    """
    path = as_path(name)
    _check_writable(path / "probe", f"{flag}={path}")
    return path


def new_folder(name: str | os.PathLike, flag: str = "--out") -> AnyPath:
    """Returns the path of a folder that `whole_folder` will make.

    Raises:
      UserError: it is there and is not empty, or cannot be written there.
    """
    path = as_path(name)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{flag}={path} is not an empty folder; give another, or remove it first.")
    _check_writable(path, f"{flag}={path}")
    return path


def _check_writable(file: AnyPath, said: str) -> None:
    """Raises UserError unless a file of about this name can be written; makes its folder.

    It is tried: root may write where no mode allows it, and nobody on a disk that is read-only.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{said}: its folder cannot be made ({why}); give another.") from None
    # A name of its own: several processes may try at a time.
    probe = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
    except Exception as error:  # the client of gs:// has errors of its own
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{said} cannot be written ({why}); give another place.") from None


@contextlib.contextmanager
def whole_folder(out: AnyPath) -> Iterator[Path]:
    """Gives a local folder; what the body writes there is the new folder `out` if it ends well."""
    if is_remote(out):
        with tempfile.TemporaryDirectory() as partial:
            yield Path(partial)
            copy_into(Path(partial), out)
        return
    with _made_whole(out) as partial:
        partial.mkdir(parents=True)
        yield partial


@contextlib.contextmanager
def _made_whole(out: Path) -> Iterator[Path]:
    """Gives a name beside `out`; what the body makes there is stored, and then is `out`.

    If the body fails nothing of it is left: it may have failed because the disk is full.
    """
    partial = out.with_name(out.name + ".partial")
    remove(partial)  # of a body that was killed
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        partial.replace(out)
    except BaseException as error:
        remove(partial)
        if isinstance(error, OSError) and error.filename is None:  # as of a write
            error.filename = os.fspath(out)
        raise
    _sync(out.parent)


def _sync(path: Path) -> None:
    """Returns when a file or a folder is on the disk; not every file system syncs folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def remove(path: AnyPath) -> None:
    """Removes a file or a folder, if it is there."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
    elif isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.rmtree()


def cache_folder() -> Path:
    """Returns where what can be made again is kept: $NCA_JAX_CACHE, or ~/.cache/nca_jax."""
    return Path(os.environ.get("NCA_JAX_CACHE", "~/.cache/nca_jax")).expanduser()


def local_copy(path: AnyPath, patterns: Sequence[str] = ("*",)) -> Path:
    """Returns a local path: of the same file or folder, or of a copy of what is on gs://.

    Of a folder the files that match one of `patterns` are copied, and no folders in it. A copy
    stays in $NCA_JAX_CACHE (~/.cache/nca_jax); another is made once a file is written anew.

    Raises:
      UserError: there is nothing on gs:// by this name.
    """
    if not is_remote(path):
        return path
    files = [path]
    if path.is_dir():
        files = [x for x in path.iterdir() if any(fnmatch(x.name, p) for p in patterns)]
        files = sorted(x for x in files if not x.is_dir())
    if not files or not files[0].exists():
        raise UserError(f"{path} is not there, or is empty.")
    names = [os.fspath(file) for file in files]
    filesystem, _ = fsspec.core.url_to_fs(names[0])
    versions = [f"{name} {filesystem.ukey(name)}" for name in names]
    digest = hashlib.sha256("\n".join(versions).encode()).hexdigest()[:16]
    cache = cache_folder()
    folder = cache / f"{path.name}-{digest}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Of several processes on one host each makes a copy, and the first is kept.
        with tempfile.TemporaryDirectory(dir=cache) as partial:
            whole = Path(partial) / "whole"
            whole.mkdir()
            _copy([(file, whole / file.name) for file in files])
            try:
                whole.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
    return folder / path.name if files == [path] else folder


def _copy(pairs: Sequence[tuple]) -> None:
    """Copies files, (from, to), several at a time."""

    def one(pair: tuple) -> None:
        source, target = pair
        epath.Path(source).copy(target, overwrite=True)

    with ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(one, pairs))


@functools.cache
def _check_gcs() -> None:
    """Raises UserError unless the client of gs:// is installed: epath's, by way of fsspec."""
    try:
        fsspec.get_filesystem_class("gcs")
    except ImportError:
        raise UserError(f"{GS} wants the gcs extra: pip install 'nca_jax[gcs]'.") from None
