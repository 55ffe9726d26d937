"""What the launch scripts would run on Cloud TPU: they are read here, and run nowhere."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "experiments" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
WHERE = {"CLUSTER": "cluster", "PROJECT": "project", "ZONE": "zone", "REPOSITORY": "docker.pkg/x"}
TRAIN = (
    "python -m nca_jax.train --config=configs/ultrafeedback.py:model=mistral_7b,algo=nca".split()
)


def printed(script: str, *args: str) -> list[list[str]]:
    """Returns the words of every command that a script would run."""
    run = subprocess.run(
        [str(LAUNCH / script), "--print", *args],
        env=os.environ | WHERE,
        capture_output=True,
        text=True,
        check=True,
    )
    return [words_of(line) for line in run.stdout.splitlines()]


def words_of(line: str) -> list[str]:
    """Returns the words of a line as bash reads it; shlex does not know bash's quotes."""
    script = f"printf '%s\\0' {line}"
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return run.stdout.split("\0")[:-1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_bash_that_shellcheck_passes(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def test_on_a_slice_every_host_runs_the_same_command():
    ((*gcloud, command),) = printed("tpu_vm.sh", "run", *TRAIN)
    assert gcloud == "gcloud compute tpus tpu-vm ssh nca --zone=zone --worker=all".split()
    assert shlex.join(TRAIN[:3]) in command
    # As a host's shell would: the words of the run arrive whole.
    started = command.split("nohup ")[1].split(" > ")[0]
    assert shlex.split(started) == TRAIN


def test_a_slice_is_made_installed_stopped_and_given_back():
    ((*create,),) = printed("tpu_vm.sh", "create")
    assert create[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "create"]
    assert "--accelerator-type=v5p-128" in create
    bundle, copy, install = printed("tpu_vm.sh", "install")
    assert bundle[:3] == ["git", "bundle", "create"] and bundle[3] in copy
    assert "--worker=all" in copy and ".[tpu,gcs]" in install[-1]
    assert "kill -TERM" in printed("tpu_vm.sh", "stop")[0][-1]
    assert printed("tpu_vm.sh", "delete")[0][4] == "delete"


def test_a_workload_runs_the_image_of_this_commit_and_gets_sigterm_itself():
    *_, build, push = printed("xpk.sh", "image")
    image = push[-1]
    assert f"--tag={image}" in build
    (workload,) = printed("xpk.sh", "run", *TRAIN)
    assert workload[:3] == ["xpk", "workload", "create"]
    assert f"--docker-image={image}" in workload
    command = next(word for word in workload if word.startswith("--command="))
    assert shlex.split(command.removeprefix("--command=")) == ["exec", *TRAIN]


@pytest.mark.parametrize("args", [["run"], ["nothing"], []])
def test_a_script_without_something_to_do_says_what_it_wants(args):
    for script in SCRIPTS:
        run = subprocess.run(
            [script, *args], env=os.environ | WHERE, capture_output=True, text=True
        )
        assert run.returncode == 2 and "run" in run.stderr and not run.stdout
