"""Alignment losses: pure functions of [B, K] arrays, each in one record.

Axes:   B prompts, K responses a prompt. `mask` [B, K] bool says which responses are there (None:
        all); an absent one changes neither a loss nor a gradient, and "K" counts those present.
Units:  log-probabilities are in nats, summed (not averaged) over response tokens.
Dtypes: computed in the dtype of the input, float32 at least.
Paper:  Chen et al. 2024, arXiv:2402.05369. InfoNCA is section 3, NCA is section 4.

`LOSSES` names every loss that a config may ask for. A new one is a function and its record, here or
in a module of its own, and a line of `LOSSES`:

    def _likelihood(responses, fields):
        # - log pi of the best response, [B] nats: supervised fine-tuning on it.
        best = jnp.argmax(jnp.where(responses.mask, responses.scores, -jnp.inf), axis=-1)
        return -jnp.take_along_axis(responses.logps, best[:, None], axis=-1)[:, 0]

    LIKELIHOOD = Loss(_likelihood, fields={}, reads=("scores",), k=(1, None))
"""

from nca_jax.losses.contrastive import INFONCA, NCA, infonca, nca, nca_floor
from nca_jax.losses.pairs import BIASED_NCA, DPO, PAIRWISE_NCA, biased_nca, dpo, pairwise_nca
from nca_jax.losses.record import Fields, Loss, Responses
from nca_jax.losses.targets import entropy, implicit_rewards, targets_from_scores

LOSSES: dict[str, Loss] = {
    "nca": NCA,
    "infonca": INFONCA,
    "dpo": DPO,
    "pairwise_nca": PAIRWISE_NCA,
    "biased_nca": BIASED_NCA,
}

__all__ = [
    "LOSSES",
    "Fields",
    "Loss",
    "Responses",
    "biased_nca",
    "dpo",
    "entropy",
    "implicit_rewards",
    "infonca",
    "nca",
    "nca_floor",
    "pairwise_nca",
    "targets_from_scores",
]
