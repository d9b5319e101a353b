"""Data parallel and sharded training on two processes: the selection moves, the rest stays, ranks agree."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, batch, build
from ranks import on_two_ranks
from wrapping import assert_only_the_selected_moved, selection_of, snapshot

import kappa_fast
from kappa_fast import OptionError

distributed = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")

ADAMW = dict(lr=1e-2, weight_decay=0.1)


def equal_everywhere(model):
    for name, parameter in model.named_parameters():
        others = [torch.empty_like(parameter) for _ in range(2)]
        torch.distributed.all_gather(others, parameter.detach())
        assert torch.equal(*others), name


def data_parallel(rank, family):
    from torch.nn.parallel import DistributedDataParallel

    model = build(family)
    selection, before = selection_of(model), snapshot(model)
    optimizer = kappa_fast.wrap(torch.optim.AdamW, model, selection, **ADAMW)
    ddp = DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)
    for step in range(3):
        ddp(**batch(10 * step + rank)).loss.backward()
        for target in optimizer.targets:
            if not target.whole:  # what clipping sees
                selected = sum(float(target.parameter.grad[i].square().sum()) for i in target.indices)
                assert float(target.parameter.grad.square().sum()) == pytest.approx(selected)
        optimizer.step()
        optimizer.zero_grad()
    assert_only_the_selected_moved(model, selection, before)
    equal_everywhere(model)


def in_data_parallel_already(rank):
    from torch.nn.parallel import DistributedDataParallel

    model = build("llama")
    selection = selection_of(model)
    ddp = DistributedDataParallel(model)
    with pytest.raises(OptionError, match=r"in DistributedDataParallel already.*wrap\(\), before DDP"):
        kappa_fast.wrap(torch.optim.AdamW, ddp, selection, **ADAMW)
    handle = selection.apply(build("llama"))
    ready = build("llama")
    for target in handle.targets:
        ready.get_parameter(target.name).requires_grad_(True)
    for name, parameter in ready.named_parameters():
        parameter.requires_grad_(name in {t.name for t in handle.targets})
    optimizer = kappa_fast.wrap(torch.optim.SGD, DistributedDataParallel(ready), selection, lr=0.1)
    assert len(optimizer.targets) == len(handle.targets)


def shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model):
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def train(model, optimizer, steps):
    for step in steps:
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def compare(model, family, selection, before, steps):
    """Frozen weights bit for bit, the others as without sharding."""
    alone = build(family)
    train(alone, kappa_fast.wrap(torch.optim.AdamW, alone, selection, **ADAMW), range(steps))
    found = whole(model)
    held = build(family)
    held.load_state_dict({**held.state_dict(), **found})
    assert_only_the_selected_moved(held, selection, before)
    for name, parameter in alone.named_parameters():
        assert torch.allclose(found[name], parameter.detach(), atol=3e-5), name


def sharded_before(rank, family):
    model = build(family)
    selection, before = selection_of(model), snapshot(model)
    shard(model)
    optimizer = kappa_fast.wrap(torch.optim.AdamW, model, selection, **ADAMW)
    train(model, optimizer, range(3))
    compare(model, family, selection, before, 3)


def sharded_after(rank, family):
    """As accelerate does it: the model is sharded, and the optimizer's parameters are exchanged for its new ones."""
    model = build(family)
    selection, before = selection_of(model), snapshot(model)
    optimizer = kappa_fast.wrap(torch.optim.AdamW, model, selection, **ADAMW)
    names = [target.name for target in optimizer.targets]
    shard(model)
    with pytest.raises(OptionError, match="the model holds another"):
        optimizer.step()
    optimizer.param_groups[0]["params"] = [model.get_parameter(name) for name in names]
    train(model, optimizer, range(3))
    compare(model, family, selection, before, 3)


def saved_and_resumed(rank, folder):
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    straight, model = shard(build("mixtral")), build("mixtral")
    selection = selection_of(model)
    straight_optimizer = kappa_fast.wrap(torch.optim.AdamW, straight, selection, **ADAMW)
    train(straight, straight_optimizer, range(4))
    shard(model)
    optimizer = kappa_fast.wrap(torch.optim.AdamW, model, selection, **ADAMW)
    train(model, optimizer, range(2))
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    resumed = shard(build("mixtral"))
    second = kappa_fast.wrap(torch.optim.AdamW, resumed, selection, **ADAMW)
    weights, state = get_state_dict(resumed, second)
    checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(resumed, second, model_state_dict=weights, optim_state_dict=state)
    train(resumed, second, range(2, 4))
    for (name, ours), theirs in zip(whole(resumed).items(), whole(straight).values(), strict=True):
        assert torch.equal(ours, theirs), name


def muon_on_shards(rank):
    model = shard(build("mixtral"))
    selection = kappa_fast.rank(build("mixtral"), include="experts", progress=False).select(num_tensors=2)
    with pytest.raises(OptionError, match="Muon needs whole matrices"):
        kappa_fast.wrap(torch.optim.Muon, model, selection)


FAMILY = ["mixtral", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "mixtral")]


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILY)
def test_data_parallel_ranks_agree_and_leave_the_rest_alone(family):
    on_two_ranks(data_parallel, family)


@pytest.mark.slow
def test_in_data_parallel_already_nothing_may_flip():
    on_two_ranks(in_data_parallel_already)


@pytest.mark.parametrize(
    "family", ["mixtral", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt_oss", "llama"))]
)
def test_sharded_before_wrap(family):
    on_two_ranks(sharded_before, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "phi3"])
def test_sharded_after_wrap(family):
    on_two_ranks(sharded_after, family)


@pytest.mark.slow
def test_distributed_checkpoints_resume(tmp_path):
    on_two_ranks(saved_and_resumed, str(tmp_path))


@pytest.mark.slow
def test_muon_refuses_shards():
    on_two_ranks(muon_on_shards)
