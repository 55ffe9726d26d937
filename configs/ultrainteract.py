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

from nca_jax.config import choose_loss, default_config, make_smoke, section
from nca_jax.config_arg import parse_arg

EURUS_BASE = "openbmb/Eurus-7b-sft"


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg, model="mistral_7b", init_from="", files="", algo="pairwise_nca", beta=0.01,
        smoke=False,
    )  # fmt: skip
    c = default_config()
    choose_loss(c, arg.algo, asked=arg.asked, k=2, alpha=0.0, beta=arg.beta)  # alpha 0: hard labels
    c.seed, c.optim.warmup_from = 42, "zero"  # as released
    c.eval_every, c.save_every = 200, 200  # steps
    c.model.name = arg.model
    c.model.init_from = arg.init_from or (EURUS_BASE if arg.model == "mistral_7b" else "")

    own_files = arg.files or ("experiments/demo/rows.jsonl" if arg.smoke else "")
    c.data.files = own_files or "tfds:ultra_interact_pair:train"
    c.data.eval_fraction = 0.05 if own_files else 0.01  # of the prompts
    c.data.bad_rows = "skip"
    c.data.max_prompt_len, c.data.max_response_len = 2048, 1024  # tokens; the end is kept

    # On TPUs: rows of one length, layers scanned and computed again, bfloat16 activations.
    c.model.dtype, c.model.remat, c.model.scan_layers = "bfloat16", "full", True
    c.data.row_len, c.data.rows = 4096, 8
    c.data.block, c.data.align, c.loss.logits_chunk = 512, 16, 512

    c.generate = section("generate")
    c.generate.max_new_tokens = 1024
    if arg.smoke:
        make_smoke(c)
    return c.lock()
