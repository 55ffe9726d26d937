"""Alignment losses: pure functions of [B, K] arrays, each in one record.

Axes:   B prompts, K responses a prompt. `mask` [B, K] bool says which responses are there; an
        absent one changes neither a loss nor a gradient, and "K" counts those present.
Units:  log-probabilities are in nats, summed (not averaged) over response tokens.
Dtypes: computed in the dtype of the input, float32 at least.
Rooms:  contrastive (nca, infonca: Chen et al. 2024, arXiv:2402.05369), lists (all K at once),
        pairs (ordered: which), likelihood.

`LOSSES` names every loss that a config may ask for:

    given = Responses(logps, ref_logps, lengths, scores, mask)
    LOSSES["exo"].per_prompt(given, {"alpha": 1.0, "beta": 0.1, "nll_weight": 0.0})  # [B] nats

A new one is a function and its record, in its room or a module of its own, and a line of `LOSSES`:

    def _best(responses, fields):
        # - log pi of the best response, [B] nats: supervised fine-tuning on it.
        best = jnp.argmax(jnp.where(responses.mask, responses.scores, -jnp.inf), axis=-1)
        return -jnp.take_along_axis(responses.logps, best[:, None], axis=-1)[:, 0]

    BEST = Loss(_best, fields={}, reads=("scores",), k=(1, None))
"""

from nca_jax.losses.contrastive import ALPHA, BETA, INFONCA, NCA, infonca, nca, nca_floor
from nca_jax.losses.likelihood import LIKELIHOOD, with_nll
from nca_jax.losses.lists import LOSSES_OF_LISTS
from nca_jax.losses.pairs import LOSSES_OF_PAIRS
from nca_jax.losses.record import Fields, Loss, Responses
from nca_jax.losses.targets import entropy, implicit_rewards, targets_from_scores

LOSSES: dict[str, Loss] = {
    name: with_nll(loss)
    for name, loss in (
        {"nca": NCA, "infonca": INFONCA}
        | LOSSES_OF_PAIRS
        | LOSSES_OF_LISTS
        | {"likelihood": LIKELIHOOD}
    ).items()
}
# Fields that losses share: what a config file says of them holds for each that has them.
SHARED = (ALPHA, BETA)

__all__ = [
    "ALPHA",
    "BETA",
    "LOSSES",
    "SHARED",
    "Fields",
    "Loss",
    "Responses",
    "entropy",
    "implicit_rewards",
    "infonca",
    "nca",
    "nca_floor",
    "targets_from_scores",
]
