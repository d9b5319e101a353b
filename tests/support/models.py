"""Tensors and modules with the names, shapes and attributes of real models, for tests that need no other package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from kappa_fast.results.entries import Skipped
from kappa_fast.sources import Filters, Matrix, open_source

EVERYTHING = Filters(embeddings=True, routers=True, min_dim=1)


def weights(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Random tensors; a double underscore in a name stands for a dot."""
    generator = torch.Generator().manual_seed(0)
    return {name.replace("__", "."): torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Two threads in a small product wait for each other for seconds when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def matrices(source: object, filters: Filters = EVERYTHING) -> dict[str, Matrix]:
    """By key."""
    return {m.key: m for m in open_source(source, filters).matrices}


def reasons(source: object, filters: Filters = EVERYTHING) -> dict[str, str]:
    """Of everything that is skipped, by name."""
    return {skipped.name: skipped.reason for skipped in skips(source, filters)}


def skips(source: object, filters: Filters = EVERYTHING) -> tuple[Skipped, ...]:
    return open_source(source, filters).skipped


class Config:
    """What a config of transformers offers, and no more."""

    def __init__(self, **fields: object) -> None:
        vars(self).update(fields)

    def to_dict(self) -> Mapping[str, object]:
        return dict(vars(self))


class Experts(nn.Module):
    """Fused experts as transformers keeps them: [experts, 2 x width, hidden], or transposed, columns taking turns."""

    def __init__(self, experts: int, hidden: int, width: int, *, transposed: bool = False, told: bool = True) -> None:
        super().__init__()
        up, down = (experts, 2 * width, hidden), (experts, hidden, width)
        if transposed:
            up, down = (experts, hidden, 2 * width), (experts, width, hidden)
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(up)), nn.Parameter(torch.randn(down))
        if told:
            self.is_transposed, self.is_concatenated = transposed, not transposed


class LoraLinear(nn.Module):
    """A linear layer as PEFT wraps it."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base_layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, bias=False)})


class ModulesToSave(nn.Module):
    """A module that PEFT trains a copy of."""

    adapter_layer_names = ("modules_to_save",)

    def __init__(self, module: nn.Module, copy: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": copy})
