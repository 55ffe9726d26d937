"""A scorer that is a model, reward_model:WHERE[:label=I]: prompts shared, rows packed, on a mesh.

WHERE is as `pretrained.resolve` takes it; `nca_jax.data.whole` says what the model reads of a text.
Scores are those of transformers' AutoModelForSequenceClassification, to rounding.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from nca_jax import auto, build, programs
from nca_jax.checks import UserError
from nca_jax.config import default_config
from nca_jax.data.group import Group
from nca_jax.data.pack import segment_spans
from nca_jax.data.sources import RecordError
from nca_jax.data.whole import encode_whole, share_start, write_whole
from nca_jax.infra.fingerprint import params_fingerprint, text_fingerprint
from nca_jax.infra.mesh import row_shards
from nca_jax.models.formats.pretrained import open_pretrained
from nca_jax.params import start_params
from nca_jax.protocols import Tokenizer
from nca_jax.rewards.scorers import Record, Scorer

SPEC = re.compile(r"(.+?)(?::label=(\d+))?")
SLOTS = 256  # responses that are computed together, a device that has rows of its own


def open_reward_model(spec: str, mesh: ConfigDict, *, dtype: str, row_len: int) -> Scorer:
    """Opens the scorer "reward_model:" + spec.

    Args:
      mesh: as config.mesh.
      dtype: of activations, as config.model.dtype.
      row_len: tokens of a row; 0: as the texts want.
    Raises:
      UserError: there is no such model, it is a policy, has no tokenizer, or has several labels of
        which none is named.
    """
    matched = SPEC.fullmatch(spec)
    if matched is None:
        raise UserError("The scorer reward_model: names no model; write reward_model:DIR.")
    where, asked = matched.groups()
    label = _label(where, asked)
    run = build.build(_config(where, mesh, dtype, row_len))
    tokenizer = run.tokenizer
    if tokenizer is None:
        raise UserError(f"{where} has no tokenizer, and a reward model reads texts by its own.")
    with jax.set_mesh(run.mesh):
        params = start_params(run, where, dtype="")
        params["score"]["kernel"] = params["score"]["kernel"][:, label : label + 1]
        digest = params_fingerprint(params)
    num_slots = SLOTS * row_shards(run.mesh)

    @functools.cache
    def values_in(row_len: int) -> programs.GroupLogps:
        config = ConfigDict(run.config.to_dict())
        config.data.row_len = row_len
        return programs.make_group_logps(run._replace(config=config.lock()), num_slots)

    def score(records: Sequence[Record], responses: Sequence[str]) -> Iterator[float]:
        for groups in _pieces(_groups(run, tokenizer, records, responses), num_slots):
            values = values_in(_row_len(groups, row_len, run.config.data.align))
            with jax.set_mesh(run.mesh):
                found = values(params, groups)
            if not np.isfinite(found).all():
                raise UserError(f"{where} gives scores that are not finite in {dtype}.")
            yield from found.tolist()

    def lacks(record: Record) -> str:
        try:
            write_whole(record.get("prompt"), ["a"], tokenizer, run.date)
        except RecordError as error:
            return error.message
        return ""

    said = f"{digest} {run.encoder.digest} {run.config.model.dtype}"
    return Scorer(score, lacks, digest=text_fingerprint(said))


def _label(where: str, asked: str | None) -> int:
    """Returns which label is the score. UserError if there is no such, or none is said of many."""
    num_labels = open_pretrained(where)[0].num_labels
    if not num_labels:
        raise UserError(
            f"{where} is a policy, not a reward model: the architectures of its config.json name "
            "no ForSequenceClassification."
        )
    if asked is None and num_labels > 1 or int(asked or 0) >= num_labels:
        raise UserError(
            f"{where} has {num_labels} labels: write reward_model:{where}:label=I with I from 0 to "
            f"{num_labels - 1}."
        )
    return int(asked or 0)


def _config(where: str, mesh: ConfigDict, dtype: str, row_len: int) -> ConfigDict:
    """Returns the config of a run that nothing is read for and nothing trained in."""
    config = default_config()
    auto.leave_open(config)
    config.model.init_from, config.model.head, config.model.dtype = where, "reward", dtype
    config.reference.kind = "none"
    config.mesh = ConfigDict(mesh.to_dict())
    config.data.row_len = row_len or auto.SEVERAL
    config.data.files = where  # a config wants some
    config.data.max_prompt_len = config.data.max_response_len = 1  # nothing is cut
    return config.lock()


def _groups(
    run: build.Run, tokenizer: Tokenizer, records: Sequence[Record], responses: Sequence[str]
) -> Iterator[Group]:
    """Yields the conversations of each record, in order, as few groups of at most SLOTS each."""
    pairs = zip(records, responses, strict=True)
    for _, of_record in itertools.groupby(pairs, key=lambda pair: id(pair[0])):
        several, texts = zip(*of_record, strict=True)
        for start in range(0, len(texts), SLOTS):
            conversations = encode_whole(
                several[0].get("prompt"),
                texts[start : start + SLOTS],
                tokenizer,
                vocab_size=run.model.config.vocab_size,
                pad_id=run.model.config.pad_id,
                date=run.date,
            )
            yield from share_start(conversations)


def _pieces(groups: Iterator[Group], num_slots: int) -> Iterator[list[Group]]:
    """Yields as many groups as have at most so many responses together."""
    piece, taken = [], 0
    for group in groups:
        if taken + len(group.responses) > num_slots:
            yield piece
            piece, taken = [], 0
        piece.append(group)
        taken += len(group.responses)
    if piece:
        yield piece


def _row_len(groups: Sequence[Group], asked: int, align: int) -> int:
    """Returns the tokens of a row that holds the longest conversation: few values, each compiled.

    Raises:
      UserError: one is longer than the length that is asked for.
    """
    longest = max(
        segment_spans([len(group.prompt), max(map(len, group.responses))], 0, align)[-1][1]
        for group in groups
    )
    if 0 < asked < longest:
        raise UserError(
            f"A prompt with its response takes {longest} tokens, and --row_len is {asked}: raise "
            "it, or leave it out."
        )
    return asked or max(auto.SEVERAL, 1 << (longest - 1).bit_length())
