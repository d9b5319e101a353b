"""Full fine-tuning of a causal language model with transformers' Trainer, of what KappaTuneCallback selects.

Needs the extras demo and transformers.

python examples/finetune_trainer.py
"""

from __future__ import annotations

import tempfile

from corpus import blocks, loss, small_llama, texts
from transformers import Trainer, TrainingArguments

from kappa_fast.integrations.transformers import KappaTuneCallback


def main() -> None:
    """Rank and select when the Trainer is made, train, stop, go on, and show what moved."""
    train, test = texts()
    model = small_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    print(f"loss before: {loss(model, test):.3f}")
    with tempfile.TemporaryDirectory() as folder:
        for steps in (60, 120):  # the second Trainer goes on where the first one stopped
            model = small_llama()
            callback = KappaTuneCallback(max_params=0.5, fill=True, rerank_every=40)
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                save_steps=60,
                per_device_train_batch_size=32,
                learning_rate=5e-3,
                lr_scheduler_type="constant",
                report_to=[],
                logging_steps=40,
                disable_tqdm=True,
                use_cpu=True,
            )
            trainer = Trainer(model=model, args=arguments, train_dataset=blocks(train), callbacks=[callback])
            trainer.train(resume_from_checkpoint=steps > 60)
    print(f"loss after: {loss(model, test):.3f}")
    print(f"selected: {callback.selection}")
    for found in callback.history:
        print(f"step {found['step']}: kappa of what trains moved by {100 * found['trained']['median']:.1f}% (median)")
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    same = [name for name, p in model.named_parameters() if (p == before[name]).all()]
    print(f"parameters bit for bit as before: {len(same)} of {len(frozen)} that are frozen")
    assert set(same) == set(frozen)


if __name__ == "__main__":
    main()
