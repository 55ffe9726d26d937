"""The table of all fields of a config, but for the hyperparameters that a loss brings with it.

A field's default, what a value must be, what it means with its unit, and since when it is there are
said here and nowhere else: `config` makes the defaults from it, `config_check` the checks,
`config_doc` the page, `saved_config` what an older run means. A new field is one line.
"""

from nca_jax.axes import MESH_AXES
from nca_jax.data.chat import FORMATS
from nca_jax.field import (
    AXIS,
    COUNT,
    COUNT_OR_0,
    FLAG,
    FRACTION,
    NOT_NEGATIVE,
    PATTERN,
    POSITIVE,
    TEXT,
    Check,
    Field,
    one_of,
    parse_pairs,
)
from nca_jax.losses import LOSSES
from nca_jax.metrics import IS_BETTER_HIGH
from nca_jax.model_config import MODELS, TARGETS

# Sections that a config may lack, and where it does.
OPTIONAL = {
    "lora": "without adapters",
    "generate": "where nothing is sampled",
    "rounds": "of nca_jax.rounds alone",
}


def _is_sampling_mesh(text: str) -> bool:
    sizes = parse_pairs(text)
    is_size = [x == "-1" or (x.isdecimal() and int(x) > 0) for x in sizes.values()]
    are_sizes = bool(sizes) and sizes.keys() <= set(MESH_AXES) and all(is_size)
    return text in ("auto", "same") or (are_sizes and list(sizes.values()).count("-1") <= 1)


DTYPES = ("float32", "bfloat16")
SAMPLING_MESH = Check(
    str,
    _is_sampling_mesh,
    f"'auto', 'same', or sizes of {', '.join(MESH_AXES)}, at most one of them -1, as in "
    "'data=-1,tensor=8'",
)
ALIGN = Check(int, lambda x: x in (0, 1, 8, 16, 64, 128), "0, 1, 8, 16, 64 or 128")
EVERY = Check(int, lambda x: x >= 1 or x == -1, "a whole number of at least 1, or -1")
EVERY_OR_0 = Check(int, lambda x: x >= -1, "a whole number of at least -1")
LOSS = Check(str, lambda x: x in LOSSES, one_of(*LOSSES).wanted)  # of what is there when asked
LR = Check(float, lambda x: x >= 0, "a number above 0 in float32, or 0")
NAMES = Check(
    str,
    lambda x: x and set(x.split(",")) <= set(TARGETS),
    f"some of {', '.join(TARGETS)}, by commas",
)
SHARE = Check(float, lambda x: 0 < x <= 1, "a number in (0, 1] in float32")

FIELDS: dict[str, Field] = {
    "seed": Field(0, COUNT_OR_0, "of random weights, the order of the data and sampling"),
    "steps": Field(0, COUNT_OR_0, "updates; 0: by epochs"),
    "epochs": Field(1.0, NOT_NEGATIVE, "passes over the training records; 0: by steps"),
    "log_every": Field(1, COUNT, "steps from one line of metrics to the next", True),
    "eval_every": Field(
        0, EVERY_OR_0, "steps to the next held-out evaluation; 0: none; -1: a tenth", True, auto=-1
    ),
    "eval_patience": Field(
        0,
        COUNT_OR_0,
        "evaluations that may follow the best one, by checkpoint.best_metric, before the run ends;"
        " 0: all steps",
        True,
        since=4,
    ),
    "save_every": Field(
        200, EVERY, "steps; the last is always saved; -1: a tenth, 10 at least", True, auto=-1
    ),
    "compiler_options": Field(
        "",
        TEXT,
        "of XLA, NAME=VALUE,...: beside those of nca_jax/infra/compiler.py, or in place of them",
        True,
        since=5,
    ),
    "model.name": Field("", one_of("", *MODELS), "a size, of random weights; empty: init_from's"),
    "model.init_from": Field(
        "", TEXT, "folder, .gguf, package:NAME or hub id; empty: random weights of the size `name`"
    ),
    "model.head": Field(
        "lm", one_of("lm", "reward"), "reward: it gives each response a value", since=7
    ),
    "model.dtype": Field(
        "float32", one_of("auto", *DTYPES), "of activations; auto: float32 on CPU", auto="auto"
    ),
    "model.remat": Field(
        "none",
        one_of("auto", "none", "dots", "attention", "full", "host"),
        "what of a layer is computed again, fastest to leanest: nothing, all but products, all but "
        "attention, all; host: all, from inputs in the host's memory; wants scan_layers; auto: "
        "sets both, never to host",
        True,
        auto="auto",
    ),
    "model.scan_layers": Field(
        False, FLAG, "one compiled layer run L times; unrolled is faster on CPU", True
    ),
    "model.attention": Field(
        "auto",
        one_of("auto", "pairs", "splash"),
        "kernel of packed rows: XLA or Pallas; auto: splash on TPU",
        True,
    ),
    "model.splash": Field(
        "",
        TEXT,
        "of jax's splash BlockSizes those that are not data.block, as in "
        "block_kv=1024,use_fused_bwd_kernel=1",
        True,
        since=5,
    ),
    "reference.kind": Field(
        "live",
        one_of("live", "base", "cached", "none"),
        "beside the policy, the base without its adapters, from a cache that precompute made, or "
        "none",
    ),
    "reference.init_from": Field("", TEXT, "as model.init_from; empty: the policy's start"),
    "reference.cache": Field("", TEXT, "folder of a cached reference"),
    "lora.rank": Field(16, COUNT, "r, of the adapters", since=6),
    "lora.alpha": Field(16.0, POSITIVE, "an adapter's product is scaled by alpha / rank", since=6),
    "lora.targets": Field(
        "q,k,v,o,gate,up,down",
        NAMES,
        "matrices of a layer that have adapters, also router; of a mixture gate, up and down are "
        "those of the experts",
        since=6,
    ),
    "lora.init_from": Field(
        "", TEXT, "folder of a PEFT adapter that is continued; empty: they start at 0", since=6
    ),
    "lora.rslora": Field(False, FLAG, "scaled by alpha / sqrt(rank) instead", since=6),
    "lora.dora": Field(False, FLAG, "each output's norm is trained apart; not of experts", since=6),
    "lora.b_lr_ratio": Field(
        1.0, POSITIVE, "LoRA+: learning rate of the second factor over that of the first", since=6
    ),
    "lora.base_dtype": Field(
        "",
        one_of("", *DTYPES, "nf4"),
        "of the base in memory, nf4: QLoRA's 4 bits; empty: that of its file",
        since=6,
    ),
    "data.files": Field(
        "", TEXT, "globs, tfds:NAME[/SCORE]:SPLIT or hf:NAME[:CONFIG]:SPLIT, by commas or +"
    ),
    "data.store": Field(
        "",
        TEXT,
        "folder where records of 16 MiB or more stay encoded; empty: in $NCA_JAX_CACHE; none: no",
        True,
        since=5,
    ),
    "data.weights": Field(
        "", TEXT, "mixture weight of each entry of files; empty: every record once an epoch"
    ),
    "data.eval_files": Field(
        "", TEXT, "held-out records, as files; NAME=ENTRY is of a set that has its own metrics; or:"
    ),
    "data.eval_fraction": Field(0.0, FRACTION, "of the prompts in files, held out by their hash"),
    "data.tokenizer": Field(
        "", TEXT, "as model.init_from, byte, or none; empty: that of model.init_from"
    ),
    "data.chat_template": Field(
        "", TEXT, "name of one of the tokenizer's chat templates; empty: its default", since=3
    ),
    "data.format": Field("chat", one_of(*FORMATS), "how text is rendered"),
    "data.join": Field(
        "together",
        one_of("together", "apart"),
        "prompt and response become ids as one text where that can be cut; released: apart",
        since=3,
        before="apart",
    ),
    "data.score_unit": Field(
        "raw",
        one_of("raw", "spread"),
        "of scores and loss.alpha: the data's own, or the mean over the training records of the "
        "standard deviation of a record's scores",
        since=4,
    ),
    "data.num_responses": Field(4, COUNT, "K, responses of a prompt in a step"),
    "data.train_on": Field(
        "last_assistant",
        one_of("last_assistant", "all_assistant"),
        "of a conversation: its last answer, or every one, where a record has one response",
        since=6,
    ),
    "data.choose": Field(
        "best_worst_random",
        one_of("all", "first", "random", "best_worst_random"),
        "which K of a record's responses",
    ),
    "data.max_prompt_len": Field(512, COUNT, "tokens"),
    "data.max_response_len": Field(512, COUNT, "tokens"),
    "data.prompt_keep": Field("end", one_of("end", "start"), "of a prompt that is too long"),
    "data.too_long": Field(
        "truncate",
        one_of("truncate", "drop", "skip", "stop"),
        "drop: also the worst responses, until the others fit a row",
    ),
    "data.bad_rows": Field("stop", one_of("stop", "skip"), "of records that cannot be used"),
    "data.shuffle": Field(True, FLAG, "anew every epoch, by the seed"),
    "data.batch_size": Field(32, COUNT, "B, prompts in a step"),
    "data.row_len": Field(
        4096, COUNT_OR_0, "T, tokens in a row: a prompt and its responses; 0: by the data", auto=0
    ),
    "data.rows": Field(
        1, COUNT_OR_0, "in a micro-batch: a multiple of data * fsdp * expert; 0: it", True, auto=0
    ),
    "data.block": Field(
        64, COUNT_OR_0, "tokens in an attention block; 0: 64, on GPU 256, on TPU 512", True, auto=0
    ),
    "data.row_pairs": Field(0, COUNT_OR_0, "attention block pairs that a row may hold; 0: all"),
    "data.align": Field(
        1, ALIGN, "prompts end and responses start at its multiples; 0: 1, on TPU 16 to 128", auto=0
    ),
    "data.first_bonus": Field(
        0.0, NOT_NEGATIVE, "added to the score of a record's first response; released: 0.01"
    ),
    "loss.name": Field("nca", LOSS, "see below"),
    "loss.logits_chunk": Field(
        128, COUNT_OR_0, "tokens whose logits exist at once; 0: 64 MiB of them", True, auto=0
    ),
    "optim.lr": Field(
        5e-6,
        LR,
        "peak learning rate of AdamW; 0: 1e-5, from 1e9 parameters on 5e-7; tenfold of adapters",
        auto=0.0,
    ),
    "optim.schedule": Field(
        "cosine", one_of("constant", "linear", "cosine", "wsd"), "after the warmup"
    ),
    "optim.warmup_frac": Field(0.1, FRACTION, "of the steps, rounded up: linear"),
    "optim.warmup_from": Field(
        "share",
        one_of("share", "zero"),
        "rate of the first of W steps of warmup: lr / W, or 0, which trains nothing; released: 0",
        since=4,
        before="zero",
    ),
    "optim.decay_frac": Field(
        0.0, FRACTION, "of the steps, rounded up: the last ones, in which wsd falls to 0", since=4
    ),
    "optim.freeze": Field(
        "",
        PATTERN,
        "parameters in whose path it is found are not trained, such as embed; empty: all are",
        since=4,
    ),
    "optim.clip_norm": Field(1.0, NOT_NEGATIVE, "of the whole gradient; 0: not clipped"),
    "optim.b1": Field(0.9, FRACTION, "decay of the first moment"),
    "optim.b2": Field(0.999, FRACTION, "decay of the second moment"),
    "optim.eps": Field(1e-8, POSITIVE, "added to the root of the second moment"),
    "optim.weight_decay": Field(0.0, NOT_NEGATIVE, "of matrices; norms and biases are spared"),
    "optim.mu_dtype": Field("float32", one_of(*DTYPES), "of the first moment in memory"),
    "optim.moments": Field(
        "device",
        one_of("device", "host"),
        "whose memory holds both moments; host: they come to the device and go back in every step",
        True,
        since=5,
    ),
    "optim.grad_dtype": Field(
        "float32",
        one_of(*DTYPES),
        "in which devices sum the gradients of layers' matrices; sums of micro-batches: float32",
        since=6,
    ),
    "mesh.data": Field(1, AXIS, "devices that hold copies of the parameters", True),
    "mesh.fsdp": Field(
        -1, AXIS, "devices over which parameters are split; -1: all that remain", True
    ),
    "mesh.tensor": Field(1, AXIS, "devices over which heads, MLP and vocabulary are split", True),
    "mesh.expert": Field(1, AXIS, "devices over which experts are split", True),
    "checkpoint.keep_last": Field(2, COUNT, "checkpoints", True),
    "checkpoint.best_metric": Field(
        "", one_of("", *IS_BETTER_HIGH), "held-out metric whose best checkpoint is kept too", True
    ),
    "checkpoint.on_damage": Field(
        "previous",
        one_of("previous", "stop"),
        "where the newest checkpoint is damaged: go on from the one before it, or stop",
        True,
        since=3,
    ),
    "generate.max_new_tokens": Field(
        512, COUNT_OR_0, "tokens of a sampled response; 0: data.max_response_len", True, auto=0
    ),
    "generate.num_samples": Field(1, COUNT, "responses a prompt", True),
    "generate.temperature": Field(1.0, NOT_NEGATIVE, "of sampling; 0: the likeliest token", True),
    "generate.top_p": Field(1.0, SHARE, "probability of the tokens that are drawn from", True),
    "generate.top_k": Field(
        0, COUNT_OR_0, "that many of the likeliest tokens are drawn from; 0: all", True, since=8
    ),
    "generate.min_p": Field(
        0.0,
        FRACTION,
        "tokens are drawn from that are so likely, as a share of the likeliest",
        True,
        since=8,
    ),
    "generate.logps": Field(
        False, FLAG, "the log-probability of each sampled token is written too, nats", True, since=8
    ),
    "generate.stop": Field("", TEXT, "a string that ends a response; empty: none", True),
    "generate.batch_size": Field(32, COUNT, "samples at once", True),
    "generate.mesh": Field(
        "auto",
        SAMPLING_MESH,
        "for sampling: sizes as in data=-1,tensor=8; same: those of mesh; auto: weights over "
        "tensor, on a CPU same",
        True,
        since=8,
    ),
    "generate.scorer": Field("", TEXT, "rewards sampled responses; empty: none", True),
    "rounds.number": Field(3, COUNT, "rounds", since=7),
    "rounds.prompts": Field(64, COUNT, "drawn in a round", since=7),
    "rounds.samples": Field(
        4,
        COUNT,
        "responses a prompt, in place of generate.num_samples and data.num_responses",
        since=7,
    ),
    "rounds.steps": Field(4, COUNT, "updates a round, in place of steps and epochs", since=7),
    "rounds.reference": Field(
        "start",
        one_of("start", "previous"),
        "that of the config, or the policy at the start of the round",
        since=7,
    ),
    "rounds.keep_best": Field(
        False,
        FLAG,
        "the best response of earlier rounds to a prompt takes the place of the worst of this one",
        since=7,
    ),
    "rounds.drop_tied": Field(
        False, FLAG, "prompts whose responses all have one score are not trained on", since=7
    ),
    "rounds.dedupe": Field(False, FLAG, "equal responses to a prompt are trained on once", since=7),
    "rounds.optimizer": Field(
        "keep", one_of("keep", "new"), "in each round: its moments go on, or start anew", since=7
    ),
    "log.tensorboard": Field(True, FLAG, "event files beside metrics.jsonl", True),
    "log.wandb_project": Field("", TEXT, "of Weights & Biases; empty: off", True),
}
