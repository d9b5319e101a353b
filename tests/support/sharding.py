"""A small model with everything that sharding may get wrong, and the usual ways to shard it."""

from __future__ import annotations

import torch
from models import Experts
from ranks import Outcome
from torch import nn

import kappa_fast


class Standardized(nn.Linear):
    """Multiplies with another matrix than the one that it holds."""

    def forward(self, x):
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return nn.functional.linear(x, weight, self.bias)


class Attention(nn.Module):
    """Fused q, k and v, as transformers' GPTNeoX calls them, and a projection."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * size, size))
        self.out_proj = nn.Linear(size, size)

    def forward(self, x):
        q, k, v = nn.functional.linear(x, self.in_proj_weight).chunk(3, -1)
        return self.out_proj(q * k.sigmoid() + v)


class Layer(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.attention = Attention(size)
        self.up, self.down = nn.Linear(size, inner), nn.Linear(inner, size, bias=False)
        self.standard = Standardized(size, size)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(size, size))
        self.experts = Experts(3, size, 20)
        self.norm = nn.LayerNorm(size)

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        x = self.down(self.up(x).relu()) + self.standard(x) + self.normed(x)
        return (
            x + torch.einsum("bd,eod->bo", x, self.experts.gate_up_proj)[:, : x.shape[1]] * self.experts.down_proj.sum()
        )


class Net(nn.Module):
    """Two layers, a convolution, an embedding, and a head that is tied to it."""

    def __init__(self, size: int = 24, inner: int = 73) -> None:  # which no number of ranks divides
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, size)
        self.mix = nn.Conv1d(size, size + 3, 3, padding=1)
        self.back = nn.Linear(size + 3, size)
        self.layers = nn.ModuleList(Layer(size, inner) for _ in range(2))
        self.head = nn.Linear(size, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens).mean(1)
        x = self.back(self.mix(x.unsqueeze(-1)).squeeze(-1))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def mesh(*shape: int, names: tuple[str, ...] | None = None):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names or tuple("abc"[: len(shape)]))


def fully_sharded(model: nn.Module, on, **options) -> nn.Module:
    """By FSDP2, each layer for itself."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer, mesh=on, **options)
    return fully_shard(model, mesh=on, **options)


def tensor_parallel(model: nn.Module, on) -> nn.Module:
    """Up by its rows and down by its columns, as Megatron does."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for layer in model.layers:
        parallelize_module(layer, on, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def distributed_parameter(module: nn.Module, leaf: str, on, *placements) -> None:
    from torch.distributed.tensor import distribute_tensor

    value = distribute_tensor(getattr(module, leaf).detach(), on, placements)
    setattr(module, leaf, nn.Parameter(value))


def expert_parallel(model: nn.Module, on) -> nn.Module:
    """Whole experts of a stack on each rank."""
    from torch.distributed.tensor import Shard

    for layer in model.layers:
        for leaf in ("gate_up_proj", "down_proj"):
            distributed_parameter(layer.experts, leaf, on, Shard(0))
    return model


def flattened(model: nn.Module, *, use_orig_params: bool) -> nn.Module:
    """By FSDP1, each layer for itself."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Layer}),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )


def zero3(model: nn.Module) -> nn.Module:
    """Partitioned by DeepSpeed, with its optimizer around it."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def passed(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert outcome.error is None, outcome.trace
        assert outcome.seconds > 0, "it was killed"


def together(model, **options):
    return kappa_fast.rank(model, process_group=torch.distributed.group.WORLD, **options)
