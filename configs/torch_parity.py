r"""The run of the PyTorch release, number by number (arXiv:2402.05369; its code's own settings).

rows: JSON lines {"prompt_ids": [int, ...], "response_ids": [[int, ...], ...], "scores": [...]}, the
best response first, taken in file order and again from the start. As released: the first response's
score gets +0.01, an eos inside a prompt or response is no key, and what is longer than 1024 tokens
is cut by its rule. AdamW with linear warmup over ceil(0.1 * steps) and cosine to 0.

algo: any loss. A pair loss (dpo, pairwise_nca, biased_nca) wants rows of 2 responses, has hard
labels, and takes no alpha and no other k: the first response wins unless the second is scored
higher.

Run:   python -m nca_jax.train --workdir=runs/parity \
           --config=configs/torch_parity.py:model=HF_DIR,rows=ROWS.jsonl,algo=nca
Mesh:  --config.mesh.data=2 --config.mesh.fsdp=2 --config.mesh.tensor=2, on 8 devices.
Rows:  row_len holds any prompt that the rule leaves; short ones run faster at its true size, such
       as --config.data.row_len=512.

Expected (30 steps of a model of 2 layers against PyTorch): loss to 2e-5 and grad_norm to 5e-4
relative, logps to 1e-3 nats, rewards to 1e-4; tests/test_released.py says so.
"""

from ml_collections import ConfigDict

from nca_jax.config import choose_loss, default_config
from nca_jax.config_arg import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg,
        model="",
        rows="",
        algo="nca",
        alpha=1e-4,
        beta=0.1,
        steps=30,
        batch_size=4,
        lr=1e-3,
        k=4,
    )
    c = default_config()
    choose_loss(c, arg.algo, asked=arg.asked, k=arg.k, alpha=arg.alpha, beta=arg.beta)
    c.steps, c.epochs = arg.steps, 0.0
    c.save_every = 1000  # the last one is always saved
    c.model.init_from = arg.model

    c.data.files, c.data.tokenizer = arg.rows, "none"
    c.data.format = "released"
    c.data.choose, c.data.shuffle = "all", False
    c.data.first_bonus = 0.01  # in the unit of the scores
    c.data.batch_size = c.data.rows = arg.batch_size
    c.data.row_len = 1024 * c.data.num_responses  # the most that a prompt and its responses can be
    c.optim.lr = arg.lr

    c.checkpoint.keep_last = 1
    c.log.tensorboard = False
    return c.lock()
