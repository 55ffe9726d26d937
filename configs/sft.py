r"""Supervised fine-tuning: the likelihood of one response a prompt, a mean over the step's tokens.

Records are JSON lines, plain or .gz, one conversation each, and may have other keys:
    {"prompt": text or messages, "response": text}
    {"messages": [{"role": ..., "content": ...}, ...]}, the assistant's last

train_on: last_assistant, or all_assistant: every answer of a conversation. Whichever it is, what a
system or a user says is not learned.

Run:   python -m nca_jax.train --workdir=runs/sft \
           --config=configs/sft.py:files=rows.jsonl.gz,init_from=HF_FOLDER
Then:  python -m nca_jax.export --workdir=runs/sft --out=SFT_FOLDER
       python -m nca_jax.train --workdir=runs/nca \
           --config=configs/jsonl.py:files=scored.jsonl.gz,init_from=SFT_FOLDER,algo=nca
Try:   append `,smoke`: a tiny model with random weights on bytes, CPU, under a minute.

Expected: transformers' own loss on the same tokens, to rounding (tests/test_sft.py); perplexity of
the held-out conversations falls.
"""

from ml_collections import ConfigDict

from nca_jax.auto import leave_open
from nca_jax.config import choose_loss, default_config, make_smoke, section
from nca_jax.config_arg import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, files="", model="", init_from="", train_on="last_assistant", smoke=False)
    c = default_config()
    choose_loss(c, "likelihood", asked={"k"}, k=1)
    c.loss.per_token, c.loss.reduce = True, "tokens"
    c.model.name, c.model.init_from = arg.model, arg.init_from
    c.data.files, c.data.train_on = arg.files, arg.train_on
    c.data.choose = "first"
    c.data.eval_fraction = 0.05  # of the prompts
    c.data.batch_size = 16  # conversations a step
    c.data.max_response_len = 2048  # tokens: of all_assistant, what follows the first prompt
    c.generate = section("generate")
    if arg.smoke:
        make_smoke(c)
        c.generate.max_new_tokens = 64
    else:
        leave_open(c)
    return c.lock()
