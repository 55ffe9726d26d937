"""Show what the model will see.

    python -m nca_jax.inspect --config=FILE[:args] [--rows=2] [--config.section.field=value ...]

--config    a config file or nca_jax:NAME, with its arguments; --help_config lists all fields
--rows      prompts that are shown

What the chat template adds to a response. For the first prompts of step 1: rendered text, tokens
with their segment and whether they are scored, scores and targets; then how the step is packed,
what a step sees, which rows and batch would suit the data, how much memory training takes on a CPU,
a GPU and a TPU, and the histogram of lengths; last what a run is going to do, and warnings.
"""

import jax.numpy as jnp
import numpy as np

from nca_jax import advice, build
from nca_jax.batch import Batch
from nca_jax.checks import run_main
from nca_jax.data.pipeline import Dataset
from nca_jax.data.room import row_sizes
from nca_jax.data.table import joined
from nca_jax.data.template import Turn
from nca_jax.flags import parse_flags
from nca_jax.losses import Fields, Loss, targets_from_scores
from nca_jax.propose import memory, proposals, what_a_step_sees
from nca_jax.protocols import Tokenizer
from nca_jax.train_step import loss_of

SHOWN = 12  # tokens at either end of a segment


def main(argv: list[str]) -> int:
    config, flags = parse_flags(argv, rows=2)
    asked = config
    run, data = build.read_all(asked)
    config = run.config
    if run.turn is not None and config.data.format == "chat":
        print_turn(run.turn, is_reward=run.encoder.is_reward)
    dataset = Dataset(data.sources, config.data, seed=config.seed)
    host = dataset.batch_at(0)
    for b, where in enumerate(host.examples[: flags.rows]):
        print_prompt(host.batch, b, where, run.tokenizer, loss_of(config))
    print_packing(host.batch, host.stats)
    examples = joined([dataset.examples, data.heldout])
    print(f"\n=== {what_a_step_sees(run, int(host.batch.num_micro), dataset.examples)}")
    print("\n=== proposed")
    print("\n".join(proposals(run, dataset.examples)))
    print("\n=== memory of training, estimated; nca_jax.aot compiles for a TPU and knows it")
    print("\n".join(memory(asked, run, row_sizes(examples, config.data))))
    lengths = [lengths for _, lengths, _ in examples.by_count()]
    print_histogram("prompts", np.concatenate([x[:, 0] for x in lengths]))
    print_histogram("responses", np.concatenate([x[:, 1:].ravel() for x in lengths]))
    for note in data.notes():
        print(note)
    for line in advice.before_training(
        dataset.examples,
        config,
        build.num_steps(config, len(dataset)),
        num_heldout=len(data.heldout),
        num_devices=run.mesh.size,
    ):
        print(line)
    return 0


def print_turn(turn: Turn, *, is_reward: bool = False) -> None:
    """Prints what the chat template adds to a response to a plain question."""
    after = turn.tail if is_reward else turn.closing + turn.end
    begun = f"begins a response with {turn.prefill!r}, which it must have, " if turn.prefill else ""
    print(
        f"the chat template {begun}writes {turn.prefix!r} before a response and "
        f"{after!r} after it; id {turn.end_id} ends a turn"
    )


def print_prompt(
    batch: Batch[np.ndarray],
    b: int,
    where: str,
    tokenizer: Tokenizer | None,
    loss: tuple[Loss, Fields],
) -> None:
    """Prints prompt b of the step as it lies in its row."""
    record, fields = loss
    soft = None
    if record.soft_labels:
        scores, mask = jnp.asarray(batch.scores[b : b + 1]), jnp.asarray(batch.mask[b : b + 1])
        soft = np.asarray(targets_from_scores(scores, alpha=float(fields["alpha"]), mask=mask))[0]
    k_all = batch.scores.shape[1]
    micro, row = np.argwhere((batch.rows.logp_slot // k_all == b).any(axis=-1))[0]
    rows = type(batch.rows)(*(x[micro, row] for x in batch.rows))  # [T]
    prompt_id = rows.prompt_ids[rows.logp_at[rows.logp_slot // k_all == b][0]]
    print(f"\n=== {where}: micro-batch {micro}, row {row}, prompt {prompt_id} of the row")
    for segment in np.unique(rows.segments[rows.prompt_ids == prompt_id]):
        at = np.flatnonzero((rows.prompt_ids == prompt_id) & (rows.segments == segment))
        title = f"segment {segment}, the prompt"
        if segment > 1:
            k = segment - 2
            title = f"segment {segment}, response {k}: score {batch.scores[b, k]:g}"
            title += "" if soft is None or k_all == 1 else f", target {soft[k]:.4f}"
            num_scored = int((rows.logp_slot == b * k_all + k).sum())
        else:
            num_scored = 0
        place = (
            f"row {at[0]}..{at[-1]}, positions {rows.positions[at[0]]}..{rows.positions[at[-1]]}"
        )
        some = {0: "not scored", len(at): "scored"}.get(num_scored, f"{num_scored} scored")
        print(f"--- {title}; {len(at)} tokens, {place}, {some}")
        ids = rows.tokens[at]
        print(f"ids  {_ends(ids.tolist())}")
        off = at[~rows.key_on[at]]
        if len(off):
            print(f"keys switched off at {_ends(off.tolist())}")
        if tokenizer is not None:
            print(tokenizer.decode(ids))


def print_packing(batch: Batch[np.ndarray], stats: dict[str, float]) -> None:
    """Prints how step 1 fills its rows."""
    num_micro, num_rows, row_len = int(batch.num_micro), *batch.rows.tokens.shape[1:]
    print(f"\n=== step 1: {num_micro} micro-batches of {num_rows} rows of {row_len} tokens")
    for m in range(num_micro):
        for r in range(num_rows):
            used = int((batch.rows.segments[m, r] > 0).sum())
            prompts = int(batch.rows.prompt_ids[m, r].max())
            pairs = int((batch.rows.pairs[m, r, :, 0] >= 0).sum())
            print(f"row {m}.{r}: {prompts} prompts, {used} tokens, {pairs} live block pairs")
    print("  ".join(f"{name} {value:.4g}" for name, value in stats.items()))


def print_histogram(name: str, lengths: np.ndarray, bins: int = 10) -> None:
    """Prints counts of lengths in tokens."""
    counts, edges = np.histogram(lengths, bins=bins)
    mean, most = np.mean(lengths), np.max(lengths)
    print(f"\n=== {name}: {len(lengths)}, mean {mean:.1f} tokens, longest {most}")
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "#" * round(50 * count / max(counts))
        print(f"{low:7.0f} .. {high:<7.0f} {count:7d} {bar}")


def _ends(items: list[int]) -> str:
    """The first and last SHOWN of a list."""
    if len(items) <= 2 * SHOWN:
        return str(items)
    return f"{str(items[:SHOWN])[:-1]}, ... {str(items[-SHOWN:])[1:]}"


if __name__ == "__main__":
    run_main(main)
