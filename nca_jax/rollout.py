"""Sampling responses from a policy: what `generate`, `evaluate` and on-policy training share."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from tqdm import tqdm

from nca_jax.axes import Params
from nca_jax.build import Run
from nca_jax.callable import make_callable
from nca_jax.checks import UserError
from nca_jax.data.encode import Prompt
from nca_jax.data.group import Group
from nca_jax.data.room import row_layout
from nca_jax.evaluators import make_kl, score_responses
from nca_jax.infra import distributed
from nca_jax.infra.progress import first_call
from nca_jax.programs import drawn_how, jit_sampler, serving_run
from nca_jax.reward_model import open_reward_model
from nca_jax.rewards.scorers import REWARD_MODEL, Scorer, get_scorer, score_all
from nca_jax.sampling.draw import How
from nca_jax.sampling.refill import Sampled, sample_batches
from nca_jax.sampling.serving import on_mesh, serving_params
from nca_jax.sampling.stops import stop_at

Record = dict[str, Any]  # JSON, see `nca_jax.data.record`
Samples = list[list[np.ndarray]]  # of each prompt its responses, [their length] int32
Generate = Callable[[Params, Sequence[np.ndarray], int], Samples]  # see `make_generator`
# see `make_batch_generator`
SampleBatches = Callable[[Params, Sequence[np.ndarray], int, int], Iterator[list[Sampled]]]
# Policy, reference, prompts with samples of the policy -> of each sample, [samples] nats
SampleKl = Callable[[Params, Params, Sequence[Group]], np.ndarray]


class Response(NamedTuple):
    """What was sampled. `ids` is None where the text was cut, and they would say more than it."""

    text: str
    ids: list[int] | None  # with the end-of-turn token where there is one
    finished: bool  # ended its turn, by that token or by `config.generate.stop`


def open_scorer(
    name: str, mesh: ConfigDict, *, dtype: str = "float32", row_len: int = 0
) -> Scorer | None:
    """Returns the scorer of a name, also of one that is a model; None for "".

    Args:
      mesh, dtype, row_len: of a model: see `open_reward_model`.
    Raises:
      UserError: no scorer has that name, or the model cannot be opened.
    """
    if not name.startswith(REWARD_MODEL):
        return get_scorer(name)
    spec = name.removeprefix(REWARD_MODEL)
    return open_reward_model(spec, mesh, dtype=dtype, row_len=row_len)


def rollout(
    run: Run, params: Params, prompts: Sequence[Prompt], scorer: Scorer | None, seed: int
) -> list[Record]:
    """Samples `config.generate.num_samples` responses to each prompt, and scores them.

    The mesh of the run is set, as for every program. Every process samples; process 0 alone makes
    records and scores them.

    Args:
      prompts: from `load_prompts`, or of examples.
      scorer: None: the records have no scores.
    Returns:
      On process 0 a record a prompt, as `nca_jax.data.record` says a rollout is: what
      `nca_jax.generate` writes and `nca_jax.train` reads. On the others [].
    Raises:
      UserError: a prompt lacks what the scorer wants, or the scorer fails.
    """
    check_scorable(prompts, scorer)
    batches = rollout_batches(run, params, prompts, seed)
    return with_scores(prompts, [record for batch in batches for record in batch], scorer)


def rollout_batches(
    run: Run,
    params: Params,
    prompts: Sequence[Prompt],
    seed: int,
    start: int = 0,
    sample: SampleBatches | None = None,
) -> Iterator[list[Record]]:
    """Yields what `rollout` returns for a batch of prompts at a time, not scored.

    Args:
      sample: from `make_batch_generator`, where it is there already.
      start: the first prompt: those before it are done. The others have the samples that they have
        in a whole rollout.
    """
    sample = sample or make_batch_generator(run)
    for sampled in sample(params, [prompt.ids for prompt in prompts], seed, start):
        now = prompts[start : start + len(sampled)]
        start += len(sampled)
        if not distributed.is_first():
            yield []
            continue
        records = make_records(run, now, [found.ids for found in sampled], None)
        if run.config.generate.logps:
            records = [with_logps(*pair) for pair in zip(records, sampled, strict=True)]
        yield records


def check_scorable(prompts: Sequence[Prompt], scorer: Scorer | None) -> None:
    """Raises UserError, naming the place, if a prompt lacks what the scorer wants."""
    if scorer is not None:
        for prompt in prompts:
            scorer.check(prompt.where, prompt.record)


def make_records(
    run: Run, prompts: Sequence[Prompt], samples: Samples, scorer: Scorer | None
) -> list[Record]:
    """Returns the records of a rollout, scored if there is a scorer."""
    digest = run.encoder.digest
    records = [
        _make_record(prompt, [read_response(run, ids) for ids in of_prompt], digest)
        for prompt, of_prompt in zip(prompts, samples, strict=True)
    ]
    return with_scores(prompts, records, scorer)


def with_logps(record: Record, sampled: Sampled) -> Record:
    """Returns a record of samples with "response_logps": those of their ids, nats a token.

    They are of the policy that was sampled from, not tempered; None where there are no ids.
    """
    pairs = zip(record["response_ids"], sampled.logps, strict=True)
    return record | {"response_logps": [ids and logps.tolist() for ids, logps in pairs]}


def with_scores(
    prompts: Sequence[Prompt], records: list[Record], scorer: Scorer | None
) -> list[Record]:
    """Returns the records of prompts with their scores; as they are without a scorer, or none.

    Process 0 has the records and gets them; all others have none, and compute with a model.
    """
    if scorer is not None and scorer.digest:
        records = distributed.json_from_first(records)
    if scorer is None or not records:
        return records
    asked = [prompt.record for prompt in prompts]
    scores = score_all(scorer, asked, [record["responses"] for record in records])
    if not distributed.is_first():
        return []
    return [
        record | {"scores": of_record} for record, of_record in zip(records, scores, strict=True)
    ]


def _make_record(prompt: Prompt, responses: Sequence[Response], digest: str) -> Record:
    texts, ids, finished = map(list, zip(*responses, strict=True))
    return prompt.record | {
        "responses": texts,
        "prompt_ids": prompt.ids.tolist(),
        "response_ids": ids,
        "finished": finished,
        "tokenizer": digest,
    }


def read_response(run: Run, ids: np.ndarray) -> Response:
    """Returns what a sample says: its text ends before its end of turn, or the stop."""
    if run.tokenizer is None:
        raise UserError("Generation needs a tokenizer: set config.data.tokenizer.")
    stop, sampled, ends = run.config.generate.stop, ids.tolist(), set(run.eos_ids)
    whole = run.tokenizer.decode([i for i in sampled if i not in ends])
    text = whole.split(stop)[0] if stop else whole
    if text != whole:
        return Response(text, None, True)
    is_finished = sampled[-1] in ends
    if is_finished and run.turn is not None and run.config.data.format == "chat":
        text = text.removesuffix(run.turn.closing)  # the template writes it again
    return Response(text, sampled, is_finished)


def make_generator(run: Run, stops: Sequence[str] | None = None) -> Generate:
    """Returns `generate(params, prompts, seed) -> samples` as `config.generate` says.

    `prompts` are token ids; samples[n] holds `num_samples` int32 arrays, each with its end-of-turn
    token where it has one. A prompt's samples depend on its index and the seed, not on its batch.

    Args:
      stops: strings that end a response; None: `config.generate.stop`.
    """
    sample = make_batch_generator(run, stops)

    def generate(params: Params, prompts: Sequence[np.ndarray], seed: int) -> Samples:
        batches = sample(params, prompts, seed, 0)
        return [sampled.ids for batch in batches for sampled in batch]

    return generate


def make_batch_generator(run: Run, stops: Sequence[str] | None = None) -> SampleBatches:
    """Returns `sample(params, prompts, seed, start)`, of which `make_generator` is the whole.

    It yields the samples of a batch of prompts at a time, from prompt `start` on, in their order.
    They are sampled on the mesh of `config.generate.mesh`, to which the parameters are copied once
    a call.
    """
    run = serving_run(run)
    programs, stop = jit_sampler(run), None
    programs = programs._replace(
        prefill=first_call("the sampler's prompts", programs.prefill),
        decode=first_call("the sampler", programs.decode),
    )
    stops = [run.config.generate.stop] if stops is None else stops
    if run.tokenizer is not None:
        stop = stop_at(stops, run.tokenizer.decode, set(run.eos_ids))
    elif any(stops):
        raise UserError("generate.stop needs a tokenizer: set config.data.tokenizer.")

    def sample(
        params: Params, prompts: Sequence[np.ndarray], seed: int, start: int
    ) -> Iterator[list[Sampled]]:
        params = serving_params(run.mesh, run.model.dtype, params)
        batches = sample_batches(programs, params, prompts, seed, start, stop)
        with tqdm(total=len(prompts) - start, unit="prompt", disable=None) as bar:
            for batch in on_mesh(run.mesh, batches):
                bar.update(len(batch))
                yield batch

    return sample


def draws_policy(run: Run) -> bool:
    """Whether samples follow the policy itself: nothing is sharpened, or cut off."""
    return drawn_how(run) == How()


def make_sample_kl(run: Run, num_prompts: int) -> SampleKl:
    """Returns `kl(policy, reference, groups)`, of `generate.num_samples` samples a prompt.

    They were drawn as `draws_policy` says; see `evaluators.make_kl`.
    """
    config = run.config
    num_slots = num_prompts * config.generate.num_samples
    of_rows = jax.jit(
        make_kl(
            run.model,
            num_slots=num_slots,
            block=config.data.block,
            chunk=config.loss.logits_chunk,
        ),
        out_shardings=NamedSharding(run.mesh, P()),
        compiler_options=run.compiler_options,
    )

    def kl(policy: Params, reference: Params, groups: Sequence[Group]) -> np.ndarray:
        return score_responses(
            lambda rows: of_rows(policy, reference, rows),
            groups,
            row_layout(config.data),
            num_slots=num_slots,
            mesh=run.mesh,
        )

    return kl


make_callable(__name__)
