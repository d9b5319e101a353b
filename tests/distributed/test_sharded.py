"""Sharded models, ranked where they are: the same ranking as of the whole model, whatever has sharded it."""

from __future__ import annotations

import os

import pytest
import torch
from ranks import on_ranks
from sharding import (
    Net,
    distributed_parameter,
    expert_parallel,
    flattened,
    fully_sharded,
    mesh,
    passed,
    tensor_parallel,
    together,
    zero3,
)

import kappa_fast
from kappa_fast import OptionError, ProcessGroupError, ShardedError
from kappa_fast.sources.placements import pieces_here

distributed = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")


def as_whole(model, whole=None, **options):
    """The ranking of all ranks, which is that of the whole model."""
    expected = kappa_fast.rank(Net() if whole is None else whole, **options)
    before = {name: (id(p), local_bytes(p)) for name, p in model.named_parameters()}
    found = together(model, **options)
    assert {name: (id(p), local_bytes(p)) for name, p in model.named_parameters()} == before
    assert list(map(repr, found)) == list(map(repr, expected))
    assert found.skipped == expected.skipped
    assert found.metadata["num_parameters"] == expected.metadata["num_parameters"]
    assert found.metadata["source"] == expected.metadata["source"]
    return found


def local_bytes(parameter):
    local = parameter.detach()
    local = local.to_local() if hasattr(local, "to_local") else local
    return local.contiguous().view(torch.uint8).numpy().tobytes()


def refused(error, match, model, **options):
    with pytest.raises(error, match=match):
        kappa_fast.rank(model, **options)


def world():
    return torch.distributed.get_world_size()


def fsdp2(rank):
    model = fully_sharded(Net(), mesh(world()))
    refused(ShardedError, r"sharded over several processes \(DTensor\), and so are .*process_group", model)
    found = as_whole(model)
    shares = found.metadata["ranks"]
    assert all(share["matrices"] for share in shares)
    held = sum(p.numel() * p.element_size() for p in Net().parameters())
    assert sum(share["gathered"] for share in shares) < 1.5 * held
    as_whole(model, top=4, certify="selection")
    as_whole(model, fused="stored", embeddings=True, certify=True)
    as_whole(fully_sharded(Net().to(torch.bfloat16), mesh(world())), Net().to(torch.bfloat16), memory_budget="64KB")


def after_steps(rank):
    model = fully_sharded(Net(), mesh(world()))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(torch.arange(8).view(2, 4)).square().mean().backward()
    optimizer.step()
    whole = Net()
    whole.load_state_dict({n: t.full_tensor() for n, t in model.state_dict().items()})
    assert len(as_whole(model, whole)) > 0
    with torch.no_grad():
        model(torch.arange(8).view(2, 4))
    refused(ShardedError, r"FSDP2 has gathered the parameters of FSDPNet.*reshard\(\)", model)
    model.reshard()
    as_whole(model, whole)


def parallel(rank):
    as_whole(tensor_parallel(Net(), mesh(world())))
    as_whole(expert_parallel(Net(), mesh(world())))
    as_whole(expert_parallel(tensor_parallel(Net(), mesh(world())), mesh(world())))


def two_dimensions(rank):
    from torch.distributed.tensor import Replicate, Shard

    grid = mesh(2, 2, names=("data", "tensor"))
    as_whole(fully_sharded(tensor_parallel(Net(), grid["tensor"]), grid["data"]))
    model = fully_sharded(Net(), grid)  # replicated along the first
    as_whole(model)
    for placements in ((Shard(0), Shard(1)), (Shard(1), Shard(0)), (Shard(0), Shard(0)), (Replicate(), Shard(1))):
        model = Net()
        for leaf in ("gate_up_proj", "down_proj"):
            distributed_parameter(model.layers[1].experts, leaf, grid, *placements)
        distributed_parameter(model.layers[0].attention, "in_proj_weight", grid, *placements)
        distributed_parameter(model.mix, "weight", grid, *placements)
        as_whole(model)


def copies_differ(rank):
    model = fully_sharded(Net(), mesh(2, 2))
    if rank == 3:
        with torch.no_grad():
            model.layers[1].up.weight.to_local()[0, 0] += 1
    with pytest.raises(
        ProcessGroupError, match=r"rank 3 has another copy of layers\.1\.up\.weight from .* than rank 1"
    ):
        together(model)


def fsdp1(rank):
    for use_orig_params in (True, False):
        model = flattened(Net(), use_orig_params=use_orig_params)
        refused(ShardedError, r"sharded over several processes \(FSDP\)", model)
        as_whole(model)
        model(torch.arange(8).view(2, 4)).square().mean().backward()
        as_whole(model, top=3)
        if use_orig_params:
            refused(ShardedError, "what FSDP1 has put around the model is not there", model.module)


def state_dicts(rank, cache):
    weights = fully_sharded(Net(), mesh(world())).state_dict()
    expected = kappa_fast.rank(Net().state_dict())
    for computed in (len(expected), 0):
        found = together(weights, cache=cache)
        assert list(map(repr, found)) == list(map(repr, expected))
        assert found.metadata["cache"]["computed"] == computed
    assert dict(kappa_fast.rank(Net().state_dict(), cache=cache).metadata["cache"])["computed"] == 0


def drift(rank):
    """The callback ranks what the Trainer has sharded since, and finds what has moved."""
    from types import SimpleNamespace

    from kappa_fast.integrations.transformers import KappaDriftCallback

    model = Net()
    callback = KappaDriftCallback(rerank_every=2)
    control = SimpleNamespace(should_log=False)
    callback.on_init_end(None, None, control, model=model)
    fully_sharded(model, mesh(world()))
    state = SimpleNamespace(global_step=2, epoch=None, log_history=[])
    callback.on_step_end(None, state, control)
    assert {found["largest"] for kind, found in callback.history[0].items() if kind != "step"} == {0.0}
    with torch.no_grad():
        model.layers[0].up.weight.to_local()[:, 0].mul_(5)
    state.global_step = 4
    callback.on_step_end(None, state, control)
    assert callback.history[1]["trained"]["largest"] > 0.1


def adapters(rank):
    import peft

    def adapted():
        torch.manual_seed(1)
        config = peft.LoraConfig(target_modules=["up", "down"], r=4, init_lora_weights=False)
        return peft.get_peft_model(Net(), config)

    model = adapted()
    fully_sharded(model.base_model.model, mesh(world()))
    expected, found = kappa_fast.rank(adapted(), adapters="merged"), together(model, adapters="merged")
    assert list(map(repr, found)) == list(map(repr, expected))
    assert found.skipped == expected.skipped
    with pytest.warns(UserWarning, match="the model has adapters of PEFT"):
        together(model)


def partitioned(rank):
    import deepspeed

    os.environ["LOCAL_RANK"] = str(rank)
    deepspeed.init_distributed("gloo")
    engine = zero3(Net())
    refused(ShardedError, r"sharded over several processes \(ZeRO-3\)", engine.module)
    as_whole(engine.module)
    loss = engine(torch.arange(8).view(2, 4)).square().mean()
    engine.backward(loss)
    engine.step()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        whole = Net()
        whole.load_state_dict({name: t.detach().clone() for name, t in engine.module.state_dict().items()})
    as_whole(engine.module, whole)


def stage_of(rank):
    """Half of the model, as a pipeline has it: one layer of the two, and the head again where it is tied."""
    model = Net()
    del model.layers[1 - rank % 2]
    model.layers = torch.nn.ModuleDict({str(rank % 2): model.layers[0]})
    if rank % 2:
        del model.embed, model.mix, model.back
    return model


def pipeline(rank):
    expected = kappa_fast.rank(Net(), embeddings=True)
    as_mine = {entry.key: entry for entry in expected}
    found = together(stage_of(rank), stages=True, embeddings=True)
    assert {entry.key for entry in found} == {*as_mine, "head.weight"}  # of its own on the last stage
    for entry in found:
        if entry.name not in ("embed.weight", "head.weight"):
            assert repr(entry) == repr(as_mine[entry.key])
    head = Net().head.weight.numel()
    assert found.metadata["num_parameters"] == sum(p.numel() for p in Net().parameters()) + head
    assert all(share["matrices"] and not share["gathered"] for share in found.metadata["ranks"])
    assert len(together(stage_of(rank), stages=True, top=3)) == len(found) - 1  # without embed
    other = Net()
    if rank:
        other.layers[1].up = torch.nn.Linear(24, 30)
    with pytest.raises(ProcessGroupError, match=r"rank 1 has another layers\.1\.up\.weight than rank 0"):
        together(other, stages=True)
    with torch.no_grad():
        other = Net()
        other.layers[0].up.weight[0, 0] += rank
    with pytest.raises(ProcessGroupError, match=r"rank 1 has another copy of layers\.0\.up\.weight than rank 0"):
        together(other, stages=True)
    with pytest.raises(ProcessGroupError, match=r"rank 1 has other settings than rank 0 .stages: True against False"):
        together(Net(), stages=bool(rank))
    refused(OptionError, "stages=True .* process_group", Net(), stages=True)


def pipeline_of_shards(rank):
    """Two stages, each on two ranks that share it out: 0 and 2, 1 and 3."""
    from torch.distributed.device_mesh import init_device_mesh

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "stage"))
    model = stage_of(rank)
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.layers[str(rank % 2)], mesh=grid["data"])
    fully_shard(model, mesh=grid["data"])
    expected = {entry.key: repr(entry) for entry in kappa_fast.rank(Net())}
    found = together(model, stages=True)
    assert {entry.key: repr(entry) for entry in found if entry.name != "head.weight"} == expected


def experts_apart(rank):
    """Experts with numbers of the whole model, one on each rank; the rest is everywhere."""

    def moe():
        torch.manual_seed(0)
        experts = {str(i): torch.nn.Linear(24, 40, bias=False) for i in range(2)}
        return torch.nn.ModuleDict({"dense": torch.nn.Linear(24, 24), "experts": torch.nn.ModuleDict(experts)})

    model = moe()
    del model.experts[str(1 - rank)]
    expected = kappa_fast.rank(moe())
    found = together(model, stages=True)
    assert list(map(repr, found)) == list(map(repr, expected))
    assert found.metadata["num_parameters"] == expected.metadata["num_parameters"]
    model = moe()
    del model.experts["1"]
    with torch.no_grad():
        model.experts["0"].weight += rank  # two experts under one name
    with pytest.raises(ProcessGroupError, match=r"rank 1 has another copy of experts\.0\.weight"):
        together(model, stages=True)


def sharded_on_one(rank):
    """One rank has the whole model, the other shards of it."""
    model = fully_sharded(Net(), mesh(world()))
    with pytest.raises(ProcessGroupError, match=r"rank 1 has other matrices than rank 0 .sharded: True against False"):
        together(model if rank else Net())


def not_understood(rank):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Shard

    model, on = Net(), mesh(world())
    model.back.weight = torch.nn.Parameter(DTensor.from_local(model.back.weight.detach(), on, [Partial()]))
    refused(ShardedError, r"back\.weight: sharded .* in a way that is not read: Partial is none of", model)
    assert "back.weight" not in [entry.name for entry in together(model, exclude="back")]
    backwards, model = DeviceMesh("cpu", [1, 0]), Net()
    distributed_parameter(model.back, "weight", backwards, Shard(0))
    refused(ShardedError, r"back\.weight: sharded .* do not ascend along every dimension", model)
    with pytest.raises(ShardedError, match="do not ascend"):
        pieces_here(model.back.weight)
    half = torch.distributed.new_group([0])
    if rank == 0:
        model = fully_sharded(Net(), mesh(world()))
        refused(ShardedError, "process_group", model, process_group=half)
    else:
        fully_sharded(Net(), mesh(world()))


def in_a_part_of_the_group(rank):
    pair = torch.distributed.new_group([0, 1])
    model = fully_sharded(Net(), mesh(world()))
    if rank < 2:
        refused(OptionError, r"process_group lacks rank 2, which holds a part of", model, process_group=pair)
    torch.distributed.barrier()


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_fully_sharded_models_are_ranked_as_whole_ones(size):
    passed(on_ranks(size, fsdp2))


@pytest.mark.slow
def test_what_is_ranked_is_what_has_been_trained():
    passed(on_ranks(2, after_steps))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_tensor_and_expert_parallel_models_are_ranked_as_whole_ones(size):
    passed(on_ranks(size, parallel))


@pytest.mark.slow
def test_meshes_of_two_dimensions():
    passed(on_ranks(4, two_dimensions))


@pytest.mark.slow
def test_copies_that_differ_are_named():
    passed(on_ranks(4, copies_differ))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_models_in_fsdp1_are_ranked_as_whole_ones(size):
    passed(on_ranks(size, fsdp1))


@pytest.mark.slow
def test_state_dicts_of_shards_and_the_cache(tmp_path):
    passed(on_ranks(2, state_dicts, tmp_path))


@pytest.mark.slow
def test_the_callback_ranks_shards():
    passed(on_ranks(2, drift))


@pytest.mark.slow
def test_adapters_in_a_sharded_model():
    passed(on_ranks(2, adapters))


@pytest.mark.slow
def test_models_partitioned_by_zero3(monkeypatch):
    pytest.importorskip("deepspeed", reason="pip install deepspeed: it is too heavy for the extra test")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    passed(on_ranks(2, partitioned))


def test_stages_of_a_pipeline_are_ranked_as_one_model():
    passed(on_ranks(2, pipeline))


@pytest.mark.slow
def test_sharded_stages_of_a_pipeline():
    passed(on_ranks(4, pipeline_of_shards))


@pytest.mark.slow
def test_experts_apart():
    passed(on_ranks(2, experts_apart))


@pytest.mark.slow
def test_shards_here_and_a_whole_model_there_are_refused():
    passed(on_ranks(2, sharded_on_one))


def test_what_is_not_understood_is_refused_by_name():
    passed(on_ranks(2, not_understood))


@pytest.mark.slow
def test_all_that_hold_the_model_must_take_part():
    passed(on_ranks(3, in_a_part_of_the_group))
