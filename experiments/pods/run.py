r"""Compiles every cell of the table of pods, then writes the table and its plots.

    python experiments/pods/run.py [--only=TEXT] [--again] [--table]

A cell is one `nca_jax.aot` command and one file in experiments/pods/cells/; those that are there
are not compiled again, so the table can be continued. It wants libtpu (the tpu extra) and no TPU.

    --only   cells whose name has this text
    --again  those that are there too, but for what is of this commit
    --table  compiles nothing
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from nca_jax.files import write_json

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CELLS = HERE / "cells"


class Cell(NamedTuple):
    """One compile; `flags` are added to those that all share."""

    name: str
    model: str
    reference: str
    topology: str
    num_slices: int = 1
    rows_a_chip: int = 1
    flags: tuple[str, ...] = ()
    programs: tuple[str, ...] = ("train",)
    config: str = "configs/ultrafeedback.py:algo=nca"


TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v6e:16x16", "v5p:4x4x4", "v5p:8x8x16")
# How many copies of the parameters (mesh.data) a slice has, where its memory allows: README.md.
COPIES = {
    "mistral_7b": {"v5e:16x16": 8, "v6e:16x16": 8, "v5p:4x4x4": 2, "v5p:8x8x16": 32},
    "mixtral_8x7b": {"v5p:8x8x16": 16},
}
EXPERTS = {"mistral_7b": 1, "mixtral_8x7b": 8, "llama3_8b": 1}  # mesh.expert; fsdp has the rest
# One host, and records of one's own, as docs/one_host.md has them.
OWN_RECORDS = "configs/jsonl.py:files=rows.jsonl.gz,init_from=HF_FOLDER,algo=nca"
SIZES = (
    *("--config.model.dtype=bfloat16", "--config.model.scan_layers=True"),
    *("--config.model.remat=full", "--config.data.block=512", "--config.data.align=16"),
    "--config.loss.logits_chunk=512",
)
# Adapters of rank 16, the base as the reference: the dtype of the base, a model, a topology.
ADAPTED = (
    ("bfloat16", "mistral_7b", "v5e:2x2"),
    ("bfloat16", "mistral_7b", "v6e:1x1"),
    ("nf4", "mistral_7b", "v5e:1x1"),
    ("nf4", "mistral_7b", "v5e:2x2"),
    ("nf4", "llama3_8b", "v5e:1x1"),
    ("nf4", "qwen3_8b", "v5e:1x1"),
    ("nf4", "mixtral_8x7b", "v5e:2x4"),
    ("nf4", "mixtral_8x7b", "v6e:2x4"),
)
# T of rows, each a prompt of T / 16 tokens (2048 of 32768) with 8 responses of 7 T / 64 (3584).
ROW_LENS = {4096: 16, 8192: 16, 16384: 64, 32768: 128}  # data.align
LONG_ROWS = ("v5p:4x4x4", "v6e:8x8")
HOSTS = ("v5e:2x4", "v6e:2x4")
SAMPLED_ON = ("v5p:4x4x4", "v5e:4x4", "v5e:2x4")
SAMPLES = ("--config.generate.num_samples=8", "--config.generate.batch_size=64")
REWARD = "configs/reward_model.py:files=rows.jsonl.gz,init_from=HF_FOLDER"
ON_A_HOST = ("smollm2_135m", "qwen3_0_6b", "mistral_7b", "llama3_8b")


def cells() -> list[Cell]:
    """Returns the table: models by references by topologies, two slices, and one choice undone."""

    def cell(name: str, model: str, reference: str, topology: str, *flags: str, **changes) -> Cell:
        data = COPIES.get(model, {}).get(topology, 1) * changes.get("num_slices", 1)
        copies, experts = f"--config.mesh.data={data}", f"--config.mesh.expert={EXPERTS[model]}"
        return Cell(name, model, reference, topology, flags=(copies, experts, *flags), **changes)

    table = [
        cell(f"{model}-{reference}-{topology}", model, reference, topology)
        for topology in TOPOLOGIES
        for reference in ("cached", "live")
        for model in COPIES
    ]
    table += [cell("llama3_8b-cached-v6e:4x4", "llama3_8b", "cached", "v6e:4x4")]
    table += [
        cell(f"mistral_7b-cached-2x{topology}", "mistral_7b", "cached", topology, num_slices=2)
        for topology in ("v5e:16x16", "v5p:4x4x4")
    ]
    base = ("mistral_7b", "cached", "v5p:4x4x4")
    table += [
        cell("choice-one-fsdp-axis", *base, "--config.mesh.data=1"),
        cell("choice-whole-logits", *base, "--config.loss.logits_chunk=4096"),
        cell("choice-4-rows", *base, rows_a_chip=4),
        cell("choice-no-remat", *base, "--config.model.remat=none"),
        cell("choice-remat-dots", *base, "--config.model.remat=dots"),
    ]
    table += [
        cell(
            f"{model}-forward-{topology}",
            model,
            "cached",
            topology,
            programs=("precompute", "decode"),
        )
        for topology in ("v5p:4x4x4", "v5e:16x16")
        for model in COPIES
    ]
    table += [
        Cell(
            f"{model}-sampling-{topology}",
            model,
            "cached",
            topology,
            flags=(f"--config.mesh.expert={EXPERTS[model]}", *SAMPLES),
            programs=("decode",),
        )
        for topology in SAMPLED_ON
        for model in COPIES
    ]
    table += [
        Cell(f"host-{model}-{topology}", model, "live", topology, flags=SIZES, config=OWN_RECORDS)
        for topology in HOSTS
        for model in ON_A_HOST
    ]
    table += [
        Cell(f"reward-{model}-v5e:2x4", model, "none", "v5e:2x4", flags=SIZES, config=REWARD)
        for model in ON_A_HOST[:2]
    ]
    table += [
        Cell(
            f"rows-{row_len}-qwen3_8b-{topology}",
            "qwen3_8b",
            "cached",
            topology,
            flags=(
                *("--config.mesh.data=2", "--config.data.num_responses=8"),
                *(f"--config.data.row_len={row_len}", f"--config.data.align={align}"),
                f"--config.data.max_prompt_len={row_len // 16}",
                f"--config.data.max_response_len={7 * row_len // 64}",
            ),
        )
        for topology in LONG_ROWS
        for row_len, align in ROW_LENS.items()
    ]
    lora = ("--config.reference.kind=base", "--config.lora.rank=16")
    attention = (
        "--config.lora.targets=q,k,v,o",
        "--config.mesh.expert=8",
    )  # as the paper's Mixtral
    table += [
        Cell(
            f"lora-{dtype}-{model}-{topology}",
            model,
            "base",
            topology,
            flags=(
                *lora,
                f"--config.lora.base_dtype={dtype}",
                *(attention if model == "mixtral_8x7b" else ()),
            ),
        )
        for dtype, model, topology in ADAPTED
    ]
    return table


def command(cell: Cell, out: Path) -> list[str]:
    """Returns the command line of one cell."""
    reference = ["--config.reference.kind=cached", "--config.reference.cache=cache"]
    return [
        sys.executable,
        "-m",
        "nca_jax.aot",
        f"--config={cell.config},model={cell.model}",
        *(reference if cell.reference == "cached" else []),
        f"--topology={cell.topology}",
        f"--num_slices={cell.num_slices}",
        f"--rows_per_chip={cell.rows_a_chip}",
        f"--programs={','.join(cell.programs)}",
        *cell.flags,
        f"--json={out}",
    ]


def path_of(cell: Cell) -> Path:
    return CELLS / f"{cell.name.replace(':', '_')}.json"


def commit() -> str:
    """Returns the commit of the code, "-dirty" if anything outside this folder was changed."""

    def git(*args: str) -> str:
        return subprocess.check_output(["git", *args], cwd=ROOT, text=True).strip()

    changed = git(
        "status", "--porcelain", "--untracked-files=no", ".", f":(exclude){HERE.relative_to(ROOT)}"
    )
    return git("describe", "--always", "--abbrev=12") + ("-dirty" if changed else "")


def compile_missing(only: str, again: bool) -> None:
    """Compiles one after another what has no file yet; with `again` those of other commits too."""
    CELLS.mkdir(exist_ok=True)
    now = commit()
    for cell in cells():
        out = path_of(cell)
        is_there = out.exists() and not (again and json.loads(out.read_text())["commit"] != now)
        if is_there or only not in cell.name:
            continue
        print(f"== {cell.name}", flush=True)
        out.unlink(missing_ok=True)
        status = subprocess.run(command(cell, out), cwd=ROOT).returncode
        if not out.exists():
            raise SystemExit(f"{cell.name} stopped with status {status}.")
        write_json(out, json.loads(out.read_text()) | {"commit": now})


def read_cells() -> dict[str, dict]:
    """Returns the reports that are there, by the name of the cell."""
    paths = {cell.name: path_of(cell) for cell in cells()}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def sent_bytes(program: dict, network: str) -> int:
    return sum(one["bytes"] for one in program["collectives"] if one["network"] == network)


def table(reports: dict[str, dict]) -> str:
    """Returns the Markdown table: one line a cell, "-" where it is not compiled yet."""
    lines = [
        "| cell | chips | mesh | rows a chip | GiB a chip | of | margin | ICI GiB | DCN GiB "
        "| asynchronous | FLOPs a step and chip | compile s | commit |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells():
        report = reports.get(cell.name)
        if report is None:
            lines.append(f"| {cell.name} |" + " - |" * 12)
            continue
        lines += [line(cell, report, name) for name in cell.programs]
    return "\n".join(lines) + "\n" + sampling(reports)


def sampling(reports: dict[str, dict]) -> str:
    """Returns the Markdown table of one sampled token: a line a cell that has it."""
    lines = [
        "",
        "| a token of | GiB sent a chip | of weights, GiB | share | GiB written a chip "
        "| in slices of MiB, at most |",
        "|---|---|---|---|---|---|",
    ]
    for name, report in reports.items():
        for program in report["programs"].values():
            if "weights" in program:
                turn, weights = program["a_turn"], program["weights"]
                lines.append(
                    f"| {name} | {turn['sent'] / 2**30:.4f} | {weights / 2**30:.2f} "
                    f"| {turn['sent'] / weights:.3%} | {turn['written'] / 2**30:.4f} "
                    f"| {turn['largest_write'] / 2**20:.3f} |"
                )
    return "\n".join(lines) + "\n"


def line(cell: Cell, report: dict, name: str) -> str:
    """Returns the line of one program of a cell."""
    program = report["programs"][name]
    title = cell.name.replace("forward", name)
    shape = program.get("mesh", report["mesh"])  # sampling has its own
    mesh = " ".join(f"{axis}={n}" for axis, n in shape.items() if n > 1)
    start = f"| {title} | {report['chips']} | {mesh} | {report['rows_a_chip']} |"
    flops = f"{report['flops_a_step_and_chip']:.2e}" if name == "train" else "-"
    work = f" {flops} | {program['compile_seconds']:.0f} | {report['commit']} |"
    memory, large = program["memory"], program["overlap"]
    verdict = "" if program["fits"] else "does not fit: "
    margin = f"{memory['margin'] / memory['limit']:.0%}" if program["fits"] else "-"
    sent = [sent_bytes(program, network) / 2**30 for network in ("ici", "dcn")]
    hidden = f"{large['async_bytes'] / large['bytes']:.0%}" if large["bytes"] else "-"
    return (
        f"{start} {verdict}{memory['total']:.2f} | {memory['limit']:.2f} "
        f"| {margin} | {sent[0]:.1f} | {sent[1]:.2f} | {hidden} |{work}"
    )


def plot(reports: dict[str, dict], out: Path) -> None:
    """Draws memory a chip, and bytes sent a chip and micro-batch, against the number of chips.

    A colour is a model with its reference, a marker a kind of chip; a line joins one kind.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pods"  # the same names in every drawing
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    series: dict[tuple[str, str], list[tuple]] = {}
    for cell in cells():
        report = reports.get(cell.name)
        others = ("choice", "host", "rows")
        is_series = cell.programs == ("train",) and not cell.name.startswith(others)
        if report is None or not is_series or cell.num_slices > 1:
            continue
        program = report["programs"]["train"]
        if program["fits"]:
            memory, sent = program["memory"], sent_bytes(program, "ici") / 2**30
            point = (report["chips"], memory["total"], memory["arguments"], sent)
            key = (f"{cell.model}, {cell.reference}", cell.topology.partition(":")[0])
            series.setdefault(key, []).append(point)
    names = list(dict.fromkeys(name for name, _ in series))
    for (name, kind), points in series.items():
        chips, total, state, sent = zip(*sorted(points), strict=True)
        how = {
            "color": f"C{names.index(name)}",
            "marker": {"v5e": "s", "v6e": "^", "v5p": "o"}[kind],
        }
        axes[0].plot(chips, total, "-", label=f"{name}, {kind}", **how)
        axes[0].plot(chips, state, ":", mfc="white", **how)  # 12 or 16 bytes a parameter, split
        axes[1].plot(chips, sent, "-", **how)
    axes[0].set(ylabel="GiB a chip (hollow: arguments)", yscale="log")
    axes[0].set_yticks((2, 5, 10, 20, 30), ("2", "5", "10", "20", "30"))
    axes[1].set(ylabel="GiB in collectives, a chip and micro-batch", ylim=(0, None))
    for ax in axes:
        ax.set(xlabel="chips", xscale="log")
        ax.set_xticks((64, 256, 1024), ("64", "256", "1024"))
        ax.minorticks_off()
    figure.legend(loc="outside right", fontsize=8)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        compile_missing(args.only, args.again)
    reports = read_cells()
    (HERE / "table.md").write_text(table(reports))
    print(table(reports))
    if reports:
        plot(reports, HERE / "growth.svg")


if __name__ == "__main__":
    main()
