"""The optimizer: AdamW, warmup and cosine, clipping by the global norm."""

import math

import jax
import optax


def make_schedule(optim, num_steps: int) -> optax.Schedule:
    """Linear warmup from 0 over ceil(warmup_frac * steps), then cosine to 0 (or constant)."""
    warmup = math.ceil(optim.warmup_frac * num_steps)
    if optim.schedule == "constant":
        after = optax.constant_schedule(optim.lr)
    else:
        after = optax.cosine_decay_schedule(optim.lr, max(num_steps - warmup, 1))
    return optax.join_schedules(
        [optax.linear_schedule(0.0, optim.lr, max(warmup, 1)), after], [warmup]
    )


def make_optimizer(optim, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clip, then AdamW with the first moment in `mu_dtype`; decay spares norms and biases."""

    def decayed(params):
        is_matrix = ("kernel", "table")
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in is_matrix, params)

    adamw = optax.adamw(
        schedule,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mu_dtype=optim.mu_dtype,
        mask=decayed,
    )
    if not optim.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), adamw)
