"""Evaluation: functions of (params, batches) that return floats by name."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from nca_jax.axes import Params
from nca_jax.batch import Batch, Rows
from nca_jax.comparison import ERROR, mean_and_error
from nca_jax.data.group import Group
from nca_jax.data.pack import RowLayout, pack, segment_spans
from nca_jax.data.pipeline import HostBatch
from nca_jax.field import Value
from nca_jax.infra.mesh import put_rows, rows_here
from nca_jax.logprobs import sum_by_slot, token_logps, token_logps_and_misses
from nca_jax.losses import LOSSES, Responses
from nca_jax.metrics import alignment_metrics
from nca_jax.models.decoder import Model
from nca_jax.train_step import loss_of, responses_of

# -> [B, K]; see `programs.jit_step_logps`
HostLogps = Callable[[Params, Batch[np.ndarray]], jax.Array]
Measure = Callable[[Responses], dict[str, jax.Array]]
RowValues = Callable[[Rows[jax.Array]], ArrayLike]  # -> [.., num_slots]
# Metrics that are means over all prompts, whatever the weights of the loss.
PLAIN_MEANS = {"accuracy", "accuracy_half_ties", "top1", "margin", "chosen_logp_drift"}
RowsKl = Callable[[Params, Params, Rows[jax.Array]], jax.Array]  # -> [num_slots]
RowsMisses = Callable[[Params, Rows[jax.Array]], jax.Array]  # -> [2, num_slots]


class Heldout(NamedTuple):
    responses: Responses  # [B, K]; a prompt without any is an empty slot
    has_reference: bool


def fill_reference(
    step_logps: HostLogps, ref_params: Params | None, batches: Sequence[HostBatch]
) -> list[HostBatch]:
    """Returns the batches with the reference's log-probabilities, computed once for all.

    Without parameters of a reference they are as they were: a cache has filled them, or there is
    no reference.
    """
    if ref_params is None:
        return list(batches)
    return [
        host._replace(
            batch=host.batch._replace(ref_logps=np.asarray(step_logps(ref_params, host.batch)))
        )
        for host in batches
    ]


def heldout_metrics(
    step_logps: HostLogps, params: Params, batches: Sequence[HostBatch], config: ConfigDict
) -> dict[str, float]:
    """Returns the training metrics over all held-out prompts, each prompt counted once.

    Args:
      batches: with their `ref_logps`, where there is a reference.
    """
    return metrics_of(heldout_responses(step_logps, params, batches), config)


def heldout_responses(
    step_logps: HostLogps, params: Params, batches: Sequence[HostBatch]
) -> Heldout:
    """Returns all held-out responses, with their log-probabilities under `params`."""
    logps = np.concatenate([np.asarray(step_logps(params, host.batch)) for host in batches])

    def joined(field: str) -> jax.Array | None:
        values = [getattr(host.batch, field) for host in batches]
        return None if values[0] is None else jnp.asarray(np.concatenate(values))

    per_response = ("scores", "mask", "lengths")  # the arrays that are [B, K], beside ref_logps
    whole = batches[0].batch._replace(**{name: joined(name) for name in per_response})
    ref_logps = joined("ref_logps")
    responses = responses_of(whole, jnp.asarray(logps), ref_logps)
    return Heldout(responses, has_reference=ref_logps is not None)


def metrics_of(heldout: Heldout, config: ConfigDict) -> dict[str, float]:
    """Returns the training metrics over all these prompts."""
    found = jax.device_get(jax.jit(_metrics(heldout, config))(heldout.responses))
    return {name: float(value) for name, value in found.items()}


def values_of(heldout: Heldout, config: ConfigDict) -> dict[str, np.ndarray]:
    """Returns {name: its value at each prompt, [prompts]} of the metrics that are plain means."""
    measure = _metrics(heldout, config)

    def of_one(prompt: Responses) -> dict[str, jax.Array]:
        return measure(jax.tree.map(lambda x: x[None], prompt))

    present = np.asarray(heldout.responses.mask).any(axis=-1)
    by_prompt = jax.device_get(jax.jit(jax.vmap(of_one))(heldout.responses))
    return {name: by_prompt[name][present] for name in sorted(PLAIN_MEANS & by_prompt.keys())}


def errors_of(by_prompt: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns {name_se: standard error} of the mean of each name's values at prompts."""
    found = {}
    for name, values in by_prompt.items():
        found |= mean_and_error(name, values)
    return {name: value for name, value in found.items() if name.endswith(ERROR)}


def _metrics(heldout: Heldout, config: ConfigDict) -> Measure:
    """Returns the same function for the same loss, so that it is compiled once."""
    _, fields = loss_of(config)
    return _measure(config.loss.name, tuple(fields.items()), heldout.has_reference)


@functools.cache
def _measure(name: str, fields: tuple[tuple[str, Value], ...], has_reference: bool) -> Measure:
    loss, given = LOSSES[name], dict(fields)

    def measure(responses: Responses) -> dict[str, jax.Array]:
        losses = loss.per_prompt(responses, given)
        return alignment_metrics(loss, responses, given, losses=losses, has_reference=has_reference)

    return measure


def score_responses(
    compute: RowValues,
    groups: Sequence[Group],
    layout: RowLayout,
    *,
    num_slots: int,
    mesh: Mesh,
) -> np.ndarray:
    """Returns what `compute` says of each response, in order, [.., sum of responses] float32.

    The responses of a group may be spread over rows: without a loss they need no company.

    Args:
      compute: `compute(rows) -> [.., num_slots]` on one micro-batch, jitted, whole on every device;
        0 for a response that is not in it.
      layout: of the rows.
      num_slots: responses that are packed together.
      mesh: of the rows.
    """
    left = [part for group in groups for part in _split(group, layout)]
    here = rows_here(mesh, layout.rows)
    values: list[np.ndarray] = []
    while left:
        # As many groups as have slots; each group holds one slot a response at least.
        ends = np.cumsum([len(group.responses) for group in left])
        taken = max(1, int(np.searchsorted(ends, num_slots, side="right")))
        now, left = left[:taken], left[taken:]
        slots = np.split(np.arange(ends[taken - 1]), ends[: taken - 1])
        rows, num_micro, _ = pack(now, layout, slots=slots, num_slots=num_slots, rows_here=here)
        parts = []
        for m in range(num_micro):
            micro = put_rows(mesh, jax.tree.map(lambda x, m=m: x[m], rows), layout.rows)
            parts.append(np.asarray(compute(micro)))
        values.append(np.sum(parts, axis=0)[..., : ends[taken - 1]])
    return np.concatenate(values, axis=-1)


def _split(whole: Group, layout: RowLayout) -> list[Group]:
    """Returns groups that fit a row each; together they hold all responses, in order."""
    groups: list[Group] = []
    first = 0
    for end in range(1, len(whole.responses) + 1):
        longer = whole.take(range(first, end))
        if (
            end - first > 1
            and segment_spans(longer.lengths(), 0, layout.align)[-1][1] <= layout.row_len
        ):
            groups[-1] = longer
        else:
            first = end - 1
            groups.append(whole.take([first]))
    return groups


def make_kl(model: Model, *, num_slots: int, block: int, chunk: int) -> RowsKl:
    """Returns `kl(params, ref_params, rows) -> [num_slots]`: KL(policy || reference), nats.

    The responses must be the policy's own samples at temperature 1. The estimator is k3 summed
    over tokens, sum_t exp(-d_t) - 1 + d_t with d = log pi - log pi_ref: unbiased, never negative
    (Schulman 2020, "Approximating KL Divergence").
    """

    def kl(params: Params, ref_params: Params, rows: Rows[jax.Array]) -> jax.Array:
        how = dict(num_slots=num_slots, block=block, chunk=chunk)
        d = token_logps(model, params, rows, **how) - token_logps(model, ref_params, rows, **how)
        return sum_by_slot(jnp.expm1(-d) + d, rows, num_slots)

    return kl


def make_misses(model: Model, *, num_slots: int, block: int, chunk: int) -> RowsMisses:
    """Returns `misses(params, rows) -> [2, num_slots]` float32, of each response.

    Its log-probability in nats, and how many of its tokens are not the likeliest ones: none where
    greedy decoding gives it.
    """

    def misses(params: Params, rows: Rows[jax.Array]) -> jax.Array:
        how = dict(num_slots=num_slots, block=block, chunk=chunk)
        values = token_logps_and_misses(model, params, rows, **how)
        return jnp.stack([sum_by_slot(x, rows, num_slots) for x in values])

    return misses


def length(responses: Sequence[Sequence[int]]) -> float:
    """Returns the mean number of tokens of responses, each with its end-of-turn token."""
    return float(np.mean([len(ids) for ids in responses]))


def repetition(responses: Sequence[Sequence[int]], n: int = 3) -> float:
    """Returns the share of n-grams of tokens that their response has had before, mean over them.

    0: no response says anything twice; near 1: they go in circles. One that is shorter than n
    tokens repeats nothing.
    """
    shares = []
    for ids in responses:
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return float(np.mean(shares))


def text_perplexity(logps: np.ndarray, texts: Sequence[Sequence[int]]) -> float:
    """Returns exp of the mean loss of a token of plain text, each text's first token being given.

    Args:
      logps: log-probability of each text after its first token, [texts] nats.
      texts: token ids.
    """
    return float(np.exp(-np.sum(logps) / sum(len(ids) - 1 for ids in texts)))
