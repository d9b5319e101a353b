"""wrap() and apply() on sharded and data-parallel models, and checkpoints that go on with another number of ranks."""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks
from sharding import Net, distributed_parameter, fully_sharded, mesh, passed, tensor_parallel
from wrapping import assert_only_the_selected_moved, snapshot

import kappa_fast
from kappa_fast import OptionError
from kappa_fast.training.masks import frozen_mask, local_mask

distributed = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")

ADAMW = dict(lr=1e-2, weight_decay=0.1)


def net():
    return Net(inner=72)  # torch trains tensor-parallel layers that divide evenly only


def selected():
    """Some experts, some parts of fused projections, and whole matrices."""
    return kappa_fast.rank(net(), include=r"experts|in_proj|up\.").select(num_tensors=9)


def train(model, optimizer, steps):
    for step in steps:
        tokens = torch.randint(0, 50, (4, 3), generator=torch.Generator().manual_seed(step))
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model):
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in parameters.items()}


def alone(steps):
    """The unsharded model after so many steps, and what it was before."""
    model, selection = net(), selected()
    before = snapshot(model)
    train(model, kappa_fast.wrap(torch.optim.AdamW, model, selection, **ADAMW), range(steps))
    assert any(not target.whole for target in selection.apply(net()).targets)
    return model, before


def compare(model, steps):
    """Frozen weights bit for bit, the others as without sharding."""
    expected, before = alone(steps)
    found = net()
    with torch.no_grad():
        for name, value in whole(model).items():
            found.get_parameter(name).copy_(value)
    assert_only_the_selected_moved(found, selected(), before)
    for name, parameter in expected.named_parameters():
        assert torch.allclose(found.get_parameter(name), parameter, atol=3e-5), name


def shapes_of_meshes(rank):
    from torch.distributed.tensor import Shard, distribute_tensor

    grid = mesh(2, 2, names=("data", "tensor"))
    models = [
        fully_sharded(tensor_parallel(net(), grid["tensor"]), grid["data"]),
        fully_sharded(net(), grid),
    ]
    for model in models:
        train(model, kappa_fast.wrap(torch.optim.AdamW, model, selected(), **ADAMW), range(2))
        compare(model, 2)
    for placements in ((Shard(0), Shard(0)), (Shard(1), Shard(0))):
        model = net()
        distributed_parameter(model.layers[0].experts, "gate_up_proj", grid, *placements)
        target = next(t for t in selected().apply(model).targets if t.name == "layers.0.experts.gate_up_proj")
        mask = frozen_mask(target)
        whole_mask = mask.expand(target.parameter.shape)
        expected = distribute_tensor(whole_mask.to(torch.uint8), grid, placements).to_local().bool()
        assert torch.equal(local_mask(mask, target.parameter).expand(expected.shape), expected)


def applied(rank):
    """apply() for whoever makes the optimizer."""
    model, before = fully_sharded(net(), mesh(2)), snapshot(net())
    with selected().apply(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW)
        train(model, optimizer, range(2))
    found = net()
    with torch.no_grad():
        for name, value in whole(model).items():
            found.get_parameter(name).copy_(value)
    assert_only_the_selected_moved(found, selected(), before)


def not_by_element(rank):
    with pytest.raises(OptionError, match="Adafactor takes statistics of whole matrices, and 'layers"):
        kappa_fast.wrap(torch.optim.Adafactor, fully_sharded(net(), mesh(2)), selected())


def prepared(kind):
    from torch.nn.parallel import DistributedDataParallel

    model = net()
    if kind == "fsdp2":
        fully_sharded(model, mesh(torch.distributed.get_world_size()))
    optimizer = kappa_fast.wrap(torch.optim.AdamW, model, selected(), **ADAMW)
    return (DistributedDataParallel(model, find_unused_parameters=True) if kind == "ddp" else model), model, optimizer


def saved(rank, kind, folder):
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    outer, _, optimizer = prepared(kind)
    train(outer, optimizer, range(2))
    weights, state = get_state_dict(outer, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def resumed(rank, kind, folder):
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    outer, model, optimizer = prepared(kind)
    weights, state = get_state_dict(outer, optimizer)
    checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(outer, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(outer, optimizer, range(2, 4))
    compare(model, 4)


@pytest.mark.slow
def test_meshes_of_two_dimensions_train_exactly_what_is_selected():
    passed(on_ranks(4, shapes_of_meshes))


@pytest.mark.slow
def test_apply_on_shards():
    passed(on_ranks(2, applied))


@pytest.mark.slow
def test_optimizers_that_look_at_whole_matrices_are_refused_for_parts_of_shards():
    passed(on_ranks(2, not_by_element))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (2, 1)])
def test_checkpoints_go_on_with_another_number_of_ranks(tmp_path, kind, before, after):
    passed(on_ranks(before, saved, kind, str(tmp_path)))
    passed(on_ranks(after, resumed, kind, str(tmp_path)))
