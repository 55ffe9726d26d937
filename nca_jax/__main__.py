"""The commands by one name: `nca-jax train ...` is `python -m nca_jax.train ...`."""

import ast
import difflib
import runpy
import sys
from pathlib import Path

COMMANDS = (
    "train",
    "rounds",
    "inspect",
    "evaluate",
    "lm_eval",
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
    asked = sys.argv[1] if len(sys.argv) > 1 else "--help"
    name = asked.replace("-", "_")
    if name in COMMANDS:
        sys.argv = [f"nca-jax {name}", *sys.argv[2:]]
        runpy.run_module(f"nca_jax.{name}", run_name="__main__", alter_sys=True)
    elif asked in ("--help", "-h", "help"):
        print("nca-jax COMMAND --flag=value ...; each is a module too, nca_jax.COMMAND:\n")
        for command in COMMANDS:
            print(f"  {command:11s} {_first_line(command)}")
        print("\nnca-jax COMMAND --help says what a command reads and writes, and its flags.")
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        said = f"did you mean {near[0]}?" if near else f"wanted one of {', '.join(COMMANDS)}."
        print(f"error: there is no command {asked!r}; {said}", file=sys.stderr)
        raise SystemExit(2)


def _first_line(command: str) -> str:
    """Returns the first line of a command's docstring, without importing what it needs."""
    source = (Path(__file__).parent / f"{command}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


if __name__ == "__main__":
    main()
