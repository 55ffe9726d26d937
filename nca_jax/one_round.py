"""One round: prompts are drawn, responses sampled and scored, and what is trained on is chosen.

Each piece of it is kept in the round's folder as soon as it is known, so a stop loses little, and
what it makes is a pure function of the policy, the prompts and the seed.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from nca_jax.axes import Params
from nca_jax.build import Run
from nca_jax.data import pieces
from nca_jax.data.encode import Prompt
from nca_jax.data.load import load_examples
from nca_jax.data.sources import write_records
from nca_jax.evaluators import length
from nca_jax.files import AnyPath, read_json, remove, whole_lines, write_json
from nca_jax.infra import distributed, progress
from nca_jax.infra.fingerprint import params_fingerprint, text_fingerprint
from nca_jax.protocols import RoundsSection
from nca_jax.rewards.scorers import Scorer, score_each
from nca_jax.rollout import Record, SampleBatches, SampleKl, rollout_batches
from nca_jax.train_step import Frozen, TrainState

ROLLOUTS, TRAINED, ROUND = "rollouts.jsonl", "train.jsonl", "round.json"
SAMPLES = "samples.jsonl"  # not scored yet
# Of a record, one a response.
SAMPLED = ("responses", "response_ids", "response_logps", "finished", "scores")
PIECE = 64  # records whose scores a stop can lose


class Kit(NamedTuple):
    """What the sampling of all rounds shares.

    Attributes:
      asked: the prompts that rounds draw from.
      sample: from `make_batch_generator`.
      kl: of samples; None: there is no reference, or it is not known of samples drawn so.
    """

    run: Run
    workdir: AnyPath
    asked: Sequence[Prompt]
    scorer: Scorer
    sample: SampleBatches
    kl: SampleKl | None


class Round(NamedTuple):
    """A round whose samples are there and scored; it trains the steps first + 1 .. last."""

    first: int
    last: int  # equal to `first` where it trains nothing
    metrics: dict[str, float]  # of its samples


def folder_of(workdir: AnyPath, number: int) -> AnyPath:
    return workdir / "rounds" / str(number)


def seed_of(config: ConfigDict, number: int) -> int:
    """Returns the seed of a round's samples and of the order in which it trains on them."""
    return int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0] >> 1)


def drawn(config: ConfigDict, known: int, number: int) -> list[int]:
    """Returns which of `known` prompts a round has, [rounds.prompts].

    The seed's order is a permutation after another: each is drawn once before any is drawn twice.
    """
    size = config.rounds.prompts
    places = range((number - 1) * size, number * size)
    orders = {
        lap: np.random.default_rng([config.seed, lap]).permutation(known)
        for lap in {place // known for place in places}
    }
    return [int(orders[place // known][place % known]) for place in places]


def make_round(
    kit: Kit,
    frozen: Frozen,
    state: TrainState,
    number: int,
    asked_to_stop: Callable[[], bool],
) -> Round | None:
    """Samples, scores and chooses what a round trains on; None: it was asked to stop.

    What an earlier start has done of it stays.
    """
    run, how = kit.run, kit.run.config.rounds
    folder, first = folder_of(kit.workdir, number), int(state.step)
    prompts = [kit.asked[i] for i in drawn(run.config, len(kit.asked), number)]
    folder.mkdir(parents=True, exist_ok=True)
    policy = frozen.whole(state.params)
    with progress.phase(f"round {number}: sampling responses to {len(prompts)} prompts"):
        samples = sample_responses(kit, policy, prompts, number, asked_to_stop)
    if samples is None:
        return None
    with progress.phase(f"round {number}: scoring them"):
        records = score_samples(kit.scorer, prompts, samples, folder / ROLLOUTS)
    if distributed.is_first():
        remove(folder / SAMPLES)
        best = best_before(kit, number) if how.keep_best else [None] * len(records)
        chosen = [
            chosen_of(record, known, how) for record, known in zip(records, best, strict=True)
        ]
        least = run.encoder.least_responses
        write_records(folder / TRAINED, [x for x in chosen if x and len(x["scores"]) >= least])
    distributed.wait_for_first()
    records, trained = (whole_lines(folder / name) for name in (ROLLOUTS, TRAINED))
    metrics = metrics_of(records)
    [examples] = load_examples(str(folder / ROLLOUTS), run.encoder).sources
    groups = [example.group for example in examples]
    metrics["length"] = length([list(ids) for group in groups for ids in group.responses])
    reference = frozen.whole_reference()
    if kit.kl is not None and reference is not None:
        metrics["kl"] = float(kit.kl(policy, reference, groups).mean())
    has_signal = any(len(set(record["scores"])) > 1 for record in trained)
    if not has_signal:
        print(f"round {number} has no signal: all responses to a prompt are equally good, or none")
    one = Round(first, first + how.steps * has_signal, metrics)
    if distributed.is_first():
        write_json(folder / ROUND, one._asdict())
    distributed.wait_for_first()
    return one


def read_round(folder: AnyPath) -> Round | None:
    """Returns what `make_round` returned; None: it has not finished."""
    path = folder / ROUND
    return Round(**read_json(path)) if path.exists() else None


def sample_responses(
    kit: Kit,
    policy: Params,
    prompts: Sequence[Prompt],
    number: int,
    asked_to_stop: Callable[[], bool],
) -> list[Record] | None:
    """Returns the records of a round's samples, on process 0; None: it was asked to stop."""
    out = folder_of(kit.workdir, number) / SAMPLES
    whole = [path for path in (out, out.with_name(ROLLOUTS)) if path.exists()]
    made_from, records = {"parameters": params_fingerprint(policy)}, []
    if distributed.is_first():
        records = whole_lines(whole[0]) if whole else pieces.begin(out, made_from)
    start = int(distributed.from_first(np.array(len(records), np.int32)))
    if start < len(prompts):
        seed = seed_of(kit.run.config, number)
        for batch in rollout_batches(kit.run, policy, prompts, seed, start, kit.sample):
            if distributed.is_first():
                pieces.add(out, len(records), batch)
            records += batch
            if asked_to_stop():
                return None
    if distributed.is_first() and not whole:
        pieces.finish(out, records)
    return records


def score_samples(
    scorer: Scorer, prompts: Sequence[Prompt], samples: Sequence[Record], out: AnyPath
) -> list[Record]:
    """Returns the samples with their scores, and writes them; on process 0, which has the samples.

    With a scorer that is a model all processes compute their part of it.
    """
    is_first, scored = distributed.is_first(), []
    if is_first:
        made_from = {"samples": text_fingerprint(json.dumps(samples))}
        scored = whole_lines(out) if out.exists() else pieces.begin(out, made_from)
    start = int(distributed.from_first(np.array(len(scored), np.int32)))
    left = (distributed.json_from_first(samples) if scorer.digest else samples)[start:]
    asked = [prompt.record for prompt in prompts[start:]] if left else []
    scores = score_each(scorer, asked, [record["responses"] for record in left])
    new = (x | {"scores": found} for x, found in zip(left, scores, strict=True))
    while piece := list(itertools.islice(new, PIECE)):
        if is_first:
            pieces.add(out, len(scored), piece)
        scored += piece
    if is_first and start < len(prompts):
        pieces.finish(out, scored)
    return scored


def best_before(kit: Kit, number: int) -> list[Record | None]:
    """Returns for each prompt of a round the best response that earlier rounds had, or None."""
    config, known = kit.run.config, len(kit.asked)
    best: dict[int, Record] = {}
    for earlier in range(1, number):
        records = whole_lines(folder_of(kit.workdir, earlier) / ROLLOUTS)
        for i, record in zip(drawn(config, known, earlier), records, strict=True):
            now = picked(record, [int(np.argmax(record["scores"]))])
            if i not in best or now["scores"] > best[i]["scores"]:
                best[i] = now
    return [best.get(i) for i in drawn(config, known, number)]


def chosen_of(record: Record, best: Record | None, how: RoundsSection) -> Record | None:
    """Returns what of a prompt's samples is trained on; None: nothing.

    Args:
      best: its best response of earlier rounds, alone in a record; None: there is none.
    """
    if best is not None and best["scores"][0] > min(record["scores"]):
        worst = len(record["scores"]) - 1 - int(np.argmin(record["scores"][::-1]))
        stay = picked(record, [i for i in range(len(record["scores"])) if i != worst])
        record = stay | {field: stay[field] + best[field] for field in SAMPLED if field in stay}
    if how.dedupe:
        texts = record["responses"]
        record = picked(record, [i for i, text in enumerate(texts) if text not in texts[:i]])
    is_tied = len(set(record["scores"])) == 1
    return None if how.drop_tied and is_tied else record


def picked(record: Record, indices: Sequence[int]) -> Record:
    """Returns the record with some of its responses."""
    fields = [field for field in SAMPLED if field in record]
    return record | {field: [record[field][i] for i in indices] for field in fields}


def metrics_of(records: Sequence[Record]) -> dict[str, float]:
    """Returns what the samples of a round are like, means over its prompts."""
    scores = np.array([record["scores"] for record in records])  # [P, S]
    return {
        "reward": float(scores.mean()),
        "reward_best": float(scores.max(axis=1).mean()),
        "reward_spread": float(scores.std(axis=1).mean()),
        "tied": float((np.ptp(scores, axis=1) == 0).mean()),
        "finished": float(np.mean([record["finished"] for record in records])),
    }
