"""The numerics, written once over the operations of a backend: extreme singular values with an interval around kappa."""
