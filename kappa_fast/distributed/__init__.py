"""Several processes of torch.distributed on one ranking: who works on what, and what happens when one fails."""
