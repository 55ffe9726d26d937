"""How far apart trainers are: one table, one JSON with every step, one plot."""

import json
from pathlib import Path

OTHERS = ("released", "trl")  # beside ours
# Nats. Before the policy has left the reference, rewards are rounding and accuracy is a coin.
MOVED = 1e-3
RELATIVE = ("loss", "grad_norm")
QUANTITIES = {
    "loss": "loss, relative",
    "grad_norm": "grad_norm, relative",
    "logps": "logps, nats",
    "rewards": "rewards, nats",
    "accuracy": "accuracy, once moved",
    "final_logps": "final logps, nats",
}


def write_report(out: Path, results: dict[str, dict]) -> None:
    """Writes table.md, differences.json, results.json and parity.png.

    Args:
      results: {case: {trainer: {"log", "final_logps"} or None}}.
    """
    (out / "results.json").write_text(json.dumps(results) + "\n")
    found = {
        f"{case}/{theirs}": differences(of[theirs], of["ours"]) if of[theirs] else None
        for theirs in OTHERS
        for case, of in results.items()
    }
    (out / "differences.json").write_text(json.dumps(found, indent=2) + "\n")
    lines = ["| loss | beside | " + " | ".join(QUANTITIES.values()) + " |"]
    lines.append("|---" * (len(QUANTITIES) + 2) + "|")
    for name, apart in found.items():
        shown = [f"{apart[q]:.1e}" if apart else "-" for q in QUANTITIES]
        case, theirs = name.split("/")
        lines.append(f"| {case} | {theirs} | " + " | ".join(shown) + " |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot(out / "parity.png", results)


def differences(theirs: dict, ours: dict) -> dict[str, float]:
    """Returns the largest difference of each quantity over all steps."""
    apart = dict.fromkeys(QUANTITIES, 0.0)
    for a, b in zip(theirs["log"], ours["log"], strict=True):
        if a["step"] != b["step"]:
            raise ValueError(f"Step {a['step']} beside step {b['step']}.")
        moved = any(abs(x) > MOVED for name, x in a.items() if name.startswith("rewards/"))
        for name in a.keys() & b.keys():
            quantity = name.split("/")[0]
            if quantity in apart and (quantity != "accuracy" or moved):
                scale = abs(a[name]) if quantity in RELATIVE else 1.0
                apart[quantity] = max(apart[quantity], abs(a[name] - b[name]) / scale)
    for row, other in zip(theirs["final_logps"], ours["final_logps"], strict=True):
        for a, b in zip(row, other, strict=True):
            apart["final_logps"] = max(apart["final_logps"], abs(a - b))
    return apart


def plot(path: Path, results: dict[str, dict]) -> None:
    """Draws both losses a case above, their difference below."""
    import matplotlib  # the extra `demo` has it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(results), figsize=(3.2 * len(results), 6), squeeze=False)
    for (case, of), (above, below) in zip(results.items(), axes.T, strict=True):
        for style, trainer in (("-", "released"), ("--", "ours"), (":", "trl")):
            if of[trainer]:
                above.plot([entry["loss"] for entry in of[trainer]["log"]], style, label=trainer)
        for theirs in OTHERS:
            if of[theirs]:
                both = zip(of["ours"]["log"], of[theirs]["log"], strict=True)
                apart = [abs(a["loss"] - b["loss"]) for a, b in both]
                below.plot(apart, ".-", label=f"ours beside {theirs}")
        above.set_title(case)
        below.set_yscale("symlog", linthresh=1e-8)
        below.set_xlabel("step")
    axes[0, 0].set_ylabel("loss, nats")
    axes[1, 0].set_ylabel("difference of the losses, nats")
    axes[0, 0].legend()
    for below in axes[1]:
        below.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
