"""Cases of a recording: selections in the words of other programs, PEFT among them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from recording_cases_results import ranked
from recording_cases_training import SELECTED
from recording_plain import Lines
from recording_sources import Cases, Stored, model
from torch import nn

import kappa_fast
from kappa_fast import Ranking, Selection
from kappa_fast.integrations import peft as for_peft

FORMATS = ("axolotl", "ms-swift", "spectrum", "esft", "names", "regex")
BUDGETS: dict[str, dict[str, Any]] = {
    "matrix": {"num_tensors": 4},
    "no experts": {"num_tensors": 4, "exclude": "experts"},
    "expert": {"max_params": 0.4, "unit": "expert"},
    "parameter": {"max_params": 0.4, "unit": "parameter"},
    "experts": {"num_tensors": 2, "unit": "expert", "include": "experts"},
}
OF_LORA = ("target_modules", "target_parameters", "modules_to_save", "r", "lora_alpha", "lora_dropout", "rank_pattern")


def cases(stored: Stored) -> Cases:
    sources: dict[str, tuple[Ranking, nn.Module | None]] = {"mapping": (ranked(), None)}
    for name, fused in {"module": False, "fused": True}.items():
        made = model(fused=fused)
        sources[name] = (kappa_fast.rank(made, progress=False), made)
    for (name, (ranking, owner)), (which, budget) in itertools.product(sources.items(), BUDGETS.items()):
        selection = ranking.select(**budget)
        for kind in FORMATS:
            yield f"{kind} of {name}, {which}", partial(_exported, selection, kind)
            if owner is not None:
                yield f"{kind} of {name}, {which}, with the model", partial(_exported, selection, kind, owner)
    ranking, owner = sources["module"]
    selection = ranking.select(num_tensors=3, exclude="experts")
    changed = selection.including("norm").excluding(r"layers\.1")
    yield "patterns", partial(_exported, changed, "names", owner)
    yield "patterns, no model", partial(_exported, selection.including("norm"), "names")
    for kind in ("llama-factory", "other"):
        yield kind, partial(_exported, selection, kind)
    yield "nothing", partial(_exported, Selection((), True, {}), "names")
    for kind in FORMATS[:3] + FORMATS[4:]:
        yield f"{kind} to a file", partial(_to_file, selection, kind, stored.place.folder / "exported")
    yield from _for_peft(model())


def _exported(selection: Selection, kind: str, owner: nn.Module | None = None) -> Lines:
    return Lines(selection.export(kind, model=owner))


def _to_file(selection: Selection, kind: str, path: Path) -> list[Any]:
    method: Callable[..., str] = getattr(selection, f"to_{kind.replace('-', '_')}")
    return [method(path) == path.read_text(), Lines(path.read_text())]


def config_of(config: Any) -> dict[str, Any]:
    """What a LoraConfig says of its targets."""
    return {name: getattr(config, name, None) for name in OF_LORA}


def _for_peft(made: nn.Module) -> Cases:
    ranking = kappa_fast.rank(made, progress=False)
    for (which, budget), how in itertools.product(SELECTED.items(), ("error", "widen")):
        yield f"lora_config, {which}, {how}", partial(_lora, ranking.select(**budget), partial=how)
    wide = ranking.select(num_tensors=2, exclude="experts").including("lm_head")
    yield "lora_config, with the model", partial(_lora, wide, model=made)
    yield "lora_config, without the model", partial(_lora, wide)
    yield "lora_config, targets given", partial(_lora, wide, target_modules=["conv"])
    yield "find_kappa_target_modules", lambda: for_peft.find_kappa_target_modules(made, top_p=0.4, show_progress=False)
    selector = for_peft.KappaTuneSelector(made, show_progress=False)
    yield "KappaTuneSelector", lambda: selector.get_best_targets(num_modules=3)
    yield "KappaTuneSelector, threshold", lambda: selector.get_best_targets(threshold=100.0)
    yield "KappaTuneSelector, parameters", selector.get_best_target_parameters


def _lora(selection: Selection, **options: Any) -> dict[str, Any]:
    return config_of(for_peft.lora_config(selection, r=2, **options))
