"""A command of one's own that is asked in JSON lines: a scorer, a judge."""

import contextlib
import json
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, TypeVar

from nca_jax.checks import UserError

Answer = TypeVar("Answer")


def ask(
    who: str,
    command: str,
    questions: Sequence[dict[str, Any]],
    read: Callable[[Any], Answer | None],
    *,
    what: str,
    wanted: str,
) -> Iterator[Answer]:
    """Yields an answer to each question, as they come, from one process without a shell.

    It reads one JSON object a question from stdin and writes one JSON value a line to stdout, in
    the same order.

    Args:
      who: the command in an error.
      read: a line's JSON -> the answer; None: it is no answer.
      what: questions are, in the plural.
      wanted: of a line, in words.
    Raises:
      UserError: it cannot be started or fails, or what it writes is not that.
    """
    lines = [json.dumps(question, ensure_ascii=False) + "\n" for question in questions]
    bad, number = None, 0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        try:
            process = subprocess.Popen(
                shlex.split(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                errors="replace",
            )
        except (OSError, ValueError) as error:  # not there, an open quote
            raise UserError(f"{who} cannot be started: {error}.") from None
        with process:
            threading.Thread(target=_feed, args=(process.stdin, lines), daemon=True).start()
            try:
                for number, line in enumerate(process.stdout or (), start=1):
                    if bad is not None or number > len(lines):
                        continue
                    answer = _read(read, line)
                    if answer is None:  # the command may say more itself when it ends
                        said = repr(line.removesuffix("\n")[:80])
                        bad = UserError(f"{who} wrote {said} as line {number}; wanted {wanted}.")
                    else:
                        yield answer
                process.wait()
            finally:
                process.kill()  # where nobody wants the other answers
        if process.returncode:
            errors.seek(0)
            said = errors.read().strip().splitlines()[-1:] or ["nothing on stderr"]
            raise UserError(f"{who} stopped with status {process.returncode}: {said[0]}")
    if number != len(lines):
        raise UserError(f"{who} wrote {number} lines for {len(lines)} {what}; one each.")
    if bad:
        raise bad


def _feed(stdin: IO[str], lines: Sequence[str]) -> None:
    # It may end before it has read all.
    with contextlib.suppress(BrokenPipeError, ValueError), stdin:
        stdin.writelines(lines)


def _read(read: Callable[[Any], Answer | None], line: str) -> Answer | None:
    try:
        return read(json.loads(line))
    except (ValueError, RecursionError):
        return None
