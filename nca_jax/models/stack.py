"""One layer after the other: parameters stacked on an L axis, layers of one kind or of several.

A loop runs groups of a layer of each kind, so that a program is no larger than its kinds; the
layers that are left over, where their number is not a multiple, come after it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from nca_jax.model_config import LayerKind, ModelConfig
from nca_jax.models.attention.attend import Cache, Caches

# layer(kind, x, its parameters, its cache) -> (x, cache)
Layer = Callable[[LayerKind, jax.Array, Any, Cache | None], tuple[jax.Array, Cache | None]]


class Stack(NamedTuple):
    """Which layers are run by a loop.

    Attributes:
      kinds: of the layers of a group, in order.
      num_groups: 0: there is no loop.
      num_left: layers that are left over.
    """

    kinds: tuple[LayerKind, ...]
    num_groups: int
    num_left: int

    @classmethod
    def of(cls, config: ModelConfig, *, has_loop: bool) -> "Stack":
        num_groups = config.num_layers // len(config.kinds) if has_loop else 0
        num_left = config.num_layers - num_groups * len(config.kinds)
        return cls(config.kinds, num_groups, num_left)

    @property
    def cache_axes(self) -> tuple[tuple[int, ...], ...]:
        """The leading axes of each cache: one for each kind in the loop, then one for each left."""
        in_loop = [(self.num_groups,)] * len(self.kinds) if self.num_groups else []
        return (*in_loop, *[()] * self.num_left)

    def run(
        self,
        in_loop: Layer,
        left: Layer,
        x: jax.Array,
        params: Any,
        caches: Caches,
        *,
        unroll: bool,
    ) -> tuple[jax.Array, Caches]:
        """Returns x after all layers, and the caches as they are then.

        Args:
          in_loop, left: a layer of the loop, and one that is left over.
          params: [L, ...] each.
          caches: one for each of `cache_axes`.
          unroll: unrolls the loop, whose gradients are stacked in place all the same.
        """
        period = len(self.kinds)
        num_looped = self.num_groups * period

        def group(x, params_and_caches):
            params, caches = params_and_caches
            after = []
            for j, kind in enumerate(self.kinds):
                of_layer = params if period == 1 else jax.tree.map(lambda p, j=j: p[j], params)
                x, cache = in_loop(kind, x, of_layer, caches[j])
                after.append(cache)
            return x, tuple(after)

        def by_group(p: jax.Array) -> jax.Array:  # a copy, where layers are left over
            return p[:num_looped].reshape(self.num_groups, period, *p.shape[1:])

        looped: Caches = ()
        if self.num_groups:
            groups = params if period == 1 else jax.tree.map(by_group, params)
            times = self.num_groups if unroll else 1
            x, looped = jax.lax.scan(group, x, (groups, caches[:period]), unroll=times)
        after = []
        for i, cache in enumerate(caches[len(looped) :]):
            of_layer = jax.tree.map(lambda p, i=i: p[num_looped + i], params)
            x, cache = left(self.kinds[i % period], x, of_layer, cache)
            after.append(cache)
        return x, (*looped, *after)
