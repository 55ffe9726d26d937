r"""The run of the PyTorch release, number by number (arXiv:2402.05369; its code's own settings).

rows: JSON lines {"prompt_ids": [int, ...], "response_ids": [[int, ...], ...], "scores": [...]}, the
best response first, taken in file order and again from the start. As released: the first response's
score gets +0.01, an eos inside a prompt or response is no key, and what is longer than 1024 tokens
is cut by its rule. AdamW with linear warmup over ceil(0.1 * steps) and cosine to 0.

algo: any loss. A pair loss (dpo, pairwise_nca, biased_nca) wants rows of 2 responses, has hard
labels, and reads neither k nor alpha: the first response wins unless the second is scored higher.

Run:   python -m nca_jax.train --workdir=runs/parity \
           --config=configs/torch_parity.py:model=HF_DIR,rows=ROWS.jsonl,algo=nca
Mesh:  --config.mesh.data=2 --config.mesh.fsdp=2 --config.mesh.tensor=2, on 8 devices.
Rows:  row_len holds any prompt that the rule leaves; short ones run faster at its true size, such
       as --config.data.row_len=512.

Expected (30 steps of a model of 2 layers against PyTorch): loss to 2e-5 and grad_norm to 5e-4
relative, logps to 1e-3 nats, rewards to 1e-4; tests/test_released.py says so.
"""

from ml_collections import ConfigDict

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
    pair = arg.algo in ("dpo", "pairwise_nca", "biased_nca")  # K = 2, hard labels
    c = ConfigDict()
    c.seed = 0
    c.steps, c.epochs = arg.steps, 0.0
    c.log_every, c.eval_every, c.save_every = 1, 0, 1000  # steps; the last one is always saved

    c.model = ConfigDict(dict(name="", init_from=arg.model))
    c.model.dtype, c.model.remat, c.model.scan_layers = "float32", "none", False
    c.model.attention = "auto"  # pairs (XLA) or splash (Pallas); auto: splash on TPU
    c.reference = ConfigDict(dict(kind="live", init_from="", cache=""))

    c.data = ConfigDict()
    c.data.files, c.data.weights = arg.rows, ""
    c.data.eval_files, c.data.eval_fraction = "", 0.0
    c.data.tokenizer, c.data.format = "none", "released"
    c.data.num_responses, c.data.choose = 2 if pair else arg.k, "all"
    c.data.max_prompt_len, c.data.max_response_len = 512, 512  # tokens; 1024 together
    c.data.prompt_keep, c.data.too_long, c.data.bad_rows = "end", "truncate", "stop"
    c.data.shuffle = False
    c.data.first_bonus = 0.01  # in the unit of the scores
    c.data.batch_size = arg.batch_size
    c.data.row_len = 1024 * c.data.num_responses  # the most that a prompt and its responses can be
    c.data.rows = arg.batch_size
    c.data.block, c.data.row_pairs, c.data.align = 64, 0, 1

    c.loss = ConfigDict(dict(name=arg.algo, beta=arg.beta, logits_chunk=128))
    c.loss.alpha = 0.0 if pair else arg.alpha
    c.optim = ConfigDict(dict(lr=arg.lr, schedule="cosine", warmup_frac=0.1, clip_norm=1.0))
    c.optim.b1, c.optim.b2, c.optim.eps, c.optim.weight_decay = 0.9, 0.999, 1e-8, 0.0
    c.optim.mu_dtype = "float32"

    c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1, expert=1))
    c.checkpoint = ConfigDict(dict(keep_last=1, best_metric=""))
    c.generate = ConfigDict(dict(max_new_tokens=64, num_samples=1, temperature=1.0, top_p=1.0))
    c.generate.stop, c.generate.batch_size, c.generate.scorer = "", 32, ""
    c.log = ConfigDict(dict(tensorboard=False, wandb_project=""))
    return c.lock()
