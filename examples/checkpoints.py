"""A pipeline over the checkpoints of a run: rank each, follow kappa over all, write a picture, a page and a table.

Needs the extras demo, transformers, dataframe and report.

python examples/checkpoints.py [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from corpus import blocks, small_llama, texts

import kappa_fast

LIMIT = 1000.0  # no kappa is to move by more than this factor


def main(folder: Path) -> None:
    """Train, save three checkpoints, rank them with a cache, and judge what moved."""
    checkpoints = train(folder)
    rankings = [kappa_fast.rank(path, cache=folder / "cache", progress=False) for path in checkpoints]
    for path, ranking in zip(checkpoints, rankings, strict=True):
        ranking.to_json(folder / f"{path.name}.json")
        print(f"{path.name}: {ranking!r}")
    course = rankings[0].series(*rankings[1:], labels=[path.name for path in checkpoints])
    print(course.to_text(limit=5))
    course.plot(folder / "run.svg")
    course.to_dataframe().to_csv(folder / "run.csv", index=False)
    change = rankings[0].compare(rankings[-1])
    change.to_html(folder / "change.html")
    print(rankings[-1].summary("layer"))
    beyond = change.exceeding(LIMIT)
    print(f"matrices whose kappa certainly moved by more than {LIMIT:g}: {len(beyond)}")
    print(f"written: {', '.join(sorted(path.name for path in folder.iterdir() if path.is_file()))}")


def train(folder: Path) -> list[Path]:
    """An ordinary loop over all weights that saves as it goes."""
    model, rows = small_llama(), blocks(texts(300)[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    drawn = torch.Generator().manual_seed(0)
    saved = []
    for step in range(61):
        if step % 30 == 0:
            saved.append(folder / f"checkpoint-{step}")
            model.save_pretrained(saved[-1])
        some = torch.stack([rows[i]["input_ids"] for i in torch.randint(len(rows), (16,), generator=drawn).tolist()])
        model(input_ids=some, labels=some).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return saved


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
