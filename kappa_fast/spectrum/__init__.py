"""The numerics, written once over the operations of a backend: kappa with an interval around it."""
