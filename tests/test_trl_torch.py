"""Beside TRL 1.16: the losses of its trainers, by their own code, on the same log-probabilities.

No trainer is built and no model run: a loss is called with what it reads of the two. Value and
gradient agree in float64; where TRL means something else by a name, a test says what and why.
"""

import math
import os
from collections import defaultdict
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytest.importorskip("trl")

from trl import DPOTrainer, KTOTrainer  # noqa: E402  (TRL may not be there)
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402

from nca_jax.losses import LOSSES, Responses  # noqa: E402
from nca_jax.metrics import prompt_weights  # noqa: E402

pytestmark = pytest.mark.torch
PROMPT = 3  # tokens
LENGTHS = ((5, 2), (1, 4), (3, 3))  # of each pair's better and worse response
BETA = 0.3
CPU = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


class Step(NamedTuple):
    """The loss of a step and its gradient by the log-probability of each response."""

    loss: float
    gradient: np.ndarray  # [B, 2], the better response first


def assert_same(one: Step, other: Step, rtol: float = 1e-12) -> None:
    np.testing.assert_allclose(one.loss, other.loss, rtol=rtol)
    np.testing.assert_allclose(one.gradient, other.gradient, rtol=rtol, atol=1e-14)


def times(factor: float, step: Step) -> Step:
    return Step(factor * step.loss, factor * step.gradient)


# Pairs whose tokens have random log-probabilities


class Pairs(NamedTuple):
    """Responses of a pair, all better ones before all worse ones, as TRL has a batch."""

    scored: torch.Tensor  # [2 B, T] int: the tokens of responses
    logps: torch.Tensor  # [2 B, T - 1] of those, 0 elsewhere
    ref_logps: torch.Tensor  # [2 B]


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    rng, lengths = np.random.default_rng(0), np.array(LENGTHS).T.reshape(-1)
    place = np.arange(PROMPT + lengths.max())
    scored = (place >= PROMPT) & (place < PROMPT + lengths[:, None])
    logps = -rng.exponential(size=scored[:, 1:].shape) * scored[:, 1:]
    ref_logps = logps.sum(-1) + rng.normal(size=len(lengths))
    return Pairs(*map(torch.tensor, (scored.astype(int), logps, ref_logps)))


def ours(pairs: Pairs, name: str, **fields) -> Step:
    """The mean loss of a step, as the training step weighs its prompts."""
    loss = LOSSES[name]
    fields = loss.defaults(**fields)
    of_each = (pairs.logps.sum(1).detach(), pairs.ref_logps, pairs.scored.sum(1).double())
    by_pair = [x.reshape(2, -1).T.numpy() for x in of_each]  # [B, 2]
    with jax.enable_x64(True):
        logps, *others = map(jnp.asarray, by_pair)
        scores = jnp.broadcast_to(jnp.array([1.0, 0.0]), logps.shape)

        def mean_loss(logps):
            given = Responses(logps, *others, scores, jnp.ones(logps.shape, bool))
            weights = prompt_weights(loss, given, fields)
            return jnp.sum(weights * loss.per_prompt(given, fields)) / jnp.sum(weights)

        value, gradient = jax.value_and_grad(mean_loss)(logps)
    return Step(float(value), np.asarray(gradient))


def stub_of(pairs: Pairs, **attributes) -> tuple[SimpleNamespace, SimpleNamespace, torch.Tensor]:
    """What a loss reads of a trainer and of a model's outputs, and what it differentiates by."""
    by = pairs.logps.clone().requires_grad_()
    zeros = torch.zeros_like(pairs.logps)
    outputs = SimpleNamespace(
        log_probs=by * pairs.scored[:, 1:], entropy=zeros, mean_logits=zeros, is_top1=zeros > 0
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=CPU,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )
    return trainer, outputs, by


def step_of(loss: torch.Tensor, by: torch.Tensor, pairs: Pairs) -> Step:
    loss.backward()
    a_token = by.grad.sum(1) / pairs.scored.sum(1)  # all tokens of a response have the same
    return Step(loss.item(), a_token.numpy().reshape(2, -1).T)


def dpo_trainer(pairs: Pairs, loss_type: str, *, beta=BETA, label_smoothing=0.0) -> Step:
    trainer, outputs, by = stub_of(
        pairs,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
    )
    better, worse = pairs.ref_logps.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(pairs.scored),
        "attention_mask": torch.ones_like(pairs.scored),
        "completion_mask": pairs.scored,
        "ref_chosen_logps": better,
        "ref_rejected_logps": worse,
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    return step_of(loss, by, pairs)


@pytest.mark.parametrize(
    ("loss_type", "name", "fields", "factor"),
    [
        ("sigmoid", "dpo", {}, 1),
        ("sigmoid_norm", "dpo", {"length_normalised": True}, 1),
        ("hinge", "hinge", {}, 1),
        ("nca_pair", "pairwise_nca", {}, 1),
        ("nca_pair", "nca", {"alpha": 0.0}, 1),
        ("bco_pair", "biased_nca", {}, 1),
        ("apo_zero", "apo_zero", {}, 1),
        ("apo_down", "apo_down", {}, 1),
        # It divides log-ratios by lengths; the paper does not, and neither do we unless asked to.
        ("ipo", "ipo", {"length_normalised": True}, 1),
        # A sum over the two where ours is a mean; the better one always wins.
        ("sppo_hard", "sppo", {"alpha": 1e-3}, 2),
    ],
)
def test_a_loss_of_pairs_is_that_of_its_dpo_trainer(pairs, loss_type, name, fields, factor):
    found = ours(pairs, name, beta=BETA, **fields)
    assert_same(times(factor, found), dpo_trainer(pairs, loss_type))


def test_supervised_fine_tuning_is_a_mean_over_the_tokens_of_the_step(pairs):
    found = ours(pairs, "likelihood", per_token=True, reduce="tokens")
    assert_same(found, dpo_trainer(pairs, "sft"))


def test_labels_that_are_wrong_at_a_rate_are_its_robust_and_its_exo_pair_and_not_its_sigmoid(pairs):
    rate = {"label_smoothing": 0.1}
    robust = ours(pairs, "dpo", beta=BETA, robust=True, **rate)
    assert_same(robust, dpo_trainer(pairs, "robust", **rate))
    # Its labels are (1 - rate, rate), ours softmax(s / alpha) of scores that are 1 apart. It has
    # the rate in float32.
    soft = ours(pairs, "exo", beta=BETA, alpha=1 / math.log(0.9 / 0.1))
    assert_same(soft, dpo_trainer(pairs, "exo_pair", **rate), rtol=1e-6)
    # `sigmoid` reads no rate any more: what was cDPO there is DPO, and ours is cDPO still.
    ignored = dpo_trainer(pairs, "sigmoid", **rate)
    assert_same(ignored, ours(pairs, "dpo", beta=BETA))
    assert abs(ours(pairs, "dpo", beta=BETA, **rate).loss - ignored.loss) > 1e-2


def test_ipo_as_published_is_not_its_ipo_unless_responses_are_of_one_token(pairs):
    published = ours(pairs, "ipo", beta=BETA)
    assert abs(published.loss - dpo_trainer(pairs, "ipo").loss) > 0.1


# KTO


def kto_trainer(pairs: Pairs, loss_type: str, *, kl: torch.Tensor | None = None, **weights) -> Step:
    """Its loss, with z = 0 or beta times the mean of `kl`, log-ratios of mismatched responses."""
    trainer, outputs, by = stub_of(
        pairs, loss_type=loss_type, beta=BETA, calculate_KL=kl is not None, **weights
    )
    trainer._compute_kl_logps = lambda *_: kl
    half = len(pairs.scored) // 2
    inputs = {
        "input_ids": torch.zeros_like(pairs.scored),
        "attention_mask": torch.ones_like(pairs.scored),
        "completion_mask": pairs.scored,
        "label": torch.arange(2 * half) < half,
        "ref_logps": pairs.ref_logps,
        "ref_KL_logps": torch.zeros(2 * half),
    }
    loss = KTOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    return step_of(loss, by, pairs)


def test_kto_is_twice_that_of_its_trainer_which_is_a_mean_over_single_responses(pairs):
    theirs = kto_trainer(pairs, "kto", desirable_weight=1.2, undesirable_weight=0.7)
    found = ours(pairs, "kto", beta=BETA, better_weight=1.2, worse_weight=0.7)
    assert_same(found, times(2, theirs))
    even = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    unpaired = kto_trainer(pairs, "apo_zero_unpaired", **even)
    assert_same(ours(pairs, "apo_zero", beta=BETA), times(2, unpaired))


def test_kto_has_no_z_of_mismatched_responses_where_its_trainer_has_one(pairs):
    even = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    apart = kto_trainer(pairs, "kto", kl=torch.full((len(pairs.scored),), 2.0), **even)
    found = ours(pairs, "kto", beta=BETA)
    assert abs(found.loss - 2 * apart.loss) > 1e-2
    # Its z moves both responses of a pair down by the same: ours of log-ratios 2 nats lower.
    lower = ours(pairs._replace(ref_logps=pairs.ref_logps + 2.0), "kto", beta=BETA)
    assert_same(lower, times(2, apart))


# CPO and ORPO, from logits on


class FromLogits(NamedTuple):
    """Pairs with the logits that their tokens' log-probabilities come from."""

    pairs: Pairs
    logits: torch.Tensor  # [2 B, T, V] float64
    ids: torch.Tensor  # [2 B, T]

    def step(self, step: Step) -> tuple[float, torch.Tensor]:
        """Loss and gradient by the logits, of a step by the responses' log-probabilities."""
        (gradient,) = torch.autograd.grad(
            self.pairs.logps.sum(1),
            self.logits,
            torch.tensor(step.gradient.T.reshape(-1)),
            retain_graph=True,
        )
        return step.loss, gradient


def from_logits(prompt: int, lengths=LENGTHS) -> FromLogits:
    rng, of_each = np.random.default_rng(1), np.array(lengths).T.reshape(-1)
    place = np.arange(prompt + of_each.max())
    scored = torch.tensor((place >= prompt) & (place < prompt + of_each[:, None])).int()
    logits = torch.tensor(rng.normal(size=(*scored.shape, 7)), requires_grad=True)
    ids = torch.tensor(rng.integers(0, 7, scored.shape))
    every = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    logps = every * scored[:, 1:]
    return FromLogits(Pairs(scored, logps, torch.zeros(len(ids))), logits, ids)


def their_loss(trainer_class, given: FromLogits, **attributes) -> tuple[float, torch.Tensor]:
    """The loss that CPOTrainer or ORPOTrainer takes of a batch, and its gradient by the logits."""
    trainer = object.__new__(trainer_class)
    common = {"accelerator": CPU, "is_encoder_decoder": False, "aux_loss_enabled": False}
    trainer.__dict__.update(common, pad_token_id=0, padding_value=0, beta=BETA, **attributes)
    scored = given.pairs.scored
    there = scored.flip(1).cummax(1)[0].flip(1)  # a prompt and its response
    fields = {"input_ids": given.ids, "attention_mask": there}
    fields["labels"] = torch.where(scored > 0, given.ids, -100)
    batch = {}
    for name, value in fields.items():
        batch[f"chosen_{name}"], batch[f"rejected_{name}"] = value.chunk(2)
    outputs = SimpleNamespace(logits=given.logits)
    loss, _ = trainer.get_batch_loss_metrics(lambda *_, **__: outputs, batch)
    (gradient,) = torch.autograd.grad(loss, given.logits, retain_graph=True)
    return loss.item(), gradient


CPO = {"alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.5}


def assert_equal(found: tuple, theirs: tuple, rtol: float = 1e-10) -> None:
    np.testing.assert_allclose(found[0], theirs[0], rtol=rtol)
    np.testing.assert_allclose(found[1], theirs[1], rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    ("loss_type", "name", "fields", "factor"),
    [
        ("sigmoid", "cpo", {"beta": BETA}, 1),
        ("simpo", "simpo", {"beta": BETA, "gamma": 0.5}, 1),
        ("hinge", "slic", {"delta": 1 / BETA}, BETA),
    ],
)
def test_a_loss_without_a_reference_is_that_of_its_cpo_trainer(loss_type, name, fields, factor):
    given = from_logits(PROMPT)
    theirs = their_loss(CPOTrainer, given, loss_type=loss_type, cpo_alpha=0.0, **CPO)
    assert_equal(given.step(times(factor, ours(given.pairs, name, **fields))), theirs)


def one_pair(prompt: int) -> FromLogits:
    return from_logits(prompt, LENGTHS[:1])


def test_the_likelihood_beside_cpo_is_of_the_steps_tokens_there_and_of_each_prompts_here():
    given, how = one_pair(PROMPT), CPO | {"loss_type": "sigmoid", "cpo_alpha": 1.0}
    found = given.step(ours(given.pairs, "cpo", beta=BETA, nll_weight=1.0))
    assert_equal(found, their_loss(CPOTrainer, given, **how))
    several = from_logits(PROMPT)
    found = several.step(ours(several.pairs, "cpo", beta=BETA, nll_weight=1.0))
    theirs, alone = (
        their_loss(CPOTrainer, several, **how | {"cpo_alpha": x})[0] for x in (1.0, 0.0)
    )
    better = several.pairs.logps[: len(LENGTHS)].sum(1)
    lengths = torch.tensor([pair[0] for pair in LENGTHS])
    assert theirs - alone == pytest.approx(-(better.sum() / lengths.sum()).item())
    assert found[0] - alone == pytest.approx(-(better / lengths).mean().item())


def test_the_likelihood_of_orpo_covers_the_prompt_there_and_the_response_alone_here():
    # A prompt of one token is predicted by nothing, so there they are the same.
    given = one_pair(prompt=1)
    found = given.step(ours(given.pairs, "orpo", beta=BETA))
    assert_equal(found, their_loss(ORPOTrainer, given), rtol=1e-5)  # its log-odds are in float32
    given = one_pair(PROMPT)
    found, theirs = ours(given.pairs, "orpo", beta=BETA).loss, their_loss(ORPOTrainer, given)[0]
    every = given.logits[0, :-1].log_softmax(-1).gather(-1, given.ids[0, 1:, None])[..., 0]
    length = LENGTHS[0][0]
    response, whole = every[PROMPT - 1 :][:length], every[: PROMPT - 1 + length]
    apart = (response.mean() - whole.mean()).item()
    assert theirs - found == pytest.approx(apart, rel=1e-4) and abs(apart) > 1e-2
