"""Writes the demo's prompts: openings of movie reviews, all of our own writing.

    python experiments/demo/make_prompts.py > prompts.jsonl

Every film meets every opening once in a fixed order; every third pair is kept. The demo's rows are
then samples of the model itself, scored:

    python -m nca_jax.generate --config=configs/demo.py --config.generate.num_samples=4 \
        --prompts=prompts.jsonl --out=experiments/demo/rows.jsonl
"""

import itertools
import json

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
    pairs = itertools.product(enumerate(FILMS), enumerate(OPENINGS))
    for (i, film), (j, opening) in pairs:
        if (i + j) % 3 < 2:
            print(json.dumps({"prompt": REQUEST.format(film=film, opening=opening)}))


if __name__ == "__main__":
    main()
