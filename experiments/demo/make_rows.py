"""Makes the demo's rows: openings of film reviews, answered and scored by the project itself.

    python experiments/demo/make_rows.py --out=experiments/demo/rows.jsonl

The openings are of our own writing: every film meets every opening, and two of three pairs are
kept. SmolLM2-135M-Instruct answers each one K = 4 times; VADER's sentiment is the score.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILMS = (
    "a slow drama about two lighthouse keepers",
    "a heist comedy set in a cheese factory",
    "a science fiction film about the last radio station",
    "a documentary on competitive beekeeping",
    "a western in which nobody fires a gun",
    "a musical about tax inspectors",
    "a horror film in an empty swimming pool",
    "a romance between two rival bakers",
    "a war film told by a field cook",
    "an animated film about a homesick glacier",
    "a courtroom thriller with a deaf judge",
    "a biopic of a forgotten chess champion",
    "a road movie with three grandmothers",
    "a superhero film without any villain",
    "a silent film about a noisy street",
    "a detective story on a night train",
    "a family film about a stolen circus horse",
    "a disaster film in a small library",
    "a sports film about underwater hockey",
    "a spy film set at a pottery class",
    "a fantasy film about a town of clockmakers",
    "a student film shot on a single roof",
    "a sequel to a film about haunted lifts",
    "a remake of an old island adventure",
    "a political satire in a zoo",
    "a coming-of-age film on a fishing boat",
    "a mystery about a missing orchestra",
    "a space opera with a very small crew",
    "a kitchen drama during a heat wave",
    "a ghost story in a new apartment",
)
OPENINGS = (
    "I went in without expectations, and",
    "The first ten minutes made me think that",
    "My sister and I left the cinema saying that",
    "What stays with me a week later is that",
    "The lead actor plays the part as if",
    "By the time the credits rolled,",
    "The music and the pictures together",
    "Critics have argued about it, but to me",
    "The script has one big idea:",
    "When the story finally turns,",
    "Compared with the director's earlier work,",
    "If you only see one film this month,",
    "The middle of the film",
    "The ending, without giving it away,",
    "Everyone around me in the theatre",
    "For a film made with so little money,",
)
REQUEST = "Finish this review of {film} in one sentence: {opening}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out.absolute()
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": x}) + "\n" for x in make_prompts()))
        flags = ("--config=configs/sentiment.py", "--config.generate.num_samples=4")
        command = [sys.executable, "-m", "nca_jax.generate", *flags]
        subprocess.run([*command, f"--prompts={prompts}", f"--out={out}"], cwd=ROOT, check=True)


def make_prompts() -> list[str]:
    """Returns the 320 requests, in a fixed order."""
    pairs = itertools.product(enumerate(FILMS), enumerate(OPENINGS))
    return [
        REQUEST.format(film=film, opening=opening)
        for (i, film), (j, opening) in pairs
        if (i + j) % 3 < 2
    ]


if __name__ == "__main__":
    main()
