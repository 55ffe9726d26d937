"""train.log has what a run said and what its libraries said, and the screen the first alone."""

import os
import re
import subprocess
import sys

import pytest
from commands import ROOT

from nca_jax.checks import UserError
from nca_jax.infra.log import LOG, logged


def stamped(path) -> list[str]:
    """Returns the lines of a log without their times, which each must have."""
    lines = path.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)
    return [line[21:] for line in lines]


def still_held() -> None: ...


def test_what_is_printed_goes_to_the_screen_and_is_added_to_the_log(tmp_path, capsys):
    for word in ("first", "second"):
        with logged(tmp_path, still_held):
            print(word, end="")
            print(" start\nand more")
    print("after")
    both = ["first start", "and more", "second start", "and more"]
    assert capsys.readouterr().out.splitlines() == [*both, "after"]
    assert stamped(tmp_path / LOG) == both


def test_the_log_ends_in_what_stopped_the_run(tmp_path):
    with pytest.raises(UserError), logged(tmp_path, still_held):
        raise UserError("lower optim.lr")
    assert stamped(tmp_path / LOG) == ["error: lower optim.lr"]
    with pytest.raises(ZeroDivisionError), logged(tmp_path, still_held):
        print(1 / 0)
    assert "Traceback" in (tmp_path / LOG).read_text()


def test_what_native_code_writes_is_in_the_log_and_errors_are_on_the_screen(tmp_path):
    program = (
        "import os, pathlib, sys\n"
        "from nca_jax.checks import UserError, run_main\n"
        "from nca_jax.infra.log import logged\n"
        "def main(argv):\n"
        "    with logged(pathlib.Path(argv[1]), lambda: None):\n"
        "        print('ours')\n"
        "        os.write(1, b'[Gloo] rank 0\\n')\n"
        "        os.write(2, b'W0000 slow compile\\n')\n"
        "        raise UserError('mend it')\n"
        "run_main(main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT, env=os.environ, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (2, "ours\n", "error: mend it\n")
    log = (tmp_path / LOG).read_text()
    assert "[Gloo] rank 0\nW0000 slow compile\n" in log and "error: mend it" in log
