"""The names and signatures of the reference implementation, so that code for it only has to change the import.

Here ``SelectiveFineTuningOptimizer`` is an optimizer of the base class, so schedulers, gradient scaling, accelerate and
checkpoints work with it. It ranks bfloat16 models and fused experts too, and reads and writes the same file.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from ..errors import OptionError, missing_extra
from ..io.documents import read_document
from ..io.limits import LARGEST_CONFIG
from ..results.selection import Selection
from ..results.serialize import write_text
from ..results.units import geometric_mean
from ..training.optimizer import wrap_with
from .originals import condition_numbers

if TYPE_CHECKING:
    from peft import LoraConfig

log = logging.getLogger("kappa_fast")

LARGEST_FOR_LORA = 16384  # a larger side is not analyzed for LoRA, as in the original


class _Built(type):
    """Calls of the class return an optimizer whose class derives from it and from the base optimizer."""

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        if cls is SelectiveFineTuningOptimizer:
            return _build(*arguments, **options)
        return super().__call__(*arguments, **options)


class SelectiveFineTuningOptimizer(metaclass=_Built):
    """Ranks the model, trains the parameters with the lowest condition numbers, and is the optimizer of these.

        SelectiveFineTuningOptimizer(model, base_optimizer_cls, optimizer_args, condition_file="condition_numbers.json",
                                     num_tensors_to_finetune=100, recompute=False, max_dim_size_to_analyze=None)

    Candidates are all parameters with two or more dimensions as stored, also embeddings, heads and routers; the number
    of a stack of experts is their geometric mean. The numbers are read from the file if it exists and fits the model,
    unless ``recompute`` is set.

    Attributes:
        model, condition_file, num_tensors_to_finetune, recompute, max_dim_size_to_analyze: the arguments.
        condition_numbers: by name of the parameter.
        trainable_param_names: the names that were selected.
        optimizer: this optimizer itself; the original kept another one there.

    Raises:
        OptionError: the file belongs to another model; nothing can be selected.
    """

    model: nn.Module
    condition_file: str
    num_tensors_to_finetune: int
    recompute: bool
    max_dim_size_to_analyze: int | None
    condition_numbers: dict[str, float]
    trainable_param_names: set[str]

    @property
    def optimizer(self) -> SelectiveFineTuningOptimizer:
        """Itself."""
        return self


def _build(
    model: nn.Module,
    base_optimizer_cls: type[Optimizer],
    optimizer_args: Mapping[str, Any],
    condition_file: str = "condition_numbers.json",
    num_tensors_to_finetune: int = 100,
    recompute: bool = False,
    max_dim_size_to_analyze: int | None = None,
) -> Any:
    numbers = None if recompute else _stored(condition_file, model)
    if numbers is None:
        numbers = analyze(model, max_dim_size_to_analyze)
        write_text(condition_file, json.dumps(numbers, indent=2) + "\n")
    chosen = _lowest(numbers, num_tensors_to_finetune)
    optimizer: Any = wrap_with(
        SelectiveFineTuningOptimizer, base_optimizer_cls, model, _selection_of(chosen), dict(optimizer_args)
    )
    optimizer.model, optimizer.condition_file, optimizer.recompute = model, condition_file, recompute
    optimizer.num_tensors_to_finetune = num_tensors_to_finetune
    optimizer.max_dim_size_to_analyze = max_dim_size_to_analyze
    optimizer.condition_numbers, optimizer.trainable_param_names = numbers, set(chosen)
    return optimizer


def analyze(model: nn.Module, max_dim_size_to_analyze: int | None = None) -> dict[str, float]:
    """The condition number of every parameter with two or more dimensions, none larger than the limit."""
    limit = max_dim_size_to_analyze
    candidates = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and (limit is None or max(parameter.shape) <= limit)
    }
    if not candidates:
        raise OptionError("the model has no parameter with two or more dimensions within the limit: nothing to train")
    return condition_numbers(candidates, max_dim=None, epsilon=0.0, mean=geometric_mean, progress=None)


def _stored(condition_file: str, model: nn.Module) -> dict[str, float] | None:
    """The numbers in the file; None if the file is missing or damaged."""
    path = Path(condition_file)
    try:
        raw = read_document(path, LARGEST_CONFIG)
        numbers = {str(name): float(value) for name, value in raw.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, TypeError, OverflowError) as error:
        log.warning("%s cannot be read (%s): the model is analyzed again", condition_file, error)
        return None
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    foreign = [name for name in numbers if name not in names]
    if foreign or not numbers:
        example = f"{foreign[0]!r} is not a parameter of it" if foreign else "it is empty"
        raise OptionError(
            f"{condition_file} belongs to another model ({example}): give recompute=True, or another condition_file"
        )
    return numbers


def _lowest(numbers: Mapping[str, float], count: int) -> list[str]:
    ordered = sorted(numbers, key=lambda name: (numbers[name] != numbers[name], numbers[name]))  # nan last
    chosen = [name for name in ordered[: max(0, count)] if numbers[name] == numbers[name]]
    if not chosen:
        raise OptionError(f"num_tensors_to_finetune={count} selects nothing: give 1 or more")
    return chosen


def _selection_of(names: list[str]) -> Selection:
    """Whole parameters by name."""
    return Selection((), True, {}).including("^(?:" + "|".join(re.escape(name) for name in names) + ")$")


def get_kappa_lora_config(
    model: nn.Module,
    num_modules_to_adapt: int = 50,
    lora_rank: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.05,
    target_modules: list[str] | None = None,
    task_type: Any = "CAUSAL_LM",
    **lora_kwargs: Any,
) -> LoraConfig:
    """A LoraConfig for the modules with the lowest condition numbers, the lowest first.

    The original over-selects tensors and takes modules in no order; here these are the lowest ``num_modules_to_adapt``
    among modules that LoRA can adapt (linear, convolution and embedding layers).

    Raises:
        OptionError: the model has no such module.  MissingExtraError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise missing_extra("peft", "peft", "get_kappa_lora_config()") from error
    if target_modules is None:
        numbers = analyze(model, LARGEST_FOR_LORA)
        adaptable = {f"{name}.weight": name for name, module in model.named_modules() if _can_adapt(module)}
        ordered = [adaptable[name] for name in _lowest(numbers, len(numbers)) if name in adaptable]
        target_modules = ordered[:num_modules_to_adapt]
        if not target_modules:
            raise OptionError("the model has no module that LoRA can adapt: linear, convolution or embedding")
    return LoraConfig(
        r=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_modules,
        task_type=task_type,
        **lora_kwargs,
    )


def get_kappatune_lora_model(model: nn.Module, num_modules_to_adapt: int = 50, **lora_kwargs: Any) -> Any:
    """The model with LoRA on the modules that ``get_kappa_lora_config`` chooses."""
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise missing_extra("peft", "peft", "get_kappatune_lora_model()") from error
    wrapped: Any = model
    return get_peft_model(wrapped, get_kappa_lora_config(model, num_modules_to_adapt, **lora_kwargs))


def _can_adapt(module: nn.Module) -> bool:
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, kinds) or type(module).__name__ == "Conv1D"
