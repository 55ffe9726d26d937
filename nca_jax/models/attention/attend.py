"""What every kind of attention is: a function that a layer calls with its queries, keys, values."""

from collections.abc import Callable, Mapping

import jax

NEVER = -1e30  # finite: a query without a key gives exp(NEVER - NEVER), never nan
# Names of what the backward pass may keep of a layer, see `decoder.REMAT`.
KEPT = "kept"  # products
ATTENDED = "attended"  # the output of attention and its log-sum: without them it runs again

Cache = dict[str, jax.Array]  # keys and values of one layer; only decoding has one
Caches = Cache | tuple[Cache, ...]  # of all layers: stacked, [L, ...], or one each

# attend(q [R, T, N, H], k [R, T, G, H], v [R, T, G, H], cache) -> (out [R, T, N, H], cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Cache | None], tuple[jax.Array, Cache | None]]
Attends = Mapping[int, Attend]  # of each of `ModelConfig.windows`
