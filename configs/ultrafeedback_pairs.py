r"""NCA and DPO on pairs of UltraFeedback: K = 2, hard labels.

Paper: arXiv:2402.05369, section 5; loss and optimizer settings are those of the released trainer.
At K = 2 with hard labels nca is pairwise_nca and infonca is dpo. It trained LoRA adapters; here
every parameter moves, which wants a far smaller beta: sweep beta=1e-4 to 1e-3.

Data:  python -m nca_jax.prepare --name=ultrafeedback_preference
       (or --raw=FOLDER with the files of HuggingFaceH4/ultrafeedback_binarized)
Run:   python -m nca_jax.train --config=configs/ultrafeedback_pairs.py:algo=dpo \
           --workdir=runs/ultrafeedback_pairs
Try:   append `,smoke` to the config: a tiny model on the demo's rows, CPU, under a minute.

Expected on test_prefs. Published are the model cards of the released LoRA checkpoints, beta 0.01,
which may differ in the rows they keep; "-" is not run yet.
    algo           where       loss     accuracy   rewards/0   rewards/1   hours   commit
    pairwise_nca   published   1.3030   .7820      +0.049      -0.540
    pairwise_nca   here        -        -          -           -           -       -
    dpo            published   0.4575   .7745      -0.893      -2.014
    dpo            here        -        -          -           -           -       -
"""

from ml_collections import ConfigDict

from nca_jax.config_arg import parse_arg

PAPER_BASE = "HuggingFaceH4/mistral-7b-sft-beta"


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
    c.model.init_from = arg.init_from or (PAPER_BASE if c.model.name == "mistral_7b" else "")
    c.model.dtype = "bfloat16"  # of activations; parameters are float32
    c.model.remat, c.model.scan_layers = "full", True
    c.model.attention = "auto"  # pairs (XLA) or splash (Pallas); auto: splash on TPU
    c.reference = ConfigDict(dict(kind="live", init_from="", cache=""))

    c.data = ConfigDict()
    c.data.files, c.data.weights = own_rows or "tfds:ultrafeedback_preference:train_prefs", ""
    c.data.eval_files = "" if own_rows else "tfds:ultrafeedback_preference:test_prefs"
    c.data.eval_fraction = 0.05 if own_rows else 0.0
    c.data.tokenizer, c.data.format = ("byte", "plain") if arg.smoke else ("", "chat")
    c.data.num_responses, c.data.choose = 2, "best_worst_random"  # K
    c.data.max_prompt_len, c.data.max_response_len = (64, 96) if arg.smoke else (512, 512)  # tokens
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
    c.generate = ConfigDict(dict(max_new_tokens=512, num_samples=1, temperature=1.0, top_p=1.0))
    c.generate.stop, c.generate.batch_size, c.generate.scorer = "", 32, ""
    c.log = ConfigDict(dict(tensorboard=True, wandb_project=""))
    return c.lock()
