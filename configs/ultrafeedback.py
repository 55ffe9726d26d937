r"""NCA and InfoNCA on UltraFeedback: K = 4 responses a prompt, each with GPT-4's score.

Paper: arXiv:2402.05369, section 5; loss and optimizer settings are those of the released trainer.
recipe=qlora is the release itself: a Mistral-7B in nf4, adapters of rank 16 and alpha 16 on all
seven matrices, lr 5e-6, prompts of 512 of 1024 tokens, its text, masks and cuts, and the same base
without adapters as the reference. On a Mixtral (model=mixtral_8x7b) the names that it adapts are
those of the attention alone, and so they are here. recipe=full moves every parameter, which wants a
far smaller beta: sweep beta=1e-4 to 1e-3. A loss of pairs takes the best and the worst of the four
(K = 2, hard labels).

Data:  python -m nca_jax.prepare --name=ultrafeedback_reward
Run:   python -m nca_jax.train --config=configs/ultrafeedback.py:model=mistral_7b,algo=nca \
           --workdir=runs/ultrafeedback
QLoRA: the same with model=mistral_7b,algo=nca,recipe=qlora: one row a device, on one chip or more
Try:   append `,smoke` to the config: a tiny model on the demo's rows, CPU, under a minute.

Expected on test_prefs. Published are the model cards of the released checkpoints (QLoRA on
Mistral-7B, beta 0.01), which recipe=qlora should give and which may differ in the rows they keep;
"-" is not run yet.
    algo       recipe   where       loss     accuracy   rewards/0   rewards/3   hours   commit
    nca        qlora    published   1.3007   .7396      -0.004      -0.646
    nca        qlora    here        -        -          -           -           -       -
    nca        full     here        -        -          -           -           -       -
    infonca    qlora    published   1.1137   .7334      -0.901      -2.088
    infonca    qlora    here        -        -          -           -           -       -
    infonca    full     here        -        -          -           -           -       -
"""

from ml_collections import ConfigDict

from nca_jax.checks import UserError
from nca_jax.config import choose_loss, default_config, make_smoke, section
from nca_jax.config_arg import parse_arg

PAPER_BASE = "HuggingFaceH4/mistral-7b-sft-beta"


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg, model="mistral_7b", init_from="", files="", algo="nca", alpha=1e-4, beta=0.01,
        recipe="full", smoke=False,
    )  # fmt: skip
    if arg.recipe not in ("full", "qlora"):
        raise UserError(f"recipe={arg.recipe}: wanted full or qlora.")
    c = default_config()
    # alpha in GPT-4's points: at 1e-4 the labels are hard.
    choose_loss(c, arg.algo, asked=arg.asked, k=4, alpha=arg.alpha, beta=arg.beta)
    c.seed, c.optim.warmup_from = 42, "zero"  # as released
    c.eval_every, c.save_every = 200, 200  # steps
    c.model.name = arg.model
    c.model.init_from = arg.init_from or (PAPER_BASE if arg.model == "mistral_7b" else "")

    own_files = arg.files or ("experiments/demo/rows.jsonl" if arg.smoke else "")
    c.data.files = own_files or "tfds:ultrafeedback_reward:train_prefs"
    c.data.eval_files = "" if own_files else "tfds:ultrafeedback_reward:test_prefs"
    c.data.eval_fraction = 0.05 if own_files else 0.0  # of the prompts
    c.data.bad_rows = "skip"

    # On TPUs: rows of one length, layers scanned and computed again, bfloat16 activations.
    c.model.dtype, c.model.remat, c.model.scan_layers = "bfloat16", "full", True
    c.data.row_len, c.data.rows = 4096, 8
    c.data.block, c.data.align, c.loss.logits_chunk = 512, 16, 512

    if arg.recipe == "qlora":
        be_the_release(c)
    c.generate = section("generate")
    if arg.smoke:
        make_smoke(c)
    return c.lock()


def be_the_release(c: ConfigDict) -> None:
    """Sets what the released trainer does and a full run does not."""
    c.lora = section("lora")
    c.lora.rank, c.lora.alpha, c.lora.base_dtype = 16, 16.0, "nf4"
    if c.model.name == "mixtral_8x7b":  # its experts have other names than q_proj to down_proj
        c.lora.targets = "q,k,v,o"
    c.reference.kind = "base" if c.reference.kind == "live" else c.reference.kind
    c.optim.lr = 5e-6
    c.data.format, c.data.first_bonus = "released", 0.01  # in the unit of the scores
    c.data.choose = "all" if c.data.num_responses == 4 else c.data.choose
    c.data.rows = 0  # one a device
