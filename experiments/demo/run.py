"""The demo: SmolLM2-135M-Instruct learns to speak of the film it is asked about, by NCA and DPO.

    make demo      or      python -m experiments.demo.run [--seed=0] [--out=runs/demo] [--smoke]

The reward is the share of the film's words that an answer has: so small a model learns more of it
in ten steps than of sentiment. Both start from the same model and see the same prompts: NCA four
responses and their scores, DPO the best and the worst of them. The responses are the model's own,
so those of held-out records say what it was like before. One process does all, by the functions
that the commands are made of. It prints what changed, and writes
    OUT/summary.json    the numbers; an interval is half the width of the 95% one, over prompts
    OUT/report.html     the same, with curves and samples, in one self-contained page
    OUT/rows.jsonl      the records with that reward
    OUT/nca, OUT/dpo    of each arm metrics.jsonl, config.json, run.json and evaluation.json
"""

import argparse
import contextlib
import math
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import report
from nca_jax.axes import Params
from nca_jax.build import Run, build, read_data
from nca_jax.checks import run_main
from nca_jax.data.encode import Example, Prompt
from nca_jax.data.pipeline import Dataset, eval_batches
from nca_jax.data.sources import write_records
from nca_jax.data.table import Table, joined
from nca_jax.files import out_folder, whole_lines, write_json
from nca_jax.fit import fit
from nca_jax.flags import parse_flags
from nca_jax.infra.program_cache import keep_programs
from nca_jax.infra.records import record_run
from nca_jax.infra.writer import MetricWriter
from nca_jax.params import start_params
from nca_jax.programs import build_optimizer, jit_step_logps, jit_train_step, start_state
from nca_jax.rewards.scorers import Scorer
from nca_jax.rollout import Record, rollout
from nca_jax.saved_config import CONFIG, config_json
from nca_jax.train_step import Frozen

ROWS = Path("experiments/demo/rows.jsonl")
TITLE = "SmolLM2-135M learns to speak of the film: NCA, and DPO beside it"
FILM = re.compile(r"Finish this review of (.*) in one sentence:")
STEPS, BATCH = 10, 4  # prompts a step
NUM_ANSWERED, NUM_COMPARED = 62, 20  # held-out prompts: for the reward, for likelihoods
NUM_SHOWN = 3  # of those answered, on the screen
ROW_LEN = {"nca": 704, "dpo": 512}  # tokens: BATCH prompts with four responses, or with two
FLAGS = (
    "--config.optim.lr=2.5e-5",
    "--config.optim.warmup_frac=0.0",
    "--config.optim.b1=0.5",  # in ten steps a longer memory overshoots
    "--config.loss.beta=1.0",
    f"--config.data.batch_size={BATCH}",
    f"--config.steps={STEPS}",
    "--config.reference.kind=cached",
    "--config.reference.cache=unread",  # it is computed here, for the prompts that are needed
    "--config.model.scan_layers=True",  # compiles in a fraction of the time
    f"--config.generate.batch_size={2 * NUM_ANSWERED}",
    "--config.generate.scorer=",  # it is `of_the_film`
    "--config.log.tensorboard=False",
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="experiments.demo.run", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--smoke", action="store_true", help="a tiny model of random weights")
    args = parser.parse_args(argv[1:])
    shutil.rmtree(args.out, ignore_errors=True)  # the demo shows a whole run, not a resumed one
    keep_programs()
    began = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - began:4.0f} s  {what}", flush=True)

    say("Reading the model and the records.")
    rows = scored_rows()
    out_folder(args.out)
    write_records(args.out / ROWS.name, rows)
    run = build(config_of("nca", args))
    data = read_data(run)
    spans = [np.ptp(example.scores) for example in data.training]
    by_span = data.training.take(np.argsort(np.negative(spans), kind="stable"))
    training = by_span[: STEPS * BATCH]  # those whose scores differ most teach most
    compared, answered = data.heldout[:NUM_COMPARED], data.heldout[:NUM_ANSWERED]
    best = np.array([example.scores.argmax() for example in compared])
    drifts, answers = {}, {}
    with jax.set_mesh(run.mesh):
        say("The reference's log-probabilities, once for both losses. Compiling takes a while.")
        reference = start_params(run, run.config.model.init_from)
        logps_of = make_logps_of(run)
        ref_logps = logps_of(reference, joined([training, compared]))
        for algo in ROW_LEN:
            say(f"{algo.upper()}: training, {STEPS} steps of {BATCH} prompts.")
            arm = run._replace(config=config_of(algo, args))
            policy = train(arm, reference, training, ref_logps[: len(training)], args.out / algo)
            say(f"{algo.upper()}: log-probabilities of {len(compared)} held-out records.")
            change = logps_of(policy, compared) - ref_logps[len(training) :]  # [n, K] nats
            drifts[algo] = change[np.arange(len(best)), best]
            if algo == "nca":
                say(f"NCA: answering {len(answered)} held-out prompts.")
                answers = answers_to(arm, policy, answered, args.seed)
    say("Writing the page.")
    samples = beside_reference(answers, rows)
    summary = measure(samples, drifts)
    for algo, drift in drifts.items():
        metrics = {"chosen_logp_drift": float(drift.mean())}
        if algo == "nca":
            metrics |= {x: summary[x] for x in ("reward", "reward_reference", "reward_difference")}
        told = {"metrics": metrics, "samples": samples if algo == "nca" else []}
        write_json(args.out / algo / "evaluation.json", told)
    summary["seconds"] = round(time.perf_counter() - began, 1)
    write_json(args.out / "summary.json", summary)
    page = args.out / "report.html"
    status = report.main(["report", str(args.out), f"--out={page}", f"--title={TITLE}"])
    print(told_of(summary, samples))
    return status


def scored_rows() -> list[Record]:
    """Returns the records with the demo's reward in place of their own."""

    def scored(record: Record) -> Record:
        responses = record["responses"]
        return record | {"scores": of_the_film([record] * len(responses), responses).tolist()}

    return [scored(record) for record in whole_lines(ROWS)]


def of_the_film(records: Sequence[Record], responses: Sequence[str]) -> np.ndarray:
    """The share of the film's words, by their first five letters, that a response has: [N]."""

    def share(prompt: str, response: str) -> float:
        film = FILM.match(prompt)
        words = re.findall("[a-z]{4,}", film[1].lower()) if film else []
        return sum(word[:5] in response.lower() for word in words) / max(1, len(words))

    pairs = zip(records, responses, strict=True)
    return np.array([share(record["prompt"], text) for record, text in pairs])


def config_of(algo: str, args: argparse.Namespace) -> ConfigDict:
    """Returns the config of an arm: configs/sentiment.py with the demo's settings."""
    files = args.out / ROWS.name
    where = f"--config=configs/sentiment.py:algo={algo},files={files},seed={args.seed}"
    row_len = ROW_LEN[algo]
    rows = (f"--config.data.row_len={row_len}", f"--config.loss.logits_chunk={row_len // 2}")
    return parse_flags(["demo", where + (",smoke" if args.smoke else ""), *FLAGS, *rows])[0]


def make_logps_of(run: Run) -> Callable[[Params, Table], np.ndarray]:
    """Returns `logps_of(params, examples) -> [n, K]`: of all responses, nats."""
    step_logps = jit_step_logps(run)

    def logps_of(params: Params, examples: Table) -> np.ndarray:
        batches = eval_batches(examples, run.config.data)
        logps = [np.asarray(step_logps(params, host.batch)) for host in batches]
        return np.concatenate(logps)[: len(examples)]

    return logps_of


def train(
    run: Run, reference: Params, training: Table, ref_logps: np.ndarray, workdir: Path
) -> Params:
    """Trains a copy of the reference in one pass over the prompts, and returns it."""
    config = run.config
    out_folder(workdir)
    write_json(workdir / CONFIG, config_json(config))
    sizes = {"records": str(len(training)), "heldout": str(NUM_ANSWERED), "steps": config.steps}
    record_run(workdir, None, sizes)
    dataset = Dataset([training], config.data, seed=config.seed, ref_logps=list(ref_logps))
    optimizer = build_optimizer(config, config.steps)
    writer = MetricWriter(workdir, config.log, restored_step=None, num_steps=config.steps)
    with contextlib.closing(writer):
        state = fit(
            run,
            start_state(run, optimizer, jax.tree.map(jnp.copy, reference)),
            Frozen(),
            dataset.iterate(0, config.steps),
            train_step=jit_train_step(run, optimizer, Frozen()),
            steps=config.steps,
            writer=writer,
        )
    return state.params


def answers_to(run: Run, policy: Params, examples: Sequence[Example], seed: int) -> list[Record]:
    """Returns a record of each prompt with the policy's own answers and their scores."""
    prompts = [Prompt(x.where, x.group.prompt, x.record) for x in examples]
    return rollout(run, policy, prompts, Scorer(of_the_film), seed)


def beside_reference(answers: Sequence[Record], rows: Sequence[Record]) -> list[Record]:
    """Returns the policy's answers beside those of the records, as evaluation.json has samples."""
    records = {record["prompt"]: record for record in rows}
    return [
        {
            "prompt": record["prompt"],
            "policy": record["responses"],
            "policy_scores": record["scores"],
            "reference": records[record["prompt"]]["responses"],
            "reference_scores": records[record["prompt"]]["scores"],
        }
        for record in answers
    ]


def measure(samples: Sequence[Record], drifts: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns means over prompts by name, and "NAME_interval" of those that are differences."""
    policy, reference = (
        np.array([np.mean(x[f"{who}_scores"]) for x in samples]) for who in ("policy", "reference")
    )
    found = {"reward_reference": float(reference.mean()), "reward": float(policy.mean())}
    differences = {
        "reward_difference": policy - reference,
        **{f"{algo}_best_logp": drift for algo, drift in drifts.items()},
        "nca_above_dpo": drifts["nca"] - drifts["dpo"],
    }
    for name, values in differences.items():  # [prompts]
        error = values.std(ddof=1) / math.sqrt(len(values))
        found |= {name: float(values.mean()), f"{name}_interval": float(1.96 * error)}
    return found


def told_of(summary: dict[str, float], samples: Sequence[Record]) -> str:
    """Returns what changed, in words, and the first answers before and after."""

    def with_interval(name: str) -> str:
        return f"{summary[name]:+.2f} ± {summary[f'{name}_interval']:.2f}"

    lines = [
        "",
        f"Share of the film's words in its own answers to {len(samples)} held-out prompts:",
        f"  before {summary['reward_reference']:+.2f}, after NCA {summary['reward']:+.2f}: "
        f"{with_interval('reward_difference')}",
        "Log-likelihood of the best of four held-out answers, change in nats:",
        f"  NCA {with_interval('nca_best_logp')}, DPO {with_interval('dpo_best_logp')}; NCA is "
        f"above DPO by {with_interval('nca_above_dpo')}",
        "(± is the 95% interval over prompts.)",
    ]
    for sample in samples[:NUM_SHOWN]:
        lines += ["", sample["prompt"]]
        for when, who in (("before", "reference"), ("after", "policy")):
            text = " ".join(sample[who][0].split())
            lines.append(f"  {when:6s} {sample[f'{who}_scores'][0]:+.2f}  {text}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
