"""The argument of a config file: `--config=configs/FILE.py:name=value,flag`.

Of the project a config file imports this leaf and `nca_jax.config`, and more where what it leaves
open or is given (a PEFT folder) decides its values.
"""

import re
from types import SimpleNamespace

from nca_jax.checks import UserError
from nca_jax.other_names import did_you_mean

WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def parse_arg(arg: str | None, **defaults) -> SimpleNamespace:
    """Returns the defaults overridden by `name=value` items; types come from the defaults.

    A bare `name` sets a bool to True. Commas separate items, so a value holds none. `asked` has the
    names that were given.

    Raises:
      UserError: an unknown name, or a value that is not of its default's type.
    """
    values, asked = dict(defaults), set()
    for item in filter(None, (arg or "").split(",")):
        name, equals, text = item.partition("=")
        if name not in defaults:
            raise UserError(
                f"Unknown config argument {name!r}; this config takes {', '.join(defaults)}."
                f"{did_you_mean(name, list(defaults))} {_hint(name)}"
            )
        if re.search(rf"\s({'|'.join(defaults)})=", text):
            raise UserError(f"Config argument {item!r}: commas part arguments, not spaces.")
        kind = type(defaults[name])
        if not equals and kind is not bool:
            raise UserError(f"Config argument {name}: give {name}=VALUE.")
        values[name] = _convert(name, text if equals else "true", kind)
        asked.add(name)
    return SimpleNamespace(**values, asked=asked)


def _convert(name: str, text: str, kind: type):
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise UserError(f"Config argument {name}={text!r}: wanted {WANTED[kind]}.") from None


def _hint(name: str) -> str:
    """Returns what somebody may have meant who gave an argument that there is not."""
    if re.search(r"[./]", name):
        return "Several files are one argument: files=A.jsonl+B.jsonl."
    return "Fields are set by flags of their own: --config.section.field=value."
