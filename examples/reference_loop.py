"""A training loop written for the reference implementation of KappaTune: only the import of the optimizer is another.

python examples/reference_loop.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from task import accuracy, batches, minilm_classifier, unchanged

from kappa_fast import SelectiveFineTuningOptimizer  # was: from selective_fine_tuning import ...


def main() -> None:
    """Train the parameters with the lowest condition numbers, and show that the rest has not moved."""
    model = minilm_classifier()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        optimizer = SelectiveFineTuningOptimizer(
            model=model,
            base_optimizer_cls=torch.optim.AdamW,
            optimizer_args={"lr": 5e-4},
            condition_file=str(Path(folder, "condition_numbers.json")),
            num_tensors_to_finetune=20,
            recompute=True,
            max_dim_size_to_analyze=16384,
        )
    chosen = sorted(optimizer.trainable_param_names, key=optimizer.condition_numbers.get)  # type: ignore[arg-type]
    print(f"selected: {len(chosen)} parameters")
    for name in chosen[:5]:
        print(f"  {optimizer.condition_numbers[name]:8.2f}  {name}")
    print(f"accuracy before: {accuracy(model):.3f}")
    for epoch in range(2):
        model.train()
        total = 0.0
        rounds = batches(32, "train")
        for batch in rounds:
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(rounds):.3f}, accuracy {accuracy(model):.3f}")
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    same, weights = unchanged(model.named_parameters(), before)
    print(f"trained: {len(moved)} parameters")
    print(f"bit for bit as before: {same:,} of {weights:,} weights")
    assert moved <= optimizer.trainable_param_names


if __name__ == "__main__":
    main()
