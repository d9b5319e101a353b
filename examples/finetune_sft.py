"""Full fine-tuning of a causal language model with TRL's SFTTrainer and an optimizer over a selection.

Needs the extras demo and transformers, and the packages trl and datasets.

python examples/finetune_sft.py
"""

from __future__ import annotations

import tempfile

import torch
from corpus import LENGTH, loss, small_llama, texts, tokenizer
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import kappa_fast
from kappa_fast.integrations.transformers import KappaDriftCallback, optimizer_factory


def main() -> None:
    """Rank, select, train with the learning rate of the arguments, and show what moved."""
    train, test = texts()
    model = small_llama()
    selection = kappa_fast.rank(model).select(max_params=0.5, fill=True).including(r"norm\.weight$")
    print(f"selected: {selection}")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    print(f"loss before: {loss(model, test):.3f}")
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=120,
            per_device_train_batch_size=32,
            learning_rate=5e-3,
            weight_decay=0.01,
            max_length=LENGTH,
            report_to=[],
            save_strategy="no",
            logging_steps=40,
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"text": train}),
            processing_class=tokenizer(),
            optimizer_cls_and_kwargs=optimizer_factory(selection, torch.optim.AdamW, args=arguments),
            callbacks=[KappaDriftCallback(rerank_every=60)],
        )
        trainer.train()
    print(f"loss after: {loss(model, test):.3f}")
    for found in trainer.state.log_history:
        if "kappa_trained_change" in found:
            print(f"step {found['step']}: kappa of what trains moved by {100 * found['kappa_trained_change']:.1f}%")
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    same = [name for name, p in model.named_parameters() if (p == before[name]).all()]
    print(f"parameters bit for bit as before: {len(same)} of {len(frozen)} that are frozen")
    assert set(same) == set(frozen)


if __name__ == "__main__":
    main()
