"""From files of scored responses to packed rows: numpy only, never jax.

`sources` reads lines, `chat` renders and tokenises, `encode` makes and checks examples, `plan`
lists live attention blocks, `pack` fills rows, `pipeline` says what step s is made of.
"""
