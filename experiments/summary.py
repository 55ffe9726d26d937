"""What runs were and what changed by them, in words: the beginning of a page about them."""

import math
import statistics
from collections.abc import Iterable, Sequence

from experiments.results import BAND, Run, by_setting, kind_of_loss

MAX_VALUES = 6  # of a field that differs from run to run
OF_KIND = (
    "loss.name",
    "loss.alpha",
    "loss.logits_chunk",
)  # said by the kind of loss, or not at all


def facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Returns (name, text) of what was run: data, model, loss, training, evaluation, commit.

    Values that differ from run to run are listed. Runs without config.json or run.json say nothing.
    """
    known = [run for run in runs if run.config and run.began]
    if not known:
        return []

    def of(field: str) -> str:
        return _listed(run.config[field] for run in known if field in run.config)

    def began(name: str) -> str:  # "258 (digest) + 300 (digest)" of two sources: their sizes
        kept = [str(run.began[name]) for run in known if name in run.began]
        return _listed(" + ".join(x.split()[0] for x in text.split(" + ")) for text in kept) or "?"

    loss_fields = dict.fromkeys(x for run in known for x in run.config if x.startswith("loss."))
    loss = [_listed(map(kind_of_loss, known))]
    loss += [f"{x.partition('.')[2]} {of(x)}" for x in loss_fields if x not in OF_KIND]
    model = (
        run.config["model.init_from"] or f"{run.config['model.name']}, random weights"
        for run in known
    )
    sizes = {
        f"{len(next(iter(answers.values())))} samples to each of {len(answers)} held-out prompts"
        for run in known
        if (answers := run.samples.get("policy"))
    }
    commits = (commit for run in known for commit in run.began["commits"])
    found = {
        "data": f"{of('data.files')}: {began('records')} prompts to train on, {began('heldout')} "
        "held out",
        "model": _listed(model),
        "loss": "; ".join(loss),
        "training": f"{began('steps')} steps of {of('data.batch_size')} prompts, learning rate "
        f"{of('optim.lr')}, seed {of('seed')}",
        "evaluation": _listed(sizes) or "none yet",
        "commit": _listed(commits),
    }
    return list(found.items())


def what_changed(runs: Sequence[Run]) -> str:
    """Returns a sentence: from where to where the reward went, and how sure that is.

    Where nothing was sampled, the accuracy on held-out records. Of more than three settings it is
    about the best one; "" where nothing was measured.
    """
    for name, change_of in (("reward", _reward_change), ("held-out accuracy", _accuracy_change)):
        found = {
            setting: change
            for setting, members in by_setting(runs).items()
            if (change := change_of(members))
        }
        if found and len(by_setting(runs)) == 1:
            return f"The {name} {_phrase(*next(iter(found.values())))}."
        if 0 < len(found) <= 3:
            return "; ".join(f"{x}: the {name} {_phrase(*y)}" for x, y in found.items()) + "."
        if found:
            best = max(found, key=lambda setting: found[setting][1])
            phrase = _phrase(*found[best])
            return f"The best of {len(found)} settings is {best}: its {name} {phrase}."
    return ""


def _reward_change(members: Sequence[Run]) -> tuple[float, float, float, str] | None:
    """Returns the mean reward before and after, how far the change may be off, and what says so."""
    done = [run.evaluation for run in members]
    done = [x for x in done if {"reward", "reward_reference"} <= x.keys()]
    if not done:
        return None
    before, after = (statistics.fmean(x[y] for x in done) for y in ("reward_reference", "reward"))
    if len(done) >= BAND:
        spread = statistics.stdev(x["reward"] - x["reward_reference"] for x in done)
        return before, after, spread, f"standard deviation over {len(done)} seeds"
    errors = [x for run in members if (x := gain_error(run)) is not None]
    spread = 1.96 * statistics.fmean(errors) if errors else math.nan
    return before, after, spread, "95% interval over prompts"


def gain_error(run: Run) -> float | None:
    """Returns the standard error of a run's reward above the reference's.

    That of the mean over prompts of the difference of their mean scores. None: there are no scored
    samples of two prompts.
    """
    if "reward_difference_se" in run.evaluation:
        return run.evaluation["reward_difference_se"]
    means = [
        {prompt: [score for _, score in of_prompt] for prompt, of_prompt in answers.items()}
        for answers in (run.samples.get("policy", {}), run.samples.get("reference", {}))
    ]
    policy, reference = means
    if len(policy) < 2 or policy.keys() != reference.keys() or None in sum(policy.values(), []):
        return None
    differences = [statistics.fmean(policy[x]) - statistics.fmean(reference[x]) for x in policy]
    return statistics.stdev(differences) / math.sqrt(len(differences))


def _accuracy_change(members: Sequence[Run]) -> tuple[float, float, float, str] | None:
    """Returns the held-out accuracy of the first and the last evaluation while it trained."""
    name = "accuracy_half_ties"  # one half where policy and reference are equal, as at the start
    series = [[x[name] for x in run.lines if x["split"] == "eval" and name in x] for run in members]
    series = [values for values in series if len(values) > 1]
    if not series:
        return None
    before, after = (statistics.fmean(values[at] for values in series) for at in (0, -1))
    return before, after, math.nan, ""


def _phrase(before: float, after: float, spread: float, known_by: str) -> str:
    change = after - before
    verb = "rose" if change > 0 else "fell"
    if abs(change) <= spread:
        verb = "did not move beyond its noise: it went"
    sure = f" ± {spread:.3f}, {known_by}" if math.isfinite(spread) else ""
    return f"{verb} from {before:.3f} to {after:.3f} ({change:+.3f}{sure})"


def _listed(values: Iterable[object]) -> str:
    """Returns the values, each once, in the order in which they come."""
    texts = list(dict.fromkeys(map(str, values)))
    left = f" and {len(texts) - MAX_VALUES} more" if texts[MAX_VALUES:] else ""
    return " / ".join(texts[:MAX_VALUES]) + left
