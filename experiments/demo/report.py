"""One self-contained HTML page about a run: its curves, and samples before and after."""

import html
import io
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend)

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>nca_jax demo</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem;
       color: #1c2330; background: #fff; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .45rem .7rem;
          border-bottom: 1px solid #dde2ea; }}
.numbers td {{ font-variant-numeric: tabular-nums; }}
.samples td {{ width: 40%; font-size: .92rem; }} .samples td:first-child {{ width: 20%; }}
.score {{ display: inline-block; min-width: 3.2rem; font-weight: 600; color: #44506a; }}
.score.good {{ color: #16704a; }} .score.bad {{ color: #a8323e; }}
p {{ max-width: 46rem; }} svg {{ max-width: 100%; height: auto; }}
</style></head><body>
<h1>SmolLM2-135M learns to review films kindly</h1>
<p>NCA (arXiv:2402.05369) on {steps} steps of scored responses that the model itself wrote, K = 4 a
prompt. The reward is VADER's sentiment, in [-1, 1].</p>
<h2>Result on held-out prompts</h2><table class="numbers">{numbers}</table>
<h2>Training</h2>{curves}
<h2>Held-out prompts, before and after</h2>
<table class="samples"><tr><th>Prompt</th><th>Before</th><th>After</th></tr>{samples}</table>
</body></html>
"""
MEANING = {
    "reward_before": "mean reward of the reference's responses",
    "reward_after": "mean reward of the policy's responses",
    "accuracy": "the best response has the higher implicit reward; chance is 0.5",
    "kl": "KL(policy || reference), nats a response, on the policy's own samples",
    "chosen_logp_drift": "change of the best response's log-probability, nats",
    "seconds": "training and evaluation, wall clock",
}
SHOWN = 16  # prompts


def write_report(path: Path, summary: dict, lines: list[dict], samples: list[dict]) -> None:
    """Writes the page.

    Args:
      summary: what summary.json holds.
      lines: of metrics.jsonl.
      samples: of evaluation.json: prompt, policy, reference and their scores.
    """
    train = [line for line in lines if line["split"] == "train"]
    numbers = "".join(
        f"<tr><th>{name}</th><td>{value:.3f}</td><td>{MEANING[name]}</td></tr>"
        for name, value in summary.items()
    )
    rows = "".join(_sample_row(sample) for sample in samples[:SHOWN])
    page = PAGE.format(steps=len(train), numbers=numbers, curves=_curves(train), samples=rows)
    path.write_text(page)


def _sample_row(sample: dict) -> str:
    cells = [html.escape(sample["prompt"])]
    for who in ("reference", "policy"):
        pairs = zip(sample[who], sample[f"{who}_scores"], strict=True)
        cells.append("<br>".join(_scored(text, score) for text, score in pairs))
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _scored(text: str, score: float) -> str:
    kind = "good" if score > 0.05 else "bad" if score < -0.05 else ""
    return f'<span class="score {kind}">{score:+.2f}</span> {html.escape(text)}'


def _curves(train: list[dict]) -> str:
    """The training curves as one inline SVG."""
    panels = (
        ("NCA loss and its floor, nats", ("loss", "floor")),
        ("implicit reward by rank, nats", ("rewards/0", "rewards/1", "rewards/2", "rewards/3")),
        ("log-ratio of the best response, nats", ("chosen_logp_drift",)),
    )
    steps = [line["step"] for line in train]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for axis, (title, names) in zip(axes, panels, strict=True):
        for name in names:
            axis.plot(steps, [line[name] for line in train], label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]
