"""What a family is: how the files of one Hugging Face architecture say what the decoder computes.

The decoder knows the features of a `ModelConfig` and no family; a record translates between the
two, in both directions.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nca_jax.checks import UserError
from nca_jax.model_config import LayerKind, ModelConfig, Rope, shortest_period
from nca_jax.models.families.rope import read_rope, rope_fields, write_rope

Fields = Mapping[str, Any]  # {name: value}, of a config.json or of a ModelConfig

# A config.json leaves out what equals the default of its class in transformers; a test compares.
DEFAULTS: Fields = {
    "architectures": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "rope_parameters": None,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "head_dim": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attention_bias": False,
    "mlp_bias": False,
    "layer_types": None,
    "quantization_config": None,
}
WANTED: Fields = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}


SLIDING, FULL = "sliding_attention", "full_attention"  # in layer_types


def one_kind_of_layer(kinds: list[str] | None) -> str | None:
    """Returns the kind that all layers of `layer_types` are of, None where it is absent.

    Raises:
      UserError: there are several.
    """
    if len(set(kinds or ())) > 1:
        raise UserError(
            "a sliding window in some layers only (layer_types, max_window_layers) is not "
            "supported; wanted all or none."
        )
    return kinds[0] if kinds else None


def read_alike(raw: Fields, window: int | None = 0) -> Fields:
    """`Family.read` of an architecture whose layers are all alike, by default without a window."""
    one_kind_of_layer(raw["layer_types"])
    return {"kinds": (LayerKind(window or 0, read_rope(raw, rope_fields(raw))),)}


def read_window(raw: Fields) -> Fields:
    """`Family.read` of an architecture whose layers all have the window of config.json, if any."""
    return read_alike(raw, raw["sliding_window"])


def read_by_layer(raw: Fields, names: list[str], ropes: Mapping[str, Rope]) -> Fields:
    """`Family.read` of an architecture some of whose layers have the window of config.json.

    Args:
      names: SLIDING or FULL of each layer, where `layer_types` is absent.
      ropes: of SLIDING and of FULL layers.
    """
    kinds = {
        SLIDING: LayerKind(raw["sliding_window"] or 0, ropes[SLIDING]),
        FULL: LayerKind(0, ropes[FULL]),
    }
    return {"kinds": shortest_period([kinds[name] for name in layer_names(raw, names)])}


def layer_names(raw: Fields, names: list[str]) -> list[str]:
    """Returns SLIDING or FULL of each layer: `layer_types`, and where it is absent `names`.

    Raises:
      UserError: layer_types are of another number of layers.
    """
    names = names if raw["layer_types"] is None else raw["layer_types"]
    if len(names) != raw["num_hidden_layers"]:
        raise UserError(
            f"layer_types are {len(names)}, and num_hidden_layers is {raw['num_hidden_layers']}."
        )
    return names


def write_alike(config: ModelConfig) -> Fields:
    """`Family.write` that `read_alike` reads."""
    return write_rope(config.kinds[0].rope or Rope())


def write_window(config: ModelConfig) -> Fields:
    """`Family.write` that `read_window` reads."""
    return {**write_alike(config), "sliding_window": config.kinds[0].window or None}


def write_by_layer(config: ModelConfig) -> Fields:
    """The fields that `read_by_layer` reads, but for what says of the ropes."""
    names = [SLIDING if kind.window else FULL for kind in config.layer_kinds]
    return {"sliding_window": max(config.windows) or None, "layer_types": names}


class Gguf(NamedTuple):
    """How a GGUF file holds a family's models, under the tensor names of `names.GGUF`.

    Attributes:
      architecture: in its metadata.
      interleaves: llama.cpp stores the halves that the rotary embedding pairs interleaved.
      norms_hold: how much more than the parameter is stored.
      reads: keys of the metadata that are refused in other families.
      read: what gives the value of a key, and fields of ModelConfig -> fields over these.
    """

    architecture: str
    interleaves: bool = False
    norms_hold: float = 0.0
    reads: tuple[str, ...] = ()
    read: Callable[[Callable[..., Any], Fields], Fields] = lambda get, common: {}


class Family(NamedTuple):
    """One architecture of transformers.

    Attributes:
      model_type: of config.json.
      architecture: the class in transformers.
      defaults: what its config.json leaves out.
      read: config.json, with the defaults filled in -> fields of ModelConfig, over the common ones
        of `hf.parse_config`. Raises UserError, without the file's name, for what the decoder would
        compute wrongly.
      write: the inverse: ModelConfig -> fields of config.json, over those of `config_json`.
      has: fields of ModelConfig that all its models share and its files do not say.
      wanted: fields of config.json that are refused unless they have this value, and written so.
      tensors: {parameter path: tensor name}, where it is not that of `names.TABLE`. Parameters with
        one name are one tensor: in the table's order, one below the other.
      gguf: None: GGUF files of it are not read.
      reward_architecture: as architecture, of its reward models; "": it has the name that follows.
    """

    model_type: str
    architecture: str
    defaults: Fields = DEFAULTS
    read: Callable[[Fields], Fields] = read_alike
    write: Callable[[ModelConfig], Fields] = write_alike
    has: Fields = {}
    wanted: Fields = WANTED
    tensors: Mapping[str, str] = {}
    gguf: Gguf | None = None
    reward_architecture: str = ""

    @property
    def classifier(self) -> str:
        """The class in transformers of its reward models."""
        usual = self.architecture.replace("ForCausalLM", "ForSequenceClassification")
        return self.reward_architecture or usual
