"""What a family is: how the files of one Hugging Face architecture say what the decoder computes.

The decoder knows the features of a `ModelConfig` and no family; a record translates between the
two, in both directions.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nca_jax.checks import UserError
from nca_jax.model_config import ModelConfig

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


def read_no_window(raw: Fields) -> Fields:
    """`Family.read` of an architecture that has no sliding window, whatever config.json says."""
    one_kind_of_layer(raw["layer_types"])
    return {"sliding_window": 0}


def read_window(raw: Fields) -> Fields:
    """`Family.read` of an architecture whose layers all have the window of config.json, if any."""
    one_kind_of_layer(raw["layer_types"])
    return {"sliding_window": raw["sliding_window"] or 0}


def write_nothing(config: ModelConfig) -> Fields:
    """`Family.write` of an architecture that has the common fields alone."""
    return {}


def write_window(config: ModelConfig) -> Fields:
    """`Family.write` that `read_window` reads."""
    return {"sliding_window": config.sliding_window or None}


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
      wanted: fields of config.json that are refused unless they have this value; hidden_act is one.
      tensors: {parameter path: tensor name}, where it is not that of `names.TABLE`. Parameters with
        one name are one tensor: in the table's order, one below the other.
      in_gguf: whether a GGUF file may name it as its architecture.
      gguf_interleaves: llama.cpp stores the halves that the rotary embedding pairs interleaved.
      reward_architecture: as architecture, of its reward models; "": it has the name that follows.
    """

    model_type: str
    architecture: str
    defaults: Fields = DEFAULTS
    read: Callable[[Fields], Fields] = read_no_window
    write: Callable[[ModelConfig], Fields] = write_nothing
    has: Fields = {}
    wanted: Fields = WANTED
    tensors: Mapping[str, str] = {}
    in_gguf: bool = False
    gguf_interleaves: bool = False
    reward_architecture: str = ""

    @property
    def classifier(self) -> str:
        """The class in transformers of its reward models."""
        usual = self.architecture.replace("ForCausalLM", "ForSequenceClassification")
        return self.reward_architecture or usual
