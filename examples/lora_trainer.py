"""LoRA on MiniLM's best-conditioned matrices with transformers' Trainer. Needs the extras demo and peft.

python examples/lora_trainer.py
"""

from __future__ import annotations

import tempfile

import torch
from peft import get_peft_model
from task import accuracy, batches, minilm_classifier, unchanged
from transformers import Trainer, TrainingArguments

import kappa_fast
from kappa_fast.integrations.peft import lora_config
from kappa_fast.results.names import plain_name


def main() -> None:
    """Rank, select, adapt, train, and show that the base weights have not moved."""
    model = minilm_classifier()
    ranking = kappa_fast.rank(model)
    selection = ranking.select(top_p=0.4)
    print(f"selected: {selection}")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "classifier" not in name}
    config = lora_config(selection, r=8, lora_alpha=16, task_type="SEQ_CLS", modules_to_save=["classifier"])
    adapted = get_peft_model(model, config)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    print(f"adapters on {len(selection.names)} matrices, {trainable:,} weights train")
    print(f"accuracy before: {accuracy(adapted):.3f}")

    examples = [
        {key: values[i] for key, values in batch.items()}
        for batch in batches(1, "train")
        for i in range(len(batch["labels"]))
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=3,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            report_to=[],
            save_strategy="no",
            logging_steps=40,
            disable_tqdm=True,
        )
        Trainer(model=adapted, args=arguments, train_dataset=examples, data_collator=collate).train()
    adapted.to("cpu")
    print(f"accuracy after: {accuracy(adapted):.3f}")
    same, total = unchanged(((plain_name(name), p) for name, p in adapted.named_parameters()), before)
    print(f"base weights bit for bit as before: {same:,} of {total:,}")
    assert same == total


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch, padded to its longest text."""
    found = {"labels": torch.stack([e["labels"] for e in examples])}
    for key in examples[0].keys() - {"labels"}:
        found[key] = torch.nn.utils.rnn.pad_sequence([e[key] for e in examples], batch_first=True)
    return found


if __name__ == "__main__":
    main()
