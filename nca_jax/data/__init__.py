"""From files of scored responses to packed rows: numpy only, never jax.

`sources` and `tfds_source` read rows, `chat` renders and tokenises, `encode` makes and checks
examples, `plan` lists live attention blocks, `pack` fills rows, `pipeline` says what step s is made
of. Beside that road, `layouts` and `builders` make tensorflow-datasets of the rows of others.
"""
