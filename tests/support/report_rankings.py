"""Rankings that a report has to show: every status, intervals of every width, numbers from 1 to 1e300."""

from __future__ import annotations

import math
import random

from make_entries import bounded, make_entry, non_finite

from kappa_fast.results.names import group_of, layer_of
from kappa_fast.results.ranking import Ranking


def named(name, kappa=10.0, make=make_entry, **fields):
    return make(name, kappa, layer=layer_of(name), group=group_of(name), **fields)


def nan(name, _, **fields):
    return non_finite(name, **fields)


def odd_ranking(count=240):
    """Every status, intervals of every width, and numbers from 1 to 1e300."""
    rng = random.Random(3)
    entries = []
    for i in range(count):
        kappa = 10 ** rng.choice([rng.uniform(0, 2), rng.uniform(0, 6.5), rng.uniform(0, 300)])
        width = 10 ** rng.uniform(-17, 0.5)
        interval = dict(lower=max(1.0, kappa / (1 + width)), upper=kappa * (1 + width))
        sensitivity = 10 ** rng.uniform(-5, 3)
        shape = (rng.choice([16, 64, 1024]), rng.choice([16, 48]))
        name = f"model.layers.{i % 12}.m{i // 12}.weight"
        fields = dict(**interval, sensitivity=sensitivity, shape=shape, certified=rng.random() < 0.3)
        if i % 10 == 7:
            entries.append(named(name, kappa, bounded, shape=shape))
        elif i % 10 == 8:
            entries.append(named(name, math.inf, shape=shape))
        elif i % 10 == 9:
            entries.append(named(name, make=nan, shape=shape))
        else:
            entries.append(named(name, kappa, **fields))
    exact = [
        named(f"exact.{i}.w", float(k)) for i, k in enumerate([1, 2, 9.9995, 99995, 999999.5, 1e6, 10000.5, 10001.5])
    ]
    total = sum(entry.numel for entry in [*entries, *exact])
    return Ranking([*entries, *exact], [], {"num_parameters": total})
