"""Campaigns of faults: each tries many, and says what became of them.

    make test-faults            100 of each kind; FAULT_TRIES=, FAULT_SEED= and, where a machine is
                                busy, FAULT_PATIENCE= (seconds) choose others

A fault that is survived leaves the result that there would have been without it. One that is
refused ends a command with one line and status 2. Any other outcome, a traceback or another
result, is lost, and fails the test. The table is printed at the end, for docs/reliability.md.
"""

import os
from collections import Counter

import pytest
from campaign import KINDS, Tally

TRIES = int(os.environ.get("FAULT_TRIES", "100"))
SEED = int(os.environ.get("FAULT_SEED", "0"))


@pytest.hookimpl(tryfirst=True)  # before those that -m deselects are
def pytest_collection_modifyitems(items):
    for item in items:
        if "/faults/" in str(item.path):
            item.add_marker(pytest.mark.faults)


@pytest.fixture
def tries() -> int:
    return TRIES


@pytest.fixture
def seed() -> int:
    return SEED


@pytest.fixture
def tally(request) -> Tally:
    """Counts what became of the faults of one test."""
    counts = Tally()
    yield counts
    for (what, kind), number in counts.items():
        request.node.user_properties.append((f"fault:{what}:{kind}", number))
    assert counts.total(), "nothing was tried"


def pytest_terminal_summary(terminalreporter):
    found: dict[str, Counter] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "teardown":
                for name, number in report.user_properties:
                    if name.startswith("fault:"):
                        _, what, kind = name.split(":")
                        found.setdefault(what, Counter())[kind] += number
    if not found:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(f"| fault | tried | {' | '.join(KINDS)} |")
    terminalreporter.write_line("|---|---|---|---|---|")
    for what, counts in sorted(found.items()):
        cells = " | ".join(str(counts[kind]) for kind in KINDS)
        terminalreporter.write_line(f"| {what} | {counts.total()} | {cells} |")
