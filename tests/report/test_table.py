from __future__ import annotations

import io
import math
import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_entries import bounded, entry_lists, make_entry, non_finite
from rich.console import Console

from kappa_fast.errors import OptionError
from kappa_fast.report.names import shorten_names
from kappa_fast.report.table import format_interval, format_number, format_relative, shorten
from kappa_fast.results.entries import Skipped
from kappa_fast.results.ranking import Ranking
from kappa_fast.texts import printable

BERT = [
    make_entry(
        f"encoder.layer.{layer}.{name}.weight",
        kappa * (1 + layer / 7),
        lower=kappa * (1 + layer / 7) * 0.999,
        upper=kappa * (1 + layer / 7) * 1.002,
        shape=shape,
        dtype="bfloat16",
        certified=layer == 2,
    )
    for layer in range(12)
    for name, kappa, shape in [
        ("attention.self.query", 1e3, (384, 384)),
        ("intermediate.dense", 14.0, (1536, 384)),
        ("attention.output.dense", 8e4, (384, 384)),
    ]
]
WORST = [
    make_entry("model.layers.12.mlp.experts.gate_up_proj", 123.456, part="[31].gate", shape=(151936, 4096)),
    make_entry("model.layers.3.mlp.experts.17.down_proj.weight", math.inf, dtype="float8_e4m3fn", sensitivity=math.nan),
    bounded("model.layers.30.self_attn.q_proj.weight", 8.8e5),
    non_finite("model.layers.31.self_attn.q_proj.weight"),
]


def test_every_line_fits_into_100_columns_and_columns_give_way_to_names():
    lines = Ranking(BERT + WORST).to_text().splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in "".join(lines)
    assert lines[0].split() == ["#", "tensor", "shape", "dtype", "kappa", "interval", "proven"]  # names are long
    first = lines[1].split()
    assert first == ["1", BERT[1].key, "1536x384", "bf16", "14.00", "13.98..14.03", "no"]
    assert "151936x4096" in next(line for line in lines if "[31].gate" in line)


def test_quantized_weights_show_their_format_in_place_of_the_dtype_and_a_line_explains_it():
    formats = ("fp8 e4m3, 128x128 blocks", "gptq 4 bits, groups of 128", "gptq 4 bits, groups of 128", None)
    entries = [make_entry(f"{i}.weight", 10.0 + i, quantization=name) for i, name in enumerate(formats)]
    *lines, summary, explained = Ranking(entries).to_text().splitlines()
    assert [line.split()[3] for line in lines] == ["dtype", "fp8*", "gptq*", "gptq*", "f32"]
    assert summary.startswith("4 ranked")
    assert explained == "* dequantized: 2 gptq 4 bits, groups of 128; 1 fp8 e4m3, 128x128 blocks"
    assert "dequantized" not in Ranking(entries[3:]).to_text()


def test_each_status_reads_as_what_it_is():
    lines = Ranking(WORST).to_text(width=120).splitlines()
    assert re.search(r"\binf >= 1\.00e15 +no +- deficient$", lines[2])
    assert re.search(r"\bnan >= 880000 +- +- bounded$", lines[3])
    assert re.search(r"\bnan - +- +- non_finite$", lines[4])


def test_names_that_fit_are_shown_in_full():
    text = Ranking(BERT).to_text(width=140)
    assert all(entry.key in text for entry in BERT)


@pytest.mark.parametrize("width", [60, 72, 80, 100, 120])
def test_no_width_from_60_on_cuts_a_number(width):
    lines = Ranking(BERT + WORST).to_text(width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(line.split()[-1] for line in lines)
    assert "13.98..14.03" in lines[1]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("suffix", [".weight", ""])
def test_no_two_rows_of_a_mixture_of_experts_read_alike(width, suffix):
    keys = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj{suffix}"
        for layer in (0, 11)
        for expert in (3, 58)
        for part in ("gate", "up", "down")
    ]
    lines = Ranking([make_entry(key, 2.0 + i) for i, key in enumerate(keys)]).to_text(width=width).splitlines()[1:-1]
    for key, line in zip(keys, lines, strict=True):
        name = line.split()[1]
        words = key.split(".")
        assert {words[2], words[5]} <= set(re.findall(r"\d+", name)), name
        assert words[6] in name
    assert len({line.split()[1] for line in lines}) == len(keys)


def test_names_are_shortened_from_what_they_share():
    names = ["model.layers.2.mlp.experts.58.up_proj.weight", "model.layers.2.mlp.experts.3.up_proj.weight"]
    assert shorten_names(names, 24) == ["…2.…experts.58.up_proj", "…2.mlp.experts.3.up_proj"]
    assert shorten_names(names, 44) == names
    same = ["a.attention.output.dense.weight", "a.output.dense.weight", "b.attention.key.dense.weight"]
    assert shorten_names(same, 20)[0] == "a.attention.output.…"


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), max_size=6), st.integers(12, 80))
def test_shortened_names_never_exceed_the_width(names, width):
    short = shorten_names(names, width)
    assert len(short) == len(names)
    assert all(len(name) <= width for name in short)
    assert all(name.isprintable() for name in short)


@given(entry_lists, st.integers(60, 200))
def test_any_ranking_has_a_table_with_one_printable_line_per_entry(entries, width):
    lines = Ranking(entries).to_text(width=width).split("\n")
    explained = any(entry.quantization for entry in entries)
    assert len(lines) == (len(entries) + 2 + explained if entries else 1)
    assert all(line.isprintable() for line in lines)


def test_limit_cuts_the_rows_and_says_how_many_there_are():
    ranking = Ranking(BERT, [Skipped("head", (3, 4), "output head")])
    lines = ranking.to_text(limit=2).splitlines()
    assert [line.split()[0] for line in lines] == ["#", "1", "2", "...", "36"]
    assert lines[-2:] == ["... 34 more", "36 ranked, 3 of them proven, 1 skipped (ranking.skipped says why)"]
    assert ranking.to_text(limit=0).splitlines() == ["... 36 more", lines[-1]]
    assert "more" not in ranking.to_text()


def test_str_is_the_text_of_the_first_40_rows():
    ranking = Ranking([make_entry(f"w{i:03}", 2.0 + i) for i in range(60)])
    assert str(ranking) == ranking.to_text(limit=40)
    assert "... 20 more" in str(ranking)


def test_an_empty_ranking_has_a_line_that_says_so():
    assert str(Ranking([])) == "0 ranked, 0 of them proven, 0 skipped"


def test_an_interrupted_ranking_says_so():
    assert str(Ranking([make_entry()], (), {"partial": True})).endswith("interrupted: matrices are missing")


def test_a_custom_score_has_its_own_column():
    ranking = Ranking([make_entry("a", 50.0, score=0.25), make_entry("b", 5.0, score=0.5), bounded("c", 7.0)])
    lines = ranking.to_text().splitlines()
    assert "score" in lines[0].split()
    assert lines[1].split()[4:6] == ["0.2500", "50.000"]
    assert "score" not in Ranking([make_entry()]).to_text()


@pytest.mark.parametrize("limit", [-1, 2.5, True, "3"])
def test_a_limit_that_is_no_count_is_refused(limit):
    with pytest.raises(OptionError, match=r"limit=.*: give a count of rows, or None for all"):
        Ranking([]).table(limit)


def test_a_width_without_room_is_refused():
    with pytest.raises(OptionError, match="width=59: the table needs at least 60 columns"):
        Ranking([]).to_text(width=59)


def test_rich_prints_the_same_table_with_marks_for_what_needs_attention():
    ranking = Ranking(WORST)
    page = io.StringIO()
    Console(file=page, width=100, force_terminal=True, color_system="standard").print(ranking.table())
    colored = page.getvalue()
    assert "\x1b[33m" in colored
    plain = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", colored).splitlines()]
    assert plain == ranking.to_text().splitlines()


def test_names_cannot_send_commands_to_the_terminal_or_be_taken_for_markup():
    assert printable("a\x1b[31m\nb\ud800\u202e") == r"a\x1b[31m\nb\ud800\u202e"
    assert printable("日本.重み") == "日本.重み"
    assert "[bold]w[/bold][3]" in Ranking([make_entry("[bold]w[/bold]", part="[3]")]).to_text()


def test_shorten_keeps_both_ends_and_the_layer():
    name = "model.layers.12.self_attn.q_proj.weight"
    assert shorten(name, 39) == name
    assert shorten(name, 30) == "model.layers.12..._proj.weight"
    assert shorten("a_name_without_any_number.weight", 16) == "a_name...weight"[:6] + "..." + "weight"[-7:].rjust(
        7, "."
    )


@given(st.text(min_size=1), st.integers(12, 80))
def test_shorten_never_exceeds_the_width_and_keeps_what_fits(text, width):
    short = shorten(text, width)
    assert len(short) == min(len(text), width)
    assert short == text or (text.startswith(short.split("...")[0]) and text.endswith(short[-4:]))


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (14.2849, 4, "14.28"),
        (1.0, 4, "1.000"),
        (80123.0, 4, "80120"),
        (999999.0, 4, "1.000e6"),
        (8.0123e15, 4, "8.012e15"),
        (1.5e-7, 3, "1.50e-7"),
        (math.inf, 4, "inf"),
        (math.nan, 4, "nan"),
        (0.0, 4, "0"),
    ],
)
def test_numbers_are_written_with_significant_digits(value, digits, text):
    assert format_number(value, digits) == text


@given(st.floats(1.0, 1e300), st.floats(1.0, 1.5))
def test_the_printed_interval_holds_the_true_one_and_is_not_much_wider(lower, factor):
    upper = lower * factor
    ends = format_interval(make_entry("w", lower, lower=lower, upper=upper)).split("..")
    low, high = Decimal(ends[0]), Decimal(ends[-1])
    assert low <= Decimal(lower)
    assert high >= Decimal(upper)
    assert high - low <= Decimal(upper) - Decimal(lower) + 2 * Decimal(lower) * Decimal(max((factor - 1), 1e-4))


def test_an_interval_that_says_nothing_is_a_dash():
    assert format_interval(make_entry("w", 5.0, lower=1.0, upper=math.inf)) == "-"
    assert format_interval(make_entry("w", 5.0, lower=4.0, upper=math.inf)) == ">= 4.00"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-5, "<0.1%"),
        (0.0012, "0.1%"),
        (0.0534, "5.3%"),
        (0.5, "50%"),
        (5.4, "540%"),
        (13.7, "14x"),
        (2e7, "2.0e7x"),
        (math.nan, "-"),
        (math.inf, "inf"),
    ],
)
def test_sensitivity_is_a_percentage_and_then_a_factor(value, text):
    assert format_relative(value) == text
