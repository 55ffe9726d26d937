r"""Write the cached reference that a sweep shares.

    python -m nca_jax.precompute --config=FILE[:args] --config.reference.kind=cached \
        --config.reference.cache=FOLDER

--config   a config file or nca_jax:NAME, with its arguments; --help_config lists all fields

Every response of every record, training and held out, is scored once under the frozen reference.
Started again after any stop, it goes on with the parts that are missing or damaged; of a folder
that does not say what its parts were made from, it makes all again. Several processes share
the records of every part, and the first of them writes it.
"""

import math
import time

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from nca_jax import build, programs, reference
from nca_jax.checks import UserError, run_main
from nca_jax.data.table import Table, joined
from nca_jax.files import AnyPath, out_folder, read_json, write_json
from nca_jax.flags import parse_flags
from nca_jax.infra import distributed, lock
from nca_jax.infra.progress import duration, first_call
from nca_jax.params import open_base
from nca_jax.protocols import DataSection
from nca_jax.reference import FINGERPRINT

PART = 64  # examples in a part at least: what a stop can lose
FULL = 4  # micro-batches that a part fills at least, of which the last one is not full


def main(argv: list[str]) -> int:
    config, _ = parse_flags(argv)
    if config.reference.kind != "cached":
        raise UserError("Set --config.reference.kind=cached and --config.reference.cache=FOLDER.")
    folder = out_folder(config.reference.cache, "--config.reference.cache")
    with lock.held(folder) as check_held:
        return fill_cache(config, folder, check_held)


def fill_cache(config: ConfigDict, folder: AnyPath, check_held: lock.CheckHeld) -> int:
    """Makes the parts of a cache that are missing, and returns the exit status."""
    run, data = build.read_all(config, date=reference.cache_date(folder))
    config = run.config
    examples = joined([data.training, data.heldout])
    distributed.check_same(rows=reference.examples_fingerprint(examples))

    with jax.set_mesh(run.mesh):
        params = reference.open_reference(run, open_base(run))
        fingerprint = reference.cache_fingerprint(run, params)
        is_known = (folder / FINGERPRINT).exists()
        size = part_size(examples, config.data)
        if is_known:
            reference.check_fingerprint(folder, fingerprint)
            size = read_json(folder / FINGERPRINT).get("part", PART)
        parts = [examples[i : i + size] for i in range(0, len(examples), size)]
        paths = [reference.part_path(folder, i) for i in range(len(parts))]
        is_made = np.array([is_known and reference.is_whole(path) for path in paths])
        missing = np.flatnonzero(~distributed.from_first(is_made)).tolist()
        if distributed.is_first():
            write_json(folder / FINGERPRINT, fingerprint | {"date": run.date, "part": size})
        num_slots = size * int(examples.entries["count"].max())
        logps = first_call("the reference", programs.make_group_logps(run, num_slots))
        start, tokens = time.perf_counter(), 0
        for i in tqdm(missing, unit="part", disable=None):
            scored = logps(params, [example.group for example in parts[i]])
            if distributed.is_first():
                check_held()
                reference.write_part(folder, i, parts[i], scored)
            tokens += sum(int(x[:, 1:].sum()) for _, x, _ in parts[i].by_count())
    if distributed.is_first():
        write_json(folder / "complete.json", {"examples": len(examples), "parts": len(parts)})
    seconds = time.perf_counter() - start
    print(
        f"{len(examples)} examples in {folder}: {len(missing)} of {len(parts)} parts made now, "
        f"in {duration(seconds)}, {tokens / seconds:.0f} useful tokens/s"
    )
    return 0


def part_size(examples: Table, data: DataSection) -> int:
    """Returns how many examples are scored together, so that the rows of all devices are full."""
    needed = sum(int(lengths.sum()) for _, lengths, _ in examples.by_count())
    of_part = FULL * data.rows * data.row_len * len(examples) / needed
    return PART * math.ceil(of_part / PART)


if __name__ == "__main__":
    run_main(
        distributed.together(main),
        interrupted="the parts that were made are kept; the same command goes on",
    )
