"""Attention over packed rows that share prompts, by two kernels, and over a key-value cache."""
