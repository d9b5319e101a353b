"""Names come from strangers: each format quotes them so that its own reader gets them back, or refuses them."""

import json
import re
import subprocess

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from make_entries import make_entry

from kappa_fast import OptionError, Selection
from kappa_fast.integrations.exports import FORMATS

WORDS = [
    "'",
    '"',
    "$(touch PWNED)",
    "`id`",
    ";",
    "|",
    "&&",
    ">x",
    "\\",
    " ",
    "#",
    "!",
    "*",
    "{a,b}",
    "~",
    "%s",
    "é",
    "\n",
]
NASTY = st.lists(
    st.sampled_from([*WORDS, "\r", "\u2028", "\x85", "\x1b[2J", "\t", "\0", "a", "0", ".", "-"]), max_size=6
)
NAMES = NASTY.map("".join) | st.text(st.characters(codec=None, exclude_categories=()), max_size=12)
SPLIT = "\x1f"


def selected(*names, **settings_):
    return Selection(tuple(make_entry(name) for name in names), True, settings_)


def text_or_refusal(selection, kind):
    try:
        return selection.export(kind)
    except OptionError:
        return None


def as_a_shell_reads(text):
    done = subprocess.run(
        ["sh", "-c", f"printf '%s{SPLIT}' {text}"], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    return done.stdout.split(SPLIT)[:-1]


@settings(max_examples=25)
@given(NAMES)
def test_a_shell_hands_the_pattern_to_ms_swift_as_it_is(name):
    text = text_or_refusal(selected(name, "layers.1.b.weight"), "ms-swift")
    if text is None:
        assert not name.isprintable() or name != name.strip() or not name
        return
    *flags, pattern = as_a_shell_reads(text)
    assert flags == ["--freeze_parameters_ratio", "1.0", "--trainable_parameters_regex"]
    assert re.search(pattern, name)
    assert not re.search(pattern, name + "x")


@given(NAMES)
def test_axolotl_reads_two_patterns_and_nothing_else(name):
    text = text_or_refusal(selected(name, "layers.1.b.weight", budget=name, value=name), "axolotl")
    if text is not None:
        document = yaml.safe_load(text)
        assert list(document) == ["unfrozen_parameters"]
        assert len(document["unfrozen_parameters"]) == len({name, "layers.1.b.weight"})


@given(NAMES)
def test_a_list_of_names_has_a_line_for_each(name):
    text = text_or_refusal(selected(name, "layers.1.b.weight"), "names")
    if text is not None:
        assert [line.strip() for line in text.splitlines()] == list(dict.fromkeys([name, "layers.1.b.weight"]))


@given(NAMES)
def test_an_expression_is_one_line_that_matches_the_name_alone(name):
    text = text_or_refusal(selected(name), "regex")
    if text is not None:
        (line,) = text.splitlines()
        assert re.fullmatch(line, name)
        assert not re.fullmatch(line, "x" + name)


@pytest.mark.filterwarnings("ignore:ESFT needs every layer")
@given(NAMES)
def test_json_holds_any_name(name):
    found = json.loads(selected(name).to_spectrum())
    assert list(found) == [name.removesuffix(".weight")]
    text = selected(f"layers.0.{name}mlp.experts.3.up.weight", unit="expert")
    assert text_or_refusal(text, "esft") is None or json.loads(text.to_esft())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.filterwarnings("ignore:ESFT needs every layer")
@pytest.mark.parametrize("budget", ["x\nbase_model: other\ntrust_remote_code: true\n#", "\u2028a: 1", "\x85b: 2"])
def test_what_a_selection_file_says_of_its_budget_is_a_comment_at_most(kind, budget):
    selection = selected("layers.0.mlp.experts.1.up.weight", budget=budget, value="1\nc: d", unit="expert")
    plain = selected("layers.0.mlp.experts.1.up.weight", unit="expert")
    said, expected = ([row for row in s.export(kind).splitlines() if row[:1] != "#"] for s in (selection, plain))
    assert said == expected


@pytest.mark.parametrize("kind", ["names", "regex", "ms-swift", "axolotl"])
def test_a_line_break_in_a_name_is_refused_with_the_name(kind):
    with pytest.raises(OptionError, match=r"'a\\nb' has characters"):
        selected("a\nb").export(kind)


def test_a_selection_describes_itself_in_visible_characters():
    assert repr(selected("a", budget="\x1b]0;x\x07", value=1).including("\x9b2J")).isprintable()


def test_kappa_zero_is_no_division():
    assert (
        json.loads(Selection((make_entry("a", kappa=1.0, sigma_min=1.0),), True, {}).to_spectrum())["a"]["snr"] == 1.0
    )
    entry = make_entry("a", kappa=2.0, status="ok")
    object.__setattr__(entry, "kappa", 0.0)
    assert json.loads(Selection((entry,), True, {}).to_spectrum())["a"]["snr"] == 0.0
