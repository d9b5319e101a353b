"""What kernels tell the compiler of a wave is true of every wave: a wrong promise would show on a GPU only."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kappa_fast.kernels.problems import (
    COLUMN_STRIDE,
    COLUMNS,
    GRAM,
    INNER_COLUMNS,
    INNER_NONE,
    INNER_ROWS,
    LEADING,
    PAD,
    PITCH,
    POINTER,
    ROW_PAD,
    ROW_STRIDE,
    ROWS,
    SLICE,
    Problems,
    Storage,
    storages,
    target_of,
)
from kappa_fast.kernels.splits import Splits

SHAPES = st.lists(
    st.tuples(st.integers(1, 40000), st.integers(1, 300)).map(lambda s: (max(s), min(s))), min_size=1, max_size=7
)


@given(SHAPES, st.sampled_from([64, 128]))
def test_what_a_wave_lays_out_itself_is_aligned(shapes, side):
    problems = Problems.of([torch.empty(1).expand(shape) for shape in shapes])
    column = {f.value: problems.table[:, f.value] for f in (PITCH, SLICE, GRAM, LEADING)}
    assert not (column[PITCH.value] % PAD.value).any()
    assert not (column[SLICE.value] % PAD.value).any()
    assert problems.slice_bytes % PAD.value == 0
    assert not (column[GRAM.value] % ROW_PAD.value).any()
    assert not (column[LEADING.value] % ROW_PAD.value).any()
    shares = Splits.of(problems, side)
    assert not (shares.part_start % ROW_PAD.value).any()
    # Triton compiles a launch once more for an array that starts elsewhere than on 16 bytes.
    for array in (shares.part_start, shares.on_device, shares.parts, problems.table):
        assert array.data_ptr() % 16 == 0


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e5m2]),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.sampled_from([0, 1, 16]), st.sampled_from([0, 1, 4, 16])),
    st.tuples(st.integers(0, 2), st.integers(0, 8)),
    st.booleans(),
    st.integers(1, 2),
)
def test_a_class_is_called_aligned_only_where_it_is(dtype, sizes, margins, turned, step):
    tall, wide, more_rows, more_columns = sizes
    m, n = 16 * tall + more_rows, 16 * wide + more_columns
    holder = torch.zeros(m + margins[0], (n + margins[1]) * step, dtype=torch.float32).to(dtype)
    matrix = holder[margins[0] :, margins[1] * step :: step]
    matrix = matrix.T if turned else matrix
    storage, problems = Storage.of(matrix), Problems.of([matrix])
    (row,) = problems.table.tolist()
    if storage.inner == INNER_COLUMNS:
        assert row[COLUMN_STRIDE.value] == 1
    if storage.inner == INNER_ROWS:
        assert row[ROW_STRIDE.value] == 1
    if storage.aligned:
        pitch, length = (ROW_STRIDE, COLUMNS) if storage.inner == INNER_COLUMNS else (COLUMN_STRIDE, ROWS)
        assert storage.inner != INNER_NONE
        assert row[POINTER.value] % 16 == row[pitch.value] % 16 == row[length.value] % 16 == 0


def test_ordinary_weights_are_aligned():
    for storage in storages():
        weight = torch.zeros(96, 64, dtype=torch.float32).to(storage.dtype)
        assert Storage.of(weight) == Storage(storage.dtype, INNER_COLUMNS, True)
        assert Storage.of(weight.T) == Storage(storage.dtype, INNER_ROWS, True)


TARGET_OF = {(8, 0): "sm_80", (8, 9): "sm_89", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_103", (11, 0): "sm_100"}
TARGET_OF |= {(12, 0): "sm_120", (12, 1): "sm_120"}


@pytest.mark.parametrize(("capability", "target"), TARGET_OF.items())
def test_every_device_has_a_target(capability, target, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert target_of(torch.device("cuda")) == target
