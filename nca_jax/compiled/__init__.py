"""What the compiler says of a program: topologies without a TPU, collectives, reports."""
