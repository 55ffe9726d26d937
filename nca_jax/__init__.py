"""nca_jax: align language models with explicit rewards by NCA and InfoNCA (arXiv:2402.05369)."""

__version__ = "0.1.0"
