"""The commands by one name: `nca-jax train ...` is `python -m nca_jax.train ...`."""

import ast
import runpy
import sys
from pathlib import Path

COMMANDS = (
    "train",
    "inspect",
    "evaluate",
    "generate",
    "score",
    "precompute",
    "logps",
    "prepare",
    "export",
    "aot",
)


def main() -> None:
    """Runs the command that is named, with the arguments that follow; without one lists them."""
    name = sys.argv[1].replace("-", "_") if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        sys.argv = [f"nca-jax {name}", *sys.argv[2:]]
        runpy.run_module(f"nca_jax.{name}", run_name="__main__")
        return
    print("nca-jax COMMAND --flag=value ...; each is a module, nca_jax.COMMAND:\n")
    for command in COMMANDS:
        print(f"  {command:11s} {_first_line(command)}")
    if name not in ("", "__help", "_h", "help"):
        print(f"\nerror: there is no command {sys.argv[1]!r}", file=sys.stderr)
        raise SystemExit(2)


def _first_line(command: str) -> str:
    """Returns the first line of a command's docstring, without importing what it needs."""
    source = (Path(__file__).parent / f"{command}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


if __name__ == "__main__":
    main()
