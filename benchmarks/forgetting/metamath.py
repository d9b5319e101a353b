"""Entries for PEFT's comparison of methods on MetaMathQA: KappaTune's selection, and the controls that it needs.

    python -m benchmarks.forgetting.metamath meta-llama/Llama-3.2-3B PEFT/method_comparison/MetaMathQA

writes experiments/lora/NAME-kappatune-lowest and its controls there, each a folder with the adapter_config.json that
run.py of that folder reads (``python run.py -v experiments/lora/NAME-kappatune-lowest``). All other settings are the
defaults of that comparison. Each has about as many trainable parameters as its LoRA of rank 32 on q_proj and v_proj.
The selection is made from the weights, so the model must be there; ranking takes minutes on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from . import published_methods as methods

REFERENCE, RANK = ("q_proj", "v_proj"), 32  # PEFT's entry llama-3.2-3B-rank32
TOP_P = 0.2  # of PEFT's selector
DRAWS = 3
PARAMS = "default_training_params.json"


def entries(model: nn.Module, draws: int = DRAWS) -> Iterator[tuple[str, Any]]:
    """Names and LoRA configs: the lowest, the highest, random ones of the same types, the first and the last layers."""
    ranking = methods.candidates(model)
    options: dict[str, dict[str, Any]] = {"lowest": {}, "highest": {"order": "highest"}}
    options |= {f"random-{draw}": {"order": "random", "match": ["type"]} for draw in range(draws)}
    options |= {"first-layers": {"by": "layer"}, "last-layers": {"by": "layer", "order": "highest"}}
    size = RANK * sum(sum(e.shape) for e in ranking if e.name.removesuffix(".weight").endswith(REFERENCE))
    for name, more in options.items():
        draw = int(name.rpartition("-")[2]) if name.startswith("random") else 0
        selection = methods.adapted(ranking, {"top_p": TOP_P, **more}, draw)
        rank = max(1, round(size / methods.adapter_size(selection)))
        yield f"kappatune-{name}", methods.lora_of(selection, model, rank, 2 * rank, 0.0)


def write(model: nn.Module, name: str, folder: Path, draws: int = DRAWS) -> list[Path]:
    """Writes all entries below ``folder``/experiments/lora, and returns their folders.

    Raises:
        FileNotFoundError: ``folder`` is not that of the comparison.
    """
    if not (folder / PARAMS).exists():
        raise FileNotFoundError(f"{folder} has no {PARAMS}: give method_comparison/MetaMathQA of a clone of PEFT")
    found = []
    for entry, config in entries(model, draws):
        target = folder / "experiments" / "lora" / f"{name}-{entry}"
        config.save_pretrained(target)
        found.append(target)
    return found


def main(given: Sequence[str] | None = None) -> None:
    """The command line."""
    import torch
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser("python -m benchmarks.forgetting.metamath", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="a folder, or a name on the hub")
    parser.add_argument("folder", type=Path, help="method_comparison/MetaMathQA of a clone of PEFT")
    parser.add_argument("--draws", type=int, default=DRAWS, help="random selections")
    options = parser.parse_args(given)
    name = options.model.rstrip("/").rpartition("/")[2]
    try:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
        for target in write(model, name[:1].lower() + name[1:], options.folder, options.draws):
            print(target)
    except OSError as error:  # also of a model that is not there
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
