r"""Build a data set as tensorflow-datasets.

    python -m nca_jax.prepare --name=NAME [--raw=FOLDER] [--score=NAME] [--out=FOLDER]

    --name    ultrafeedback_reward, ultrafeedback_preference, ultra_interact_pair, scored_jsonl
    --raw     folder (or one file) of .parquet, .jsonl or .jsonl.gz; without it, from the hub
    --score   ultrafeedback_reward: overall, fine-grained (the mean of the aspects) or one aspect,
              from the raw openbmb/UltraFeedback; without it, the paper's records and their scores.
              ultrafeedback_preference: given, the scores of the pair; without it, 1 and 0
    --out     where data sets live; without it $TFDS_DATA_DIR, or ~/tensorflow_datasets

Prints what was kept, what was dropped and why. Rows that are left are read by data.files=
tfds:NAME[/SCORE]:SPLIT. Wants the tfds extra.
"""

import sys

from nca_jax.checks import UserError, run_main
from nca_jax.data.layouts import DATA_SETS
from nca_jax.data.tfds_source import data_dir
from nca_jax.files import as_path, is_remote, local_copy, out_folder
from nca_jax.flags import parse_own_flags
from nca_jax.infra import lock


def main(argv: list[str]) -> int:
    given = parse_own_flags(argv, name="", raw="", score="", out="")
    if given.name not in DATA_SETS:
        raise UserError(f"--name={given.name} is none of {', '.join(DATA_SETS)}.")
    if given.score not in DATA_SETS[given.name]:
        known = ", ".join(filter(None, DATA_SETS[given.name])) or "none"
        raise UserError(f"--score={given.score}: {given.name} takes {known}, or no --score.")
    import tensorflow_datasets as tfds  # with builders, wants the tfds extra: see checks.EXTRAS

    from nca_jax.data import builders

    origin = DATA_SETS[given.name][given.score]
    out = as_path(given.out) if given.out else data_dir()
    if is_remote(out):
        raise UserError(
            f"Records are written to a local disk, not to {out}: give --out=FOLDER, then copy it "
            f"there (gcloud storage cp -r 'FOLDER/*' {out})."
        )
    out_folder(out)
    raw = local_copy(as_path(given.raw)) if given.raw else builders.fetch(origin)
    if not raw.exists():
        raise UserError(f"--raw={given.raw} is not there; give a folder or file of raw rows.")
    files = builders.find_files(raw, origin)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with lock.held(out):
        builder = builders.ScoredRecords(given.name, given.score, origin, files, out)
        builders.prepare(builder)
    print(builder.data_dir)
    entry = f"tfds:{given.name}/{given.score}".rstrip("/")
    for split, counts in builder.counts.items():
        print(f"{entry}:{split}: {builders.report(counts)}")
    return 0


if __name__ == "__main__":
    run_main(main)
