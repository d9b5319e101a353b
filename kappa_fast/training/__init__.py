"""Training a selection: the flags and guards that freeze all other weights, and optimizers of the selected ones."""
