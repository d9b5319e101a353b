"""selection.apply(model): it freezes all parameters that are not selected, and guards those selected in part."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..errors import OptionError
from ..matching.names import Target, holds_codes, match, require_module
from ..results.selection import Selection
from ..sources.adapters import adapted_in
from .masks import Frozen


class Handle:
    """The result of ``selection.apply(model)``; ``restore()``, or leaving a ``with`` block, undoes it.

    A handle lives as long as its model, even if the caller keeps no reference.

    Attributes:
        selection: the selection that was applied.
        targets: the selected parameters, with the selected part of each.
    """

    def __init__(self, model: nn.Module, selection: Selection, targets: list[Target]) -> None:
        self.selection, self.targets = selection, tuple(targets)
        self._model = model
        self._flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self._guards = {t.name: _Guard(t) for t in targets if not t.whole}
        self._before: dict[Optimizer, list[tuple[_Guard, torch.Tensor, torch.Tensor]]] = {}
        self._removers: list[Any] = []

    def begin(self, *, around_steps: bool) -> None:
        """Set the flags and install the guards; ``around_steps``: also the guards around every optimizer's step."""
        _APPLIED[self._model] = weakref.ref(self)
        vars(self._model)[_KEPT_IN] = _Follower(self)  # restore(model) finds the handle here
        chosen = {target.name for target in self.targets}
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(name in chosen)
        if not self._guards:
            return
        self.follow()
        self._removers = [self._model.register_forward_pre_hook(_Follower(self))]
        if around_steps:
            this = weakref.ref(self)  # torch keeps these hooks for ever, and they must not keep the model alive

            def keep(optimizer: Optimizer, arguments: Any, options: Any) -> None:
                handle = this()
                if handle is not None:
                    handle._keep(optimizer, len(arguments) > 1 or bool(options))

            def put_back(optimizer: Optimizer, *_: Any) -> None:
                handle = this()
                if handle is not None:
                    handle._put_back(optimizer)

            around = [register_optimizer_step_pre_hook(keep), register_optimizer_step_post_hook(put_back)]
            self._removers += around
            weakref.finalize(self, _remove, around)

    def follow(self) -> None:
        """Guard the parameters that the model has now: sharding replaces parameters by others of the same name."""
        for name, guard in self._guards.items():
            parameter = _parameter(self._model, name)
            _refuse_zero(name, parameter)
            if parameter.shape != guard.target.parameter.shape:
                raise OptionError(
                    f"a part of {name!r} is selected, and its shape has changed to {tuple(parameter.shape)} from "
                    f"{tuple(guard.target.parameter.shape)}: restore() the selection and apply it again, or select "
                    "with unit='parameter' for trainers that flatten parameters"
                )
            guard.watch(parameter)

    @property
    def model(self) -> nn.Module:
        """The model to which the selection was applied."""
        return self._model

    @property
    def trainable(self) -> tuple[int, int]:
        """The number of weights that train, and that of all weights; codes of quantized models count as stored."""
        return sum(target.numel for target in self.targets), sum(p.numel() for p in self._model.parameters())

    def print_trainable_parameters(self) -> None:
        """Print the line of PEFT's method of this name; only the selected part of a parameter counts."""
        print(self.describe())

    def describe(self) -> str:
        """The line that ``print_trainable_parameters`` prints."""
        some, every = self.trainable
        share = 100 * some / max(1, every)
        return f"trainable params: {some:,} || all params: {every:,} || trainable%: {share:.4f}"

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter that the model has under this name now."""
        return _parameter(self._model, name)

    def restore(self) -> None:
        """Set every requires_grad to its former value and remove all guards. A second call does nothing."""
        _remove(self._removers)
        if _applied_to(self._model) is self:
            vars(self._model).pop(_KEPT_IN, None)
        for guard in self._guards.values():
            guard.release()
        self._removers, self._before = [], {}
        parameters = dict(self._model.named_parameters())
        for name, flag in self._flags.items():
            if name in parameters:
                parameters[name].requires_grad_(flag)
        self._flags = {}
        if _applied_to(self._model) is self:
            del _APPLIED[self._model]

    def _keep(self, optimizer: Optimizer, may_fill: bool) -> None:
        """may_fill: the step has an argument, perhaps a closure that computes gradients which do not exist yet."""
        mine = {id(p) for group in optimizer.param_groups for p in group["params"] if may_fill or p.grad is not None}
        here = {id(p) for p in self._model.parameters()} | {id(guard.parameter) for guard in self._guards.values()}
        if mine.isdisjoint(here):  # an optimizer of another model
            return
        self.follow()
        guards = [guard for guard in self._guards.values() if id(guard.parameter) in mine]
        if guards:
            self._before[optimizer] = [(g, g.parameter, g.frozen.kept(g.parameter)) for g in guards]

    def _put_back(self, optimizer: Optimizer) -> None:
        for guard, parameter, kept in self._before.pop(optimizer, []):
            guard.frozen.put_back(parameter, kept)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


_KEPT_IN = "_kappa_fast_handle"  # an attribute of the model
# A handle refers to its model and must not keep it alive, so neither is kept by these references.
_APPLIED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Handle]] = weakref.WeakKeyDictionary()


def _applied_to(module: nn.Module) -> Handle | None:
    found = _APPLIED.get(module)
    return found() if found is not None else None


def _remove(removers: list[Any]) -> None:
    for remover in removers:
        remover.remove()


class _Follower:
    """A hook before each forward pass; a copy or a pickle of the model gets a hook that does nothing."""

    def __init__(self, handle: Handle | None = None) -> None:
        self._handle = handle

    def __call__(self, *_: Any) -> None:
        if self._handle is not None and not torch.compiler.is_compiling():
            self._handle.follow()

    def __reduce__(self) -> Any:
        return _Follower, ()


class _Guard:
    """Zeroes the gradients of the frozen weights of one parameter as soon as they are accumulated."""

    def __init__(self, target: Target) -> None:
        self.target, self.frozen = target, Frozen(target)
        self.parameter: nn.Parameter = target.parameter
        self._remover: Any = None

    def watch(self, parameter: nn.Parameter) -> None:
        if self._remover is not None and parameter is self.parameter:
            return
        self.release()
        self.parameter = parameter
        watched: Any = parameter
        self._remover = watched.register_post_accumulate_grad_hook(lambda p: self._clear(p.grad))

    def _clear(self, gradient: torch.Tensor | None) -> None:
        if gradient is None:
            return
        if gradient.is_sparse:
            raise OptionError(
                f"{self.target.name!r} is selected in part, which sparse gradients do not allow: select all of it "
                "with unit='parameter'"
            )
        self.frozen.clear(gradient)

    def release(self) -> None:
        if self._remover is not None:
            self._remover.remove()
            self._remover = None


def refuse_occupied(model: nn.Module) -> None:
    """Raises OptionError if the model has a selection or adapters of PEFT, so that no selection can be applied."""
    require_module(model)
    if held_on(model):
        raise OptionError(
            "this model has a selection already, and two selections would freeze each other's weights: "
            "kappa_fast.restore(model) undoes it, wherever its handle, optimizer or trainer is (wrap() and "
            "KappaTuneCallback apply their selection themselves)"
        )
    adapted = adapted_in(model)
    if adapted is not None:
        raise OptionError(
            f"{adapted!r} has adapters of PEFT: a selection would freeze them and train the weights beside them, which "
            "save_pretrained() of such a model does not write. Train adapters on what is selected: rank and select on "
            "the model without adapters, then peft.get_peft_model(model, lora_config(selection)), with lora_config of "
            "kappa_fast.integrations.peft; or merge them first: model = model.merge_and_unload()"
        )


def held_on(model: nn.Module) -> list[Handle]:
    """The handles of the model, of its submodules, and of models that contain it."""
    found = []
    mine = {id(parameter) for parameter in model.parameters()}
    for reference in list(_APPLIED.values()):
        handle = reference()
        if handle is not None and any(id(parameter) in mine for parameter in handle.model.parameters()):
            found.append(handle)
    return found


def restore(model: nn.Module) -> None:
    """Undo what ``apply()``, ``wrap()`` or a callback did to this model; no handle is needed.

    Every requires_grad gets its former value, and all guards are removed. Optimizers of ``wrap()`` cannot be used
    afterwards. A model without a selection stays as it is.

    Raises:
        OptionError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"restore() takes the model, not a {type(model).__name__}")
    for handle in held_on(model):
        handle.restore()


def apply(selection: Selection, model: nn.Module, *, around_steps: bool = True) -> Handle:
    """See ``Selection.apply``. ``around_steps``: False for an optimizer that keeps frozen weights itself."""
    refuse_occupied(model)
    targets = match(selection, model)
    _check_trainable(model, targets)
    handle = Handle(model, selection, targets)
    try:
        handle.begin(around_steps=around_steps)
    except BaseException:
        handle.restore()
        raise
    return handle


def _kind(parameter: nn.Parameter) -> str:
    """The class of a tensor subclass, such as that of quantized codes; else the dtype."""
    return type(parameter).__name__ if parameter.dtype.itemsize > 1 else str(parameter.dtype)


def _check_trainable(model: nn.Module, targets: list[Target]) -> None:
    chosen = {target.name for target in targets}
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        _refuse_zero(name, parameter)
        if parameter.is_inference():
            raise OptionError(
                f"{name!r} was made in inference mode and cannot train: make or load the model in normal mode"
            )
        if name.rpartition(".")[2] == "_flat_param":
            raise OptionError(
                f"{name!r} is a flat parameter of FSDP1: wrap the model with use_orig_params=True, or use FSDP2"
            )
        if name in chosen and holds_codes(parameter):
            raise OptionError(
                f"{name!r} is stored as {_kind(parameter)}, which cannot be trained: train adapters beside it "
                f"(kappa_fast.integrations.peft.lora_config), or leave it out with excluding({name!r})"
            )
    if _in_ddp(model) and any(p.requires_grad != (n in chosen) for n, p in parameters.items()):
        flips = next(n for n, p in parameters.items() if p.requires_grad != (n in chosen))
        raise OptionError(
            f"the model is in DistributedDataParallel already, which needs the gradients that it was made for, and "
            f"the selection would change {flips!r}: apply the selection, or wrap(), before DDP"
        )


def _refuse_zero(name: str, parameter: nn.Parameter) -> None:
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        raise OptionError(
            f"{name!r} is partitioned by DeepSpeed ZeRO, which keeps parameters flat: apply a selection of whole "
            "parameters (unit='parameter') before deepspeed.initialize, and let its optimizer train what requires it; "
            "or use FSDP2"
        )


def _in_ddp(model: nn.Module) -> bool:
    return any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter by name, or by plain name, since wrappers may have changed the words between."""
    try:
        return model.get_parameter(name)
    except AttributeError:
        from ..results.names import plain_name

        wanted = plain_name(name)
        found = next((p for n, p in model.named_parameters() if plain_name(n) == wanted), None)
        if found is None:
            raise OptionError(f"the model has lost {name!r} since the selection was applied: apply it again") from None
        return found
