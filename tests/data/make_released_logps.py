"""Makes released_logps.json: what PyTorch gives where an eos inside the text is no key.

Run:   python tests/data/make_released_logps.py, with transformers and torch==2.13.0 installed.

tiny_mistral scores random rows, one sequence a response, in float32 with eager attention. As in the
PyTorch release, attention_mask is 0 at every eos but a response's last token, at the padding too,
and positions are 0, 1, 2, ... The rows have an eos at the start, inside and at the end of prompts,
two in a row, and inside responses.
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

DATA = Path(__file__).parent
EOS = 2
# Lengths of a prompt and its responses, and where an eos is put in each.
ROWS = [
    (([7], [3]), ([9], [4]), ([5], []), ([12], [0, 6])),
    (([20], [0, 8]), ([1], []), ([15], [3, 4]), ([30], [28])),
    (([5], [4]), ([6], [1]), ([11], [2, 9]), ([2], [])),
    (([33], [11, 12, 30]), ([25], [5]), ([8], []), ([17], [0])),
    (([1], []), ([14], [6]), ([3], []), ([22], [10, 20])),
    (([12], []), ([10], []), ([19], []), ([4], [])),
]


def draw(segment, generator: torch.Generator) -> list[int]:
    (length,), eos_at = segment
    ids = torch.randint(3, 257, (length,), generator=generator)
    ids[eos_at] = EOS
    return ids.tolist()


def logps(model, prompt: list[int], responses: list[list[int]]) -> list[list[float]]:
    """Returns the log-probability of every response token, nats."""
    length = len(prompt) + max(map(len, responses))
    ids = torch.full((len(responses), length), EOS)
    mask = torch.zeros_like(ids)
    for k, response in enumerate(responses):
        end = len(prompt) + len(response)
        ids[k, :end] = torch.tensor(prompt + response)
        mask[k, :end] = ids[k, :end] != EOS
        mask[k, end - 1] = 1
    positions = torch.arange(length).expand_as(ids)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
    all_logps = logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    first = len(prompt) - 1
    return [all_logps[k, first : first + len(y)].tolist() for k, y in enumerate(responses)]


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(
        DATA / "tiny_mistral", attn_implementation="eager", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row in ROWS:
        prompt, *responses = (draw(segment, generator) for segment in row)
        responses = [[*ids, EOS] for ids in responses]  # the appended eos
        rows.append(
            {
                "prompt_ids": prompt,
                "response_ids": responses,
                "scores": [3.0, 2.0, 1.0][: len(responses)],
                "logps": [[round(x, 6) for x in y] for y in logps(model, prompt, responses)],
            }
        )
    (DATA / "released_logps.json").write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
