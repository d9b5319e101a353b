"""Real Trainers over small models of three kinds: a language model, a mixture of experts, a vision transformer."""

from __future__ import annotations

from typing import Any

import torch
from families import batch, build

KINDS = ("llama", "mixtral", "vit")
# What transformers and torch warn about on their own.
IGNORED = ("ignore::UserWarning:torch", "ignore::UserWarning:transformers", "ignore::FutureWarning")


def make(kind: str) -> Any:
    """A small model with weights that depend on nothing but the kind."""
    if kind != "vit":
        return build(kind)
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        num_labels=4,
    )
    torch.manual_seed(7)
    return transformers.ViTForImageClassification(config).eval()


def examples(kind: str) -> list[dict[str, Any]]:
    """Eight examples."""
    if kind != "vit":
        return [{key: value[0] for key, value in batch(seed, rows=1).items()} for seed in range(8)]
    drawn = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=drawn), "labels": i % 4} for i in range(8)]


def arguments(folder: Any, steps: int = 3, **options: Any) -> Any:
    """TrainingArguments for a CPU that report to nobody."""
    import transformers

    given: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": steps,
        "save_steps": 3,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 100,
        **options,
    }
    return transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, remove_unused_columns=False, **given
    )


def trainer_of(kind: str, folder: Any, model: Any = None, steps: int = 3, callbacks: Any = (), **more: Any) -> Any:
    """A Trainer; ``more``: for TrainingArguments, or for the Trainer what only that takes."""
    import transformers

    own = {key: more.pop(key) for key in ("optimizer_cls_and_kwargs", "model_init") if key in more}
    chosen = model if model is not None or "model_init" in own else make(kind)
    args = arguments(folder, steps, **more)
    return transformers.Trainer(model=chosen, args=args, train_dataset=examples(kind), callbacks=list(callbacks), **own)
