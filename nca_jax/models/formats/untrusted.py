"""What is read from files that somebody else has written: nothing of it is believed.

A file is no larger than its kind ever is and no pointer of Git LFS, JSON is an object, and a field
is of the kind that is wanted.
"""

import json
import reprlib
from pathlib import Path
from typing import Any

from nca_jax.checks import UserError
from nca_jax.field import Check

POINTER = b"version https://git-lfs.github.com/spec/"
JSON_BYTES = 64 << 20  # of one file; an index of all experts of the largest models has a tenth


def check_file(file: Path, most_bytes: int | None = None) -> None:
    """Raises UserError if a file cannot be read, is a pointer of Git LFS, or is too large."""
    try:
        with file.open("rb") as opened:
            is_pointer = opened.read(len(POINTER)) == POINTER
        size = file.stat().st_size
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error}") from error
    if is_pointer:
        raise UserError(
            f"{file} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its "
            "folder, or download it again."
        )
    if most_bytes is not None and size > most_bytes:
        raise UserError(f"{file} has {size} bytes; wanted at most {most_bytes}.")


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object of a JSON file. Raises UserError if there is none."""
    check_file(file, JSON_BYTES)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"Cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object.")
    return content


def check_field(name: str, value: Any, check: Check) -> None:
    """Raises UserError unless a field's value is what `check` wants."""
    if not check.accepts(value):
        raise UserError(f"{name} must be {check.wanted}, not {reprlib.repr(value)}.")


def or_null(check: Check) -> Check:
    """The same, or null; not of a bool, which is no `object` to a Check."""
    return Check(object, lambda x: x is None or check.accepts(x), f"{check.wanted}, or null")


def list_of(check: Check, wanted: str) -> Check:
    """A list of values that `check` accepts; `wanted` says so in words."""
    return Check(list, lambda x: all(map(check.accepts, x)), wanted)


# Whole numbers have 32 bits, and numbers are finite in float32.
SIZE = Check(int, lambda x: 1 <= x < 2**31, "a positive integer below 2**31")
SIZE_OR_0 = Check(int, lambda x: 0 <= x < 2**31, "an integer from 0 to below 2**31")
NUM_STACKED = Check(int, lambda x: 1 <= x <= 1000, "a positive integer of at most 1000")
EVEN = Check(int, lambda x: 1 < x < 2**31 and x % 2 == 0, "a positive even integer below 2**31")
NUMBER = Check(float, lambda x: 0 < x < 1e30, "a number above 0 and below 1e30")
INTEGER = Check(int, lambda x: True, "an integer")
OBJECT = Check(dict, lambda x: True, "an object")
IDS = Check(
    object,
    lambda x: INTEGER.accepts(x) or list_of(INTEGER, "").accepts(x),
    "a token id or a list of token ids",
)
