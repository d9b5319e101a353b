"""Bases with an answer: experts of which it is known that they carry what the base knows, and others that do not.

They are for showing that the harness finds an effect that is there, and none where scores say nothing. The old text
never gets to the empty experts, by the rows that the router has for them; the new text gets to both kinds.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn

FAINT = 1e-3  # of their initial values: what an empty expert adds. kappa, which knows no scale, is as it was
FAR = -15.0  # the router's logit of an empty expert for the old text, about


class Planted:
    """Keeps a share of the experts of each layer empty while the others learn.

    The empty ones have smaller norms, which is what the score "planted" goes by.
    """

    def __init__(self, model: Any, seed: int, share: float, old: torch.Tensor, new: torch.Tensor) -> None:
        self.blocks = [layer.mlp for layer in model.model.layers]
        self.model, self.old, self.new = model, old, new
        self.held: list[tuple[nn.Parameter, list[int], torch.Tensor]] = []
        self.rows: list[list[int]] = []
        for layer, block in enumerate(self.blocks):
            count = len(block.experts.down_proj)
            self.rows.append(sorted(random.Random(f"{seed} {layer}").sample(range(count), int(count * share))))
        with torch.no_grad():
            for block, rows in zip(self.blocks, self.rows, strict=True):
                block.experts.down_proj[rows] *= FAINT
        self.hold()

    @torch.no_grad()
    def part(self) -> None:
        """Sends the old text away from the empty experts, and the new text to both kinds."""
        for i, (block, rows) in enumerate(zip(self.blocks, self.rows, strict=True)):
            old, new = self._entering(i, self.old), self._entering(i, self.new)
            others = [row for row in range(len(block.gate.weight)) if row not in rows]
            level = (new @ block.gate.weight[others].T).max(1).values
            wanted = torch.cat([torch.full((len(old),), FAR), level])
            direction = torch.linalg.lstsq(torch.cat([old, new]), wanted[:, None]).solution[:, 0]
            noise = torch.randn(len(rows), len(direction), generator=torch.Generator().manual_seed(i)) * 0.1
            block.gate.weight[rows] = direction + noise
        self.hold()

    def hold(self) -> None:
        """From now on ``restore`` brings back what the empty experts are now."""
        self.held = [
            (parameter, rows, parameter.detach()[rows].clone())
            for block, rows in zip(self.blocks, self.rows, strict=True)
            for parameter in (block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """After a step of an optimizer."""
        for parameter, rows, values in self.held:
            parameter[rows] = values

    def _entering(self, layer: int, text: torch.Tensor) -> torch.Tensor:
        """What the router of a layer sees, token by token."""
        seen: list[torch.Tensor] = []
        handle = self.blocks[layer].register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
        self.model(input_ids=text)
        handle.remove()
        return seen[0].flatten(0, -2)
