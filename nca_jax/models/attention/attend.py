"""What every kind of attention is: a function that a layer calls with its queries, keys, values."""

from collections.abc import Callable, Mapping

import jax

NEVER = -1e30  # finite: a query without a key gives exp(NEVER - NEVER), never nan
# Names of what the backward pass may keep of a layer, see `decoder.REMAT`.
KEPT = "kept"  # products
ATTENDED = "attended"  # the output of attention and its log-sum: without them it runs again

# Keys and values, of one layer or stacked of all, [L, ...]; sampling alone has them.
Cache = dict[str, jax.Array]

# attend(q [R, T, N, H], k [R, T, G, H], v [R, T, G, H], cache) -> (out [R, T, N, H], what is kept)
# `cache` is read alone. What is kept is of the tokens at hand; None: nothing.
Attend = Callable[[jax.Array, jax.Array, jax.Array, Cache | None], tuple[jax.Array, Cache | None]]
Attends = Mapping[int, Attend]  # of each of `ModelConfig.windows`
