"""data/old_run: a model of a few thousand parameters with records of ids, and a run of it.

The workdir there was written by commit 5f08b2107fc0 (config.json without a version, a loss.alpha, a
key in the checkpoint): three of six steps; whole_metrics.jsonl has the metrics of all six.
"""

from pathlib import Path

OLD = Path("tests/data/old_run")
MODEL = OLD / "model"
ALL_BUT_STEPS = (  # of the run that wrote the workdir
    f"--config=configs/jsonl.py:files={OLD}/rows.jsonl,init_from={MODEL},k=3",
    "--config.epochs=0",
    "--config.data.tokenizer=none",
    "--config.data.eval_fraction=0.2",
    "--config.data.batch_size=4",
    "--config.data.rows=8",
    "--config.data.row_len=64",
    "--config.data.block=16",
    "--config.loss.logits_chunk=64",
    "--config.optim.lr=1e-2",
    "--config.data.max_prompt_len=16",
    "--config.data.max_response_len=16",
    "--config.log.tensorboard=False",
    "--config.checkpoint.keep_last=1",
)
FLAGS = (*ALL_BUT_STEPS, "--config.steps=6", "--config.eval_every=3", "--config.save_every=3")
