"""One field of a config: its default, what a value must be, and what it means.

The table of all fields is in `nca_jax.fields`; a loss brings its own hyperparameters with it. So
this is a leaf that imports nothing: a loss needs jax and numpy alone.
"""

import math
import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

Value = bool | int | float | str


class Check(NamedTuple):
    """What a value must be; a number of kind float is judged as float32 has it, as all use it."""

    kind: type
    is_good: Callable[..., bool]
    wanted: str  # in words, as in "it must be ..."

    def accepts(self, value: Any) -> bool:
        """Whether a value is of the kind and good; a whole number is a float, a bool no number."""
        kinds = (int, float) if self.kind is float else (self.kind,)
        is_kind = isinstance(value, kinds) and (self.kind is bool or not isinstance(value, bool))
        if is_kind and self.kind is float:
            as_float32 = _float32(value)
            is_lost = as_float32 == 0 and value != 0
            return math.isfinite(as_float32) and not is_lost and self.is_good(as_float32)
        return is_kind and self.is_good(value)


def _float32(value: float) -> float:
    """Returns the nearest float32, infinity above the largest; below the least normal one 0."""
    try:
        (nearest,) = struct.unpack("f", struct.pack("f", float(value)))
    except OverflowError:
        return math.inf
    return nearest if abs(nearest) >= 2**-126 else 0.0


class Field(NamedTuple):
    """One field of a config.

    Attributes:
      default: where neither a config file nor the command line says otherwise.
      check: what a value must be.
      meaning: in a line, with its unit.
      may_change: whether a resumed run may have another value: no later number depends on it.
      since: version of config.json from which on it is written; an older run has not got it.
      before: the value that such an older run means.
      auto: the value that leaves the choice to `nca_jax.auto`; None: there is no such choice.
    """

    default: Value
    check: Check
    meaning: str
    may_change: bool = False
    since: int = 1
    before: Value | None = None
    auto: Value | None = None


def one_of(*names: str) -> Check:
    """A string out of a few; "" is one only where it is among them."""
    return Check(str, lambda x: x in names, "one of " + ", ".join(repr(name) for name in names))


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def parse_pairs(text: str) -> dict[str, str]:
    """Returns {"a": "1", "b": "2"} of "a=1,b=2"; a part without "=" has the value ""."""
    parts = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    return {name: value for name, _, value in parts}


TEXT = Check(str, lambda x: True, "a string")
PATTERN = Check(str, _is_pattern, "a regular expression")
FLAG = Check(bool, lambda x: True, "True or False")
COUNT = Check(int, lambda x: x >= 1, "a whole number of at least 1")
COUNT_OR_0 = Check(int, lambda x: x >= 0, "a whole number of at least 0")
AXIS = Check(int, lambda x: x >= 1 or x == -1, "a whole number of at least 1, or -1 for the rest")
NUMBER = Check(float, lambda x: True, "a finite number in float32")
POSITIVE = Check(float, lambda x: x > 0, "a number above 0 in float32")
NOT_NEGATIVE = Check(float, lambda x: x >= 0, "a number of at least 0 in float32")
FRACTION = Check(float, lambda x: 0 <= x < 1, "a number in [0, 1) in float32")
