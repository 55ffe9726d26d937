"""Tasks of lm-eval as their files are, over documents that are made here: nothing is fetched."""

import json
import random
from collections.abc import Mapping
from pathlib import Path

WORDS = "sun moon river stone cloud ember wind salt glass iron".split()
STOPS = "generation_kwargs:\n  until: {until}\n  max_gen_toks: {tokens}\n"
# {name: (file of lm-eval, split that is asked)}
TASKS = {
    "made_arithmetic": ("arithmetic/arithmetic_1dc.yaml", "validation"),
    "made_choices": ("arc/arc_easy.yaml", "test"),
    "made_answers": ("gsm8k/gsm8k.yaml", "test"),
    "made_text": ("wikitext/wikitext.yaml", "test"),
}


def write_tasks(
    folder: Path,
    counts: Mapping[str, int],
    *,
    fewshot: int,
    until: list[str],
    tokens: int,
    words: int,
) -> None:
    """Writes the YAML and the documents of `TASKS` into a folder, for --include_path.

    Args:
      counts: {name: documents}.
      fewshot: examples before a question that has choices or an answer.
      until, tokens: what ends an answer.
      words: of the longest text.
    """
    import lm_eval

    theirs = Path(lm_eval.__file__).parent / "tasks"
    folder.mkdir(parents=True)
    for name, (file, split) in TASKS.items():
        documents = _documents(name, counts[name], words)
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
        lines = [f"include: {theirs / file}", f"task: {name}", "tag: null"]
        lines += ["dataset_path: json", "dataset_name: null", "dataset_kwargs:", "  data_files:"]
        lines += [f"    {x}: {path}" for x in sorted({split, "train", "validation"})]
        if name in ("made_choices", "made_answers"):
            lines += [f"num_fewshot: {fewshot}", "fewshot_split: train"]
        text = "\n".join(lines) + "\n"
        if name == "made_answers":
            text += STOPS.format(until=json.dumps(until), tokens=tokens)
        (folder / f"{name}.yaml").write_text(text)


def _documents(name: str, count: int, words: int) -> list[dict]:
    draw = random.Random(name)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    def one(i: int) -> dict:
        match name:
            case "made_arithmetic":  # several ends of one context, most of them wrong
                end = (f" {3 * (i // 5)}", " ", "\n", "s", f" {i}")[i % 5]
                return {"context": f"Question: What is {i // 5} * 3?\nAnswer:", "completion": end}
            case "made_choices":
                choices = {"text": [text(1, 8) for _ in range(4)], "label": list("ABCD")}
                return {"id": str(i), "question": text(5, 30), "choices": choices} | {
                    "answerKey": "ABCD"[i % 4]
                }
            case "made_answers":
                return {"question": text(5, 20), "answer": f"{text(2, 8)} #### {i}"}
        return {"page": text(1, words)}

    return [one(i) for i in range(count)]
