"""Which examples step s is made of, and the packed batch that they make.

A batch is a pure function of (data, config, seed, step): no state, so a resume is a step number.
Every process knows the whole plan of a batch, and writes only the rows that its devices hold: what
a step is made of does not depend on how many processes there are.
Axes: B prompts in a step, K responses a prompt.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from nca_jax.batch import Batch
from nca_jax.checks import UserError
from nca_jax.data.encode import Encoder, Example
from nca_jax.data.group import Group
from nca_jax.data.load import Examples, Gather, load_examples, notes_of
from nca_jax.data.pack import pack
from nca_jax.data.room import check_examples, fit_examples, row_layout
from nca_jax.data.sources import split_globs, split_named
from nca_jax.data.store import Keep
from nca_jax.data.table import Table, joined
from nca_jax.data.unit import divided
from nca_jax.protocols import DataSection

PREFETCH = 2  # batches made ahead by a thread: one is packed while the device runs another
SHARED = "training records share a prompt with data.eval_files: left out of training"
EVAL = "eval"  # the split of what is held out
EVAL_SEED = 0  # of the choice of responses, so that every evaluation of every run sees the same


class HostBatch(NamedTuple):
    """A batch on the host, where its prompts are from ("path:line"), and numbers to log."""

    batch: Batch[np.ndarray]
    examples: list[str]
    stats: dict[str, float]
    lengths: list[list[int]]  # tokens of each prompt, then of each of its responses


class Data(NamedTuple):
    """Training examples, one table a source; held-out ones; what is to be said of the others."""

    sources: list[Table]
    splits: dict[str, Table]  # held out: of "eval", or of "eval/NAME" where a set has one
    counts: Counter[str]  # as in `Examples`
    score_unit: float = 1.0  # what the data's own scores have been divided by

    def in_unit(self, unit: float) -> "Data":
        """Returns the same with all scores, which are in the data's own unit, divided by `unit`."""
        sources = [divided(source, unit) for source in self.sources]
        splits = {split: divided(examples, unit) for split, examples in self.splits.items()}
        return Data(sources, splits, self.counts, unit)

    @property
    def training(self) -> Table:
        """All that is trained on."""
        return joined(self.sources)

    @property
    def heldout(self) -> Table:
        """All that is held out."""
        return joined(list(self.splits.values()))

    def notes(self) -> list[str]:
        """Returns lines such as "3 records skipped: json"; none where all were read as they are."""
        return notes_of(self.counts)


class _Pick(NamedTuple):
    """An example, the indices of its responses that were chosen, ascending, and their ref_logps."""

    example: Example
    chosen: np.ndarray  # [n] with n <= K
    ref_logps: np.ndarray | None  # [all its responses] float32 nats


class Dataset:
    """The infinite sequence of training batches; its `len` is the number of examples.

    Args:
      sources: one table of examples a glob of `config.files`.
      config: the `data` section.
      seed: of the order and of the choice of responses.
      ref_logps: for each example of the concatenated sources, [its responses] float32 nats;
        None: the batches have none.
      rows_here: of every micro-batch, see `pack`.
      fewer: every example may have fewer than K responses.
    Raises:
      UserError: an example, or the number of sources, does not fit the config.
    """

    def __init__(
        self,
        sources: Sequence[Table],
        config: DataSection,
        *,
        seed: int,
        ref_logps: Sequence[np.ndarray] | None = None,
        rows_here: Sequence[int] | None = None,
        fewer: bool = False,
    ):
        self.examples = joined(sources)
        if not fewer:
            _check_num_responses(self.examples, config.num_responses)
        check_examples(self.examples, config)
        self._config, self._ref_logps, self._rows_here = config, ref_logps, rows_here
        sizes = [len(source) for source in sources]
        self._picks = _order(sizes, config, seed).random_map(self._pick)

    def __len__(self) -> int:
        return len(self.examples)

    def batch_at(self, step: int) -> HostBatch:
        """Returns the batch of a step: prompts step * B to step * B + B - 1 of the order."""
        first = int(step) * self._config.batch_size
        picks = [self._picks[i] for i in range(first, first + self._config.batch_size)]
        return _make_batch(picks, self._config, self._rows_here)

    def iterate(self, start: int, stop: int) -> Iterator[HostBatch]:
        """Iterates over the batches of steps [start, stop), PREFETCH of them made ahead."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)
        return iter(grain.MapDataset.range(start, stop).map(self.batch_at).to_iter_dataset(options))

    def _pick(self, index: int, rng: np.random.Generator) -> _Pick:
        example = self.examples[index]
        chosen = choose(example.scores, self._config.num_responses, self._config.choose, rng)
        return _Pick(example, chosen, None if self._ref_logps is None else self._ref_logps[index])


def eval_batches(
    examples: Table,
    config: DataSection,
    *,
    ref_logps: Sequence[np.ndarray] | None = None,
    rows_here: Sequence[int] | None = None,
) -> list[HostBatch]:
    """Returns batches that hold each example once, in order; the last one may have empty prompts.

    The arguments are those of `Dataset`.

    Raises:
      UserError: an example does not fit the config.
    """
    check_examples(examples, config)
    picks = []
    for i, example in enumerate(examples):
        rng = np.random.default_rng((EVAL_SEED, i))
        chosen = choose(example.scores, config.num_responses, config.choose, rng)
        picks.append(_Pick(example, chosen, None if ref_logps is None else ref_logps[i]))
    starts = range(0, len(picks), config.batch_size)
    return [_make_batch(picks[i : i + config.batch_size], config, rows_here) for i in starts]


def load_data(encoder: Encoder, *, keep: Keep | None = None, gather: Gather | None = None) -> Data:
    """Reads the encoder's `config.files`, and what is held out from `eval_files` or out of them.

    What shares a prompt with `eval_files` is left out of training, and counted. The arguments are
    those of `load_examples`.

    Raises:
      UserError: a file, a record, or the number of weights or of responses is wrong.
    """
    config = encoder.config
    _weights(config)  # what is wrong should not wait for the reading
    _check_k(config, encoder.least_responses)
    sources, counts = _load_fitting(config.files, encoder, keep, gather)
    named = split_named(config.eval_files)
    if not named:
        train, heldout = split_heldout(sources, config.eval_fraction)
        return Data(train, {EVAL: heldout}, counts)
    splits, more = {}, Counter()
    for name, files in named.items():
        found, said = _load_fitting(files, encoder, keep, gather)
        splits[f"{EVAL}/{name}" if name else EVAL] = joined(found)
        more += said
    prompts = np.concatenate([held.entries["prompt_hash"] for held in splits.values()])
    train = [source.take(~np.isin(source.entries["prompt_hash"], prompts)) for source in sources]
    if not all(map(len, train)):
        raise UserError(
            "Every prompt of a source of data.files is one of data.eval_files, and what is held "
            "out is not trained on; give other records."
        )
    counts += more  # without what is counted 0 times
    counts += Counter({SHARED: sum(map(len, sources)) - sum(map(len, train))})
    return Data(train, splits, counts)


def _load_fitting(
    files: str, encoder: Encoder, keep: Keep | None, gather: Gather | None
) -> Examples:
    """`load_examples`, without what does not fit a row and may be left out."""
    sources, counts = load_examples(files, encoder, keep=keep, gather=gather)
    fitting = [fit_examples(examples, encoder, counts) for examples in sources]
    if not all(map(len, fitting)):
        raise UserError(
            f"No record of a source of {files!r} fits "
            f"config.data.row_len={encoder.config.row_len}; raise it."
        )
    return Examples(fitting, counts)


def split_heldout(sources: Sequence[Table], fraction: float) -> tuple[list[Table], Table]:
    """Returns (training sources, held-out examples), by the hash of the prompt alone."""
    is_held = [source.entries["prompt_hash"] < fraction for source in sources]
    train = [source.take(~held) for source, held in zip(sources, is_held, strict=True)]
    if not all(map(len, train)):
        raise UserError(
            f"data.eval_fraction={fraction} leaves a source without records to train on."
        )
    return train, joined([x.take(held) for x, held in zip(sources, is_held, strict=True)])


def choose(scores: np.ndarray, k: int, how: str, rng: np.random.Generator) -> np.ndarray:
    """Returns which at most k of n responses are used, ascending.

    best_worst_random takes the first of the best, the last of the worst and draws the others.
    """
    n = len(scores)
    if n <= k:
        return np.arange(n)
    if how == "first":
        return np.arange(k)
    if how == "random":
        return np.sort(rng.choice(n, k, replace=False))
    if how == "best_worst_random":
        ends = [int(np.argmax(scores)), n - 1 - int(np.argmin(scores[::-1]))]
        others = np.setdiff1d(np.arange(n), ends)
        return np.sort([*ends, *rng.choice(others, k - 2, replace=False)])
    raise ValueError(f"{n} responses, but {how!r} takes all and K is {k}.")


def _check_k(config: DataSection, least: int) -> None:
    """Raises UserError unless K is what the loss learns from and the choice can be made of."""
    k = config.num_responses
    if k < least:
        raise UserError(
            f"data.num_responses is {k}, which teaches nothing; set it to {least} or more."
        )
    if k < 2 and config.choose == "best_worst_random":
        raise UserError(
            f"data.choose=best_worst_random takes 2 responses at least, but data.num_responses is "
            f"{k}; set it to 2 or more, or data.choose to first or random."
        )


def _check_num_responses(examples: Table, k: int) -> None:
    most = int(examples.entries["count"].max())
    if most < k:
        raise UserError(
            f"data.num_responses is {k}, but no record has more than {most} responses; "
            f"set it to {most}."
        )


def _weights(config: DataSection) -> list[float]:
    """Returns the mixture weights, one a glob; none where sources are concatenated."""
    if not config.weights:
        return []
    wanted = len(split_globs(config.files))
    try:
        weights = [float(weight) for weight in config.weights.split(",")]
    except ValueError:
        weights = []
    if len(weights) == wanted and all(0 < w < math.inf for w in weights):
        return weights
    raise UserError(
        f"data.weights is {config.weights!r}; wanted {wanted} positive numbers, one for each glob "
        "of data.files."
    )


def _order(sizes: Sequence[int], config: DataSection, seed: int) -> grain.MapDataset:
    """Returns the infinite order of examples, as indices into the sources of these sizes."""
    weights = _weights(config)
    sizes = sizes if weights else [sum(sizes)]
    ends = np.cumsum(sizes)
    parts = []
    for i, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        # Another seed for each: sources of one size would else go in step.
        part = grain.MapDataset.range(int(end) - size, int(end)).seed(seed + i)
        parts.append((part.shuffle() if config.shuffle else part).repeat())
    return grain.MapDataset.mix(parts, weights) if weights else parts[0]


def _make_batch(
    picks: Sequence[_Pick], config: DataSection, rows_here: Sequence[int] | None
) -> HostBatch:
    """Packs at most B picks; the prompts that lack are empty."""
    b, k, layout = config.batch_size, config.num_responses, row_layout(config)
    scores, lengths = np.zeros((b, k), np.float32), np.zeros((b, k), np.int32)
    mask, ref_logps = np.zeros((b, k), bool), np.zeros((b, k), np.float32)
    groups, slots = [], []
    for i, (example, chosen, ref) in enumerate(picks):
        n = len(chosen)
        groups.append(example.group.take(chosen))
        slots.append(range(i * k, i * k + n))
        scores[i, :n], mask[i, :n] = example.scores[chosen], True
        lengths[i, :n] = groups[-1].num_scored()
        if ref is not None:
            ref_logps[i, :n] = ref[chosen]
    # A group is never more than a row, so that B rows always do: one shape for all steps.
    rows, num_micro, micro = pack(
        groups,
        layout,
        slots=slots,
        num_slots=b * k,
        num_micro=-(-b // layout.rows),
        rows_here=rows_here,
    )
    micro_of_prompt = np.full(b, -1, np.int32)
    micro_of_prompt[: len(picks)] = micro
    is_cached = bool(picks) and picks[0].ref_logps is not None
    batch = Batch(
        rows,
        np.asarray(num_micro, np.int32),
        micro_of_prompt,
        scores,
        mask,
        lengths,
        ref_logps if is_cached else None,
    )
    num_run = num_micro * layout.rows * layout.row_len
    return HostBatch(
        batch,
        [pick.example.where for pick in picks],
        _stats(picks, groups, num_run),
        [group.lengths() for group in groups],
    )


def _stats(picks: Sequence[_Pick], groups: Sequence[Group], num_run: int) -> dict[str, float]:
    """Returns what a batch's tokens are spent on; `num_run` is how many are computed."""
    needed = sum(sum(group.lengths()) for group in groups)
    num_cut = sum(pick.example.num_cut for pick in picks)
    return {
        "truncated_frac": num_cut / sum(pick.example.num_tokens for pick in picks),
        "padding_frac": 1 - needed / num_run,
        "scored_tokens": float(sum(sum(group.num_scored()) for group in groups)),
        "needed_tokens": float(needed),
    }
