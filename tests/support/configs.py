"""Checkpoints with a config.json."""

from __future__ import annotations

import json


def with_config(model, folder):
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(config, default=str))
