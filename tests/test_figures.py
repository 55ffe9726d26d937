"""What is published of measurements is what is stored of them: `make figures` redoes it."""

import json

from commands import ROOT

from experiments.pods import run as pods
from experiments.pods.peers import run as peers
from experiments.speed import report as speed

README, EVIDENCE = ((ROOT / name).read_text() for name in ("README.md", "docs/evidence.md"))


def test_the_tables_of_speed_are_those_of_its_stored_cells():
    stored, readme = speed.stored_cells(speed.HERE), (speed.HERE / "README.md").read_text()
    assert (speed.HERE / "table.md").read_text() == speed.tables(stored)
    assert readme == speed.with_tables(readme, stored)
    assert all(side["commit"] for cell in stored.values() for side in cell["sides"].values())


def test_the_tables_of_pods_and_peers_are_those_of_their_stored_cells():
    assert (pods.HERE / "table.md").read_text() == pods.table(pods.read_cells())
    readme = peers.README.read_text()
    assert readme == peers.with_table(readme) and peers.table() in readme


def test_the_readme_says_of_speed_and_pods_what_is_stored():
    stored = speed.stored_cells(speed.HERE)
    k4, k8 = (stored[name]["sides"]["ours_fast_cached"] for name in ("real_k4", "prompt512_k8"))
    assert (
        f"{k4['ratio']:.1f} and {k8['ratio']:.1f} times the prompts/s, "
        f"{k4['peak_ratio']:.0%} and {k8['peak_ratio']:.0%} of the memory"
    ) in README
    for one in (k4, k8):
        assert f"{one['ratio']:.2f} times" in EVIDENCE
    cells = pods.read_cells()
    of_64, of_1024 = (
        cells[f"mistral_7b-cached-v5p:{chips}"]["programs"]["train"]["memory"]["total"]
        for chips in ("4x4x4", "8x8x16")
    )
    assert f"| {of_64:.1f} and {of_1024:.1f} GiB a chip |" in README


def test_the_readme_says_of_peers_what_is_stored():
    ours, lean = (peers.Ours(k, 1, "live") for k in (2, 4))
    maxtext, tunix = (peers.Peer(name, "float32", 1) for name in ("maxtext", "tunix"))
    least, most = (peers.memory_gib(ours) / peers.memory_gib(peer) for peer in (maxtext, tunix))
    flops = peers.flops_a_pair(lean) / peers.flops_a_pair(tunix)
    memory = f"{least:.0%} and {most:.0%} of their memory at equal state"
    said = f"{memory}, {flops:.0%} of their operations a pair"
    assert said in README
    assert said in EVIDENCE
    assert most < least < 1 and flops < 0.5


def test_a_measured_cell_is_stored_with_its_commit_and_no_path_of_its_machine(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(speed, "plot", lambda path, cells: None)  # seconds
    folder = tmp_path / "real_k4"
    folder.mkdir()
    counts = {"needed_tokens": 80, "scored_tokens": 60, "padded_tokens": 120}
    flops = {"needed_flops": 6e9, "head_flops": 1e9, "released_flops": 12e9}
    job = {"k": 4, "batch_size": 2, "loss": "nca", "model": "/a/b", "rows": "/a/c"}
    measured = {"seconds": [2.5], "cpu_seconds": [4.0], "peak_bytes": 2**30, "reference": "live"}
    apart = dict.fromkeys(("logps", "logps_after", "loss", "loss_after", "grad_norm"), 0.0)
    for name, told in {
        "job": job | counts | flops,
        "peak.0": {"flops_per_second": 1e10},
        "agreement": {"ours_fast_live": apart},
        "ours_fast_live.check": {},
        "ours_fast_live.0": measured | {"commit": "abc1234"},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(told))
    speed.write_report(tmp_path)
    (cell,) = speed.stored_cells(tmp_path).values()
    assert cell["sides"]["ours_fast_live"]["commit"] == "abc1234"
    assert not cell["job"].keys() & {"model", "rows"}
    assert "| ours_fast_live | 2.5 | 0.8000 | 1.00x |" in (tmp_path / "table.md").read_text()
