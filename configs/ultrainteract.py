r"""NCA and DPO on UltraInteract: pairs of reasoning steps after prompts of several turns.

Paper: arXiv:2402.05369, section 5, the reasoning tasks. Loss and optimizer settings are those of
the released trainer; the paper's own for this data could not be checked. The base model is that of
Eurus (arXiv:2404.02078), and the lengths are ours: the prompts hold whole trajectories.

Data:  python -m nca_jax.prepare --name=ultra_interact_pair
Run:   python -m nca_jax.train --config=configs/ultrainteract.py:algo=pairwise_nca \
           --workdir=runs/ultrainteract
Try:   append `,smoke` to the config: a tiny model on the demo's rows, CPU, under a minute.

The data has one split. What is held out goes by the hash of the prompt, so another step of the
same problem may be in the training rows: judge a model by problems that are not in the data.

Expected; "-" is not run yet.
    algo           loss   accuracy   chosen_logp_drift   hours   commit
    pairwise_nca   -      -          -                   -       -
    dpo            -      -          -                   -       -
"""

from ml_collections import ConfigDict

from nca_jax.config_arg import parse_arg

EURUS_BASE = "openbmb/Eurus-7b-sft"


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg, model="mistral_7b", init_from="", files="", algo="pairwise_nca", beta=0.01,
        smoke=False,
    )  # fmt: skip
    own_rows = arg.files or ("experiments/demo/rows.jsonl" if arg.smoke else "")
    c = ConfigDict()
    c.seed = 42
    c.steps = 10 if arg.smoke else 0  # updates; 0: by epochs
    c.epochs = 0.0 if arg.smoke else 1.0
    c.log_every, c.eval_every, c.save_every = (1, 5, 5) if arg.smoke else (1, 200, 200)  # steps

    c.model = ConfigDict()
    c.model.name = "tiny" if arg.smoke else arg.model
    c.model.init_from = arg.init_from or (EURUS_BASE if c.model.name == "mistral_7b" else "")
    c.model.dtype = "bfloat16"  # of activations; parameters are float32
    c.model.remat, c.model.scan_layers = "full", True
    c.model.attention = "auto"  # pairs (XLA) or splash (Pallas); auto: splash on TPU
    c.reference = ConfigDict(dict(kind="live", init_from="", cache=""))

    c.data = ConfigDict()
    c.data.files, c.data.weights = own_rows or "tfds:ultra_interact_pair:train", ""
    c.data.eval_files, c.data.eval_fraction = "", 0.05 if own_rows else 0.01  # of the prompts
    c.data.tokenizer, c.data.format = ("byte", "plain") if arg.smoke else ("", "chat")
    c.data.num_responses, c.data.choose = 2, "best_worst_random"  # K
    c.data.max_prompt_len = 64 if arg.smoke else 2048  # tokens; the end of a trajectory is kept
    c.data.max_response_len = 96 if arg.smoke else 1024
    c.data.prompt_keep, c.data.too_long, c.data.bad_rows = "end", "truncate", "skip"
    c.data.shuffle = True
    c.data.first_bonus = 0.0  # 0.01 in the released trainer: ties go to the first response
    c.data.batch_size = 4 if arg.smoke else 32  # B, prompts a step
    c.data.row_len = 512 if arg.smoke else 4096  # T, tokens
    c.data.rows = 1 if arg.smoke else 8  # rows in a micro-batch, a multiple of data * fsdp
    c.data.block, c.data.row_pairs, c.data.align = 64 if arg.smoke else 512, 0, 16

    c.loss = ConfigDict(dict(name=arg.algo, alpha=0.0, beta=arg.beta))  # alpha 0: hard labels
    c.loss.logits_chunk = 128 if arg.smoke else 512  # tokens of a row whose logits exist at once

    c.optim = ConfigDict(dict(lr=5e-6, schedule="cosine", warmup_frac=0.1, clip_norm=1.0))
    c.optim.b1, c.optim.b2, c.optim.eps, c.optim.weight_decay = 0.9, 0.999, 1e-8, 0.0
    c.optim.mu_dtype = "float32"

    c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1, expert=1))  # -1: all remaining devices
    c.checkpoint = ConfigDict(dict(keep_last=2, best_metric=""))
    c.generate = ConfigDict(dict(max_new_tokens=1024, num_samples=1, temperature=1.0, top_p=1.0))
    c.generate.stop, c.generate.batch_size, c.generate.scorer = "", 32, ""
    c.log = ConfigDict(dict(tensorboard=True, wandb_project=""))
    return c.lock()
