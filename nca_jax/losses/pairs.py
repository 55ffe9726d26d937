"""Losses of pairs: one response is better than another, by score, and that is all they see.

A prompt's loss is the mean over its pairs, which `fields["pairs"]` chooses out of its K responses;
see `ordered`. Each function below is the loss of a pair, (pair, fields) -> [B, K, K] nats, with

    l = log pi(y|x) - log pi_ref(y|x)      of the better response l_w, the worse l_r, d = l_w - l_r
    pbar = log pi(y|x) / n                 the mean over its n tokens, end of turn included
    SP(x) = log(1 + e^x),  s the scores
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, relu, sigmoid, softplus

from nca_jax.field import FLAG, NOT_NEGATIVE, NUMBER, POSITIVE, Check, Field, one_of
from nca_jax.losses.contrastive import BETA, nca_floor
from nca_jax.losses.ordered import PAIRS, OfPair, Pair, floor_of_pairs, over_pairs
from nca_jax.losses.record import (
    OF_LOGRATIOS,
    OF_MEAN_TOKENS,
    Fields,
    Floor,
    Loss,
    Responses,
)

LEAST_LOSS = 1e-6  # nats a token: `orpo` takes no response for more certain than this
ZERO = floor_of_pairs(0.0)


def dpo(pair: Pair, fields: Fields) -> jax.Array:
    """DPO: SP(-z), z = beta d (Rafailov et al. 2023, arXiv:2305.18290).

    By its fields also
        label_smoothing e   (1 - e) SP(-z) + e SP(z): cDPO, for labels that are wrong at rate e
        robust              [(1 - e) SP(-z) - e SP(z)] / (1 - 2 e): unbiased for such labels
                            (Chowdhury et al. 2024, arXiv:2403.00409); it has no floor
        margin              z = beta d - a (s_w - s_r) for "difference", or - a log(s_w - s_r)
                            for "log", a = margin_weight: ODPO (Amini et al. 2024, arXiv:2402.10571)
        length_normalised   z = beta (l_w / n_w - l_r / n_r): of a mean token
        length_weight a     z = beta d + a (n_w - n_r): R-DPO (Park et al. 2024, arXiv:2403.19159),
                            which charges for length where a > 0
    """
    z = _f(fields, "beta") * (_mean_gap(pair) if fields["length_normalised"] else pair.gap)
    if fields["margin"] != "none":
        gap = pair.score_gap
        z -= _f(fields, "margin_weight") * (jnp.log(gap) if fields["margin"] == "log" else gap)
    z += _f(fields, "length_weight") * (pair.better.lengths - pair.worse.lengths)
    e = _f(fields, "label_smoothing")
    if fields["robust"]:
        return ((1 - e) * softplus(-z) - e * softplus(z)) / (1 - 2 * e)
    return (1 - e) * softplus(-z) + e * softplus(z)


def ipo(pair: Pair, fields: Fields) -> jax.Array:
    """IPO: (d - 1/(2 beta))^2 (Azar et al. 2023, arXiv:2310.12036); d of l/n if length_normalised.

    The paper sums over tokens; `length_normalised` is what TRL computes.
    """
    d = _mean_gap(pair) if fields["length_normalised"] else pair.gap
    return (d - 1 / (2 * _f(fields, "beta"))) ** 2


def hinge(pair: Pair, fields: Fields) -> jax.Array:
    """Hinge: relu(1 - beta d); SLiC's rank loss of log-ratios (as in arXiv:2309.06657)."""
    return relu(1 - _f(fields, "beta") * pair.gap)


def slic(pair: Pair, fields: Fields) -> jax.Array:
    """SLiC-HF's rank loss, relu(delta - log pi_w + log pi_r) (Zhao et al. 2023, arXiv:2305.10425).

    Its regulariser is `nll_weight`.
    """
    return relu(_f(fields, "delta") - pair.better.logps + pair.worse.logps)


def simpo(pair: Pair, fields: Fields) -> jax.Array:
    """SimPO: SP(-(beta (pbar_w - pbar_r) - gamma)) (Meng et al. 2024, arXiv:2405.14734)."""
    gap = pair.better.per_token - pair.worse.per_token
    return softplus(_f(fields, "gamma") - _f(fields, "beta") * gap)


def cpo(pair: Pair, fields: Fields) -> jax.Array:
    """CPO: SP(-beta (log pi_w - log pi_r)) (Xu et al. 2024, arXiv:2401.08417).

    The paper adds the likelihood of the better response: nll_weight = 1.
    """
    return softplus(-_f(fields, "beta") * (pair.better.logps - pair.worse.logps))


def orpo(pair: Pair, fields: Fields) -> jax.Array:
    """ORPO: - pbar_w + beta SP(-(o_w - o_r)), o = pbar - log(1 - e^pbar) (arXiv:2403.07691).

    The first term is of the better response alone; TRL's covers its prompt too. pbar is taken for
    -1e-6 at most, so that o is finite.
    """

    def log_odds(per_token: jax.Array) -> jax.Array:
        certain = jnp.minimum(per_token, -LEAST_LOSS)
        return certain - jnp.log(-jnp.expm1(certain))

    better, worse = pair.better.per_token, pair.worse.per_token
    return _f(fields, "beta") * softplus(log_odds(worse) - log_odds(better)) - better


def kto(pair: Pair, fields: Fields) -> jax.Array:
    """KTO of a pair: b (1 - sigmoid(beta l_w - z)) + w (1 - sigmoid(z - beta l_r)), z = 0.

    Ethayarajh et al. 2024, arXiv:2402.01306, where z is an estimate of the KL divergence from
    mismatched responses; it is 0 here, as at the reference.
    """
    beta = _f(fields, "beta")
    better, worse = pair.better.logratio, pair.worse.logratio
    raised = _f(fields, "better_weight") * sigmoid(-beta * better)
    return raised + _f(fields, "worse_weight") * sigmoid(beta * worse)


def apo_zero(pair: Pair, fields: Fields) -> jax.Array:
    """APO-zero: 1 - sigmoid(beta l_w) + sigmoid(beta l_r) (arXiv:2408.06266).

    For a better response that is better than the model: it rises while the worse one falls.
    """
    beta = _f(fields, "beta")
    return sigmoid(-beta * pair.better.logratio) + sigmoid(beta * pair.worse.logratio)


def apo_down(pair: Pair, fields: Fields) -> jax.Array:
    """APO-down: sigmoid(beta l_w) + 1 - sigmoid(beta d) (arXiv:2408.06266).

    For a model that is better than both: both fall, the worse one more.
    """
    beta = _f(fields, "beta")
    return sigmoid(beta * pair.better.logratio) + sigmoid(-beta * pair.gap)


def dpop(pair: Pair, fields: Fields) -> jax.Array:
    """DPO-positive: SP(-beta (d - penalty relu(-l_w))) (Pal et al. 2024, arXiv:2402.13228).

    Charges a better response whose likelihood falls below the reference's. The penalty is inside,
    times beta, as Cerebras and PaddleNLP have it (ports to MLX add it outside of the logarithm);
    neither the paper's text nor a code of its authors was at hand.
    """
    fallen = relu(-pair.better.logratio)
    return softplus(-_f(fields, "beta") * (pair.gap - _f(fields, "penalty") * fallen))


def cal_dpo(pair: Pair, fields: Fields) -> jax.Array:
    """Cal-DPO: SP(-d) + 1/2 [(l_w - 1/(2 beta))^2 + (l_r + 1/(2 beta))^2] (arXiv:2412.14516).

    The first term has no beta, as in the authors' code.
    """
    level = 1 / (2 * _f(fields, "beta"))
    apart = (pair.better.logratio - level) ** 2 + (pair.worse.logratio + level) ** 2
    return softplus(-pair.gap) + apart / 2


def rpo(pair: Pair, fields: Fields) -> jax.Array:
    """RPO: a distance of x = beta d from y = eta (s_w - s_r) (Nemotron-4, arXiv:2406.11704).

    square (x - y)^2; forward KL(sigmoid x || sigmoid y); backward KL(sigmoid y || sigmoid x), KL
    of the Bernoulli distributions. All are least, 0, at x = y.
    """
    x, y = _f(fields, "beta") * pair.gap, _f(fields, "eta") * pair.score_gap
    if fields["distance"] == "square":
        return (x - y) ** 2
    return _bernoulli_kl(x, y) if fields["distance"] == "forward" else _bernoulli_kl(y, x)


def pairwise_nca(pair: Pair, fields: Fields) -> jax.Array:
    """NCA at K = 2 with hard labels (arXiv:2402.05369, section 4), r = beta l:

    - log sigmoid(r_w) - 1/2 log sigmoid(-r_w) - 1/2 log sigmoid(-r_r)
    """
    beta = _f(fields, "beta")
    better, worse = beta * pair.better.logratio, beta * pair.worse.logratio
    return softplus(-better) + (softplus(better) + softplus(worse)) / 2


def biased_nca(pair: Pair, fields: Fields) -> jax.Array:
    """The released code's biasedNCA: raise the better one, lower only the worse one, r = beta l:

        - log sigmoid(r_w) - negative_weight log sigmoid(-r_r)

    Another negative_weight than 1 is CCA's (arXiv:2410.09347).
    """
    beta = _f(fields, "beta")
    lowered = softplus(beta * pair.worse.logratio)
    return softplus(-beta * pair.better.logratio) + _f(fields, "negative_weight") * lowered


def _f(fields: Fields, name: str) -> float:
    return float(fields[name])


def _mean_gap(pair: Pair) -> jax.Array:
    """The difference of the two log-ratios, each divided by its length: nats a token."""
    better, worse = pair
    return better.logratio / better.lengths - worse.logratio / worse.lengths


def _bernoulli_kl(x: jax.Array, y: jax.Array) -> jax.Array:
    """KL(Bernoulli(sigmoid x) || Bernoulli(sigmoid y)), nats."""
    one = sigmoid(x) * (log_sigmoid(x) - log_sigmoid(y))
    return one + sigmoid(-x) * (log_sigmoid(-x) - log_sigmoid(-y))


def _dpo_floor(responses: Responses, fields: Fields) -> jax.Array | None:
    """The entropy of a label that is wrong at rate e, where beta d = logit(1 - e); 0 at e = 0."""
    e = _f(fields, "label_smoothing")
    if fields["robust"] and e:
        return None
    entropy = -sum(x * math.log(x) for x in (e, 1 - e)) if e else 0.0
    return floor_of_pairs(entropy)(responses, fields)


def _nca_floor(responses: Responses, fields: Fields) -> jax.Array:
    """`nca_floor` of a hard pair: 0.9548."""
    hard = jnp.array([[1.0, 0.0]])
    return floor_of_pairs(nca_floor(hard)[0])(responses, fields)


def _record(
    of_pair: OfPair,
    reads: tuple[str, ...] = OF_LOGRATIOS,
    floor: Floor | None = ZERO,
    **fields: Field,
) -> Loss:
    own = fields | {"pairs": PAIRS}
    return Loss(over_pairs(of_pair), own, reads=reads, usual_k=2, floor=floor)


RATE = Check(float, lambda x: 0 <= x < 0.5, "a number in [0, 0.5) in float32")
new = functools.partial(Field, since=5)  # what runs of older versions had not got
_BY_LENGTH = new(False, FLAG, "each log-ratio is divided by its response's length")

# By the name that a config gives them, each with its own fields.
LOSSES_OF_PAIRS = {
    "dpo": _record(
        dpo,
        (*OF_LOGRATIOS, "lengths"),
        floor=_dpo_floor,
        beta=BETA,
        label_smoothing=new(0.0, RATE, "the rate at which labels are taken to be wrong"),
        robust=new(False, FLAG, "label_smoothing by the unbiased estimate"),
        margin=new(
            "none", one_of("none", "difference", "log"), "what of the two scores is the margin"
        ),
        margin_weight=new(0.0, NUMBER, "nats a unit of the margin"),
        length_normalised=_BY_LENGTH,
        length_weight=new(0.0, NUMBER, "charge for length, nats a token"),
    ),
    "ipo": _record(ipo, (*OF_LOGRATIOS, "lengths"), beta=BETA, length_normalised=_BY_LENGTH),
    "hinge": _record(hinge, beta=BETA),
    "slic": _record(slic, ("scores",), delta=new(1.0, NOT_NEGATIVE, "the margin, nats")),
    "simpo": _record(
        simpo,
        OF_MEAN_TOKENS,
        beta=new(2.5, POSITIVE, "reward a nat of the mean token's log-probability"),
        gamma=new(1.4, NOT_NEGATIVE, "margin of the rewards, nats"),
    ),
    "cpo": _record(
        cpo, ("scores",), beta=new(0.1, POSITIVE, "reward a nat of the log-probability")
    ),
    "orpo": _record(orpo, OF_MEAN_TOKENS, beta=new(0.1, NOT_NEGATIVE, "weight of the odds ratio")),
    "kto": _record(
        kto,
        beta=BETA,
        better_weight=new(1.0, NOT_NEGATIVE, "weight of the better response"),
        worse_weight=new(1.0, NOT_NEGATIVE, "weight of the worse response"),
    ),
    "apo_zero": _record(apo_zero, beta=BETA),
    "apo_down": _record(apo_down, beta=BETA),
    "dpop": _record(
        dpop,
        beta=BETA,
        penalty=new(50.0, NOT_NEGATIVE, "of each nat by which the better response has fallen"),
    ),
    "cal_dpo": _record(
        cal_dpo,
        floor=None,
        beta=new(0.001, POSITIVE, "the log-ratios are drawn to +-1/(2 beta) nats"),
    ),
    "rpo": _record(
        rpo,
        beta=BETA,
        eta=new(1.0, POSITIVE, "nats a unit of score"),
        distance=new("backward", one_of("square", "forward", "backward"), "the distance"),
    ),
    "pairwise_nca": _record(pairwise_nca, floor=_nca_floor, beta=BETA),
    "biased_nca": _record(
        biased_nca,
        beta=BETA,
        negative_weight=new(1.0, NOT_NEGATIVE, "weight of lowering the worse response"),
    ),
}
