"""Full fine-tuning of MiniLM's best-conditioned matrices, and of a new head, with an ordinary optimizer class.

python examples/finetune_wrap.py
"""

from __future__ import annotations

import torch
from task import accuracy, batches, minilm_classifier, unchanged

import kappa_fast


def main() -> None:
    """Rank, select, train, and show that nothing else has moved."""
    model = minilm_classifier()
    ranking = kappa_fast.rank(model)
    selection = ranking.select(max_params=0.15).including(r"^classifier\.", r"pooler\.")
    print(f"selected: {selection}")
    for entry in selection.entries[:5]:
        print(f"  {entry.kappa:8.2f}  {entry.key}")

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    print(f"accuracy before: {accuracy(model):.3f}")
    optimizer = kappa_fast.wrap(torch.optim.AdamW, model, selection, lr=2e-4, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    for epoch in range(3):
        model.train()
        losses = []
        for batch in batches(32, "train"):
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        scheduler.step()
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}, accuracy {accuracy(model):.3f}")

    trained = sum(target.numel for target in optimizer.targets)
    same, total = unchanged(model.named_parameters(), before)
    print(f"trained: {len(optimizer.targets)} parameters, {trained:,} weights")
    print(f"bit for bit as before: {same:,} of {total:,} weights")
    assert same >= total - trained


if __name__ == "__main__":
    main()
