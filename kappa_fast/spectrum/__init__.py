"""The numerics: they compute kappa and an interval around it with the operations of any backend."""
