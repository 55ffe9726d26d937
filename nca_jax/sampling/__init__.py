"""Sampling responses with a key-value cache, jitted."""
