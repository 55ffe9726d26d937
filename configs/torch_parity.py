r"""The run of the PyTorch release, number by number (arXiv:2402.05369; its code's own settings).

rows: JSON lines {"prompt_ids": [int, ...], "response_ids": [[int, ...], ...], "scores": [...]}, the
best response first, taken in file order and again from the start. As released: the first response's
score gets +0.01, an eos inside a prompt or response is no key, and what is longer than 1024 tokens
is cut by its rule. AdamW with linear warmup from 0 over ceil(0.1 * steps) and cosine to 0.

algo: any loss. A pair loss (dpo, pairwise_nca, biased_nca) wants rows of 2 responses, has hard
labels, and takes no alpha and no other k: the first response wins unless the second is scored
higher.

Adapters, with the base without them as the reference, which may be quantised (base_dtype):
lora=PEFT_FOLDER starts from its A and B, and its adapter_config.json says rank, alpha and targets;
rank, lora_alpha and rslora begin new ones on all seven matrices.

Run:   python -m nca_jax.train --workdir=runs/parity \
           --config=configs/torch_parity.py:model=HF_DIR,rows=ROWS.jsonl,algo=nca
LoRA:  ...,algo=nca,lora=PEFT_FOLDER or ...,algo=nca,rank=16,base_dtype=nf4
Mesh:  --config.mesh.data=2 --config.mesh.fsdp=2 --config.mesh.tensor=2, on 8 devices.
Rows:  row_len holds any prompt that the rule leaves; short ones run faster at its true size, such
       as --config.data.row_len=512.

Expected (30 steps of a model of 2 layers against PyTorch): loss to 2e-5 and grad_norm to 5e-4
relative, logps to 1e-3 nats, rewards to 1e-4; tests/test_released.py says so.
"""

from types import SimpleNamespace

from ml_collections import ConfigDict

from nca_jax.checks import UserError
from nca_jax.config import choose_loss, default_config, section
from nca_jax.config_arg import parse_arg
from nca_jax.models.formats.pretrained import open_adapter, open_pretrained

OF_A_FOLDER = {"rank", "lora_alpha", "rslora"}


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
        lora="",
        rank=16,
        lora_alpha=16.0,
        rslora=False,
        base_dtype="",
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
    c.optim.lr, c.optim.warmup_from = arg.lr, "zero"

    if arg.asked & {"lora", "base_dtype", *OF_A_FOLDER}:
        c.lora = lora_section(arg)
        c.reference.kind = "base" if c.reference.kind == "live" else c.reference.kind

    c.checkpoint.keep_last = 1
    c.log.tensorboard = False
    return c.lock()


def lora_section(arg: SimpleNamespace) -> ConfigDict:
    """Returns the section of adapters: what a PEFT folder holds, or as the arguments say."""
    lora = section("lora")
    lora.init_from, lora.base_dtype = arg.lora, arg.base_dtype
    if not arg.lora:
        lora.rank, lora.alpha, lora.rslora = arg.rank, arg.lora_alpha, arg.rslora
        return lora
    if arg.asked & OF_A_FOLDER:
        said = ", ".join(sorted(arg.asked & OF_A_FOLDER))
        raise UserError(f"lora={arg.lora} says its {said} itself: leave {said} out, or lora.")
    told = open_adapter(arg.lora, open_pretrained(arg.model)[0]).lora
    lora.rank, lora.alpha, lora.targets = told.rank, told.alpha, ",".join(told.targets)
    lora.rslora, lora.dora = told.rslora, told.dora
    return lora
