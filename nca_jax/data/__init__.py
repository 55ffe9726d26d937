"""From files of scored responses to packed rows: numpy only, never jax.

`sources` and `tfds_source` read rows, `chat` renders and tokenises, `encode` makes a checked
example of a row, `load` all those of the files. `fit` says which responses a row has room for,
`pack` fills rows, `plan` lists their live attention blocks, `pipeline` says what step s is made of.
Beside that road, `released` is the format of the PyTorch release, and `layouts` and `builders` make
tensorflow-datasets of the rows of others.
"""
