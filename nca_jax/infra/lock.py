"""One run at a time in a folder: held before anything there is read or written.

On a local disk the kernel keeps FOLDER/lock locked until the process ends, however it ends. On
gs://, and on disks that lock nothing, FOLDER/owner says whose the folder is: whoever starts takes
it over, since nobody can tell whether the run before is alive, and that one stops at its next save.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from nca_jax.checks import UserError
from nca_jax.files import AnyPath, is_remote, write_whole
from nca_jax.infra import distributed

LOCK, OWNER = "lock", "owner"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # what a disk says that locks nothing

CheckHeld = Callable[[], None]


@contextlib.contextmanager
def held(folder: AnyPath) -> Iterator[CheckHeld]:
    """Holds a folder that is there, for all processes of a run; process 0 does it.

    Gives `check()`, to be called before a save: it raises UserError where the folder is held no
    more, because it was deleted or another run took it over.

    Raises:
      UserError: another run holds it; says which. All processes of this one raise it.
    """
    # Asks no device: what only writes files opens none.
    is_alone = not jax.distributed.is_initialized()
    check, refused = lambda: None, ""
    with contextlib.ExitStack() as stack:
        if is_alone or distributed.is_first():
            try:
                check = stack.enter_context(
                    _owned(folder) if is_remote(folder) else _locked(folder)
                )
            except UserError as error:
                refused = str(error)
        if not is_alone:
            refused = distributed.gather(refused.encode())[0].decode()
        if refused:
            raise UserError(refused)
        yield check


@contextlib.contextmanager
def waited_for(path: Path) -> Iterator[None]:
    """Holds a file, made if need be, once no other process does; says so where it waits.

    On a disk that locks nothing nobody waits, and two may do the same work.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that makes {path.with_suffix('')}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


@contextlib.contextmanager
def _locked(folder: AnyPath) -> Iterator[CheckHeld]:
    path = folder / LOCK
    # The file stays: were it removed, two could hold a lock of this name. Programs that this one
    # starts do not inherit it, so none keeps the folder after its parent.
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by {file.read() or 'another run'}: one run at a time. Wait "
                "for it, stop it, or use another folder."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            with _owned(folder) as check:
                yield check
            return
        file.truncate(0)
        file.write(_this_run())
        file.flush()

        def check() -> None:
            try:
                is_there = os.path.samestat(os.stat(path), os.fstat(file.fileno()))
            except FileNotFoundError:
                is_there = False
            if not is_there:
                raise UserError(f"{folder} was deleted or replaced under this run, which stops.")

        yield check


@contextlib.contextmanager
def _owned(folder: AnyPath) -> Iterator[CheckHeld]:
    path, mine = folder / OWNER, _this_run()
    before = _owner(path)
    if before:
        print(f"{folder} is taken over from {before}; if that one is alive, it stops at a save")
    write_whole(path, mine.encode())

    def check() -> None:
        now = _owner(path)
        if now != mine:
            raise UserError(f"{folder} was taken over by {now}" if now else f"{folder} was deleted")

    try:
        yield check
    finally:
        if _owner(path) == mine:
            path.unlink()


def _owner(path: AnyPath) -> str:
    return path.read_text() if path.exists() else ""


def _this_run() -> str:
    """Says which run this is, in words for people; no two are the same."""
    when = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return f"process {os.getpid()} on {socket.gethostname()} since {when}, {uuid.uuid4().hex[:8]}"
