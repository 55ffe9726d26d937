r"""Align a model on your own scored responses (method: arXiv:2402.05369, sections 3 and 4).

Rows are JSON lines, plain or .gz, one prompt each:
    {"prompt": text or messages, "responses": [text, ...], "scores": [number, ...]}
    {"prompt": ..., "chosen": ..., "rejected": ...}
    {"prompt_ids": [int, ...], "response_ids": [[int, ...], ...], "scores": [...]}

Run:   python -m nca_jax.train --workdir=runs/mine \
           --config=configs/jsonl.py:files=rows.jsonl.gz,init_from=HF_FOLDER,algo=nca
Try:   append `,smoke`: a tiny model with random weights on bytes, CPU, under a minute.
Look:  python -m nca_jax.inspect --config=... shows the rows as the model will see them.

Expected: at step 1 NCA shows 2 ln 2 = 1.3863 and InfoNCA ln K; a run with anything else stops.
"""

from ml_collections import ConfigDict

from nca_jax.config_arg import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    # An argument is for what a sweep changes, or for what touches several fields at once.
    arg = parse_arg(
        arg, files="", model="", init_from="", algo="nca", k=4, alpha=0.1, beta=0.1, smoke=False
    )
    pair = arg.algo in ("dpo", "pairwise_nca", "biased_nca")  # K = 2, hard labels
    c = ConfigDict()
    c.seed = 0
    c.steps = 10 if arg.smoke else 0  # updates; 0: by epochs
    c.epochs = 0.0 if arg.smoke else 1.0
    c.log_every, c.eval_every, c.save_every = (1, 5, 5) if arg.smoke else (1, 50, 50)  # steps

    c.model = ConfigDict()
    c.model.name = "tiny" if arg.smoke else arg.model  # "": as init_from has it
    c.model.init_from = "" if arg.smoke else arg.init_from  # folder, .gguf, package:NAME, hub id
    c.model.dtype = "float32"  # of activations; parameters are float32
    c.model.remat = "none"  # none, dots, full: from fastest to leanest; wants scan_layers
    c.model.scan_layers = False  # unrolled is faster on CPU; scan large models
    c.model.attention = "auto"  # pairs (XLA) or splash (Pallas); auto: splash on TPU

    c.reference = ConfigDict(dict(kind="live", init_from="", cache=""))  # "": as the policy

    c.data = ConfigDict()
    c.data.files = arg.files  # globs or tfds:NAME:SPLIT, separated by commas
    c.data.weights = ""  # mixture weights of the sources; "": every row once an epoch
    c.data.eval_files = ""  # held-out rows, or:
    c.data.eval_fraction = 0.05  # held out of `files`, by a hash of the prompt
    c.data.tokenizer = "byte" if arg.smoke else ""  # "": that of init_from
    c.data.format = "plain" if arg.smoke else "chat"  # or "released": as the PyTorch release
    c.data.num_responses = 2 if pair else arg.k  # K
    c.data.choose = "best_worst_random"  # which K of a row's responses
    c.data.max_prompt_len, c.data.max_response_len = (64, 96) if arg.smoke else (512, 512)  # tokens
    c.data.prompt_keep = "end"  # of a too long prompt
    c.data.too_long = "truncate"  # or drop: also the worst responses, to fit a row; skip; stop
    c.data.bad_rows = "stop"
    c.data.shuffle = True
    c.data.first_bonus = 0.0  # added to the score of each row's first response
    c.data.batch_size = 4 if arg.smoke else 16  # B, prompts a step
    c.data.row_len = 512 if arg.smoke else 512 * (1 + c.data.num_responses)  # T, tokens
    c.data.rows = 1  # rows in a micro-batch, a multiple of data * fsdp * expert
    c.data.block = 64  # tokens in an attention block
    c.data.row_pairs = 0  # attention block pairs a row may hold; 0: all
    c.data.align = 1  # segments start at multiples of this

    c.loss = ConfigDict()
    c.loss.name = arg.algo
    c.loss.alpha = 0.0 if pair else arg.alpha  # temperature, in the unit of the scores
    c.loss.beta = arg.beta
    c.loss.logits_chunk = 128  # tokens of a row whose logits exist at once

    c.optim = ConfigDict(dict(lr=5e-6, schedule="cosine", warmup_frac=0.1, clip_norm=1.0))
    c.optim.b1, c.optim.b2, c.optim.eps, c.optim.weight_decay = 0.9, 0.999, 1e-8, 0.0
    c.optim.mu_dtype = "float32"  # of the first moment

    c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1, expert=1))  # -1: all remaining devices
    c.checkpoint = ConfigDict(dict(keep_last=2, best_metric=""))
    c.generate = ConfigDict(dict(max_new_tokens=64, num_samples=1, temperature=1.0, top_p=1.0))
    c.generate.stop = ""  # a string that ends a response, "" for none
    c.generate.batch_size = 32  # samples at once
    c.generate.scorer = ""  # rewards generated responses: "vader", or "" for none
    c.log = ConfigDict(dict(tensorboard=True, wandb_project=""))
    return c.lock()
