r"""A second judge of sentiment, which no policy was trained on: ridge regression on human ratings.

As a scorer (see nca_jax.score), reading and writing JSON lines:

    --scorer="command:python -m experiments.claims.judge"

The ratings are means of 20 people in [-4, 4], of 23,703 snippets of film reviews, product reviews,
editorials and tweets, which come with the source of the package vaderSentiment (MIT; Hutto and
Gilbert 2014). A text is its TF-IDF over single words; VADER's word list plays no part. How
judge.json was made:

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    tar xzf vaderSentiment-3.3.2.tar.gz
    tar xzf vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz
    python -m experiments.claims.judge --fit=hutto_ICWSM_2014
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

WEIGHTS = Path(__file__).with_name("judge.json")
MIN_TEXTS = 8  # that a word must be in to be known
RIDGE = 2.0  # picked on tweets and editorials alone, never on reviews of films
HELD_OUT = 5  # every fifth snippet tells how good the fit is; the weights come from all of them
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def features(text: str, idf: dict[str, float]) -> dict[str, float]:
    """Returns the TF-IDF of the words that are known, of unit length; {} where none is."""
    counts = Counter(word for word in words(text) if word in idf)
    values = {word: count * idf[word] for word, count in counts.items()}
    norm = sum(x * x for x in values.values()) ** 0.5
    return {word: x / norm for word, x in values.items()}


def score(text: str, weights: dict) -> float:
    """Returns the rating that people would give a text, by these weights, in about [-4, 4]."""
    known = features(text, weights["idf"])
    return weights["bias"] + sum(x * weights["word"][word] for word, x in known.items())


def fit(texts: Sequence[str], ratings: np.ndarray, ridge: float = RIDGE) -> dict:
    """Returns {"bias", "idf" and "word" by word}, of the least squares with a ridge."""
    found = Counter(word for text in texts for word in set(words(text)))
    known = sorted(word for word, count in found.items() if count >= MIN_TEXTS)
    idf = {word: float(np.log(len(texts) / found[word])) + 1 for word in known}
    column = {word: i for i, word in enumerate(known)}
    bias = float(np.mean(ratings))
    gram, moment = ridge * np.eye(len(known)), np.zeros(len(known))
    for first in range(0, len(texts), 2048):
        block = np.zeros((len(texts[first : first + 2048]), len(known)))
        for row, text in zip(block, texts[first : first + 2048], strict=True):
            for word, x in features(text, idf).items():
                row[column[word]] = x
        gram += block.T @ block
        moment += block.T @ (ratings[first : first + 2048] - bias)
    weights = np.linalg.solve(gram, moment)
    return {
        "bias": round(bias, 4),
        "idf": {word: round(x, 3) for word, x in idf.items()},
        "word": {word: round(float(weights[column[word]]), 3) for word in known},
    }


def read_ratings(folder: Path) -> dict[str, list[tuple[str, float]]]:
    """Returns {source: [(text, mean rating)]} of the ground truth files."""
    return {
        path.name.removesuffix("_GroundTruth.txt"): [
            (text, float(rating))
            for _, rating, text in (
                line.split("\t", 2) for line in path.read_text(encoding="latin-1").splitlines()
            )
        ]
        for path in sorted(folder.glob("*_GroundTruth.txt"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", type=Path, help="folder of *_GroundTruth.txt; writes judge.json")
    args = parser.parse_args()
    if not args.fit:
        weights = json.loads(WEIGHTS.read_text())
        for line in sys.stdin:
            print(json.dumps({"score": round(score(json.loads(line)["response"], weights), 4)}))
        return
    rated = read_ratings(args.fit)
    training = [x for of in rated.values() for i, x in enumerate(of) if i % HELD_OUT]
    learned = fit([text for text, _ in training], np.array([x for _, x in training]))
    for source, of_source in rated.items():
        heldout = of_source[::HELD_OUT]
        got = [score(text, learned) for text, _ in heldout]
        pearson = np.corrcoef(got, [x for _, x in heldout])[0, 1]
        print(f"{source}: {len(heldout)} held-out snippets, Pearson {pearson:.3f}")
    everything = [x for of in rated.values() for x in of]
    final = fit([text for text, _ in everything], np.array([x for _, x in everything]))
    WEIGHTS.write_text(json.dumps(final, separators=(",", ":")) + "\n")
    print(f"{len(everything)} texts, {len(final['word'])} words in {WEIGHTS}")


if __name__ == "__main__":
    main()
