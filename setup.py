"""Packaging of nca_jax; `make lock` resolves what is asked for here into requirements.lock."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = (ROOT / "nca_jax" / "__init__.py").read_text()
README = ROOT / "README.md"

setup(
    name="nca_jax",
    version=re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1],
    description="Align language models with explicit rewards by NCA and InfoNCA, in JAX",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The nca_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["nca_jax", "nca_jax.*"]),
    python_requires=">=3.11",
    install_requires=[
        # These five move together: a newer jax breaks this flax or wants Python 3.12.
        "jax==0.10.2",
        "flax==0.12.8",
        "optax==0.2.8",
        "orbax-checkpoint==0.12.8",
        "etils[epath]>=1.12",  # files on gs://
        "grain==0.2.18",
        "transformers>=5,<6",
        "tokenizers>=0.22",
        "huggingface_hub>=1",
        "jinja2>=3.1",  # chat templates
        "safetensors>=0.6",
        "gguf>=0.17",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources>=6",  # tensorflow-datasets imports it without asking for it
        "pyarrow>=20",  # raw data sets in parquet
        "ml_collections>=1.0",
        "absl-py>=2.1",
        "numpy>=2.0",
        "ml_dtypes>=0.5",
        "tensorboardX>=2.6.2",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.17,<0.18",
            "basedpyright>=1.40,<1.41",
        ],
        "demo": ["vaderSentiment>=3.3.2", "matplotlib>=3.9"],
        "torch": ["torch==2.13.0"],  # parity with the released code, in CPU arithmetic
        "tpu": ["jax[tpu]==0.10.2", "libtpu==0.0.42.*"],
        "gpu": ["jax[cuda13]==0.10.2"],
        "gcs": ["gcsfs"],  # files on gs://; of the release of fsspec that is installed
        "wandb": ["wandb>=0.19"],
    },
)
