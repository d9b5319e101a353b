"""Training a selection: who gets gradients, what inside a parameter must not move, and the optimizer over the rest."""
