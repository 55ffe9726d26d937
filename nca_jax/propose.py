"""What `inspect` proposes before anything is trained: rows, a batch, and the memory they take."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nca_jax import auto
from nca_jax.advice import BEST, alpha_for, chosen_scores, plural, some_scores
from nca_jax.build import Run, adapters_of
from nca_jax.chips import CHIPS
from nca_jax.data.room import row_sizes
from nca_jax.data.table import Table
from nca_jax.infra.mesh import host_mesh
from nca_jax.infra.progress import num_values
from nca_jax.logprobs import PIECE
from nca_jax.losses import LOSSES
from nca_jax.model_config import ModelConfig
from nca_jax.models.decoder import Model
from nca_jax.models.formats.names import param_shapes
from nca_jax.params import abstract_base, reference_init_from, usual_dtype

STEPS = 20  # of a pass over the data, at least, where a batch is proposed
BATCHES = (4, 32)  # the least and the most prompts of a batch that is proposed
GIB = 2**30
PROCESS = 0.5  # GiB of Python and its libraries, which share the memory of a CPU
# Of the products of a layer, how many times over exist: in the layer that the backward pass is at,
# and in every layer. Read from the compiler's totals in experiments/pods/table.md.
NOW = 1.8
KEPT = {"none": 3.4, "dots": 1.0, "attention": 0.1, "full": 0.0, "host": 0.0}
PLACES = (("cpu", 1), ("gpu", 1), ("gpu", 8), ("tpu", 1), ("tpu", 8))
CHOSEN = {  # of a record's responses, by config.data.choose
    "all": "",
    "first": ", the first of their record",
    "random": ", drawn at random",
    "best_worst_random": ": the best, the worst and others at random",
}


def what_a_step_sees(run: Run, num_micro: int, examples: Table) -> str:
    """Returns in words what a step is made of.

    Args:
      num_micro: micro-batches of the step that is shown.
      examples: those of training.
    """
    data, k = run.config.data, run.config.data.num_responses
    up_to = "up to " if examples.entries["count"].min() < k else ""
    choice = CHOSEN[data.choose] if examples.entries["count"].max() > k else ""
    rows = plural(num_micro * data.rows, "row")
    return (
        f"each step sees {plural(data.batch_size, 'prompt')} with {up_to}{k} responses each"
        f"{choice}. Step 1 takes {rows} of {data.row_len} tokens, {data.rows} at a time"
    )


def proposals(run: Run, examples: Table) -> list[str]:
    """Returns a line for the length of rows, one for the batch and one for alpha, each with why."""
    data, n = run.config.data, len(examples)
    least, most = BATCHES
    batch = min(most, n, max(least, 2 ** int(math.log2(max(1, n / STEPS)))))
    sizes = row_sizes(examples, data)
    row_len = auto.row_len_for(sizes, data, multiple=math.lcm(data.block, auto.ROUND))
    return [
        f"config.data.row_len={row_len}{_now(row_len, data.row_len)}: the longest prompt with its "
        f"responses takes {max(sizes)} tokens, the mean one {sum(sizes) / n:.0f}",
        f"config.data.batch_size={batch}{_now(batch, data.batch_size)}: "
        f"{plural(n // batch, 'step')} in a pass over {plural(n, 'prompt')}",
        *_alpha(run.config, examples),
    ]


def _alpha(config: ConfigDict, examples: Table) -> list[str]:
    """Returns a line for the temperature of the scores, where the loss has one and there is one."""
    chosen = chosen_scores(some_scores(examples), config)
    differing = [scores for scores in chosen if np.ptp(scores) > 0]
    if not LOSSES[config.loss.name].soft_labels or not differing:
        return []
    alpha = alpha_for(differing)
    if alpha is None:
        return []
    return [
        f"config.loss.alpha={alpha:.2g} (now {config.loss.alpha:g}): the best response then has a "
        f"target of {BEST} on average"
    ]


def _now(proposed: int, now: int) -> str:
    return "" if proposed == now else f" (now {now})"


def memory(asked: ConfigDict, run: Run, sizes: Sequence[int]) -> list[str]:
    """Returns a line for each kind and number of devices: GiB of a training step, estimated.

    Args:
      asked: the config before anything was chosen, which is chosen for each of the devices.
      sizes: as in `auto.choose`.
    """
    lines = []
    for platform, devices in PLACES:
        config = auto.choose(
            asked, run.model.config, platform=platform, shards=devices, sizes=sizes
        )
        gib = memory_gib(config, run.model.config, devices)
        gib += PROCESS if platform == "cpu" else 0
        fits = [chip.name for chip in CHIPS.values() if gib <= chip.memory_gib]
        where = f"; fits {', '.join(fits) or 'none of them'}" if platform == "tpu" else ""
        kind = plural(devices, platform.upper())
        of_model = config.model
        lines.append(
            f"{kind:7s} {gib:7.1f} GiB each ({of_model.dtype}, remat {of_model.remat}{where})"
        )
    return lines


def memory_gib(config: ConfigDict, model: ModelConfig, devices: int) -> float:
    """Returns the GiB of a training step on each of the devices that share its parameters.

    docs/scaling.md has the formula: state and gradients; what is gathered of parameters that are
    split, a layer and a piece of the head, and that piece's gradient with the sum of it over
    devices; activations of a device's rows; and a chunk of logits with its gradient. The base of
    adapters has no gradient and no moments, and its head is gathered whole.
    """
    m, data = model, config.data
    num_params = sum(math.prod(shape) for shape in param_shapes(m).values())
    head = m.padded_vocab * m.width
    outside = head * (1 if m.tied_head else 2)  # the embedding and the head
    size = 2 if config.model.dtype == "bfloat16" else 4  # bytes of an activation
    moment = 2 if config.optim.mu_dtype == "bfloat16" else 4
    reference = 0
    if config.reference.kind == "live":
        reference = jnp.dtype(usual_dtype(reference_init_from(config))).itemsize
    moments = 0 if config.optim.moments == "host" else moment + 4
    columns = min(m.padded_vocab, PIECE) if devices > 1 else m.padded_vocab
    of_head = 8  # bytes of a gradient and its sum
    # Parameters, moments, the sum of gradients; layers cast. A TPU holds one layer of these at a
    # time: there they stand for what the rest leaves out.
    state = num_params * (4 + moments + 4 + reference + (2 if size == 2 else 0))
    run = Run(config, host_mesh(), Model(m, adapters_of(config, m)), None)
    if (base := abstract_base(run)) is not None:
        state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(base))
        state += num_values(run.model.abstract_trained()) * (8 + moments)
        columns, of_head = m.padded_vocab, 0
    a_layer = (num_params - outside) / m.num_layers
    gathered = a_layer * size + columns * m.width * (size + of_head) if devices > 1 else 0
    mlp = 2 * m.mlp_width * (m.experts_per_token or 1)
    products = 2 * m.head_dim * (m.num_heads + m.num_kv_heads) + mlp  # q, k, v, attention, MLP
    inputs = 0 if config.model.remat == "host" else m.width
    kept = m.num_layers * (inputs + KEPT[config.model.remat] * products)
    rows = math.ceil(data.rows / devices)
    tokens = rows * data.row_len * size * (kept + NOW * products)
    logits = rows * config.loss.logits_chunk * columns * 3 * 4
    return (state / devices + gathered + tokens + logits) / GIB
