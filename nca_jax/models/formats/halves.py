"""Folders of models of text and images, of which the text half alone is read: Gemma 3 from 4B on.

The half is a model of its own for the family of its text_config, and is exported as that.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from nca_jax.checks import UserError
from nca_jax.models.families import FAMILIES
from nca_jax.models.formats.names import Naming
from nca_jax.models.formats.untrusted import OBJECT, check_field, read_json

T = TypeVar("T")


class Whole(NamedTuple):
    """A model of text and images.

    Attributes:
      architecture: the class in transformers.
      text: the model_type of its text half.
    """

    architecture: str
    text: str


WHOLES = {"gemma3": Whole("Gemma3ForConditionalGeneration", "gemma3_text")}
# What the whole says of the half too, where it says it.
SHARED = ("bos_token_id", "eos_token_id", "quantization_config", "tie_word_embeddings")
IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def read_model_json(folder: Path) -> dict[str, Any]:
    """Returns config.json, of a model of text and images that of its text half.

    Raises:
      UserError: the file is missing or broken, or not that of such a model.
    """
    file = folder / "config.json"
    raw = read_json(file)
    model_type = raw.get("model_type")
    whole = WHOLES.get(model_type) if isinstance(model_type, str) else None
    if whole is None:
        return raw
    check_field(f"{file}: text_config", raw.get("text_config"), OBJECT)
    if raw.get("architectures") not in (None, [whole.architecture]):
        raise UserError(f"{file}: architectures must be {whole.architecture} alone, or null.")
    return {
        **raw["text_config"],
        **{key: raw[key] for key in SHARED if raw.get(key) is not None},
        "model_type": whole.text,
        "architectures": [FAMILIES[whole.text].architecture],
    }


def text_half(naming: Naming, tensors: Mapping[str, T]) -> tuple[Naming, dict[str, T]]:
    """Returns the names of the half in these files, and their tensors less those of images.

    Where there is no other half both are as they came.
    """
    found = {name: tensor for name, tensor in tensors.items() if not IMAGES.match(name)}
    for prefix, renamed in (("language_model.", ""), ("model.language_model.", "model.")):
        if any(name.startswith(prefix) for name in found):
            naming = {
                path: prefix + name.removeprefix(renamed) if name.startswith(renamed) else name
                for path, name in naming.items()
            }
    return naming, found
