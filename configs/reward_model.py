r"""A reward model: a value for each response, learned from K scored responses a prompt.

The losses of explicit rewards (arXiv:2402.05369, section 3) with the value of a response, the
model's head at its last token, in place of beta * log-ratio: infonca is cross-entropy with the soft
targets softmax(scores / alpha), plackett_luce the likelihood of the ranking, dpo at K = 2 the usual
Bradley-Terry loss. Records are those of configs/jsonl.py, and data.format=chat trains on what the
chat template writes, to its last token.

Run:   python -m nca_jax.train --workdir=runs/reward \
           --config=configs/reward_model.py:files=rows.jsonl.gz,init_from=HF_FOLDER
Then:  python -m nca_jax.export --workdir=runs/reward --out=REWARD_FOLDER
       python -m nca_jax.score --rows=generated.jsonl --out=scored.jsonl \
           --scorer=reward_model:REWARD_FOLDER
Try:   append `,smoke`: a tiny model with random weights on bytes, CPU, under a minute.

transformers loads the folder as AutoModelForSequenceClassification, with the same scores. Only
differences of values within a prompt are learned; nca alone sees their level.

Expected: the head starts at 0, so at step 1 infonca shows the mean of ln K, dpo ln 2, nca 2 ln 2 =
1.3863, and accuracy_half_ties is 0.5 at step 0; held out it rises (experiments/claims, part g).
"""

from ml_collections import ConfigDict

from nca_jax.auto import leave_open
from nca_jax.config import choose_loss, default_config, make_smoke
from nca_jax.config_arg import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg, files="", model="", init_from="", algo="infonca", k=4, alpha=0.1, beta=1.0, smoke=False
    )
    c = default_config()
    c.model.head = "reward"
    choose_loss(c, arg.algo, asked=arg.asked, k=arg.k, alpha=arg.alpha, beta=arg.beta)
    c.reference.kind = "none"
    c.model.name, c.model.init_from = arg.model, arg.init_from
    c.data.files = arg.files
    c.data.eval_fraction = 0.05  # of the prompts
    c.data.batch_size = 16  # prompts a step
    if arg.smoke:
        make_smoke(c)
    else:
        leave_open(c)
    return c.lock()
