"""wrap(): an optimizer of any class over the selected weights, which leaves all other weights bit for bit as they are.

Outside of step() it is an ordinary optimizer: ``param_groups`` hold parameters of the model, and ``state`` has them as
keys, so that schedulers, gradient scaling, clipping and checkpoints work. Inside step() a parameter that is selected in
part is replaced by one view for each selected piece, so that moments, decay and matrix statistics are those of the
pieces alone. The state of the parameter is that of its first piece, and holds those of the others under "pieces".

A DTensor (FSDP2) cannot be split like that: its state has the full shape, and its frozen weights are put back after its
step, one parameter at a time, which is exact for optimizers that work element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import OptionError
from ..matching.names import Target
from ..results.entries import Index
from ..results.names import plain_name
from ..results.selection import Selection
from .groups import parted, patterns_without_decay
from .handle import Handle, apply
from .masks import Frozen, element_by_element, is_sharded
from .states import check_names, check_shapes

Pieces = tuple[Index, ...]
Groups = list[tuple[dict[str, float], list[Target]]]
# A key in the state of a parameter. The first piece's state is not under it, since classes look for "step" on loading.
FIRST, PIECES = "0", "pieces"
SELECTION = "selection"  # in the state dict of the optimizer
NAMES = "param_names"  # torch's own word, in the parameter groups

O = TypeVar("O", bound=Optimizer)  # noqa: E741


def wrap(
    optimizer_cls: type[O],
    model: nn.Module,
    selection: Selection,
    *,
    no_decay: bool | Sequence[str] = False,
    **optimizer_kwargs: Any,
) -> O:
    """An ``optimizer_cls`` over the selected weights of ``model``; everything else is frozen.

    Calls ``selection.apply(model)``: all other parameters get requires_grad=False, also norms and biases, and the rest
    of a parameter that is selected in part keeps its values with any optimizer. Call wrap() before DDP, and before or
    after FSDP2. ``optimizer.restore()`` undoes it; ``optimizer.targets`` has the parameters that train.

    There is state only for selected weights. A piece that is not contiguous is copied with its gradient during its
    step, one piece at a time. A partly selected DTensor has state for the whole parameter, and takes a copy of its
    local shard, one parameter at a time.

    Args:
        optimizer_cls: any torch.optim.Optimizer class. torch.optim.Muon gets one 2-D view for each matrix.
        no_decay: True puts norms and biases that ``including`` brought in into a second parameter group without weight
            decay, as transformers' Trainer does; or regular expressions for the names of such parameters.
        optimizer_kwargs: arguments of the constructor after the parameters.

    Raises:
        OptionError: nothing is selected; the selection does not fit the model; the optimizer or the sharding cannot
            work on a part of a parameter; the model is in DDP and requires_grad would change.
    """
    found: O = wrap_with(None, optimizer_cls, model, selection, optimizer_kwargs, no_decay)
    return found


def wrap_with(
    mixin: type | None,
    optimizer_cls: type[Optimizer],
    model: nn.Module,
    selection: Selection,
    optimizer_kwargs: Mapping[str, Any],
    no_decay: bool | Sequence[str] = False,
) -> Any:
    """wrap() for an optimizer that is also an instance of ``mixin``, if one is given."""
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise OptionError(f"optimizer_cls={optimizer_cls!r} is not a torch.optim.Optimizer class")
    if issubclass(optimizer_cls, _Selected):  # the class of an optimizer that wrap() made
        optimizer_cls = optimizer_cls._base
    patterns = patterns_without_decay(no_decay)
    handle = apply(selection, model, around_steps=False)
    try:
        if not handle.targets:
            raise OptionError("the selection is empty, so there is nothing to optimize: select something")
        groups = parted(model, handle.targets, patterns)
        handle.targets = tuple(target for _, targets in groups for target in targets)
        pieces = [_pieces(optimizer_cls, target) for target in handle.targets]
        views = [_first_views(optimizer_cls, t, cut) for t, cut in zip(handle.targets, pieces, strict=True)]
        first: Any = _views_of(groups, views)
        made: Any = _class_of(optimizer_cls, mixin)(first, **optimizer_kwargs)
        made._take_over(handle, groups, pieces, views)
    except BaseException:
        handle.restore()
        raise
    return made


def _views_of(groups: Groups, views: list[list[nn.Parameter]]) -> list[Any]:
    """The first argument of the optimizer's constructor: parameters, or groups of them."""
    rest = iter(views)
    made: list[dict[str, Any]] = [
        {**settings, "params": [view for _ in targets for view in next(rest)]} for settings, targets in groups
    ]
    return made if len(made) > 1 or groups[0][0] else made[0]["params"]


def _pieces(optimizer_cls: type[Optimizer], target: Target) -> Pieces | None:
    """The indices of the pieces that are optimized separately; None if the parameter is optimized as a whole."""
    indices, name = target.indices, target.name
    if _is_muon(optimizer_cls):
        if target.parameter.ndim < 2:
            raise OptionError(f"Muon works on matrices, and {name!r} is not one: leave it out with excluding()")
        if target.parameter.ndim > 2 or not target.whole:
            if is_sharded(target.parameter):
                raise OptionError(
                    f"Muon needs whole matrices, and {name!r} is a sharded stack: use an optimizer that works "
                    "element by element, or unit='parameter' for 2-D parameters only"
                )
            stacked = target.parameter.ndim == 3 and (not target.entries or any(e.index for e in target.entries))
            if stacked:
                indices = tuple(i for index in indices for i in _matrices(name, index, target.parameter.detach()))
            elif target.whole:
                return ((),)  # a convolution
    if indices == ((),):
        return None
    if issubclass(optimizer_cls, torch.optim.LBFGS):
        raise OptionError(
            f"LBFGS evaluates the model many times in a step, which a part of {name!r} does not allow: select whole "
            "parameters with unit='parameter', or use another optimizer"
        )
    return element_by_element(optimizer_cls, target, indices)


def _matrices(name: str, index: Index, parameter: torch.Tensor) -> list[Index]:
    """The indices of the matrices in the part that an index selects."""
    dimensions = parameter[index].ndim
    if dimensions <= 2:
        return [index]
    if not all(isinstance(part, int) for part in index):
        raise OptionError(f"Muon cannot tell the matrices of {name!r}{list(index)} apart: select with unit='expert'")
    size = parameter.shape[len(index)]
    return [deeper for i in range(size) for deeper in _matrices(name, (*index, i), parameter)]


def _first_views(optimizer_cls: type[Optimizer], target: Target, pieces: Pieces | None) -> list[nn.Parameter]:
    """The parameter or its pieces for the constructor, which may check their shapes and make state for them."""
    if pieces is None or is_sharded(target.parameter):
        return [target.parameter]
    return [nn.Parameter(_piece(optimizer_cls, target.parameter.detach(), index)) for index in pieces]


def _is_muon(optimizer_cls: type[Optimizer]) -> bool:
    return issubclass(optimizer_cls, getattr(torch.optim, "Muon", ()))


def _piece(optimizer_cls: type[Optimizer], tensor: torch.Tensor, index: Index) -> torch.Tensor:
    """A piece in the shape in which it is optimized: Muon gets a convolution as the matrix that was ranked."""
    piece = tensor[index]
    return piece.flatten(1) if piece.ndim > 2 and _is_muon(optimizer_cls) else piece


class _Selected(Optimizer):
    """The methods that wrap() adds to an optimizer class."""

    _base: type[Optimizer]
    _handle: Handle | None = None  # None in a copy
    _cuts: dict[int, Pieces]  # by position among all parameters of all groups
    _frozen: dict[int, Frozen]

    @property
    def targets(self) -> tuple[Target, ...]:
        """The selected parameters, with the selected part of each."""
        return self._handle.targets if self._handle is not None else ()

    @property
    def selection(self) -> Selection | None:
        """The selection that is trained; None in a copy."""
        return self._handle.selection if self._handle is not None else None

    def restore(self) -> None:
        """Undo what apply() did to the model; this optimizer cannot be used afterwards."""
        if self._handle is not None:
            self._handle.restore()

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the base class with the selected pieces under "selection", which loading checks."""
        found = super().state_dict()
        return {**found, SELECTION: self._selected()} if self._handle is not None else found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch.optim.Optimizer.load_state_dict.

        Raises:
            OptionError: the state belongs to another selection, which torch does not notice if shapes agree.
        """
        if self._handle is not None:
            saved = state_dict.get(SELECTION)
            if saved is None and (names := [n for g in state_dict["param_groups"] for n in g.get(NAMES, ())]):
                saved = {name: self._selected().get(name) for name in names}
            if saved is not None:
                check_names(saved, self._selected())
            check_shapes(self._states_in(state_dict))
        super().load_state_dict({key: value for key, value in state_dict.items() if key != SELECTION})

    def _selected(self) -> dict[str, list[str]]:
        """By the plain names of parameters, the selected pieces in the order of their state."""
        return {plain_name(t.name): [str(index) for index in t.indices] for t in self.targets}

    def _states_in(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], list[Any]]]:
        """For each parameter its name, the state that it would get, and the shapes of it and its pieces."""
        positions = [p for group in state_dict["param_groups"] for p in group["params"]]
        for number, (target, position) in enumerate(zip(self.targets, positions, strict=False)):
            data, cuts = target.parameter.detach(), self._cuts.get(number, ())
            shapes = [tuple(data.shape), *(tuple(_piece(self._base, data, index).shape) for index in cuts)]
            yield plain_name(target.name), state_dict["state"].get(position, {}), shapes

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch.optim.Optimizer.add_param_group; parameters of the model get their names in the group."""
        if self._handle is not None and NAMES not in param_group and isinstance(param_group, dict):
            given = param_group.get("params", ())
            given = [given] if isinstance(given, torch.Tensor) else list(given)
            names = {id(p): plain_name(n) for n, p in self._handle.model.named_parameters()}
            named = [names.get(id(p), f"unnamed.{i}") for i, p in enumerate(given)]
            param_group = {**param_group, "params": given, NAMES: named}
        super().add_param_group(param_group)

    def _take_over(
        self, handle: Handle, groups: Groups, pieces: list[Pieces | None], views: list[list[nn.Parameter]]
    ) -> None:
        """Replace the constructor's parameters by those of the model, with the state that the constructor made."""
        self._handle = handle
        self._cuts = {position: cut for position, cut in enumerate(pieces) if cut is not None}
        self._frozen = {i: Frozen(t) for i, t in enumerate(handle.targets) if not t.whole}
        for target, cut, some in zip(handle.targets, pieces, views, strict=True):
            if cut is not None and some[0] is not target.parameter:
                for number, view in enumerate(some):
                    self._take_back(target.parameter, str(number), view)
        for group, (_, targets) in zip(self.param_groups, groups, strict=True):
            group["params"] = [target.parameter for target in targets]
            group[NAMES] = [plain_name(target.name) for target in targets]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base class on the selected weights; see torch.optim.Optimizer.step."""
        self._check_current()
        if not self._cuts:
            return self._base_step() if closure is None else self._base_step(closure)
        loss = None
        if closure is not None:  # before pieces are made, since it computes the gradients of the parameters themselves
            with torch.enable_grad():
                loss = closure()
        apart = self._step_together()
        for settings, position, parameter, number in apart:
            if number is None:
                self._step_sharded(settings, position, parameter)
            else:
                self._step_copied(settings, position, parameter, number)
        return loss

    def _step_together(self) -> list[tuple[dict[str, Any], int, nn.Parameter, int | None]]:
        """Take one step of the base class for whole parameters and contiguous pieces; returns those that need another.

        These come with the present settings of their group, in which some classes count steps.
        """
        groups = self.param_groups
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        originals = [group["params"] for group in groups]
        lent: list[tuple[nn.Parameter, str, nn.Parameter]] = []
        apart: list[tuple[dict[str, Any], int, nn.Parameter, int | None]] = []
        position = 0
        try:
            for group, own, parameters in zip(groups, settings, originals, strict=True):
                group["params"] = []
                for p in parameters:
                    cuts = self._cuts.get(position)
                    if cuts is None:
                        group["params"].append(p)
                    elif is_sharded(p):
                        apart.append((own, position, p, None))
                    for number, index in enumerate(() if cuts is None or is_sharded(p) else cuts):
                        if not p.detach()[index].is_contiguous():
                            apart.append((own, position, p, number))
                            continue
                        lent.append((p, str(number), self._lend(p, str(number), index)))
                        group["params"].append(lent[-1][2])
                    position += 1
            self._base_step()
        finally:
            for p, key, view in lent:
                self._take_back(p, key, view)
            for group, parameters in zip(groups, originals, strict=True):
                group["params"] = parameters
        return apart

    def _step_copied(self, settings: dict[str, Any], position: int, parameter: nn.Parameter, number: int) -> None:
        """Take the step of a piece that is not contiguous on a copy, which every kernel can read."""
        if parameter.grad is None:
            return
        index, key = self._cuts[position][number], str(number)
        view = self._lend(parameter, key, index, copy=True)
        try:
            self._step_alone(settings, view)
            target = parameter.detach()[index]
            target.copy_(view.detach().reshape(target.shape))
        finally:
            self._take_back(parameter, key, view)

    def _step_sharded(self, settings: dict[str, Any], position: int, parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            return
        frozen = self._frozen[position]
        kept = frozen.kept(parameter)
        try:
            self._step_alone(settings, parameter)
        finally:
            frozen.put_back(parameter, kept)

    def _step_alone(self, settings: dict[str, Any], parameter: nn.Parameter) -> None:
        groups = self.param_groups
        self.param_groups = [{**settings, "params": [parameter]}]
        try:
            self._base_step()
        finally:
            self.param_groups = groups

    def _lend(self, parameter: nn.Parameter, key: str, index: Index, copy: bool = False) -> nn.Parameter:
        """A temporary parameter for a piece, with its gradient and its state."""
        data = _piece(self._base, parameter.detach(), index)
        view = nn.Parameter(data.clone(memory_format=torch.contiguous_format) if copy else data)
        if parameter.grad is not None:
            gradient = _piece(self._base, parameter.grad, index)
            view.grad = gradient.contiguous() if copy else gradient
        state = self.state.get(parameter)
        if state:
            others = state.pop(PIECES, {})
            own = state if key == FIRST else others.pop(key, {})
            if own:
                self.state[view] = dict(own)
            if key == FIRST:
                state.clear()
            if others:
                state[PIECES] = others
        return view

    def _take_back(self, parameter: nn.Parameter, key: str, view: nn.Parameter) -> None:
        if view not in self.state:
            return
        found = self.state.pop(view)
        if key == FIRST:
            self.state[parameter].update(found)
        else:
            self.state[parameter].setdefault(PIECES, {})[key] = found

    def _base_step(self, *arguments: Any) -> Any:
        # The step() of this class runs the hooks already.
        step: Any = self._base.step
        return (step.__wrapped__ if getattr(step, "hooked", False) else step)(self, *arguments)

    def _check_current(self) -> None:
        if self._handle is None:
            return
        present = {id(p) for group in self.param_groups for p in group["params"]}
        for target in self._handle.targets:
            if id(self._handle.parameter(target.name)) not in present:
                raise OptionError(
                    f"the model holds another {target.name!r} than this optimizer: it was sharded or rebuilt after "
                    "wrap(); call optimizer.restore() and wrap() again, or let the trainer prepare both together"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cuts": self._cuts, "_frozen": self._frozen}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _remake, (self._base,), self.__getstate__()


_CLASSES: dict[Any, type[Optimizer]] = {}


def _class_of(optimizer_cls: type[Optimizer], mixin: type | None = None) -> type[Optimizer]:
    """A subclass of the given class that takes its steps on pieces."""
    key = optimizer_cls, mixin
    if key not in _CLASSES:
        body = {"_base": optimizer_cls, "__doc__": (mixin or optimizer_cls).__doc__}
        bases: tuple[type, ...] = (_Selected, optimizer_cls) if mixin is None else (mixin, _Selected, optimizer_cls)
        kind: Any = type(mixin) if mixin is not None else type
        _CLASSES[key] = kind((mixin or optimizer_cls).__name__, bases, body)
    return _CLASSES[key]


def _remake(optimizer_cls: type[Optimizer]) -> Optimizer:
    """An empty optimizer, for copies and pickles."""
    created = _class_of(optimizer_cls)
    return created.__new__(created)
