"""The command line: options, exit codes, one-line errors, pipes, and Ctrl-C."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from families import build
from make_entries import make_entry

import kappa_fast
from kappa_fast import backends, pipeline
from kappa_fast.cli import options
from kappa_fast.cli import rank as rank_command
from kappa_fast.cli.output import Lines
from kappa_fast.execution import executor as execution

COMMAND = [sys.executable, "-m", "kappa_fast"]


@pytest.fixture
def no_work(monkeypatch):
    """Fails the test if anything is ranked."""
    monkeypatch.setattr(pipeline, "rank", lambda *_, **__: pytest.fail("ranked, though it was known to be in vain"))


def run(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, **options)


def test_rank_prints_every_matrix_and_a_summary_and_is_quiet_on_stderr_in_a_pipe(checkpoint):
    done = run("rank", checkpoint)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("layers.0.up", "layers.1.up", "layers.2.up", "layers.0.square", "layers.1.square"):
        assert f" {name}.weight " in done.stdout
    assert "5 ranked, 0 of them proven, 1 skipped" in done.stdout
    assert "5 of 5 intervals within rtol 0.01" in done.stdout
    assert re.search(r"^\d+\.\d\d s \(cpu, threads: \d+\)$", done.stdout, re.MULTILINE)
    assert "skipped: 1 too small: its smaller side is below --min-dim 16" in done.stdout
    assert not re.search("\x1b", done.stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_on_a_terminal_there_is_a_bar_with_matrices_and_the_time_left(checkpoint):
    import pty

    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    environment.pop("NO_COLOR", None)
    child = subprocess.Popen([*COMMAND, "rank", checkpoint], stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # what Linux says where others say "end of file"
            break
        if not chunk:
            break
        seen += chunk
    os.close(ours)
    assert child.wait(60) == 0
    assert re.search(r"5/5 matrices.*ETA", seen.decode(), re.DOTALL)


def test_version_and_help_cost_next_to_nothing_beyond_the_import(root, run_python):
    code = """
import time
import kappa_fast
start = time.process_time()
from kappa_fast.cli import app
for arguments in (["--version"], ["--help"], ["rank", "--help"], ["demo", "--help"]):
    try:
        app(arguments, prog_name="kappa-fast")
    except SystemExit as stop:
        assert not stop.code
print(time.process_time() - start)
"""
    said = run_python(code, cwd=root)
    assert said.startswith(f"kappa-fast {kappa_fast.__version__}\n")
    assert "Usage: kappa-fast rank" in said
    assert "Usage: kappa-fast demo" in said
    assert float(said.split()[-1]) < 0.5


def test_without_a_command_the_help_is_shown_as_wrong_use(cli):
    code, out, err = cli()
    assert code in (0, 2)  # typer changed its mind
    assert "Commands:" in out + err


RANK = kappa_fast.rank  # looked up now, not while another function has taken its place


def test_every_option_of_rank_that_fits_a_command_line_is_there_with_the_same_default():
    python = inspect.signature(kappa_fast.rank).parameters
    shell = inspect.signature(rank_command.rank).parameters
    assert set(python) - set(shell) == {"source", "process_group", "stages", "adapters"}
    for name in set(python) & set(shell) - {"certify", "cache"}:  # the same command goes on from there: it has a cache
        assert shell[name].default == python[name].default, name
    assert options.proofs(shell["certify"].default) is python["certify"].default


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--top", "3"], {"top": 3}),
        (["--top", "0.2"], {"top": 0.2}),
        (["--top", "1"], {"top": 1}),
        (["--top", "1.0"], {"top": 1.0}),
        (["--top-per-group"], {"top_per_group": True}),
        (["--rtol", "1e-3"], {"rtol": 1e-3}),
        (["--certify", "all"], {"certify": True}),
        (["--certify", "selection", "--top", "2"], {"certify": "selection", "top": 2}),
        (["--include", "a", "--include", "b"], {"include": ["a", "b"]}),
        (["--exclude", "a$"], {"exclude": ["a$"]}),
        (["--embeddings", "--routers"], {"embeddings": True, "routers": True}),
        (["--fused", "stored"], {"fused": "stored"}),
        (["--min-dim", "2", "--max-dim", "100"], {"min_dim": 2, "max_dim": 100}),
        (["--device", "cpu"], {"device": "cpu"}),
        (["--backend", "torch"], {"backend": "torch"}),
        (["--memory-budget", "2GB"], {"memory_budget": "2GB"}),
        (["--progress"], {"progress": True}),
        (["--no-progress"], {"progress": False}),
        (["--no-cache"], {"cache": None}),
        (["--cache", "--cache-dir", "some/where"], {"cache": Path("some/where")}),
        ([], {}),
    ],
)
def test_every_option_reaches_rank(arguments, expected, cli, checkpoint, monkeypatch):
    seen = {}

    def rank(source, **options):
        seen.update(options, source=source)
        return kappa_fast.Ranking([make_entry()], (), {"seconds": 0.0, "device": ["cpu"], "threads": 2})

    monkeypatch.setattr(pipeline, "rank", rank)
    code, _, err = cli("rank", checkpoint, *arguments)
    assert (code, err) == (0, "")
    assert seen["source"] == str(checkpoint)
    defaults = {name: p.default for name, p in inspect.signature(RANK).parameters.items()}
    for name, value in seen.items():
        if name == "progress" and value is not True and value is not False:
            assert isinstance(value, Lines)  # stderr is no terminal here
        elif name != "source":
            want = expected.get(name, True if name == "cache" else defaults[name])
            assert (value, type(value)) == (want, type(want)), name


def test_options_have_their_effect(cli, checkpoint):
    code, out, _ = cli("rank", checkpoint, "--include", "up", "--exclude", r"\.2\.", "--certify", "all", "--min-dim", 1)
    assert code == 0
    assert "2 ranked, 2 of them proven, 4 skipped" in out
    assert "skipped: 3 matched by none of the include patterns" in out
    code, out, _ = cli("rank", checkpoint, "--top", 1)
    assert code == 0
    assert re.search(r"[1-4] only bounded", out)


@pytest.mark.parametrize("name", [name for name in options.BackendName if name != "triton" or sys.platform == "linux"])
def test_every_backend_that_can_be_named_exists(name):
    assert backends.get_backend(name.value, torch.device("cpu")).device.type == "cpu"


def test_limit_and_all_set_the_rows_of_the_table(cli, checkpoint):
    names = [entry.key for entry in kappa_fast.rank(checkpoint)]
    _, two, _ = cli("rank", checkpoint, "--limit", 2)
    assert [name for name in names if name in two] == names[:2]
    _, everything, _ = cli("rank", checkpoint, "--limit", 2, "--all")
    assert [name for name in names if name in everything] == names


def test_reasons_for_skipping_are_counted_over_layers_and_the_rare_ones_together():
    reasons = [f"scales of layers.{i}.q.weight, not a weight" for i in range(5)]
    reasons += ["too small: its smaller side is below min_dim=16"] * 3 + [f"reason {i}" for i in "abcdefgh"]
    skipped = [kappa_fast.Skipped("w", (2, 2), reason) for reason in reasons]
    ranking = kappa_fast.Ranking([], skipped, {"seconds": 0.0, "device": ["cpu"], "threads": 2})
    assert rank_command.summary(ranking, 1e-2)[2:] == [
        "skipped: 5 scales of layers.*.q.weight, not a weight",
        "skipped: 3 too small: its smaller side is below min_dim=16",
        *(f"skipped: 1 reason {i}" for i in "abcdef"),
        "skipped: 2 for other reasons, which the --json FILE lists",
    ]


def test_json_holds_the_ranking_and_comes_beside_the_table(cli, checkpoint, tmp_path):
    file = tmp_path / "ranking.json"
    code, out, err = cli("rank", checkpoint, "--json", file)
    assert (code, err) == (0, "")
    assert f"written to {file}" in out
    kept = kappa_fast.Ranking.from_json(file)
    assert list(kept) == list(kappa_fast.rank(checkpoint))
    assert not kept.metadata["partial"]


def fails(result, code: int, message: str) -> None:
    """The exit code, nothing on stdout, and exactly one line on stderr."""
    assert result[0] == code, result
    assert result[1] == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", result[2]), result[2]


@pytest.mark.long
def test_a_mixture_of_experts_says_nothing_on_stderr_of_what_transformers_imports(root, tmp_path):
    build("mixtral").save_pretrained(tmp_path)
    command = [sys.executable, "-m", "kappa_fast", "rank", str(tmp_path), "--min-dim", "4", "--no-cache"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert (done.stderr, "mlp.experts.down_proj[0]" in done.stdout) == ("", True)


def test_a_missing_file_is_named(cli, tmp_path):
    missing = tmp_path / "missing.safetensors"
    fails(cli("rank", missing), 1, re.escape(str(missing)))


def test_a_truncated_file_is_named(cli, checkpoint, tmp_path):
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(checkpoint.read_bytes()[:-100])
    fails(cli("rank", truncated), 1, re.escape(str(truncated)))


def test_an_option_that_rank_refuses_is_wrong_use(cli, checkpoint):
    fails(cli("rank", checkpoint, "--rtol", 2), 2, "--rtol 2.0")
    fails(cli("rank", checkpoint, "--top", 0), 2, "--top 0")
    fails(cli("rank", checkpoint, "--certify", "selection"), 2, "--top")
    fails(cli("rank", checkpoint, "--memory-budget", "much"), 2, "--memory-budget much")
    fails(cli("rank", checkpoint, "--device", "toaster"), 2, "--device toaster")


def test_errors_about_scores_name_the_options_of_the_command(cli, checkpoint, tmp_path):
    file = tmp_path / "r.json"
    assert cli("rank", checkpoint, "--no-cache", "--json", file, "-q")[0] == 0
    for arguments, words in {
        ("rank", checkpoint, "--score", "flatness", "--top", 2): "--top with --score flatness would save",
        ("rank", checkpoint, "--score=-flatness", "--top", 2): "with --score=-flatness would save nothing",
        ("rank", checkpoint, "--score", "flatnes"): "--score flatnes: give one of kappa, ",
        ("rank", checkpoint, "--statistics", "snr"): "--statistics ['snr']: give one or several of 'outliers'",
        ("rank", checkpoint, "--statistics", "outliers", "--top", 2): "--statistics takes every matrix, and --top",
        ("select", file, "--score", "alpha", "--top-p", 0.5): "rank the weights again with --score alpha",
    }.items():
        code, _, err = cli(*arguments)
        assert code == 2
        assert words in err
        assert not re.search(r"TensorKappa|(?<!-)score=|[(]|ranking[.]", err.replace("(method", "")), err


def test_the_summary_says_what_was_known_where_the_score_needs_no_kappa(cli, checkpoint, monkeypatch):
    from kappa_fast.spectrum import ladder, small

    monkeypatch.setattr(small, "BELOW", 2)
    monkeypatch.setattr(ladder, "left_to_the_svd", lambda shape: False)
    code, out, _ = cli("rank", checkpoint, "--no-cache", "--score", "flatness")
    assert code == 0
    assert "\n5 with flatness, which needs no kappa\n" in out
    assert "intervals within rtol" not in out


def test_a_cache_directory_that_is_none_is_wrong_use(cli, checkpoint, no_work):
    fails(cli("rank", checkpoint, "--cache-dir", checkpoint), 2, "not a directory: give the path of")
    fails(cli("rank", checkpoint, "--cache-dir", ""), 2, "--cache-dir '' is not a directory")
    fails(cli("rank", checkpoint, "--cache-dir", "x" * 300), 2, "x' is not a directory")


def test_a_quoted_home_is_the_home(cli, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cli("rank", checkpoint, "--cache-dir", "~/results")[0] == 0
    assert any((tmp_path / "home" / "results").iterdir())


def test_nothing_to_rank_is_said_on_stderr(cli, checkpoint):
    code, out, err = cli("rank", checkpoint, "--include", "nosuch")
    assert (code, err) == (5, "warning: no matrix was left to rank, for the reasons above\n")
    assert "matched by none of the include patterns" in out


def test_a_top_that_is_no_number_is_wrong_use(cli, checkpoint, no_work):
    fails(cli("rank", checkpoint, "--top", "most"), 2, "--top most: give a count such as 10, or a share")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "nosuch"], r"'nosuch' is not one of 'auto', 'torch'"),
        (["--certify", "maybe"], r"'maybe' is not one of 'no', 'all', 'selection'"),
        (["--fused", "half"], r"'half' is not one of 'split', 'stored'"),
        (["--limit", "-1"], r"Invalid value for '--limit'"),
        (["--rtol", "small"], r"Invalid value for '--rtol'"),
        (["--no-such-option"], r"No such option:? '?--no-such-option"),
    ],
)
def test_what_cannot_be_parsed_is_wrong_use(arguments, message, cli, checkpoint, no_work):
    code, out, err = cli("rank", checkpoint, *arguments)
    assert (code, out) == (2, "")
    assert re.search(message, err)
    assert "Traceback" not in err


def test_a_json_file_that_cannot_be_written_is_found_out_before_the_work(cli, checkpoint, tmp_path, no_work):
    fails(
        cli("rank", checkpoint, "--json", tmp_path / "nowhere" / "r.json"), 1, "r.json cannot be written: No such file"
    )
    fails(cli("rank", checkpoint, "--json", checkpoint / "r.json"), 1, "r.json cannot be written: Not a directory")
    fails(cli("rank", checkpoint, "--json", tmp_path), 2, "give the name of a file")
    fails(cli("rank", checkpoint, "--json", "-", "--csv", "-"), 2, "--json - and --csv - would both go to stdout")
    assert list(tmp_path.iterdir()) == []


def test_an_error_nobody_expected_is_one_line_and_the_traceback_comes_with_debug(cli, checkpoint, monkeypatch):
    def rank(*_, **__):
        raise ZeroDivisionError("one line\nand another")

    monkeypatch.setattr(pipeline, "rank", rank)
    fails(cli("rank", checkpoint), 1, r"ZeroDivisionError: one line and another \(--debug shows where\)")
    code, _, err = cli("rank", checkpoint, "--debug")
    assert code == 1
    assert "Traceback" in err
    assert "in rank" in err


def test_a_sharded_parameter_is_a_failure_in_one_line(cli, checkpoint, monkeypatch):
    def rank(*_, **__):
        raise NotImplementedError("'w' is sharded: rank the checkpoint")

    monkeypatch.setattr(pipeline, "rank", rank)
    fails(cli("rank", checkpoint), 1, "'w' is sharded: rank the checkpoint")


def test_a_warning_is_one_line_and_no_failure(cli, checkpoint, monkeypatch):
    rank = pipeline.rank

    def warning(*arguments, **options):
        warnings.warn("float64 cannot prove\nthis", stacklevel=2)
        return rank(*arguments, **options)

    monkeypatch.setattr(pipeline, "rank", warning)
    code, _, err = cli("rank", checkpoint)
    assert (code, err) == (0, "warning: float64 cannot prove this\n")


def test_debug_shows_the_log_and_takes_it_away_again(cli, checkpoint, monkeypatch):
    rank = pipeline.rank

    def logging(*arguments, **options):
        execution.log.info("a wave failed")
        return rank(*arguments, **options)

    monkeypatch.setattr(pipeline, "rank", logging)
    before = (execution.log.level, list(execution.log.handlers))
    assert cli("rank", checkpoint)[2] == ""
    logged = cli("rank", checkpoint, "--debug")[2].splitlines()
    assert "a wave failed" in logged
    assert any(line.startswith("tiny.weight (4, 32): taken, ") for line in logged)  # and why, for every tensor
    assert (execution.log.level, execution.log.handlers) == before
