"""The host's part of sampling: which prompt comes into which lane, and when.

Prompts come in by length, the longest first, within windows of WINDOW prompts a lane; a lane whose
samples are all done takes the next prompt after BLOCK tokens at most. So lanes that are computed
together are about as wide, and none waits for the longest sample of another.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Wrapped

from nca_jax.axes import Params
from nca_jax.sampling.sampler import Found, Lanes
from nca_jax.sampling.stops import Stop

WINDOW = 4  # prompts a lane that are put in order of length
NARROW = 64  # slots of the narrowest prompts
MULTIPLE = 16  # slots of the widest prompts are rounded up, so that few widths are compiled


class Sampled(NamedTuple):
    """The samples of a prompt.

    Attributes:
      ids: of each, [tokens] int32, with its end-of-turn token where it has one.
      logps: of each token, nats, [tokens] float32; [0] where nobody asked.
    """

    ids: list[np.ndarray]
    logps: list[np.ndarray]


class Programs(NamedTuple):
    """The compiled functions of a `sampler.Sampler`, and the sizes that they have.

    Attributes:
      empty, resize, prefill, decode: see `Sampler`; lanes that are given to the last two are gone.
      put: brings an array that every process holds to all devices.
      num_lanes: N.
      num_samples: S.
      at_once: M, how many prompts come in by one call.
    """

    empty: Callable[[int], Lanes]
    resize: Callable[[Lanes, int], Lanes]
    prefill: Callable[..., Lanes]
    decode: Wrapped
    put: Callable[[np.ndarray], jax.Array]
    num_lanes: int
    num_samples: int
    at_once: int


def width_of(length: int, longest: int) -> int:
    """Returns the slots of a prompt: powers of 2 from NARROW up, or those of the longest."""
    width = max(NARROW, 1 << (length - 1).bit_length())
    return min(width, -(-longest // MULTIPLE) * MULTIPLE)


def sample_batches(
    programs: Programs,
    params: Params,
    prompts: Sequence[np.ndarray],
    seed: int,
    start: int,
    stop: Stop | None = None,
) -> Iterator[list[Sampled]]:
    """Yields the samples of prompts from `start` on, in order, of N prompts at a time.

    Those of a prompt depend on its index, the seed and nothing else. Every process of a run decides
    alike: it sees all that was found.
    """
    made: dict[int, Sampled] = {}
    for place, sampled in _as_they_end(programs, params, prompts, seed, start, stop):
        made[place] = sampled
        while start < len(prompts):
            end = min(start + programs.num_lanes, len(prompts))
            if any(i not in made for i in range(start, end)):
                break
            yield [made.pop(i) for i in range(start, end)]
            start = end


def _as_they_end(
    programs: Programs,
    params: Params,
    prompts: Sequence[np.ndarray],
    seed: int,
    start: int,
    stop: Stop | None,
) -> Iterator[tuple[int, Sampled]]:
    longest, n, key = max(map(len, prompts)), programs.num_lanes, jax.random.key(seed)
    waiting = collections.deque(_by_length([*map(len, prompts)], start, WINDOW * n))
    running: dict[int, int] = {}  # lane: prompt
    lanes, width = None, 0
    looked = np.zeros((n, programs.num_samples), np.int32)  # tokens that `stop` has seen
    size_at_stop = np.zeros((n, programs.num_samples), np.int32)  # 0: it has met none
    while waiting or running:
        free = [lane for lane in range(n) if lane not in running]
        # A prefill takes as long for one prompt as for M, so some are waited for.
        enough = min(programs.at_once, -(-n // 4), len(waiting))
        while waiting and len(free) >= enough:
            now = [waiting.popleft() for _ in range(min(programs.at_once, len(free), len(waiting)))]
            places, free, enough = free[: len(now)], free[len(now) :], 1
            running |= dict(zip(places, now, strict=True))
            looked[places], size_at_stop[places] = 0, 0
            wide = width_of(max(len(prompts[i]) for i in running.values()), longest)
            if lanes is None:
                lanes = programs.empty(wide)
            elif wide != width:
                lanes = programs.resize(lanes, wide)
            width = wide
            indices = jnp.array([*now, *[0] * (programs.at_once - len(now))], jnp.int32)
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
            lanes = programs.prefill(
                params, lanes, *_filled(programs, prompts, now, places, longest), keys
            )
        assert lanes is not None
        lanes, found = programs.decode(params, lanes, programs.put(size_at_stop > 0))
        found = Found(*jax.device_get(found))
        if stop is not None:
            _look(stop, found, running, looked, size_at_stop)
        is_done = (found.done | (size_at_stop > 0)).all(axis=1)
        for lane in [lane for lane in running if is_done[lane]]:
            sizes = np.where(size_at_stop > 0, size_at_stop, found.sizes)[lane]
            yield (
                running.pop(lane),
                Sampled(
                    *(
                        [x[:size] for x, size in zip(of_lane, sizes, strict=True)]
                        for of_lane in (found.tokens[lane], found.logps[lane])
                    )
                ),
            )


def _by_length(lengths: Sequence[int], start: int, window: int) -> list[int]:
    """Returns the places of prompts from `start` on, in windows, each from its longest down."""
    order = []
    for first in range(start, len(lengths), window):
        places = range(first, min(first + window, len(lengths)))
        order += sorted(places, key=lambda i: -lengths[i])
    return order


def _filled(
    programs: Programs,
    prompts: Sequence[np.ndarray],
    now: Sequence[int],
    places: Sequence[int],
    longest: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the prompts `now` [M, Q], their lengths and lanes [M], as the devices take them."""
    num_more = programs.at_once - len(now)
    ids = [prompts[i] for i in now] + [prompts[now[-1]]] * num_more
    width = width_of(max(map(len, ids)), longest)
    padded = np.stack([np.pad(x, (0, width - len(x))) for x in ids]).astype(np.int32)
    lengths = np.array([*map(len, ids)], np.int32)
    lanes = np.array([*places, *[programs.num_lanes] * num_more], np.int32)
    return programs.put(padded), programs.put(lengths), programs.put(lanes)


def _look(
    stop: Stop,
    found: Found,
    running: dict[int, int],
    looked: np.ndarray,
    size_at_stop: np.ndarray,
) -> None:
    """Writes which of the running samples have met a stop, and where, in `size_at_stop`."""
    for lane in running:
        for s, size in enumerate(found.sizes[lane].tolist()):
            if not size_at_stop[lane, s]:
                size_at_stop[lane, s] = stop(
                    np.asarray(found.tokens[lane, s, :size]), int(looked[lane, s])
                )
                looked[lane, s] = size
