"""Run one command as several processes on this machine, as hosts of a pod run it.

    python -m experiments.launch.local --processes=2 --devices=2 -- python -m nca_jax.train ...

--processes  how many
--devices    virtual CPU devices of each; 0: the devices as they are

Ctrl-C, SIGTERM and SIGHUP go to each of them once: a training run saves, and is waited for. When
one ends badly the others are given a minute to see it. One line says what happened, and the exit
status is that of the first to fail (128 + the signal's number if one ended it).
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from nca_jax import signals

GRACE = 60  # seconds for the others to stop by themselves


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--devices", type=int, default=0)
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    processes: list[subprocess.Popen] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    signals.handle(pass_on)
    processes += start(given.command, given.processes, given.devices)
    began = time.monotonic()
    first = first_to_fail(processes)
    if first is None:
        print(f"launch: all {len(processes)} processes are done", file=sys.stderr)
        return 0
    seconds = time.monotonic() - began
    killed = wait_or_kill(processes)
    status = processes[first].returncode
    how = f"exit status {status}" if status > 0 else f"signal {signal.Signals(-status).name}"
    others = "; the others stopped too"
    if killed:
        others = f"; process {', '.join(map(str, killed))} said nothing and was killed"
    print(
        f"launch: process {first} of {len(processes)} ended with {how} after {seconds:.0f} s"
        f"{others if len(processes) > 1 else ''}",
        file=sys.stderr,
    )
    return status if status > 0 else 128 - status


def start(command: list[str], num_processes: int, num_devices: int) -> list[subprocess.Popen]:
    """Starts the processes; each finds the others by the variables of nca_jax.infra.distributed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(num_processes),
    }
    if num_devices:
        env["JAX_PLATFORMS"] = "cpu"
        flags = f"--xla_force_host_platform_device_count={num_devices}"
        env["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"  # the last of a flag counts
    return [
        # A session of its own: Ctrl-C reaches the launcher alone, which passes it on once.
        subprocess.Popen(command, env=env | {"JAX_PROCESS_ID": str(i)}, start_new_session=True)
        for i in range(num_processes)
    ]


def first_to_fail(processes: list[subprocess.Popen]) -> int | None:
    """Waits; returns which process was first to end badly, or None once all have ended well."""
    while True:
        # Asked in reverse: where several have just ended, the coordinator is the last to be blamed.
        statuses = [process.poll() for process in processes]
        for i in reversed(range(len(processes))):
            if statuses[i]:
                return i
        if all(status == 0 for status in statuses):
            return None
        time.sleep(0.05)


def wait_or_kill(processes: list[subprocess.Popen]) -> list[int]:
    """Returns which processes did not end within GRACE seconds and were killed."""
    deadline = time.monotonic() + GRACE
    killed = []
    for i, process in enumerate(processes):
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed.append(i)
    return killed


if __name__ == "__main__":
    sys.exit(main())
