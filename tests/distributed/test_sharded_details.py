"""Sharded models: what a tool has put on a layer, a callback that is given a wrapper, and ties of nothing."""

from __future__ import annotations

import types

import pytest
import torch
from ranks import on_ranks
from sharding import Net, flattened, fully_sharded, mesh, passed, together
from test_sharded import as_whole, world
from torch import nn

import kappa_fast

distributed = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")


def drift_in_fsdp1(rank, use_orig_params):
    """The same where what the Trainer has made of the model is another module, which its callbacks are given."""
    from types import SimpleNamespace

    from kappa_fast.integrations.transformers import KappaDriftCallback

    model = Net()
    callback = KappaDriftCallback(rerank_every=2, keep_rankings=True)
    control = SimpleNamespace(should_log=False)
    callback.on_init_end(None, None, control, model=model)
    trained = set(callback._trained(callback.ranking))
    wrapper = flattened(model, use_orig_params=use_orig_params)
    assert set(callback._trained(callback.ranking)) == trained != set()
    state = SimpleNamespace(global_step=2, epoch=None, log_history=[])
    callback.on_step_end(None, state, control, model=wrapper)
    assert list(map(repr, callback.rankings[2])) == list(map(repr, callback.ranking))
    assert callback.history[0]["trained"]["largest"] == 0.0
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=1.0)
    wrapper(torch.arange(8).view(2, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    state.global_step = 4
    callback.on_step_end(None, state, control, model=wrapper)
    assert callback.history[1]["trained"]["largest"] > 0.0


def method_of_the_instance(rank):
    """A forward() that a tool has put on a layer as a method of it, as on the whole model."""

    def centred(self, x):
        return nn.functional.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)

    def bound(model):
        for layer in model.layers:
            layer.up.forward = types.MethodType(centred, layer.up)
        return model

    found = as_whole(fully_sharded(bound(Net()), mesh(world())), bound(Net()))
    plain = {entry.key: entry.kappa for entry in kappa_fast.rank(Net())}
    changed = [entry for entry in found if entry.name.endswith(".up.weight")]
    assert len(changed) == 2
    assert all(entry.kappa != plain[entry.key] for entry in changed)


def tied_with_nothing_here(rank):
    """A stack of one expert under two names: rank 1 has nothing of either."""
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    stack = torch.randn(1, 40, 24)
    on = mesh(world())
    weight = distribute_tensor(stack, on, [Shard(0)])
    other = distribute_tensor(stack + 1, on, [Shard(0)])
    found = together({"a.experts.up": weight.detach(), "b.experts.up": weight.detach(), "c.experts.up": other})
    expected = kappa_fast.rank({"a.experts.up": stack, "b.experts.up": stack, "c.experts.up": stack + 1})
    assert list(map(repr, found)) == list(map(repr, expected))
    assert len(found) == 2


@pytest.mark.slow
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_the_callback_ranks_what_fsdp1_has_wrapped(use_orig_params):
    passed(on_ranks(2, drift_in_fsdp1, use_orig_params))


@pytest.mark.slow
def test_methods_of_instances_are_followed_in_shards():
    passed(on_ranks(2, method_of_the_instance))


def test_tied_weights_of_which_a_rank_has_nothing_are_one():
    passed(on_ranks(2, tied_with_nothing_here))
