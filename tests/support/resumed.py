"""A small net that is trained for some steps with a selection."""

from __future__ import annotations

import torch
from torch import nn

import kappa_fast


def net() -> nn.Module:
    """Layers of one shape, so that torch cannot tell their states apart."""
    return nn.Sequential(*(nn.Linear(20, 20, bias=False) for _ in range(4)))


def chosen(model, *positions):
    return kappa_fast.rank(model, include=[rf"^{i}\." for i in positions], progress=False).select(top_p=1.0)


def stepped(model, selection, optimizer=torch.optim.AdamW):
    made = kappa_fast.wrap(optimizer, model, selection, lr=1e-2)
    model(torch.randn(4, 20)).square().sum().backward()
    made.step()
    return made
