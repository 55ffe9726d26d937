"""Attention for sampling: of a prompt over itself, and of new tokens over what is kept.

Axes: M lanes, each with one prompt and its S samples, T tokens, N query heads, G kv heads
      (J = N / G queries share one), H head width, P prompt slots, W slots of new tokens.

Nothing is written here: what is kept of the tokens at hand is given back, for the caller to write.
"""

import jax
import jax.numpy as jnp

from nca_jax.models.attention.attend import NEVER, Attend


def whole(mask: jax.Array, *, scale: float, cap: float = 0.0) -> Attend:
    """Returns attention of the tokens of a row over each other.

    What is kept are k [M, G, H, T] and v [M, G, T, H], so that no later product transposes.

    Args:
      mask: which tokens each query sees, [M, T, T] bool.
      scale: of the scores q k.
      cap: scaled scores s become cap tanh(s / cap); 0: they stay.
    """

    def attend(q, k, v, cache):
        rows, length, num_heads, head_dim = q.shape
        k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
        q = q.reshape(rows, length, k.shape[1], -1, head_dim)  # [M, T, G, J, H]
        scores = jnp.einsum("rtgjh,rghs->rgjts", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None], _capped(scores * scale, cap), NEVER)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("rgjts,rgsh->rtgjh", weights, v)
        return out.reshape(rows, length, num_heads, head_dim), {"k": k, "v": v}

    return attend


def lane(prompt: jax.Array, new: jax.Array, *, scale: float, cap: float = 0.0) -> Attend:
    """Returns attention of one new token of each sample, [M, S], over its prompt, over the tokens
    before it and over itself.

    It reads {"prompt_k" [M, G, H, P], "prompt_v" [M, G, P, H], "new_k", "new_v" [M, S, G, W, H]}:
    the samples of a lane are queries of one product with their prompt. What is kept are k and v of
    the new tokens, [M, S, G, H].

    Args:
      prompt: which slots of its prompt a lane sees, [M, P] bool.
      new: which slots of a sample's own tokens, [M, W] bool.
      scale, cap: as of `whole`.
    """

    def attend(q, k, v, cache):
        lanes, samples, num_heads, head_dim = q.shape
        q = q.reshape(lanes, samples, k.shape[2], -1, head_dim)  # [M, S, G, J, H]

        def scored(form: str, keys: jax.Array) -> jax.Array:
            scores = jnp.einsum(form, q, keys, preferred_element_type=jnp.float32)
            return _capped(scores * scale, cap)

        def turned(x: jax.Array) -> jax.Array:  # [M, S, G, ...] <-> [M, G, S, ...]
            return x.swapaxes(1, 2)

        # One softmax over three parts, which are nowhere laid side by side. That of the prompt is
        # [M, G, S, J, P] throughout: as its products have it, so that none of them transposes.
        of_prompt = scored("msgjh,mghp->mgsjp", cache["prompt_k"])
        of_prompt = jnp.where(prompt[:, None, None, None], of_prompt, NEVER)
        of_new = scored("msgjh,msgwh->msgjw", cache["new_k"])
        of_new = jnp.where(new[:, None, None, None], of_new, NEVER)
        own = scored("msgjh,msgh->msgj", k)
        top = jnp.maximum(turned(jnp.max(of_prompt, axis=-1)), jnp.max(of_new, axis=-1))
        top = jnp.maximum(top, own)
        of_prompt = jnp.exp(of_prompt - turned(top)[..., None])
        of_new, own = jnp.exp(of_new - top[..., None]), jnp.exp(own - top)
        total = turned(jnp.sum(of_prompt, axis=-1)) + jnp.sum(of_new, axis=-1) + own

        def values(form: str, weights: jax.Array, of: jax.Array) -> jax.Array:
            weights = weights.astype(of.dtype)
            return jnp.einsum(form, weights, of, preferred_element_type=jnp.float32)

        out = turned(values("mgsjp,mgph->mgsjh", of_prompt, cache["prompt_v"]))
        out += values("msgjw,msgwh->msgjh", of_new, cache["new_v"])
        out += own[..., None] * v[:, :, :, None].astype(jnp.float32)
        out = (out / total[..., None]).astype(v.dtype)
        return out.reshape(lanes, samples, num_heads, head_dim), {"k": k, "v": v}

    return attend


def _capped(scores: jax.Array, cap: float) -> jax.Array:
    return cap * jnp.tanh(scores / cap) if cap else scores
