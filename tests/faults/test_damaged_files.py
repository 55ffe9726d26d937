"""A file that is damaged is named, or the run goes on to the numbers that it would have had."""

import random
import shutil
from pathlib import Path

import jax
import pytest
from campaign import files_result, run_flags, run_result
from old_run import MODEL, OLD

from nca_jax import build, export, precompute, train
from nca_jax.checks import UserError
from nca_jax.infra.mesh import make_mesh

WAYS = ("flip", "cut", "empty", "nuls", "remove")


def damage(path: Path, how: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if how == "remove":
        path.unlink()
        return
    if how == "flip" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[rng.randrange(len(content) + 1) :]
    elif how == "nuls" and content:
        first = rng.randrange(len(content))
        last = min(len(content), first + rng.randint(1, 64))
        content[first:last] = bytes(last - first)
    elif how == "empty":
        content = b""
    path.write_bytes(content)


class World:
    """A run that was stopped after four of its six steps, and all that it reads."""

    def __init__(self, folder: Path):
        self.folder, self.sound = folder / "world", folder / "sound"
        self.run, self.cache = self.folder / "run", self.folder / "cache"
        self.model, self.records = self.folder / "model", self.folder / "records.jsonl"
        self.folder.mkdir()
        shutil.copytree(MODEL, self.model)
        shutil.copy(OLD / "rows.jsonl", self.records)
        self.flags = [
            flag.replace(str(MODEL), str(self.model)) for flag in run_flags(self.records)
        ] + [
            "--config.reference.kind=cached",
            f"--config.reference.cache={self.cache}",
            "--config.checkpoint.keep_last=3",
        ]
        precompute.main(["precompute", *self.flags])
        self.train()
        self.want = self.result()
        export.main(["export", f"--workdir={self.run}", f"--out={self.folder}/hf"])
        self.exported = files_result(self.folder / "hf")
        shutil.rmtree(self.folder / "hf")
        shutil.copytree(self.folder, self.sound)

    def train(self) -> None:
        train.main(["train", *self.flags, f"--workdir={self.run}"])

    def result(self):
        return run_result(self.run, self.model)

    def restore(self, *, steps: int) -> None:
        """Makes all sound again, as after a kill with the checkpoints of so many steps."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.sound, self.folder)
        for path in (self.run / "checkpoints").iterdir():
            if int(path.name) > steps:
                shutil.rmtree(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_mesh", lambda sizes, _: make_mesh(sizes, jax.devices()[:1]))
        yield World(tmp_path_factory.mktemp("damage"))


def files_of(world: World, what: str) -> list[Path]:
    """What there is to damage, by name."""
    found = {
        "newest checkpoint": (world.run / "checkpoints/4").rglob("*"),
        "config.json of a run": [world.run / "config.json"],
        "run.json": [world.run / "run.json"],
        "metrics.jsonl": [world.run / "metrics.jsonl"],
        "cache": world.cache.glob("*.safetensors"),
        "fingerprint of a cache": [world.cache / "fingerprint.json"],
        "records": [world.records],
        "weights": [world.model / "model.safetensors"],
        "config.json of a model": [world.model / "config.json"],
    }[what]
    return sorted(path for path in found if path.is_file())


DAMAGED = (
    "newest checkpoint",
    "config.json of a run",
    "run.json",
    "metrics.jsonl",
    "cache",
    "fingerprint of a cache",
    "records",
    "weights",
    "config.json of a model",
)


@pytest.mark.parametrize("what", DAMAGED)
def test_a_run_goes_on_to_its_numbers_or_names_what_is_damaged(
    world, what, tries, seed, tally, capsys
):
    rng = random.Random(f"{what} {seed}")
    for _ in range(tries):
        world.restore(steps=4)
        path, how = rng.choice(files_of(world, what)), rng.choice(WAYS)
        before = path.read_bytes()
        damage(path, how, rng)
        where = f"{path.relative_to(world.folder)}: {how}"
        capsys.readouterr()
        try:
            world.train()
        except UserError as error:
            assert str(error), where
            tally.refused(f"{what} damaged")
            continue
        except Exception as error:
            tally.lost(f"{what} damaged", f"{where}: {error!r}")
        got, said = world.result(), capsys.readouterr().out
        if what == "metrics.jsonl" and f"{path} " in said:  # a line that is lost is said
            got = (world.want[0], *got[1:])
        if what == "metrics.jsonl" and how == "flip" and len(got[0]) == len(world.want[0]):
            got = (world.want[0], *got[1:])  # another digit: of a record, which nothing reads
        if got == world.want:
            tally.survived(f"{what} damaged")
        else:
            assert before
            tally.lost(f"{what} damaged", f"{where}: other numbers")


def test_an_export_is_of_the_numbers_that_were_saved_or_refused(world, tries, seed, tally):
    rng = random.Random(f"export {seed}")
    for _ in range(tries):
        world.restore(steps=6)
        files = [path for path in (world.run / "checkpoints/6").rglob("*") if path.is_file()]
        path, how = rng.choice(sorted(files)), rng.choice(WAYS)
        damage(path, how, rng)
        where = f"{path.relative_to(world.folder)}: {how}"
        try:
            export.main(["export", f"--workdir={world.run}", f"--out={world.folder}/hf"])
        except UserError:
            assert not (world.folder / "hf").exists()
            tally.refused("checkpoint of an export damaged")
            continue
        except Exception as error:
            tally.lost("checkpoint of an export damaged", f"{where}: {error!r}")
        if files_result(world.folder / "hf") == world.exported:
            tally.survived("checkpoint of an export damaged")
        else:
            tally.lost("checkpoint of an export damaged", f"{where}: other numbers")
