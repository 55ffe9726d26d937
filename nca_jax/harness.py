"""A policy as lm-eval, EleutherAI's harness, asks one: the log-probability of texts, and answers.

Its tasks give the numbers that lm-eval's own model of transformers gives of the exported folder:
texts are encoded, cut and read as there. But all continuations of one context are one group, so
that the context is computed once, and the rows are shared by all devices of the mesh.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Wrapped
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]  # an extra
from lm_eval.models import utils as shared  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from nca_jax.axes import Params
from nca_jax.build import Run, with_generate, with_rows_for
from nca_jax.checks import UserError
from nca_jax.data.group import Group
from nca_jax.data.pack import RowLayout, segment_spans
from nca_jax.data.room import row_layout
from nca_jax.data.sources import RecordError
from nca_jax.data.template import apply_template
from nca_jax.evaluators import make_misses, score_responses
from nca_jax.infra.progress import phase
from nca_jax.protocols import Tokenizer
from nca_jax.rollout import Generate, make_generator

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

NUM_SLOTS = 1024  # continuations that are packed together
ROOM = 1024  # tokens of a row up to which they go by powers of two
NEW_TOKENS = 256  # of an answer, where a task does not say
# What a task may ask.
SAMPLING = ("until", "do_sample", "temperature", "top_k", "top_p", "min_p", "max_gen_toks")

Scored = tuple[float, bool]  # log-probability, nats; whether greedy decoding gives it
Request = tuple[Any, list[int], list[int]]  # what it is known by, ids of context and continuation


class Policy(TemplateLM):
    """What `lm_eval.simple_evaluate(model=...)` takes. The mesh of the run is set.

    Every process of a run asks all tasks, and has all answers.
    """

    def __init__(self, run: Run, params: Params):
        super().__init__()
        if run.tokenizer is None:
            raise UserError("lm-eval asks in text: set config.data.tokenizer.")
        self.run, self.params = run, params
        self.tokenizer: Tokenizer = run.tokenizer
        self._programs: dict[RowLayout, Wrapped] = {}
        self._generators: dict[tuple, Generate] = {}  # by where they end, and how they sample

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's eos, or the first of the ids that end a turn."""
        eos = self.tokenizer.eos_token_id
        return self.run.eos_ids[0] if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.run.encoder.digest

    @property
    def max_length(self) -> int:
        """Tokens that the model was made for: contexts lose their beginning beyond these."""
        return self.run.model.config.max_position

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:  # a chat template may have written the bos
            add_special_tokens = not string.startswith(
                self.tokenizer.decode([self.prefix_token_id])
            )
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as text; without the system's turn where a template has none."""
        how = dict(generate=add_generation_prompt, goes_on=not add_generation_prompt)
        try:
            return apply_template(chat_history, self.tokenizer, date=self.run.date, **how)
        except RecordError:
            turns = [turn for turn in chat_history if turn["role"] != "system"]
            return apply_template(turns, self.tokenizer, date=self.run.date, **how)

    def loglikelihood_rolling(
        self, requests: "list[Instance]", disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability of each text, nats, in windows of `max_length`."""
        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
                )
            ]
            for request in requests
        ]
        found = iter(self._loglikelihood_tokens([pair for pairs in windows for pair in pairs]))
        return [sum(next(found)[0] for _ in pairs) for pairs in windows]

    def _loglikelihood_tokens(self, requests: list[Request], **_) -> list[Scored]:
        by_context: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            by_context.setdefault(self._cut(context, continuation), []).append(i)
        groups = [
            Group(np.array(context, np.int32), [np.array(requests[i][2], np.int32) for i in places])
            for context, places in by_context.items()
        ]
        with phase(f"scoring {len(requests)} continuations of {len(groups)} contexts"):
            logps, misses = self._score(groups)
        answers: list[Scored] = [(0.0, False)] * len(requests)
        order = [i for places in by_context.values() for i in places]
        for i, logp, missed in zip(order, logps.tolist(), misses.tolist(), strict=True):
            answers[i] = (logp, missed == 0)
        return answers

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """Returns the end of a context: with the continuation, but its last token, it fits.

        Raises:
          UserError: a continuation has no token, or more than the model was made for.
        """
        if not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"a task has a continuation of {len(continuation)} tokens, wanted 1 to "
                f"{self.max_length}: leave it out of the task."
            )
        return tuple(context[-(self.max_length + 1 - len(continuation)) :])

    def _score(self, groups: Sequence[Group]) -> np.ndarray:
        """Returns `make_misses` of the responses of all groups, in order, [2, responses]."""
        if not groups:
            return np.zeros((2, 0), np.float32)
        misses, layout = self._misses(groups)
        return score_responses(
            lambda rows: misses(self.params, rows),
            groups,
            layout,
            num_slots=NUM_SLOTS,
            mesh=self.run.mesh,
        )

    def _misses(self, groups: Sequence[Group]) -> tuple[Wrapped, RowLayout]:
        """Returns `make_misses`, jitted, and the layout of rows that hold such groups.

        Programs are kept: a task whose rows another one has had waits for no compiler.
        """
        tokens = max(_row_tokens(group, self.run.config.data.align) for group in groups)
        run = with_rows_for(self.run, [_rounded(tokens, self.max_length + 1)])
        data = run.config.data
        layout = row_layout(data)
        if layout not in self._programs:
            how = dict(num_slots=NUM_SLOTS, block=data.block, chunk=run.config.loss.logits_chunk)
            self._programs[layout] = jax.jit(
                make_misses(run.model, **how),
                out_shardings=NamedSharding(run.mesh, P()),
                compiler_options=run.compiler_options,
            )
        return self._programs[layout], layout

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Returns an answer to each context, as the task's generation_kwargs say."""
        texts, by_how = [""] * len(requests), {}
        for i, request in enumerate(requests):
            by_how.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for places in by_how.values():
            contexts = [requests[i].args[0] for i in places]
            found = self._answer(contexts, requests[places[0]].args[1])
            for i, text in zip(places, found, strict=True):
                texts[i] = text
        return texts

    def _answer(self, contexts: Sequence[str], asked: dict[str, Any]) -> list[str]:
        how = shared.normalize_gen_kwargs(asked, NEW_TOKENS)
        if unknown := sorted(set(how) - set(SAMPLING)):
            raise UserError(
                f"a task asks for {', '.join(unknown)} in its generation_kwargs; wanted some of "
                f"{', '.join(SAMPLING)}."
            )
        until = shared.handle_stop_sequences(
            how["until"], eos=self.tokenizer.decode([self.eot_token_id])
        )
        room = self.max_length - how["max_gen_toks"]
        if room < 1:
            raise UserError(
                f"a task asks for {how['max_gen_toks']} new tokens, and the model was made for "
                f"{self.max_length}: lower max_gen_toks in its generation_kwargs."
            )
        generate = self._generator(
            until,
            num_samples=1,
            max_new_tokens=how["max_gen_toks"],
            temperature=float(how["temperature"]) if how["do_sample"] else 0.0,
            top_k=int(how.get("top_k", 0)),
            top_p=float(how.get("top_p", 1.0)),
            min_p=float(how.get("min_p", 0.0)),
        )
        prompts = [np.array(self.tok_encode(text)[-room:], np.int32) for text in contexts]
        samples = generate(self.params, prompts, self.run.config.seed)
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for (ids,) in samples]
        return [shared.postprocess_generated_text(text, until, None) for text in texts]

    def _generator(self, until: Sequence[str], **how: Any) -> Generate:
        """Returns `make_generator` with these fields of `generate`, kept with its programs."""
        key = (*until, *how.items())
        if key not in self._generators:
            self._generators[key] = make_generator(with_generate(self.run, **how), until)
        return self._generators[key]


def _row_tokens(group: Group, align: int) -> int:
    """Returns the tokens of a row that a group wants: of one with many responses, a part of it."""
    prompt, *responses = group.lengths()
    whole, longest = (
        segment_spans([prompt, *lengths], 0, align)[-1][1]
        for lengths in (responses, [max(responses)])
    )
    return min(whole, 2 * longest)


def _rounded(tokens: int, usual: int) -> int:
    """Returns one of few sizes that holds so many tokens, so that tasks share programs.

    It is a power of two, above `ROOM` a multiple of a quarter of one; or `usual`, tokens of a whole
    window, of which long texts are full, where that is the next to hold them.
    """
    power = 1 << (tokens - 1).bit_length()
    step = power if power <= ROOM else power // 8
    size = -(-tokens // step) * step
    return usual if tokens <= usual < size else size
