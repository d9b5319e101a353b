"""What of a model the published runs train, and their controls: adapters on a selection, or a selection itself."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import kappa_fast
from kappa_fast import OptionError, Ranking, Selection

LARGEST = 16384  # of the dimensions of what PEFT's selector takes


@dataclass(frozen=True)
class Prepared:
    """A model of which the right part trains."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    trained: list[nn.Parameter]


def digest(value: Any) -> str:
    """12 digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def opened(model: str, quantization: str | None) -> tuple[Any, nn.Module]:
    """The tokenizer, whose end of text pads, and the model: on a GPU where there is one.

    Raises:
        RuntimeError: nf4 without a GPU.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    options: dict[str, Any] = {"dtype": torch.float32}
    if quantization == "nf4":
        if not torch.cuda.is_available():
            raise RuntimeError(f"{model} is published in nf4, which needs a GPU and bitsandbytes")
        options = {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.bfloat16,
                bnb_4bit_use_double_quant=True,
            ),
            "device_map": "auto",
        }
    elif torch.cuda.is_available():
        options = {"dtype": torch.bfloat16, "device_map": "auto"}
    found: nn.Module = AutoModelForCausalLM.from_pretrained(model, **options)
    found.config.use_cache = False
    if quantization is not None:
        from peft import prepare_model_for_kbit_training

        found = prepare_model_for_kbit_training(found)
    return tokenizer, found


def prepare(
    model: nn.Module, config: Mapping[str, Any], job: Mapping[str, Any], training: Mapping[str, Any]
) -> tuple[Prepared | None, dict[str, Any]]:
    """What a method trains, and what there is to say of it; None for one that trains nothing."""
    recipe = job["recipe"]
    if recipe.get("train") == "none":
        return None, {"trained": 0}
    options = {"lr": training["lr"], "weight_decay": training["weight_decay"]}
    if "weights" in recipe:
        selection = weights(model, recipe["weights"], job["draw"])
        optimizer = kappa_fast.wrap(torch.optim.AdamW, model, selection, **options)
        trained = [p for p in model.parameters() if p.requires_grad]
        return Prepared(model, optimizer, trained), _said(selection, selection.num_params)
    if "adapt" in recipe:
        ranking = candidates(model)
        selection = adapted(ranking, recipe["adapt"], job["draw"])
        rank = recipe["r"]
        if "match_parameters" in recipe:
            reference = config["methods"][recipe["match_parameters"]]
            rank = matched_rank(adapted(ranking, reference["adapt"], 0), reference["r"], selection)
        lora = lora_of(selection, model, rank, recipe.get("alpha"), recipe["dropout"])
        said: dict[str, Any] = _said(selection, 0) | {"r": rank}
    else:
        lora = _of_modules(model, recipe)
        said = {"r": recipe["r"], "dropout": lora.lora_dropout}
    wrapped = _wrapped(model, lora)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    said["trained"] = sum(p.numel() for p in trained)
    return Prepared(wrapped, torch.optim.AdamW(trained, **options), trained), said


def _said(selection: Selection, trained: int) -> dict[str, Any]:
    keys = hashlib.sha256("\n".join(sorted(selection.keys)).encode()).hexdigest()[:16]
    return {"trained": trained, "matrices": len(selection), "keys": keys}


def candidates(model: nn.Module) -> Ranking:
    """What PEFT's selector ranks: linear layers, routers among them, and fused experts as they are stored."""
    return kappa_fast.rank(model, progress=False, fused="stored", routers=True, exclude="lm_head")


def adapted(ranking: Ranking, options: Mapping[str, Any], draw: int) -> Selection:
    """A share of the linear layers and one of the fused parameters, each for itself, as PEFT's selector takes them.

    Raises:
        OptionError: no random draw differs from the lowest.
    """
    included = options.get("include")
    if included is not None:
        ranking = ranking.filter(include=included)
    found, alike = [], 0
    for stacked in (False, True):
        part = _only(ranking, lambda e, stacked=stacked: bool(e.index) == stacked and max(e.shape) <= LARGEST)
        if not len(part):
            continue
        try:
            found.append(_select(part, options, draw, unit="parameter"))
        except OptionError as error:
            if "leaves one way to draw" not in str(error):
                raise
            alike += 1  # the lowest are all of their types, such as all routers: every draw has them too
            lowest = {name: value for name, value in options.items() if name not in ("order", "match")}
            found.append(_select(part, lowest, draw, unit="parameter"))
    if alike == len(found):
        raise OptionError("no draw differs from the lowest, which are all of their types: give another top_p")
    union = found[0]
    for other in found[1:]:
        union = union | other
    return union


def weights(model: nn.Module, options: Mapping[str, Any], draw: int) -> Selection:
    """Tensors that train themselves: the reference ranks everything with two dimensions, up to a size."""
    ranking = kappa_fast.rank(model, progress=False, routers=True, embeddings=True)
    part = _only(ranking, lambda e: max(e.shape) <= options["largest"])
    return _select(part, options, draw, unit="matrix")


def _only(ranking: Ranking, keep: Callable[..., bool]) -> Ranking:
    return Ranking([entry for entry in ranking if keep(entry)], ranking.skipped, ranking.metadata)


def _select(ranking: Ranking, options: Mapping[str, Any], draw: int, unit: Any) -> Selection:
    given = {name: value for name, value in options.items() if name not in ("by", "largest", "include")}
    if given.get("order") == "random":
        given["seed"] = draw
    if options.get("by") == "layer":
        ranking = ranking.by(lambda entry: 1.0 + (entry.layer if entry.layer is not None else 1e9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return ranking.select(unit=unit, **given)


def adapter_size(selection: Selection) -> int:
    """Parameters of adapters of rank 1."""
    return sum(sum(entry.shape) for entry in selection)


def matched_rank(reference: Selection, rank: int, selection: Selection) -> int:
    """The rank with which adapters on a selection have as many parameters as those of the reference, nearly."""
    return max(1, round(rank * adapter_size(reference) / adapter_size(selection)))


def lora_of(selection: Selection, model: nn.Module, rank: int, alpha: int | None, dropout: float) -> Any:
    """Where fused parameters are adapted PEFT has no dropout, and none is asked."""
    from kappa_fast.integrations.peft import lora_config

    options: dict[str, Any] = {"r": rank, "task_type": "CAUSAL_LM"} | ({} if alpha is None else {"lora_alpha": alpha})
    config = lora_config(selection, model=model, **options)
    if not config.target_parameters:
        config.lora_dropout = dropout
    return config


def _of_modules(model: nn.Module, recipe: Mapping[str, Any]) -> Any:
    """LoRA on names as the published scripts give them. Of fused experts PEFT makes parameters, without dropout."""
    from peft import LoraConfig

    fused = any("experts" in name and parameter.dim() == 3 for name, parameter in model.named_parameters())
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    experts = fused and {"gate_proj", "up_proj", "down_proj"} & set(recipe["modules"])
    modules = [name for name in recipe["modules"] if name in names or experts]
    options: dict[str, Any] = {"r": recipe["r"], "task_type": "CAUSAL_LM"}
    if "alpha" in recipe:
        options["lora_alpha"] = recipe["alpha"]
    return LoraConfig(target_modules=modules, lora_dropout=0.0 if experts else recipe["dropout"], **options)


def _wrapped(model: nn.Module, config: Any) -> nn.Module:
    from peft import get_peft_model

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: nn.Module = get_peft_model(model, config)
    return found
