"""What a workdir says of its run beside metrics and checkpoints: run.json.

reference  a fingerprint of what the policy is held against; a resume must find the same
commit     of the code that began the run
commits    of the code of the start and of every resume, in order; one that follows itself once
steps      how many updates the whole run has
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from nca_jax.checks import UserError
from nca_jax.files import AnyPath, write_json
from nca_jax.infra import distributed

RUN = "run.json"
PACKAGE = Path(__file__).parent.parent


def record_run(workdir: AnyPath, *, reference: str, origin: str, steps: int) -> None:
    """Adds a start or a resume to run.json, which process 0 writes and all of them check.

    Args:
      reference: the fingerprint of the reference that this start has, or what kind it is.
      origin: where that reference comes from, for the message.
      steps: updates of the whole run.
    Raises:
      UserError: the run began with another reference; nothing is written.
    """
    began = read_run(workdir)
    if began and began["reference"] != reference:
        raise UserError(
            f"{workdir} was trained against another reference than {origin} now gives; restore "
            "that one, or use a new --workdir."
        )
    if not distributed.is_first():
        return
    commit = git_commit()
    commits = began["commits"] if began else []
    if commits[-1:] != [commit]:
        commits = [*commits, commit]
    first = {"reference": reference, "commit": commits[0]}
    write_json(workdir / RUN, first | {"steps": steps, "commits": commits})


def read_run(workdir: AnyPath) -> dict[str, Any] | None:
    """Returns run.json of a workdir, or None where no run has begun.

    One that was written before there was `commits` knows a single commit.
    """
    path = workdir / RUN
    if not path.exists():
        return None
    run = json.loads(path.read_text())
    return {"commits": [run["commit"]]} | run


def git_commit(package: Path = PACKAGE) -> str:
    """Returns the commit of this code, "-dirty" if it was changed; without one $NCA_JAX_COMMIT.

    A package that was installed below somebody else's repository has no commit of its own: that
    repository does not track its files. Neither set nor known it is "unknown".
    """
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        return _git(package, "describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("NCA_JAX_COMMIT", "unknown")


def _git(folder: Path, *args: str) -> str:
    run = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip()
