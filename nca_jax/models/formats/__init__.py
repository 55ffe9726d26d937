"""The checkpoint formats that parameters are read from and written to, and where they are found."""
