"""docs/config.md, and what --help_config prints: the table of fields in words."""

from nca_jax.field import Field
from nca_jax.fields import FIELDS, OPTIONAL
from nca_jax.losses import LOSSES


def describe() -> str:
    """Returns docs/config.md: every field with its default, what it must be and what it means."""
    lines = [
        "# Fields of a config",
        "",
        "Made by `python -m nca_jax.config > docs/config.md`. Every field can be set in a config",
        "file (`configs/`) and by `--config.section.field=value`. Those marked * may change when a",
        "run is resumed.",
    ]
    title = None
    for name, field in FIELDS.items():
        head, _, leaf = name.rpartition(".")
        if head != title:
            title = head
            absent = f" (absent {OPTIONAL[head]})" if head in OPTIONAL else ""
            lines += ["", f"## {f'config.{head}' if head else 'config'}{absent}", *_HEADER]
        lines.append(_line(leaf, field))
    for name, loss in LOSSES.items():
        least, most = loss.k
        k = f"K = {least}" if least == most else f"K >= {least}" + (f" to {most}" if most else "")
        reads = ", ".join(loss.reads)
        lines += ["", f"## config.loss of {name}: {k}; reads {reads}", *_HEADER]
        lines += [_line(leaf, field) for leaf, field in loss.fields.items()]
    return "\n".join(lines) + "\n"


_HEADER = ("", "| field | default | must be | meaning |", "|---|---|---|---|")


def _line(leaf: str, field: Field) -> str:
    mark = "*" if field.may_change else ""
    wanted = field.check.wanted.replace("|", "\\|")
    return f"| {leaf}{mark} | `{field.default!r}` | {wanted} | {field.meaning} |"
