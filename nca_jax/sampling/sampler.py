"""Sampling with a key-value cache, as pure functions to be jitted; `refill` calls them in turn.

Axes: N lanes, each with one prompt and its S samples, M prompts that come in at once, Q slots of
      them, P slots of a lane's prompt, T new tokens, V padded vocabulary, L layers.

The keys and values of a prompt are there once for its samples. Those of new tokens are a ring: the
token that step t of all lanes computes goes to slot t mod T in every lane, one slot in all layers,
whenever the lane began. A lane has T tokens at most, so it never writes over its own; what lies in
a slot from before the lane began is not looked at.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nca_jax.axes import ACTIVATION_RULES, ROWS, Params
from nca_jax.models.attention.attend import Cache
from nca_jax.models.decoder import Model
from nca_jax.sampling.draw import How, allowed, draw

BLOCK = 8  # tokens of each sample between two looks of the host


class Lanes(NamedTuple):
    """What is being sampled, on the devices. A free lane is one whose samples are done.

    Attributes:
      prompt: k [L, N, G, H, P] and v [L, N, G, P, H] of the prompts.
      new: k and v [L, N, S, G, T, H] of the new tokens, by ring slot.
      step: how many tokens all lanes have computed so far, [] int32.
      key_on: which slots of a prompt are attended to, [N, P] bool.
      lengths: tokens of a prompt, [N] int32.
      count: tokens that each sample of a lane has, were it not done, [N] int32.
      keys: random keys as numbers, [N, S, ...] uint32.
      tokens: of a sample, 0 from its end on, [N, S, T] int32.
      sizes: how many these are, the end-of-turn token included, [N, S] int32.
      done: it ended its turn, has T tokens or was ended, [N, S] bool.
      logps: log-probability of each token under the policy, nats, [N, S, T] float32; of untempered
        logits, none of them cut off. [N, S, 0] where nobody asks.
    """

    prompt: Cache
    new: Cache
    step: jax.Array
    key_on: jax.Array
    lengths: jax.Array
    count: jax.Array
    keys: jax.Array
    tokens: jax.Array
    sizes: jax.Array
    done: jax.Array
    logps: jax.Array


class Found(NamedTuple):
    """What the host looks at: see `Lanes`."""

    tokens: jax.Array
    sizes: jax.Array
    done: jax.Array
    logps: jax.Array


class Sampler(NamedTuple):
    """Sampling as four functions.

    Attributes:
      empty: `(num_lanes, width) -> lanes`, all free, of prompts of up to `width` tokens.
      resize: `(lanes, width) -> lanes`: the same with other slots for prompts. What is longer
        must be in no lane that is not done.
      prefill: `(params, lanes, prompts [M, Q], lengths [M], places [M], keys [M]) -> lanes`: puts
        prompts, padded on the right, in the lanes `places`, and draws the first token of each
        sample; where a place is N it does nothing. One random key a prompt: what is drawn for it
        depends on that, and not on what is computed beside it.
      decode: `(params, lanes, ended [N, S]) -> (lanes, found)`: up to BLOCK tokens more of each
        sample that is not done; those that `ended` says are done from the start.
    """

    empty: Callable[[int, int], Lanes]
    resize: Callable[[Lanes, int], Lanes]
    prefill: Callable[..., Lanes]
    decode: Callable[[Params, Lanes, jax.Array], tuple[Lanes, Found]]


def make_sampler(
    model: Model,
    *,
    num_samples: int,
    max_new_tokens: int,
    how: How,
    eos_ids: tuple[int, ...],
    key_off_ids: tuple[int, ...] = (),
    logps: bool = False,
) -> Sampler:
    """Returns the functions of `Sampler`.

    Args:
      num_samples, max_new_tokens: S and T.
      how: tokens are drawn.
      eos_ids: of these each ends a sample, and is a part of it.
      key_off_ids: nothing attends to these tokens of a prompt.
      logps: log-probabilities of the tokens are wanted.
    """
    c, ends, new = model.config, jnp.array(eos_ids, jnp.int32), jnp.arange(max_new_tokens)

    def empty(num_lanes: int, width: int) -> Lanes:
        n, s, t = num_lanes, num_samples, max_new_tokens
        of_key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape

        def zeros(*shape: int, dtype: jnp.dtype = model.dtype) -> jax.Array:
            return jnp.zeros((c.num_layers, *shape), dtype)

        def ints(*shape: int) -> jax.Array:
            return jnp.zeros(shape, jnp.int32)

        heads, size = c.num_kv_heads, c.head_dim
        return Lanes(
            prompt={"k": zeros(n, heads, size, width), "v": zeros(n, heads, width, size)},
            new={name: zeros(n, s, heads, t, size) for name in ("k", "v")},
            step=ints(),
            key_on=jnp.zeros((n, width), bool),
            lengths=ints(n) + 1,
            count=ints(n) + 1,
            keys=jnp.zeros((n, s, *of_key), jnp.uint32),
            tokens=ints(n, s, t),
            sizes=ints(n, s),
            done=jnp.ones((n, s), bool),
            logps=jnp.zeros((n, s, t if logps else 0), jnp.float32),
        )

    def resize(lanes: Lanes, width: int) -> Lanes:
        def one(x: jax.Array, axis: int) -> jax.Array:
            here = x.shape[axis]
            if width <= here:
                return jax.lax.slice_in_dim(x, 0, width, axis=axis)
            more = [(0, 0)] * x.ndim
            more[axis] = (0, width - here)
            return jnp.pad(x, more)

        prompt = {"k": one(lanes.prompt["k"], 4), "v": one(lanes.prompt["v"], 3)}
        return lanes._replace(prompt=prompt, key_on=one(lanes.key_on, 1))

    def prefill(
        params: Params,
        lanes: Lanes,
        prompts: jax.Array,
        lengths: jax.Array,
        places: jax.Array,
        keys: jax.Array,
    ) -> Lanes:
        num, width = prompts.shape
        slot = jnp.arange(width)[None]  # slot = position inside a prompt
        key_on = (slot < lengths[:, None]) & ~jnp.isin(prompts, jnp.array(key_off_ids, jnp.int32))
        distance = (slot[0, :, None] - slot)[None]
        attends = model.over_prompts((distance >= 0) & key_on[:, None], distance)
        hidden, kept = model.hidden(
            params,
            prompts,
            jnp.broadcast_to(slot, prompts.shape),
            attends,
            lengths=_most(lengths),
        )
        assert kept is not None
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [M, D]
        logits = model.logits(params, last)
        split = jax.vmap(lambda key: jax.random.split(key, num_samples))(keys)  # [M, S]
        may_come = jnp.repeat(allowed(logits, how), num_samples, axis=0)
        token = draw(may_come, _at_step(split.reshape(-1), jnp.int32(0)), how)
        token = token.reshape(num, num_samples)

        def put(x: jax.Array, value: jax.Array) -> jax.Array:
            return x.at[places].set(value.astype(x.dtype), mode="drop")

        def first(x: jax.Array, value: jax.Array) -> jax.Array:  # the others are 0
            rest = [(0, 0), (0, 0), (0, x.shape[2] - 1)]
            return put(x, jnp.pad(value[:, :, None], rest))

        prompt_k, prompt_v = lanes.prompt["k"], lanes.prompt["v"]
        of_all = (num, num_samples)
        found = lanes.logps
        if logps:
            found = first(found, _logps(logits, token))
        return lanes._replace(
            prompt={
                "k": prompt_k.at[:, places, :, :, :width].set(kept["k"], mode="drop"),
                "v": prompt_v.at[:, places, :, :width].set(kept["v"], mode="drop"),
            },
            key_on=put(lanes.key_on, jnp.pad(key_on, ((0, 0), (0, lanes.key_on.shape[1] - width)))),
            lengths=put(lanes.lengths, lengths),
            count=put(lanes.count, jnp.ones(num)),
            keys=put(lanes.keys, jax.random.key_data(split)),
            tokens=first(lanes.tokens, token),
            sizes=put(lanes.sizes, jnp.ones(of_all)),
            done=put(lanes.done, _ends(token) | (max_new_tokens == 1)),
            logps=found,
        )

    def decode(params: Params, lanes: Lanes, ended: jax.Array) -> tuple[Lanes, Found]:
        prompt = {f"prompt_{name}": x for name, x in lanes.prompt.items()}
        place = jnp.arange(lanes.key_on.shape[1])[None]  # slot = position inside a prompt
        most = _most(lanes.lengths)

        def written(lanes: Lanes, last: Cache) -> Cache:
            write, ring = jax.lax.dynamic_update_slice_in_dim, (lanes.step - 1) % max_new_tokens
            return {name: write(x, last[name], ring, axis=4) for name, x in lanes.new.items()}

        def is_running(carry: tuple[jax.Array, Lanes, Cache]) -> jax.Array:
            block, lanes, _ = carry
            return (block < BLOCK) & ~jnp.all(lanes.done)

        def next_token(
            carry: tuple[jax.Array, Lanes, Cache],
        ) -> tuple[jax.Array, Lanes, Cache]:
            block, lanes, last = carry
            # Before the layers read: what is written after them, unrolled, is a copy of the ring.
            lanes = lanes._replace(new=written(lanes, last))
            behind = (lanes.count - 1)[:, None]
            at = lanes.lengths[:, None] + behind  # [N, 1], the position of the tokens before
            age = ((lanes.step - new) % max_new_tokens)[None]  # [1, T], of what lies in a slot
            attends = model.over_lanes(lanes.key_on, at - place, (age > 0) & (age <= behind), age)
            of_new = {f"new_{name}": x for name, x in lanes.new.items()}
            before = jnp.take_along_axis(lanes.tokens, behind[:, None], axis=2)[:, :, 0]  # [N, S]
            hidden, kept = model.hidden(
                params,
                before,
                jnp.broadcast_to(at, before.shape),
                attends,
                prompt | of_new,
                lengths=most,
            )
            assert kept is not None
            logits = model.logits(params, hidden).reshape(-1, c.padded_vocab)  # [N * S, V]
            keys = jax.random.wrap_key_data(lanes.keys)  # [N, S]
            keys = jax.vmap(_at_step)(keys, lanes.count).reshape(-1)
            token = draw(allowed(logits, how), keys, how).reshape(before.shape)

            running = ~lanes.done
            is_here = (new[None] == lanes.count[:, None])[:, None] & running[:, :, None]
            sizes = lanes.sizes + running
            found = lanes.logps
            if logps:
                found = jnp.where(is_here, _logps(logits, token)[:, :, None], found)
            lanes = lanes._replace(
                step=lanes.step + 1,
                count=lanes.count + jnp.any(running, axis=1),
                tokens=jnp.where(is_here, token[:, :, None], lanes.tokens),
                sizes=sizes,
                done=lanes.done | _ends(token) | (sizes == max_new_tokens),
                logps=found,
            )
            return block + 1, lanes, {name: x[:, :, :, :, None] for name, x in kept.items()}

        whole = lanes
        lanes = lanes._replace(prompt={}, done=lanes.done | ended)  # prompts are read, not carried
        read, ring = jax.lax.dynamic_slice_in_dim, (lanes.step - 1) % max_new_tokens
        last = {name: read(x, ring, 1, axis=4) for name, x in lanes.new.items()}
        start = (jnp.int32(0), lanes, last)
        _, lanes, last = jax.lax.while_loop(is_running, next_token, start)
        lanes = lanes._replace(prompt=whole.prompt, new=written(lanes, last))
        return lanes, Found(lanes.tokens, lanes.sizes, lanes.done, lanes.logps)

    def _ends(token: jax.Array) -> jax.Array:
        return jnp.any(token[:, :, None] == ends[None, None], axis=2)

    def _most(lengths: jax.Array) -> jax.Array:
        # The keys of a prompt are kept: what its samples may read decides how they are turned.
        return lengths[:, None] + max_new_tokens - 1

    return Sampler(empty, resize, prefill, decode)


def _at_step(keys: jax.Array, step: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)


def _logps(logits: jax.Array, token: jax.Array) -> jax.Array:
    """[M, V] or [M * S, V] float32, [M, S] int32 -> [M, S] float32 nats."""
    all_logps = jax.nn.log_softmax(logits, axis=-1)
    return jnp.take_along_axis(all_logps, token.reshape(logits.shape[0], -1), axis=1).reshape(
        token.shape
    )


def lane_specs() -> Any:
    """Returns Lanes of PartitionSpecs: they are split as rows are, and their heads as heads."""
    rows, heads = P(ROWS), ACTIVATION_RULES["heads"]
    prompt, new = P(None, ROWS, heads), P(None, ROWS, None, heads)
    specs: dict[str, Any] = dict.fromkeys(Lanes._fields, rows)
    specs |= {"prompt": {"k": prompt, "v": prompt}, "new": {"k": new, "v": new}, "step": P()}
    return Lanes(**specs)
