"""Under the interpreter, the canaries pass as the kernels are, and each one of them dies of what it is there for."""

from dataclasses import replace

import pytest
import torch

from kappa_fast.kernels import (
    apply,
    canary,
    cholesky,
    coarse,
    gram,
    orthogonal,
    panel,
    quantize,
    ritz,
    shifted,
    start,
    triangular,
)
from kappa_fast.kernels.canary import CanaryError, check_device, check_storage
from kappa_fast.kernels.problems import INNER_COLUMNS, INNER_NONE, INNER_ROWS, Problems, Storage, storages

CPU = torch.device("cpu")
SIXTEEN = Storage(torch.bfloat16, INNER_COLUMNS, True)


@pytest.fixture(autouse=True)
def fresh():
    """Neither what passed before nor what is broken here is remembered."""
    yield
    check_device.cache_clear()
    check_storage.cache_clear()


@pytest.fixture(autouse=True)
def small(request, monkeypatch):
    """A fault shows in small matrices too, which the interpreter takes less time for."""
    if "sound" not in request.node.name and "class" not in request.node.name:
        monkeypatch.setattr(canary, "STORED", ((48, 32), (32, 16), (16, 16)))


@pytest.mark.slow
def test_every_kernel_passes_on_a_sound_device():
    check_device(CPU)


CLASSES = [
    SIXTEEN,
    Storage(torch.float32, INNER_ROWS, False),
    Storage(torch.float8_e4m3fn, INNER_NONE, False),
]


@pytest.mark.parametrize("storage", CLASSES, ids=str)
def test_storage_classes_pass_on_a_sound_device(storage):
    check_storage(CPU, storage)


@pytest.mark.slow
@pytest.mark.parametrize("storage", [s for s in storages() if s not in CLASSES], ids=str)
def test_the_other_storage_classes_pass_too(storage):
    check_storage(CPU, storage)


@pytest.mark.parametrize("storage", storages(), ids=str)
def test_a_canary_is_of_the_class_it_stands_for(storage):
    for m, n in (*canary.STORED, canary.LONG):
        made = canary._stored(storage, m, n)
        laid_out = canary._laid_out(made, storage)
        assert Storage.of(laid_out) == storage
        assert torch.equal(laid_out.float(), made.float())


def off(module, name, monkeypatch, which=None):
    """The launcher's result, or one of its tensors, is wrong by one part in a hundred million."""
    original = getattr(module, name)

    def launcher(*arguments):
        found = original(*arguments)
        tensor = found if which is None else getattr(found, which) if isinstance(which, str) else found[which]
        tensor *= 1 + 1e-8
        return found

    monkeypatch.setattr(module, name, launcher)


@pytest.mark.parametrize("name", ["times", "transposed_times", "binade_times"])
def test_a_product_with_the_weights_that_is_a_little_wrong_is_found(name, monkeypatch):
    off(apply, name, monkeypatch, 0 if name == "times" else None)
    with pytest.raises(CanaryError, match=rf"^{name} of Storage\(dtype=torch.bfloat16.* is off by \d.*e-\d+ on cpu"):
        check_storage(CPU, SIXTEEN)


def rows_left_out(matrix, first):
    """The same matrix with zeros from a row on."""
    cut = matrix.clone(memory_format=torch.preserve_format)
    cut[first:] = 0
    return cut


def test_a_second_block_of_rows_that_is_lost_is_found(monkeypatch):
    original, sizes = gram.gram_of_weights, []

    def lossy(problems):
        sizes.append(problems.m.tolist())
        return original(Problems.of([rows_left_out(a, gram.FLOAT_ROWS.value) for a in problems.matrices]))

    monkeypatch.setattr(gram, "gram_of_weights", lossy)
    with pytest.raises(CanaryError, match=r"^gram_of_weights of Storage\(dtype=torch.bfloat16"):
        check_storage(CPU, SIXTEEN)
    assert len(sizes) == 2  # what has fewer rows passes


@pytest.mark.slow
def test_a_part_along_the_rows_that_is_lost_is_found(monkeypatch):
    monkeypatch.setattr("kappa_fast.kernels.gram.add_parts", lambda *arguments, **options: None)
    with pytest.raises(CanaryError, match=r"^gram_of_slices in parts is off"):
        canary._check_splits(CPU)


def far_entries_read_near(problems):
    """The same wave, with the distance of lines cut to 32 bits where the last entry lies beyond them."""
    table = problems.table.clone()
    table[:, 3] = 0
    return replace(problems, table=table)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gram_of_weights", "times", "column_digests", "gram_of_slices"])
def test_places_beyond_two_gib_are_right_and_wrong_ones_are_found(name, monkeypatch):
    canary._check_far(CPU)
    module = {"gram_of_weights": gram, "times": apply, "column_digests": start, "gram_of_slices": gram}[name]
    original = getattr(module, name)

    def near(problems, *arguments):
        if name == "gram_of_slices":  # slices are written where they should be, and read 2 GiB before
            table = problems.table.clone()
            table[:, 7] -= canary.FAR
            return original(replace(problems, table=table), *arguments)
        far = problems.matrices[0].stride(0) > 1 << 20
        return original(far_entries_read_near(problems) if far else problems, *arguments)

    monkeypatch.setattr(module, name, near)
    with pytest.raises(CanaryError, match=f"^{name} (of|beyond|reads wrong entries beyond)"):
        canary._check_far(CPU)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_second_update_of_the_rest_that_is_lost_is_found(dtype, monkeypatch):
    original, lost = cholesky.launch, []

    def lossy(kernel, grid, *arguments, **options):
        trailing = kernel is cholesky._trailing_kernel and any(
            a.dtype == dtype for a in arguments if hasattr(a, "dtype")
        )
        if trailing and arguments[-1] > 0:
            lost.append(arguments[-1])
        else:
            original(kernel, grid, *arguments, **options)

    monkeypatch.setattr(cholesky, "launch", lossy)
    with pytest.raises(CanaryError, match=r"^cholesky is off"):
        check_device(CPU)
    assert lost


@pytest.mark.slow
def test_start_blocks_that_miss_a_bit_or_are_not_gaussian_are_found(monkeypatch):
    canary._check_start(CPU)
    original = start.gaussian_blocks
    monkeypatch.setattr(start, "gaussian_blocks", lambda rows, keys: original(rows, [0 for _ in keys]))
    with pytest.raises(CanaryError, match="gaussian_blocks are not Gaussian"):
        canary._check_start(CPU)
    monkeypatch.setattr(start, "gaussian_blocks", original)
    digests = start.column_digests
    monkeypatch.setattr(
        start,
        "column_digests",
        lambda problems: digests(Problems.of([rows_left_out(a, -1) for a in problems.matrices])),
    )
    with pytest.raises(CanaryError, match="column_digests does not tell columns apart"):
        canary._check_start(CPU)


def test_a_column_that_is_not_seen_is_found(monkeypatch):
    original = quantize.column_peaks
    monkeypatch.setattr(quantize, "column_peaks", lambda p: original(p) // 2)
    with pytest.raises(CanaryError, match=r"^column_peaks is off"):
        check_storage(CPU, SIXTEEN)


@pytest.mark.parametrize(
    ("name", "what", "factor"),
    [("gram_of_slices", "gram_of_slices, 2 slices of 7 bits", 1 + 1e-8), ("gram_of_weights", "gram_of_weights", 1.001)],
)
def test_a_gram_matrix_that_is_wrong_is_found(name, what, factor, monkeypatch):
    original = getattr(gram, name)
    monkeypatch.setattr(gram, name, lambda *arguments: original(*arguments) * factor)
    with pytest.raises(CanaryError, match=f"^{what} of Storage"):
        check_storage(CPU, SIXTEEN)


@pytest.mark.parametrize(
    ("factor", "digits"), [(1 - 1e-8, 7), (1 - 1e-8, 8), (1 + 1e-7, 7)], ids=["less", "less of bytes", "more"]
)
def test_slices_that_lie_elsewhere_than_they_say_are_found(factor, digits, monkeypatch):
    original = quantize.quantize

    def wrong(problems, peaks, slices, bits):
        found = original(problems, peaks, slices, bits=bits)
        return replace(found, residual=found.residual * factor if bits == digits else found.residual)

    monkeypatch.setattr(quantize, "quantize", wrong)
    with pytest.raises(CanaryError, match=r"^quantize computes \S+ instead of \S+ on cpu"):
        check_storage(CPU, SIXTEEN)


def test_slices_that_hold_too_little_are_found(monkeypatch):
    # All but the first slice are left empty, and the residual says so.
    original = quantize.quantize

    def coarse(problems, peaks, slices, bits):
        found, first = original(problems, peaks, slices), original(problems, peaks, 1)
        data = torch.cat([first.data, torch.zeros_like(found.data[1:])])
        return quantize.Slices(data, found.peaks, first.residual)

    monkeypatch.setattr(quantize, "quantize", coarse)
    with pytest.raises(CanaryError, match="quantize leaves too large a remainder on cpu"):
        check_storage(CPU, SIXTEEN)


SMALL = ((100, 70), (33, 17), (20, 5))


@pytest.fixture
def proofs():
    """The check of what proofs rest on, with one column of tiles less."""
    matrices = [canary._numbers(m, n, n).float() for m, n in SMALL]
    grams = [a.double().T @ a.double() + torch.eye(a.shape[1], dtype=torch.float64) for a in matrices]
    problems = Problems.of(matrices)
    return lambda: canary._check_shifted(problems, grams)


@pytest.mark.parametrize(
    ("which", "what"),
    [(None, ""), (0, "^residuals of coarse factors is off"), (1, "^sizes of coarse factors is off")],
)
def test_residuals_of_coarse_factors_are_held_to_what_their_digits_say(which, what, monkeypatch):
    matrices = [canary._numbers(m, n, n).float() for m, n in ((100, 70), (20, 5))]
    grams = [a.double().T @ a.double() for a in matrices]
    original = coarse.Coarse.residuals

    def residuals(self):
        found = list(original(self))
        if which is not None:
            found[which][-1] *= 1 - 1e-6
        return tuple(found)

    monkeypatch.setattr(coarse.Coarse, "residuals", residuals)
    if which is None:
        canary._check_coarse(Problems.of(matrices), grams)
    else:
        with pytest.raises(CanaryError, match=what):
            canary._check_coarse(Problems.of(matrices), grams)


@pytest.mark.slow
def test_what_proofs_rest_on_passes_on_a_sound_device(proofs):
    proofs()


@pytest.mark.parametrize(
    ("which", "factor", "what"),
    [
        pytest.param(0, 1 + 1e6, "^residuals of good factors are", marks=pytest.mark.slow),
        pytest.param(1, 1 - 1e-8, "^sizes of factors is off", marks=pytest.mark.slow),
    ],
)
def test_a_proof_that_would_rest_on_wrong_sums_is_found(which, factor, what, proofs, monkeypatch):
    original = shifted.Shifted.residuals

    def residuals(self):
        found = list(original(self))
        found[which] *= factor**2
        return tuple(found)

    monkeypatch.setattr(shifted.Shifted, "residuals", residuals)
    with pytest.raises(CanaryError, match=what):
        proofs()


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        pytest.param("factor_diagonals", "^residuals of roots are", marks=pytest.mark.slow),
        ("finish_columns", "^residuals of columns is off"),
    ],
)
def test_a_tile_that_measures_too_little_is_found(kernel, what, proofs, monkeypatch):
    original = getattr(cholesky, kernel)

    def launcher(problems, result, steps, step, residuals=None, **options):
        before = None if residuals is None else residuals.squares.clone()
        original(problems, result, steps, step, residuals, **options)
        if residuals is not None:  # half of what this launch has found
            residuals.squares.copy_(torch.where(residuals.squares == before, before, residuals.squares / 4))

    monkeypatch.setattr(cholesky, kernel, launcher)
    with pytest.raises(CanaryError, match=what):
        proofs()


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (2.0, "^deviations of good factors are"),
        pytest.param(0.5, "^deviations of wrong factors are", marks=pytest.mark.slow),
    ],
)
def test_a_check_of_factors_that_does_not_look_is_found(value, what, proofs, monkeypatch):
    monkeypatch.setattr(shifted.Shifted, "deviations", lambda self, squares, sizes: torch.full_like(sizes, value))
    with pytest.raises(CanaryError, match=what):
        proofs()


@pytest.mark.slow
def test_factors_that_are_finished_wrong_and_say_nothing_are_found(proofs, monkeypatch):
    original = cholesky.finish_columns

    def launcher(problems, result, steps, step, residuals=None, **options):
        original(problems, result, steps, step, residuals, **options)
        if residuals is not None and step == 0:
            result.packed[66 * 80] *= -1  # no square of a length tells

    monkeypatch.setattr(cholesky, "finish_columns", launcher)
    with pytest.raises(CanaryError, match=r"^factors are off by"):
        proofs()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "which"),
    [
        (cholesky, "cholesky", "packed"),
        *(
            (triangular, name, None)
            for name in ("lower_product", "transposed_product", "forward_solve", "backward_solve")
        ),
        *((panel, name, None) for name in ("inner", "combine", "subtract")),
        (orthogonal, "orthonormalized", 0),
        (ritz, "largest_eigenvalue", None),
        (ritz, "reach", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_kernel_that_knows_no_dtype_and_is_a_little_wrong_is_found(module, name, which, monkeypatch):
    off(module, name, monkeypatch, which)
    with pytest.raises(CanaryError, match=f"^{name} is off"):
        check_device(CPU)
