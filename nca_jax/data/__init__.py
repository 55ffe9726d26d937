"""From files of scored responses to packed rows: numpy only, never jax.

`sources`, `hub` and `tfds_source` read records, `record` says what forms they have, `conversation`
reads the prompts and responses in them, `chat` renders and tokenises (by `words`), `encode` makes a
checked example of a record, `chunks` many of them on all cores. A `table` has many examples, as
arrays; `store` keeps it on disk; `load` gives those of the files. `room` says which responses a row
has room for, `pack` fills rows with groups, `plan` lists their live attention blocks, `pipeline`
says what step s is made of. Beside that road, `released` is the format of the PyTorch release, and
`layouts` and `builders` make tensorflow-datasets of the records of others.
"""
