"""The decoder, its sharded parameters' names, and the checkpoint formats they are read from."""
