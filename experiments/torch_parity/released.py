"""The released PyTorch computation (thu-ml/Noise-Contrastive-Alignment), in our own words.

A Hugging Face model over padded rows, one prompt a micro-batch; full logits in float32, log-softmax
over the vocabulary at every position; the frozen reference runs again in every step, of adapters
their base; AdamW, linear warmup, cosine to 0, gradients clipped by their norm. It is what nca_jax
is compared with, in numbers here and in speed in experiments/speed, so it is kept plain and nothing
in it is tuned.

Axes:  B prompts in a step, K responses a prompt, T tokens of the longest response with its prompt.
Units: nats, summed over the tokens of a response.
"""

import copy
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, PreTrainedModel

IGNORED = -100  # the label of a token that is not scored


class Row(NamedTuple):
    """A prompt with its responses, best first."""

    prompt_ids: list[int]
    response_ids: list[list[int]]
    scores: list[float]


class Settings(NamedTuple):
    """What a run of the released trainer is told; AdamW is (0.9, 0.999, 1e-8) without decay."""

    loss: str = "nca"  # of SCORED_LOSSES or PAIR_LOSSES
    alpha: float = 1e-4  # the temperature of the scores; no loss of pairs reads it
    beta: float = 0.1
    lr: float = 1e-3
    steps: int = 30
    batch_size: int = 4  # B
    warmup_frac: float = 0.1
    clip_norm: float = 1.0
    first_bonus: float = 0.01  # added to the score of each row's first response
    eos_id: int | None = None  # is no key, except where it ends a response; None: every token is
    adapter: Path | None = None  # a PEFT folder, which is trained; None: every weight is
    device: str = "cpu"
    dtype: str = "float32"  # of the weights that are read


class State(NamedTuple):
    """The policy, its frozen copy, and what moves the policy."""

    policy: PreTrainedModel
    reference: PreTrainedModel | None  # None: the policy with its adapters off
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR


def read_records(path: Path, k: int) -> list[Row]:
    """Returns the rows of a file of token ids, each with its first k responses."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [Row(r["prompt_ids"], r["response_ids"][:k], r["scores"][:k]) for r in rows]


def batches(rows: Sequence[Row], batch_size: int) -> Iterator[list[Row]]:
    """Iterates without end over batches in file order, again from the start after the last row."""
    at = 0
    while True:
        yield [rows[(at + i) % len(rows)] for i in range(batch_size)]
        at += batch_size


# Losses: [B, K] implicit rewards and targets -> one value


def targets(scores: torch.Tensor, settings: Settings) -> torch.Tensor:
    """p = softmax(scores / alpha) after the bonus of the first response, [B, K]."""
    bonus = torch.zeros_like(scores)
    bonus[:, 0] = settings.first_bonus
    return torch.softmax((scores + bonus) / settings.alpha, dim=-1)


def nca(rewards: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return -(p * logsigmoid(rewards)).sum(-1).mean() - logsigmoid(-rewards).mean()


def infonca(rewards: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return -(p * torch.log_softmax(rewards, dim=-1)).sum(-1).mean()


SCORED_LOSSES = {"nca": nca, "infonca": infonca}


# Losses of pairs: [B] implicit rewards of the chosen and of the rejected -> one value


def dpo(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return -logsigmoid(chosen - rejected).mean()


def pairwise_nca(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    noise = 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))
    return -(logsigmoid(chosen) + noise).mean()


def biased_nca(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return -(logsigmoid(chosen) + logsigmoid(-rejected)).mean()


PAIR_LOSSES = {"dpo": dpo, "pairwise_nca": pairwise_nca, "biased_nca": biased_nca}


def loss_of(rewards: torch.Tensor, scores: torch.Tensor, settings: Settings) -> torch.Tensor:
    """The loss of [B, K] implicit rewards; a loss of pairs takes the first response as chosen."""
    if settings.loss in PAIR_LOSSES:
        return PAIR_LOSSES[settings.loss](*rewards.unbind(-1))
    return SCORED_LOSSES[settings.loss](rewards, targets(scores, settings))


# Log-probabilities


def padded(row: Row, eos_id: int | None) -> dict[str, torch.Tensor]:
    """Returns the K rows [K, T] of one prompt, filled up at the right to the longest."""
    length = len(row.prompt_ids) + max(map(len, row.response_ids))
    shape = (len(row.response_ids), length)
    tokens = torch.zeros(shape, dtype=torch.long)
    attended = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for k, response in enumerate(row.response_ids):
        ids = torch.tensor(row.prompt_ids + response)
        tokens[k, : len(ids)] = ids
        attended[k, : len(ids)] = 1 if eos_id is None else ids != eos_id
        attended[k, len(ids) - 1] = 1
        labels[k, len(row.prompt_ids) : len(ids)] = ids[len(row.prompt_ids) :]
    return {"tokens": tokens, "attended": attended, "labels": labels}


def response_logps(model: PreTrainedModel, row: Row, eos_id: int | None) -> torch.Tensor:
    """log pi(y|x) of each response, [K] float32."""
    inputs = {name: x.to(model.device) for name, x in padded(row, eos_id).items()}
    output = model(inputs["tokens"], attention_mask=inputs["attended"], use_cache=False)
    all_logps = torch.log_softmax(output.logits[:, :-1].float(), dim=-1)  # [K, T - 1, V]
    labels = inputs["labels"][:, 1:]
    scored = labels != IGNORED
    picked = all_logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(scored, picked, 0.0).sum(-1)


# The step


def start(model_dir: Path, settings: Settings) -> State:
    """Returns the state before the first step: policy and reference hold the same weights."""
    # A model with dropout has it off, for the reference has none either.
    dtype = getattr(torch, settings.dtype)
    policy = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(settings.device).eval()
    if settings.adapter:
        import peft

        policy = peft.PeftModel.from_pretrained(policy, settings.adapter, is_trainable=True).eval()
        reference = None
    else:
        reference = copy.deepcopy(policy).requires_grad_(False)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    warmup = math.ceil(settings.warmup_frac * settings.steps)

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(warmup, 1)
        progress = (step - warmup) / max(settings.steps - warmup, 1)
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))

    return State(policy, reference, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor))


@torch.no_grad()
def reference_logps(state: State, row: Row, settings: Settings) -> torch.Tensor:
    """`response_logps` of the reference."""
    if state.reference is not None:
        return response_logps(state.reference, row, settings.eos_id)
    with state.policy.disable_adapter():
        return response_logps(state.policy, row, settings.eos_id)


def gradients(
    state: State, rows: Sequence[Row], settings: Settings, *, autocast: bool = False
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Leaves the gradient of the mean loss in the policy; one prompt a micro-batch.

    Args:
      autocast: matmuls in bfloat16, weights and losses in float32.
    Returns:
      (loss, logps [B, K], ref_logps [B, K]).
    """
    state.optimizer.zero_grad()
    total, logps, ref_logps = 0.0, [], []
    for row in rows:
        with torch.autocast(settings.device, dtype=torch.bfloat16, enabled=autocast):
            row_logps = response_logps(state.policy, row, settings.eos_id)
            row_ref_logps = reference_logps(state, row, settings)
        rewards = settings.beta * (row_logps - row_ref_logps)
        scores = torch.tensor([row.scores], device=rewards.device)
        loss = loss_of(rewards[None], scores, settings)
        (loss / len(rows)).backward()
        total += loss.item() / len(rows)
        logps.append(row_logps.detach())
        ref_logps.append(row_ref_logps)
    return total, torch.stack(logps), torch.stack(ref_logps)


def update(state: State, settings: Settings) -> float:
    """Clips, moves the policy and the schedule; returns the gradient's norm before clipping."""
    clip = settings.clip_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(state.policy.parameters(), clip).item()
    state.optimizer.step()
    state.schedule.step()
    return norm


def train(model_dir: Path, rows: Sequence[Row], settings: Settings) -> dict:
    """Runs the released trainer.

    Returns:
      {"log": one entry a step, named as nca_jax names its metrics,
       "final_logps": [B, K] of the last batch after the last update}.
    """
    state = start(model_dir, settings)
    log, batch = [], []
    for step, batch in zip(range(settings.steps), batches(rows, settings.batch_size), strict=False):
        lr = state.schedule.get_last_lr()[0]
        loss, logps, ref_logps = gradients(state, batch, settings)
        grad_norm = update(state, settings)
        entry = {"step": step + 1, "loss": loss, "grad_norm": grad_norm, "lr": lr}
        log.append(entry | metrics(logps, ref_logps, settings.beta))
    with torch.no_grad():
        final = [response_logps(state.policy, row, settings.eos_id) for row in batch]
    return {"log": log, "final_logps": torch.stack(final).tolist()}


def metrics(logps: torch.Tensor, ref_logps: torch.Tensor, beta: float) -> dict[str, float]:
    """Means over prompts of [B, K] log-probabilities; slot 0 is the best response."""
    rewards = beta * (logps - ref_logps)
    beaten = (rewards[:, :1] > rewards[:, 1:]).float().mean()
    values = {"accuracy": beaten, "margin": (rewards[:, 0] - rewards[:, 1:].mean(-1)).mean()}
    values |= {f"logps/{k}": logps[:, k].mean() for k in range(logps.shape[1])}
    values |= {f"rewards/{k}": rewards[:, k].mean() for k in range(logps.shape[1])}
    return {name: value.item() for name, value in values.items()}
