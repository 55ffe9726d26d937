"""Packaging of nca_jax; `make lock` resolves what is asked for here, for each Python."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = (ROOT / "nca_jax" / "__init__.py").read_text()
README = ROOT / "README.md"

# Extras that the tests want too; `nca_jax.checks.EXTRAS` says which library is in which.
TFDS = [  # what builds and reads tensorflow-datasets
    "tensorflow-datasets>=4.9.9",
    "importlib_resources>=6",  # tensorflow-datasets imports it without asking for it
    "pyarrow>=20",  # raw data sets in parquet
]
GGUF = ["gguf>=0.17"]

setup(
    name="nca_jax",
    version=re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1],
    description="Align language models with explicit rewards by NCA and InfoNCA, in JAX",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The nca_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # The configs stay at the top level; installed, they are found as --config=nca_jax:NAME.
    packages=[*find_packages(include=["nca_jax", "nca_jax.*"]), "nca_jax.configs"],
    package_dir={"nca_jax.configs": "configs"},
    package_data={"nca_jax": ["py.typed"]},
    entry_points={"console_scripts": ["nca-jax = nca_jax.__main__:main"]},
    python_requires=">=3.11",
    install_requires=[
        # These move together: jax 0.10.2 and flax 0.12.8 are the last pair for Python 3.11.
        "jax==0.10.2; python_version < '3.12'",
        "jax>=0.12.0.1,<0.13; python_version >= '3.12'",
        "flax==0.12.8; python_version < '3.12'",
        "flax>=0.12.12,<0.13; python_version >= '3.12'",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "etils[epath]>=1.12",  # files on gs://
        "grain>=0.2.18,<0.3",
        "transformers>=5,<6",
        "tokenizers>=0.22",
        "huggingface_hub>=1",
        "jinja2>=3.1",  # chat templates
        "safetensors>=0.6",
        "ml_collections>=1.0",
        "absl-py>=2.1",
        "numpy>=2.0",
        "ml_dtypes>=0.5",
        "tensorboardX>=2.6.2",
        "tqdm>=4.66",
    ],
    extras_require={
        "tfds": TFDS,
        "gguf": GGUF,
        "datasets": ["datasets>=3", "pyarrow>=20"],  # hf: data, .parquet files
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.17,<0.18",
            "basedpyright>=1.40,<1.41",
            *TFDS,
            *GGUF,
        ],
        "demo": ["vaderSentiment>=3.3.2", "matplotlib>=3.9", *GGUF],
        "torch": [  # parity with the released code, PEFT and TRL, in CPU arithmetic
            "torch==2.13.0",
            "peft==0.21.2",
            "trl==1.16.0",
            "bitsandbytes==0.50.2",
            "accelerate>=1",  # transformers quantises with it
        ],
        # Evaluations of the field; it brings `datasets` along, and no PyTorch.
        "eval": ["lm_eval[ifeval]==0.4.13", "math-verify>=0.8", "scikit-learn>=1.5"],
        "tpu": ["jax[tpu]"],  # of the jax above, and the libtpu that goes with it
        "gpu": ["jax[cuda13]"],
        "gcs": ["gcsfs"],  # files on gs://; of the release of fsspec that is installed
        "wandb": ["wandb>=0.19"],
    },
)
