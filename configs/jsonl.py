r"""Align a model on your own scored responses (method: arXiv:2402.05369, sections 3 and 4).

Rows are JSON lines, plain or .gz, one prompt each:
    {"prompt": text or messages, "responses": [text, ...], "scores": [number, ...]}
    {"prompt": ..., "chosen": ..., "rejected": ...}, texts or whole conversations without a prompt
    {"prompt_ids": [int, ...], "response_ids": [[int, ...], ...], "scores": [...]}

Run:   python -m nca_jax.train --workdir=runs/mine \
           --config=configs/jsonl.py:files=rows.jsonl.gz,init_from=HF_FOLDER,algo=nca
Try:   append `,smoke`: a tiny model with random weights on bytes, CPU, under a minute.
Look:  python -m nca_jax.inspect --config=... shows the rows as the model will see them, proposes
       alpha and a batch size, and says how much memory it takes.

docs/choosing.md says how to choose the loss, alpha, beta, lr and K. Rows, learning rate, precision,
and how often to evaluate and save go by the data, the model's size and the devices, and are said at
the start; what is set by --config.section.field=value stays.

Expected: at step 1 NCA shows 2 ln 2 = 1.3863 and InfoNCA ln K; a run with anything else stops.
"""

from ml_collections import ConfigDict

from nca_jax.auto import leave_open
from nca_jax.config import choose_loss, default_config, make_smoke, section
from nca_jax.config_arg import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    # An argument is for what a sweep changes, or for what touches several fields at once.
    arg = parse_arg(
        arg, files="", model="", init_from="", algo="nca", k=4, alpha=0.1, beta=0.1, smoke=False
    )
    c = default_config()
    choose_loss(c, arg.algo, asked=arg.asked, k=arg.k, alpha=arg.alpha, beta=arg.beta)
    c.model.name, c.model.init_from = arg.model, arg.init_from
    c.data.files = arg.files
    c.data.eval_fraction = 0.05  # of the prompts
    c.data.batch_size = 16  # prompts a step
    c.generate = section("generate")
    if arg.smoke:
        make_smoke(c)
        c.generate.max_new_tokens = 64
    else:
        leave_open(c)
    return c.lock()
