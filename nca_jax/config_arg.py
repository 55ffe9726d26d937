"""The argument of a config file: `--config=configs/FILE.py:name=value,flag`.

Config files import this leaf and nothing else of the project.
"""

from types import SimpleNamespace

from nca_jax.checks import UserError


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
            )
        values[name] = _convert(name, text if equals else "true", type(defaults[name]))
        asked.add(name)
    return SimpleNamespace(**values, asked=asked)


def _convert(name: str, text: str, kind: type):
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise UserError(f"Config argument {name}={text!r} is not a {kind.__name__}.") from None
