"""Patterns from files say what ``re`` says, in a time that no pattern can make long."""

import contextlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kappa_fast.io.patterns import Pattern, PatternError, Steps, compile_pattern

ATOMS = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\.",
        "[ab]",
        "[^a]",
        "[a-c0-9]",
        r"\d",
        r"\w",
        r"\W",
        r"\s",
        "^",
        "$",
        r"\b",
        r"\B",
        r"\A",
        r"\Z",
        "ab",
    ]
)
REPEATS = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0,40}", "*?", "+?", "??"])
AROUND = st.sampled_from(["(?=%s)", "(?!%s)", "(?<=a)%s", "(?<!ab)%s", "(?i:%s)", "(?s:%s)", "(%s)", "(?P<x>%s)"])
TREES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, REPEATS).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        st.tuples(inner, AROUND).map(lambda pair: pair[1] % pair[0]),
    ),
    max_leaves=8,
)
NAMES = st.text("abAB.0_ \n", max_size=8)


@settings(max_examples=300)
@given(TREES, NAMES)
def test_it_finds_what_re_finds(text, name):
    try:
        plain = re.compile(text)
    except re.error:
        return
    pattern = Pattern(text)
    for far in (pattern._backtracking, 99):  # 99: by positions, whatever the pattern
        pattern._backtracking = far
        assert pattern.matches(name) == (plain.match(name) is not None)
        assert pattern.search(name) == (plain.search(name) is not None)


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+z",
        "(a|a)*z",
        "(a|aa)+z",
        "(.*a){20}z",
        ".*" * 12 + "z",
        "a?" * 40 + "a" * 40 + "z",
        "(a|b|ab)*" * 5 + "z",
        "(?=(a+)+z)a",
        "(?:(?:(?:a*)*)*)*z",
        "(a?){1,500}z",
        "(x|a)(x|a|a)" * 40,
    ],
)
def test_no_pattern_takes_long(text):
    for name in ("a" * 300, "a" * 60 + "b"):
        started = time.perf_counter()
        with contextlib.suppress(PatternError):  # refused after a limited number of steps
            Pattern(text).search(name)
        assert time.perf_counter() - started < 8


@pytest.mark.parametrize(
    "text", ["(", "a{99999999999999}", "(" * 3000 + ")" * 3000, r"(a)\1", "(?>a*)", "a*+", "(a)(?(1)b|c)", "a" * 2000]
)
def test_what_cannot_be_searched_in_limited_time_is_refused(text):
    with pytest.raises(PatternError):
        Pattern(text)


def test_patterns_of_one_list_share_their_steps():
    steps = Steps()
    first, second = Pattern("((a*)*b)*c", steps), Pattern("((a*)*d)*c", steps)
    before = steps.left
    assert not first.search("a" * 40)
    steps.left = (before - steps.left) // 2
    with pytest.raises(PatternError, match="steps"):
        second.search("a" * 40)


def test_a_users_own_pattern_may_refer_back():
    assert compile_pattern(r"(a)\1").search("xaa")
    assert compile_pattern("q_proj").search("l.0.q_proj.weight")
