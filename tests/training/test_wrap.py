"""wrap(): what is selected moves as if it were alone, and everything else stays bit for bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from families import FAMILIES, MOE, batch, build
from wrapping import assert_only_the_selected_moved, selection_of, snapshot

import kappa_fast
from kappa_fast import OptionError, Selection, wrap
from kappa_fast.matching.names import match

STEPS = 50


class Alone:
    """The reference: an ordinary optimizer over parameters that are the pieces, in another copy of the model."""

    def __init__(self, optimizer_cls: Any, model: torch.nn.Module, selection: Selection, **options: Any) -> None:
        self.model = model
        self.targets = match(selection, model)
        chosen = {target.name for target in self.targets}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        self.pieces = [
            [torch.nn.Parameter(t.parameter.detach()[i].contiguous().clone()) for i in t.indices] for t in self.targets
        ]
        self.optimizer = optimizer_cls([piece for some in self.pieces for piece in some], **options)

    def collect(self) -> None:
        for target, some in zip(self.targets, self.pieces, strict=True):
            for index, piece in zip(target.indices, some, strict=True):
                gradient = target.parameter.grad
                piece.grad = None if gradient is None else gradient[index].contiguous().clone()
            target.parameter.grad = None

    def step(self) -> None:
        self.collect()
        self.write(self.optimizer.step)

    def write(self, step: Any) -> None:
        step()
        with torch.no_grad():
            for target, some in zip(self.targets, self.pieces, strict=True):
                for index, piece in zip(target.indices, some, strict=True):
                    target.parameter[index] = piece


ADAMW = (torch.optim.AdamW, dict(lr=1e-2, weight_decay=0.1))
OPTIMIZERS = {
    "adamw": ADAMW,
    "adamw fused": (torch.optim.AdamW, dict(lr=1e-2, weight_decay=0.1, fused=True)),
    "adamw foreach": (torch.optim.AdamW, dict(lr=1e-2, weight_decay=0.1, foreach=True)),
    "adamw amsgrad": (torch.optim.AdamW, dict(lr=1e-2, weight_decay=0.1, amsgrad=True)),
    "sgd": (torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)),
    "adafactor": (torch.optim.Adafactor, dict(lr=1e-2, weight_decay=0.1)),
    "adagrad": (torch.optim.Adagrad, dict(lr=1e-2, weight_decay=0.1)),
    "rmsprop": (torch.optim.RMSprop, dict(lr=1e-3, weight_decay=0.1, momentum=0.9)),
    "rprop": (torch.optim.Rprop, dict(lr=1e-3)),
    "nadam": (torch.optim.NAdam, dict(lr=1e-3, weight_decay=0.1)),
    "muon": (torch.optim.Muon, dict(lr=1e-2, weight_decay=0.1)),
}
LONG = ("adamw", "adamw fused", "sgd", "adafactor")
# Every optimizer with some family and every family with some optimizer; the other pairs are slow tests.
PAIRS = [
    ("mixtral", "adamw"),
    ("gpt_oss", "adamw fused"),
    ("gpt_oss", "adafactor"),
    ("mixtral", "sgd"),
    ("olmoe", "adafactor"),
    ("phi3", "adamw foreach"),
    ("qwen3_moe", "muon"),
    ("deepseek_v3", "adagrad"),
    ("llama", "nadam"),
    ("bert", "rmsprop"),
    ("mixtral", "adamw amsgrad"),
    ("olmoe", "rprop"),
]
OTHERS = [(f, o) for f in FAMILIES for o in OPTIMIZERS if (f, o) not in PAIRS]


@pytest.mark.parametrize(
    ("family", "name"), [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)]
)
def test_pieces_move_as_if_they_were_parameters_of_their_own(family, name):
    optimizer_cls, options = OPTIMIZERS[name]
    model, twin = build(family), build(family)
    selection = selection_of(model)
    before = snapshot(model)
    optimizer, alone = (
        wrap(optimizer_cls, model, selection, **options),
        Alone(optimizer_cls, twin, selection, **options),
    )
    assert isinstance(optimizer, optimizer_cls)
    for step in range(STEPS if name in LONG else 8):
        for one in (model, twin):
            one(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        alone.step()
    assert_only_the_selected_moved(model, selection, before)
    for (n, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs), n


@pytest.mark.parametrize("family", ["mixtral", *(pytest.param(f, marks=pytest.mark.slow) for f in MOE[1:])])
@pytest.mark.parametrize("how", ["accumulate", "clip", "autocast", "scaler", "checkpointing", "scheduler"])
def test_training_loops_leave_the_rest_alone(family, how):
    model = build(family, use_cache=False)
    selection, before = selection_of(model), snapshot(build(family))
    optimizer = wrap(torch.optim.AdamW, model, selection, lr=1e-2, weight_decay=0.1)
    if how == "checkpointing":
        model.train()
        model.activation_checkpointing_enable()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    scaler = torch.amp.GradScaler("cpu", enabled=how == "scaler", init_scale=16.0)
    for step in range(STEPS):
        for part in range(2 if how == "accumulate" else 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=how in ("autocast", "scaler")):
                loss = model(**batch(2 * step + part)).loss
            scaler.scale(loss).backward()
        if how == "clip":
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        if how == "scheduler":
            scheduler.step()
        optimizer.zero_grad()
    assert_only_the_selected_moved(model, selection, before)
    if how == "scheduler":
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / (1 + STEPS))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "PagedAdamW8bit", "AdamW"])
def test_optimizers_of_bitsandbytes_work_on_pieces(name):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer_cls, options = getattr(bitsandbytes.optim, name), dict(lr=1e-2, weight_decay=0.1, min_8bit_size=128)
    model, twin = build("mixtral"), build("mixtral")
    selection, before = selection_of(model), snapshot(model)
    optimizer, alone = (
        wrap(optimizer_cls, model, selection, **options),
        Alone(optimizer_cls, twin, selection, **options),
    )
    for step in range(4):
        for one in (model, twin):
            one(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        alone.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert_only_the_selected_moved(model, selection, before)
    for (n, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs), n
    kinds = {value.dtype for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)}
    assert (torch.uint8 in kinds) == (name != "AdamW")


def test_clipping_sees_the_gradients_of_selected_weights_alone():
    model, twin = build("mixtral"), build("mixtral")
    selection = selection_of(model)
    optimizer = wrap(torch.optim.SGD, model, selection, lr=0.1)
    alone = Alone(torch.optim.SGD, twin, selection, lr=0.1)
    model(**batch()).loss.backward()
    twin(**batch()).loss.backward()
    alone.collect()
    ours = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    theirs = torch.nn.utils.clip_grad_norm_([p for some in alone.pieces for p in some], 1e-2)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    optimizer.step()
    alone.write(alone.optimizer.step)
    for (n, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-7), n


def test_a_nan_among_frozen_gradients_reaches_nobody():
    model = build("mixtral")
    selection, before = selection_of(model), snapshot(model)
    optimizer = wrap(torch.optim.AdamW, model, selection, lr=1e-2)
    target = next(t for t in optimizer.targets if not t.whole)
    target.parameter.grad = torch.full_like(target.parameter, float("nan"))
    model(**batch()).loss.backward()
    frozen = optimizer._handle._guards[target.name].frozen.of(target.parameter).expand_as(target.parameter)
    assert not target.parameter.grad[frozen].any()
    target.parameter.grad.nan_to_num_(0.0)
    optimizer.step()
    assert_only_the_selected_moved(model, selection, before, all_moved=False)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    def size(value: Any) -> int:
        if isinstance(value, dict):
            return sum(size(v) for v in value.values())
        return value.numel() * value.element_size() if torch.is_tensor(value) and value.numel() > 1 else 0

    return sum(size(state) for state in optimizer.state.values())


def test_state_is_that_of_the_selected_weights():
    model = build("mixtral", num_local_experts=64)
    ranking = kappa_fast.rank(model, include="experts", progress=False)
    keys = {f"model.layers.0.mlp.experts.down_proj[{i}]" for i in range(8)}
    chosen = Selection(tuple(e for e in ranking if e.key in keys), True, {})
    for selection in (chosen, ranking.select(max_params=0.2)):
        optimizer = wrap(torch.optim.AdamW, model, selection, lr=1e-3)
        model(**batch()).loss.backward()
        for target in optimizer.targets:  # an expert that no token was sent to has no gradient of its own
            target.parameter.grad = torch.ones_like(target.parameter)
        optimizer.step()
        assert state_bytes(optimizer) == 2 * 4 * selection.num_params
        assert sum(t.numel for t in optimizer.targets) == selection.num_params
        optimizer.restore()


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that an operation brought into being."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if torch.is_tensor(a)}
        known |= {t.untyped_storage().data_ptr() for a in args if isinstance(a, list) for t in a if torch.is_tensor(t)}
        for tensor in found if isinstance(found, (list, tuple)) else [found]:
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.numel())
        return found


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_step_makes_nothing_larger_than_a_piece(family):
    model = build(family, num_local_experts=16)
    selection = selection_of(model)
    optimizer = wrap(torch.optim.AdamW, model, selection, lr=1e-3, foreach=False)
    model(**batch()).loss.backward()
    with Allocations() as made:
        optimizer.step()
    assert 0 < made.largest <= max(entry.numel for entry in selection)
    assert made.largest < max(t.parameter.numel() for t in optimizer.targets if not t.whole) / 8


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "adagrad"])
def test_resuming_in_the_middle_gives_the_same_weights(name, tmp_path):
    optimizer_cls, options = OPTIMIZERS[name]

    def train(model, optimizer, steps):
        for step in steps:
            model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    straight, halved = build("gpt_oss"), build("gpt_oss")
    selection = selection_of(straight)
    train(straight, wrap(optimizer_cls, straight, selection, **options), range(8))
    first = wrap(optimizer_cls, halved, selection, **options)
    train(halved, first, range(4))
    torch.save({"model": halved.state_dict(), "optimizer": first.state_dict()}, tmp_path / "middle.pt")
    saved = torch.load(tmp_path / "middle.pt", weights_only=True)
    resumed = build("gpt_oss")
    resumed.load_state_dict(saved["model"])
    second = wrap(optimizer_cls, resumed, selection, **options)
    second.load_state_dict(saved["optimizer"])
    train(resumed, second, range(4, 8))
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_in_bfloat16_step_counts_survive_a_checkpoint():
    model = build("mixtral").to(torch.bfloat16)
    optimizer = wrap(torch.optim.AdamW, model, selection_of(model), lr=1e-3)
    model(**batch()).loss.backward()
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    states = list(optimizer.state.values())
    assert {s["step"].dtype for s in states} == {torch.float32}
    assert {p["step"].dtype for s in states for p in s.get("pieces", {}).values()} == {torch.float32}


def test_copies_and_pickles_step_without_the_model():
    model = build("mixtral")
    optimizer = wrap(torch.optim.AdamW, model, selection_of(model), lr=1e-2, weight_decay=0.1)
    model(**batch()).loss.backward()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(other) is type(optimizer)
        mine, theirs = other.param_groups[0]["params"], optimizer.param_groups[0]["params"]
        for p, q in zip(mine, theirs, strict=True):
            p.grad = q.grad.clone()
        other.step()
        assert not torch.equal(mine[0], theirs[0])
        moved = [p.detach().clone() for p in mine]
        assert other.targets == ()
        other.restore()
        reference = [q.detach().clone() for q in theirs]
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(moved, theirs, strict=True))
        with torch.no_grad():
            for q, r in zip(theirs, reference, strict=True):
                q.copy_(r)
        optimizer.state.clear()


def test_hooks_of_a_step_run_once_around_it_and_see_real_parameters():
    model = build("mixtral")
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).step()  # torch has hooked the class by now
    optimizer = wrap(torch.optim.AdamW, model, selection_of(model), lr=1e-2)
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(("before", len(o.param_groups[0]["params"]))))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(("after", len(o.param_groups[0]["params"]))))
    model(**batch()).loss.backward()
    optimizer.step()
    assert seen == [("before", len(optimizer.targets)), ("after", len(optimizer.targets))]


def test_a_closure_is_called_once_and_its_loss_returned():
    model = build("mixtral")
    selection, before = selection_of(model), snapshot(model)
    optimizer, calls = wrap(torch.optim.SGD, model, selection, lr=0.1), []

    def closure():
        calls.append(1)
        loss = model(**batch()).loss
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    assert len(calls) == 1
    assert_only_the_selected_moved(model, selection, before)


def test_a_step_that_fails_leaves_the_real_parameters_in_place(monkeypatch):
    model = build("mixtral")
    optimizer = wrap(torch.optim.AdamW, model, selection_of(model), lr=1e-2)
    model(**batch()).loss.backward()
    optimizer.step()
    states = {id(p): len(s) for p, s in optimizer.state.items()}
    monkeypatch.setattr(type(optimizer)._base, "step", lambda self: (_ for _ in ()).throw(RuntimeError("full")))
    with pytest.raises(RuntimeError, match="full"):
        optimizer.step()
    assert optimizer.param_groups[0]["params"] == [t.parameter for t in optimizer.targets]
    assert {id(p): len(s) for p, s in optimizer.state.items()} == states


def test_lbfgs_takes_whole_parameters_only():
    model = build("mixtral")
    with pytest.raises(OptionError, match="LBFGS evaluates the model many times"):
        wrap(torch.optim.LBFGS, model, selection_of(model))
    assert all(p.requires_grad for p in model.parameters())
    whole = build("llama")
    optimizer = wrap(torch.optim.LBFGS, whole, selection_of(whole), lr=0.1, max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = whole(**batch()).loss
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())
    assert float(closure().detach()) < first


def test_muon_refuses_what_is_no_matrix_by_name():
    model = build("llama")
    with pytest.raises(OptionError, match=r"Muon works on matrices, and 'model\.norm\.weight' is not one"):
        wrap(torch.optim.Muon, model, selection_of(model).including(r"^model\.norm"))


def test_an_empty_selection_has_nothing_to_optimize_and_changes_nothing():
    model = build("llama")
    with pytest.raises(OptionError, match="the selection is empty"):
        wrap(torch.optim.AdamW, model, Selection((), True, {}))
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_no_optimizer_class_is_refused():
    with pytest.raises(OptionError, match=r"is not a torch\.optim\.Optimizer class"):
        wrap(torch.nn.Linear, build("llama"), Selection((), True, {}))


def test_selecting_every_part_is_selecting_the_parameter():
    model = build("mixtral")
    ranking = kappa_fast.rank(model, progress=False)
    optimizer = wrap(torch.optim.AdamW, model, ranking.select(top_p=1.0), lr=1e-3)
    assert all(target.whole for target in optimizer.targets)


def test_restore_brings_back_what_trained():
    model = build("mixtral")
    model.model.norm.weight.requires_grad_(False)
    optimizer = wrap(torch.optim.AdamW, model, selection_of(model), lr=1e-3)
    assert model.model.embed_tokens.weight.requires_grad is False
    optimizer.restore()
    optimizer.restore()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert flags.pop("model.norm.weight") is False
    assert all(flags.values())
    model(**batch()).loss.backward()
    assert all(t.parameter.grad.flatten().count_nonzero() > t.numel for t in optimizer.targets if not t.whole)


def test_parameters_that_were_replaced_are_noticed():
    model = build("llama")
    optimizer = wrap(torch.optim.AdamW, model, selection_of(model), lr=1e-3)
    name = optimizer.targets[0].name
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(torch.zeros_like(model.get_parameter(name))))
    with pytest.raises(OptionError, match=r"the model holds another .* than this optimizer"):
        optimizer.step()


def test_a_model_that_was_cast_after_ranking_trains():
    model = build("mixtral")
    selection = selection_of(model)
    model.to(torch.bfloat16)
    before = snapshot(model)
    optimizer = wrap(torch.optim.SGD, model, selection, lr=1.0)
    model(**batch()).loss.backward()
    optimizer.step()
    assert_only_the_selected_moved(model, selection, before)


def test_muon_trains_a_convolution_as_the_matrix_that_was_ranked():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 20, 3, bias=False), torch.nn.Conv1d(3, 16, 6, bias=False))
    twin = copy.deepcopy(model)
    selection = kappa_fast.rank(model, progress=False, min_dim=4).select(top_p=1.0)
    optimizer = wrap(torch.optim.Muon, model, selection, lr=0.1)
    matrices = [torch.nn.Parameter(m.weight.detach().flatten(1).clone()) for m in twin]
    alone = torch.optim.Muon(matrices, lr=0.1)
    for module, matrix in zip(model, matrices, strict=True):
        module.weight.grad = torch.randn_like(module.weight)
        matrix.grad = module.weight.grad.flatten(1).clone()
    optimizer.step()
    alone.step()
    for module, matrix in zip(model, matrices, strict=True):
        assert torch.equal(module.weight.detach().flatten(1), matrix)


def test_the_class_of_an_optimizer_that_was_made_can_be_wrapped_again():
    model = build("mixtral")
    selection = selection_of(model)
    first = wrap(torch.optim.AdamW, model, selection, lr=1e-2)
    first.restore()
    assert type(wrap(type(first), model, selection, lr=1e-2)) is type(first)
