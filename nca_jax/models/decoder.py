"""One decoder for every family: what tells them apart are the features of `ModelConfig`.

Axes: R rows, T tokens, V padded vocabulary, D width, L layers.

flax.nnx stays inside this folder. At the border a model is split once into a graph and `params`, a
plain nested dict of arrays with layers stacked on a leading L axis; policy and reference are the
same graph with other params. Those that are trained are float32; frozen ones may be bfloat16 or
float16 and give what their float32 copies give, as each is cast where it is used.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nca_jax.axes import HOST_MEMORY, Params, constrain, flatten_paths, nest_paths
from nca_jax.batch import Rows
from nca_jax.model_config import LayerKind, ModelConfig
from nca_jax.models import grouped, nf4
from nca_jax.models.attention import cached, pairs, splash
from nca_jax.models.attention.attend import ATTENDED, KEPT, Attend, Attends, Cache
from nca_jax.models.layers import Attention, Kernel, Mlp, RMSNorm
from nca_jax.models.logits import Logits
from nca_jax.models.lora import Lora, split_adapters
from nca_jax.models.moe import Mix, Moe, dense
from nca_jax.models.rope import rotate, sequence_lengths

INPUT = "input"  # the name of what comes into a layer
ADAPTERS = 2**32 - 1  # folded into the key of adapters: no count of the base's numbers
REMAT = {  # what the backward pass keeps of a layer, from fastest to leanest
    "none": None,
    # By name: JAX's own policies do not see products in a custom_vjp.
    "dots": jax.checkpoint_policies.save_only_these_names(KEPT, ATTENDED),
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENDED),
    "full": jax.checkpoint_policies.nothing_saveable,
    "host": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT],
        offload_src="device",
        offload_dst=HOST_MEMORY,
    ),
}


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); or x + norm(attention(x)), or both norms."""

    def __init__(self, config: ModelConfig, lora: Lora | None, mix: Mix, rngs: nnx.Rngs):
        def norm(where: str) -> RMSNorm | None:
            return RMSNorm(config, config.width) if config.norms in (where, "both") else None

        self.attn_norm, self.attn_post_norm = norm("before"), norm("after")
        self.attn = Attention(config, lora, rngs)
        self.mlp_norm, self.mlp_post_norm = norm("before"), norm("after")
        if config.num_experts:
            self.moe = Moe(config, lora, rngs, mix)
        else:
            self.mlp = Mlp(config, lora, rngs)
        self.sparse = bool(config.num_experts)
        self.residual_scale = config.residual_scale

    def __call__(
        self, x: jax.Array, attend: Attend, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """[R, T, D] -> [R, T, D], and what attention keeps."""
        y = x if self.attn_norm is None else self.attn_norm(x)
        y, kept = self.attn(y, attend, cache)
        x = self._add(x, y, self.attn_post_norm)
        y = x if self.mlp_norm is None else self.mlp_norm(x)
        feed_forward = self.moe if self.sparse else self.mlp
        return self._add(x, feed_forward(y), self.mlp_post_norm), kept

    def _add(self, x: jax.Array, y: jax.Array, norm: RMSNorm | None) -> jax.Array:
        if norm is not None:
            y = norm(y)
        if self.residual_scale != 1:  # a number that bfloat16 does not have
            y = (y.astype(jnp.float32) * self.residual_scale).astype(y.dtype)
        return constrain(x + y, "rows", None, None)


class Embed(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.padded_vocab, config.width)
        self.table = nnx.Param(jax.random.normal(rngs.params(), shape) * config.width**-0.5)


class Score(nnx.Module):
    """The head of a reward model, [D, S]. It is 0 at the start: no response is preferred."""

    def __init__(self, config: ModelConfig):
        self.kernel = nnx.Param(jnp.zeros((config.width, config.num_labels)))


class Decoder(nnx.Module):
    """Tokens to final hidden states; the head is applied by whoever needs its logits."""

    def __init__(self, config: ModelConfig, lora: Lora | None, mix: Mix, rngs: nnx.Rngs):
        self.embed = Embed(config, rngs)
        split = nnx.split_rngs(splits=config.num_layers)
        make_layers = split(nnx.vmap(functools.partial(Layer, config, lora, mix)))
        self.layers = make_layers(rngs)
        self.norm = RMSNorm(config, config.width)
        if config.num_labels:
            self.score = Score(config)
        elif not config.tied_head:
            self.head = Kernel((config.width,), (config.padded_vocab,), rngs)


@dataclasses.dataclass(frozen=True)
class Model:
    """The pure functions of one decoder; `params` is the first argument of each.

    Of a model with adapters these are the base and the adapters in one tree; the base alone, as a
    reference may be, is computed as without adapters. Kernels of the layers may be nf4, which their
    paths tell.

    Attributes:
      config: sizes.
      lora: its adapters; None: it has none.
      dtype: of the activations, whatever the parameters'.
      grad_dtype: of the gradients of a layer's matrices where devices sum them: float32 or `dtype`.
      remat: a key of REMAT; other than "none" wants scanned layers.
      scan_layers: one compiled layer run L times, or L layers unrolled over the same params.
      attention_kernel: of packed rows: "pairs" (XLA, any platform) or "splash" (Pallas, for TPU).
      expert_kernel: "dense" (XLA, any platform) or "grouped" (Pallas, for TPU).
      align: for splash, what segments of a row lie at multiples of, see `data.pack`.
      splash_blocks: for splash, see `splash.parse_blocks`.
      interpret: run Pallas kernels in Python, where there is no TPU.
    """

    config: ModelConfig
    lora: Lora | None = None
    dtype: jnp.dtype = jnp.dtype("float32")
    grad_dtype: jnp.dtype = jnp.dtype("float32")
    remat: str = "none"
    scan_layers: bool = True
    attention_kernel: str = "pairs"
    expert_kernel: str = "dense"
    align: int = 1
    splash_blocks: splash.Blocks = ()
    interpret: bool = False

    @property
    def _mix(self) -> Mix:
        if self.expert_kernel == "grouped":
            return functools.partial(grouped.mix, interpret=self.interpret)
        return dense

    def _make(self, key: jax.Array) -> Decoder:
        rngs = nnx.Rngs(key, lora=jax.random.fold_in(key, ADAPTERS))
        return Decoder(self.config, self.lora, self._mix, rngs)

    @functools.cached_property
    def _graphdef(self) -> nnx.GraphDef:
        return nnx.split(nnx.eval_shape(lambda: self._make(jax.random.key(0))))[0]

    @functools.cached_property
    def _nf4(self) -> tuple[nnx.GraphDef, nnx.State]:
        """The graph, and the shapes, where the layers' kernels are nf4."""

        def make() -> Decoder:
            decoder = self._make(jax.random.key(0))
            for path, module in nnx.iter_modules(decoder.layers):
                name = "/".join(["layers", *map(str, path), "kernel"])
                if isinstance(module, Kernel) and nf4.is_quantised(name):
                    module.make_nf4(name)
            return decoder

        return nnx.split(nnx.eval_shape(make))

    @functools.cached_property
    def base(self) -> "Model":
        """The model without its adapters."""
        return dataclasses.replace(self, lora=None)

    @functools.cached_property
    def adapter_params(self) -> int:
        """How many parameters of adapters a token is multiplied with; 0: there are none."""
        c = self.config
        flat = flatten_paths(split_adapters(self.abstract_params())[0])
        are_experts = [path for path in flat if "/moe/" in path and "/router/" not in path]
        of_experts = sum(flat[path].size for path in are_experts)
        others = sum(x.size for x in flat.values()) - of_experts
        return others + of_experts * c.experts_per_token // max(c.num_experts, 1)

    def _merge(self, params: Params) -> Decoder:
        adapters, base = split_adapters(params)
        model = self if adapters else self.base
        return nnx.merge(model._nf4[0] if nf4.has_codes(base) else model._graphdef, params)

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters; a pure function of the key, whatever the sharding.

        Those of the base are as without adapters. The norms m of DoRA are of the base that is
        drawn here: see `init_adapters`.
        """
        return nnx.to_pure_dict(nnx.state(self._make(key), nnx.Param))

    def init_adapters(self, key: jax.Array, base: Params) -> Params:
        """Random float32 adapters, which change nothing of `base`; as pure as `init`."""
        adapters, _ = split_adapters(self.init(key))
        if self.lora is None or not self.lora.dora:
            return adapters
        decoder = self._merge(nest_paths(flatten_paths(base) | flatten_paths(adapters)))
        graph, layers = nnx.split(decoder.layers)

        def of_layer(state):  # m is the norm that there is: one layer's kernels at a time
            layer = nnx.merge(graph, state)
            for _, module in nnx.iter_modules(layer):
                if isinstance(module, Kernel) and module.lora is not None:
                    module.lora.start_norm(module.matrix)
            return split_adapters(nnx.to_pure_dict(nnx.state(layer, nnx.Param)))[0]

        return {"layers": jax.lax.map(of_layer, layers)}

    def abstract_params(self) -> Params:
        """The shapes and dtypes of `init`, without computing it."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def abstract_nf4(self) -> Params:
        """The same where the layers' kernels are nf4."""
        return nnx.to_pure_dict(self._nf4[1])

    def abstract_trained(self) -> Params:
        """The shapes of what is trained: of all parameters, or of the adapters."""
        params = self.abstract_params()
        return params if self.lora is None else split_adapters(params)[0]

    def hidden(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        attends: Attends,
        caches: Cache | None = None,
        *,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """[R, T] int32 tokens and positions -> ([R, T, D] in `dtype`, what attention keeps).

        `caches` are read and stay as they are: what is kept of each layer, [L, ...], is of these
        tokens alone, and the caller writes it where it likes.

        `lengths`, [R, T] or [R, 1] int32, are what `rope.sequence_lengths` says; a model without
        LongRope needs none.

        What is looked up is multiplied with `config.embed_scale` in the dtype of activations,
        whatever that of the table: a policy in float32 and its reference in bfloat16 round it
        alike, as do models that run in the dtype of their file.
        """
        decoder = self._merge(params)
        # Each device looks all tokens of its group up in its own slice of D, then gives its part of
        # other devices' rows away: the table is gathered nowhere. Cast after the look-up, so that
        # the gradient is summed in float32.
        tokens = constrain(tokens, "groups", None)
        x = constrain(decoder.embed.table[...][tokens], "groups", None, "width")
        x = x.astype(self.dtype)
        if self.config.embed_scale != 1:
            x *= jnp.asarray(self.config.embed_scale, self.dtype)
        x = constrain(x, "groups", None, "width")
        x = constrain(x, "rows", None, None)
        graph, layers = nnx.split(decoder.layers)

        def attend_as(kind: LayerKind) -> Attend:
            turn = functools.partial(rotate, positions=positions, rope=kind.rope, lengths=lengths)
            return lambda q, k, v, cache: attends[kind.window](turn(q), turn(k), v, cache)

        # One layer is compiled, whatever the kinds: parameters go through the scan as they are
        # kept, so that their gradients are added up in place, and attention alone is chosen in it.
        by_layer = self.config.layer_kinds
        kinds = list(dict.fromkeys(by_layer))
        ways = [attend_as(kind) for kind in kinds]
        which = jnp.array([kinds.index(kind) for kind in by_layer]) if len(kinds) > 1 else None

        def layer(x, of_layer):
            state, way, cache = of_layer
            if self.grad_dtype != jnp.float32:
                state = jax.tree_util.tree_map_with_path(self._in_grad_dtype, state)
            x = checkpoint_name(x, INPUT)
            attend = ways[0] if way is None else functools.partial(jax.lax.switch, way, ways)
            return nnx.merge(graph, state)(x, attend, cache)

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.remat], prevent_cse=False)
        # Unrolled too, a scan stacks the layers' gradients in place.
        unroll = 1 if self.scan_layers else self.config.num_layers
        x, kept = jax.lax.scan(layer, x, (layers, which, caches), unroll=unroll)
        return decoder.norm(x), kept

    def _in_grad_dtype(self, path: tuple, param: jax.Array) -> jax.Array:
        """A layer's parameter, which has the dtype that its gradient is to come in.

        Where it is not float32 it is that of activations, which a matrix is cast to anyway.
        """
        is_matrix = "kernel" in jax.tree_util.keystr(path)
        return param.astype(self.grad_dtype) if is_matrix else param

    def head(self, params: Params) -> jax.Array:
        """[D, V] as it is kept: of its V columns only the first `config.vocab_size` are tokens."""
        if self.config.tied_head:
            return params["embed"]["table"].T
        return params["head"]["kernel"]

    def rows(self, params: Params, rows: Rows[jax.Array], *, block: int) -> jax.Array:
        """[R, T, D]: the hidden states of packed rows, attention in blocks of `block` tokens."""
        packed = pairs.packed
        if self.attention_kernel == "splash":
            packed = functools.partial(
                splash.packed,
                align=self.align,
                blocks=self.splash_blocks,
                interpret=self.interpret,
            )
        attends = {
            window: packed(
                rows,
                num_blocks=rows.tokens.shape[1] // block,
                scale=self.config.score_scale,
                window=window,
                cap=self.config.attn_cap,
            )
            for window in self.config.windows
        }
        lengths = sequence_lengths(rows) if self.config.has_longrope else None
        return self.hidden(params, rows.tokens, rows.positions, attends, lengths=lengths)[0]

    def over_prompts(self, mask: jax.Array, distance: jax.Array) -> Attends:
        """Returns attention of the tokens of a row over each other; see `cached.whole`.

        Args:
          mask: which tokens each query may see, were there no window, [R, T, T].
          distance: how many positions a token lies behind a query, [R, T, T] or [1, T, T].
        """
        c, how = self.config, self._scores
        return {w: cached.whole(mask & _within(distance, w), **how) for w in c.windows}

    def over_lanes(
        self, prompt: jax.Array, behind: jax.Array, new: jax.Array, age: jax.Array
    ) -> Attends:
        """Returns attention of a new token of each sample; see `cached.lane`.

        Args:
          prompt: which slots of its prompt a lane sees, were there no window, [M, P].
          behind: how many positions they lie behind the new token, [M, P].
          new, age: the same of the slots of a sample's own tokens, [M, W] and [1, W].
        """
        return {
            w: cached.lane(prompt & _within(behind, w), new & _within(age, w), **self._scores)
            for w in self.config.windows
        }

    @property
    def _scores(self) -> dict[str, float]:
        return {"scale": self.config.score_scale, "cap": self.config.attn_cap}

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V] float32, see `Logits`: for decoding, a token at a time."""
        head = self.head(params).astype(self.dtype)
        product = jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)
        return Logits.of(self.config)(product)


def _within(distance: jax.Array, window: int) -> jax.Array:
    """Which keys so far behind a query a window has; 0: all."""
    return distance < window if window else jnp.bool(True)
