"""Several that start in one place: one works there, the others say who does."""

import random
import time

import pytest
from campaign import cache_result, is_one_line, nca_jax, run_flags, run_result, start


@pytest.mark.parametrize("name", ("train", "precompute"))
def test_of_two_in_one_folder_one_works_and_the_other_says_so(name, tmp_path, tries, seed, tally):
    rng = random.Random(f"{name} {seed}")
    place, result = {
        "train": ("--workdir=", run_result),
        "precompute": ("--config.reference.cache=", cache_result),
    }[name]
    flags = run_flags()
    if name == "precompute":
        flags += ["--config.reference.kind=cached"]
    alone = start(nca_jax(name, *flags, f"{place}{tmp_path}/alone"))
    assert alone.wait() == 0
    want = result(tmp_path / "alone")
    for i in range(tries):
        folder = tmp_path / f"{i}"
        both = []
        for _ in range(2):
            both.append(start(nca_jax(name, *flags, f"{place}{folder}")))
            time.sleep(rng.choice([0, rng.uniform(0, 3)]))
        ends = [(process, *process.communicate()) for process in both]
        what = f"two {name} in one folder"
        if any(process.returncode not in (0, 2) for process, _, _ in ends):
            tally.lost(what, str([err for _, _, err in ends]))
        if all(process.returncode == 2 for process, _, _ in ends):
            tally.lost(what, f"none worked: {[err for _, _, err in ends]}")
        if any(process.returncode == 2 and not is_one_line(err) for process, _, err in ends):
            tally.lost(what, str([err for _, _, err in ends]))
        if result(folder) != want:
            tally.lost(what, "other numbers")
        if any(process.returncode == 2 for process, _, _ in ends):
            tally.refused(what)
        else:  # one after the other
            tally.survived(what)
