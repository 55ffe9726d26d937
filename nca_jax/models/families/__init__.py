"""The families of decoders: one file each, and this dict of them by the model_type of config.json.

Export takes the first that computes a config, so the plainer ones come first.
"""

from nca_jax.models.families.family import Family
from nca_jax.models.families.gemma2 import GEMMA2
from nca_jax.models.families.gemma3 import GEMMA3_TEXT
from nca_jax.models.families.granite import GRANITE
from nca_jax.models.families.llama import LLAMA
from nca_jax.models.families.mistral import MISTRAL
from nca_jax.models.families.mixtral import MIXTRAL
from nca_jax.models.families.olmo2 import OLMO2
from nca_jax.models.families.olmo3 import OLMO3
from nca_jax.models.families.phi3 import PHI3
from nca_jax.models.families.qwen2 import QWEN2
from nca_jax.models.families.qwen3 import QWEN3
from nca_jax.models.families.qwen3_moe import QWEN3_MOE
from nca_jax.models.families.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        MIXTRAL,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
        SMOLLM3,
        OLMO2,
        OLMO3,
        PHI3,
        GRANITE,
        GEMMA2,
        GEMMA3_TEXT,
    )
}
