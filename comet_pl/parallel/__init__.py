"""Layer-level pipeline parallelism: one sequence over many devices. Importing this package loads
nothing."""
