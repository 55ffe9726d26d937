"""The optimizer: AdamW, its learning rate by step, clipping by the global norm."""

import math
import re

import jax
import jax.numpy as jnp
import optax

from nca_jax.axes import Params, flatten_paths, nest_paths
from nca_jax.checks import UserError
from nca_jax.protocols import OptimSection


def make_schedule(optim: OptimSection, num_steps: int) -> optax.Schedule:
    """Returns the learning rate by the number of updates done, from 0 to num_steps - 1.

    A linear warmup over W = ceil(warmup_frac * num_steps) updates, of which the first has lr / W
    (warmup_from "share") or 0 ("zero", as released); what follows begins at lr and, unless it is
    constant, would be 0 at num_steps. wsd is constant until its last ceil(decay_frac * num_steps)
    updates, and linear in them.
    """
    lr, warmup = optim.lr, math.ceil(optim.warmup_frac * num_steps)
    if optim.warmup_from == "share":
        rise = optax.linear_schedule(lr / max(warmup, 1), lr, max(warmup - 1, 1))
    else:
        rise = optax.linear_schedule(0.0, lr, max(warmup, 1))
    left = max(num_steps - warmup, 1)
    fall = min(math.ceil(optim.decay_frac * num_steps), left)
    after = {
        "constant": optax.constant_schedule(lr),
        "linear": optax.linear_schedule(lr, 0.0, left),
        "cosine": optax.cosine_decay_schedule(lr, left),
        "wsd": optax.linear_schedule(lr, 0.0, max(fall, 1), transition_begin=left - fall),
    }
    return optax.join_schedules([rise, after[optim.schedule]], [warmup])


def make_optimizer(
    optim: OptimSection, schedule: optax.Schedule, *, b_lr_ratio: float = 1.0
) -> optax.GradientTransformation:
    """Clip, then AdamW with the first moment in `mu_dtype`; decay spares norms and biases.

    Of adapters it is of a and b, and spares the norms m. `init` takes all parameters, and `update`
    knows those that are trained: see `split_trained`.

    Args:
      b_lr_ratio: the learning rate of b, and so its decay, over that of all others (LoRA+).
    """

    def decayed(params):
        is_matrix = ("kernel", "table", "a", "b")
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in is_matrix, params)

    clip = [optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm else []

    def faster(updates, params=None):
        def one(path, x):
            return b_lr_ratio * x if path[-1].key == "b" else x

        return jax.tree_util.tree_map_with_path(one, updates)

    tx = optax.chain(
        *clip,
        scale_by_adam(optim.b1, optim.b2, optim.eps, mu_dtype=optim.mu_dtype),
        optax.add_decayed_weights(optim.weight_decay, decayed),
        optax.scale_by_learning_rate(schedule),
        *([optax.stateless(faster)] if b_lr_ratio != 1 else []),
    )
    return optax.GradientTransformation(
        lambda params: tx.init(split_trained(params, optim.freeze)[0]), tx.update
    )


def split_trained(params: Params, freeze: str) -> tuple[Params, Params]:
    """Returns (what is trained, what is not): `freeze` is found in the paths of the latter.

    Args:
      freeze: a regular expression; "": all are trained.
    Raises:
      UserError: it is found in no path, or in all.
    """
    flat = flatten_paths(params)
    frozen = {path: x for path, x in flat.items() if freeze and re.search(freeze, path)}
    if freeze and len(frozen) in (0, len(flat)):
        raise UserError(
            f"config.optim.freeze={freeze!r} is found in {'all' if frozen else 'none'} of the "
            f"parameters, and must be found in some: {', '.join(flat)}."
        )
    trained = {path: x for path, x in flat.items() if path not in frozen}
    return nest_paths(trained), nest_paths(frozen)


def merge_trained(trained: Params, frozen: Params) -> Params:
    """Returns what `split_trained` was given."""
    return nest_paths(flatten_paths(trained) | flatten_paths(frozen))


def scale_by_adam(
    b1: float, b2: float, eps: float, *, mu_dtype: str
) -> optax.GradientTransformation:
    """optax.scale_by_adam with its bias corrections, 1 - b^t, exact in float32.

    As powers of a float32 b they are 1.3e-5 off at b = 0.999 and t = 1, which is a part in 150,000
    of the first update; PyTorch's are of float64.
    """

    def correction(b: float, t: jax.Array) -> jax.Array:
        return -jnp.expm1(t * (math.log(b) if b else -math.inf))

    def update(grads, state: optax.ScaleByAdamState, params=None):
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        t = count.astype(jnp.float32)

        def scaled(m, v):
            return m / correction(b1, t) / (jnp.sqrt(v / correction(b2, t)) + eps)

        updates = jax.tree.map(scaled, mu, nu)
        mu = optax.tree.cast(mu, mu_dtype)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    init = optax.scale_by_adam(mu_dtype=mu_dtype).init
    return optax.GradientTransformation(init, update)
