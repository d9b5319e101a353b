"""What messages quote comes from strangers: a terminal must not obey it, and a log must not learn passwords."""

import pickle
import re
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kappa_fast
from kappa_fast import errors
from kappa_fast.texts import cleaned, printable, warn, without_secrets

CLASSES = [
    errors.KappaError,
    errors.OptionError,
    errors.SourceError,
    errors.SourceNotFoundError,
    errors.RankingFileError,
    errors.BackendError,
    errors.ComputeError,
    errors.ProcessGroupError,
    errors.MissingExtraError,
]


@given(st.text(st.characters(codec=None, exclude_categories=())))
def test_a_cleaned_text_is_one_line_of_visible_characters_and_stays_as_it_is(text):
    once = cleaned(text)
    assert once.isprintable()
    assert cleaned(once) == once


@pytest.mark.parametrize("kind", CLASSES)
def test_no_error_holds_what_a_terminal_obeys_nor_a_password(kind):
    error = kind("tensor 'a\x1b[2J\nb\u202e' from https://me:s3cret@hub.example/x?token=abc&revision=1")
    for text in (str(error), repr(error), *error.args):
        assert text.isprintable()
        assert not {"s3cret", "abc"} & set(re.split(r"[\W_]+", text))
        assert "https://***@hub.example/x?token=***&revision=1" in text
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_interruption_is_cleaned_too():
    ranking = kappa_fast.Ranking((), (), {})
    assert str(kappa_fast.Interrupted("stop \x07", ranking)) == r"stop \x07"


def test_a_warning_is_cleaned_and_comes_from_the_line_that_caused_it():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("file \x1b]0;title\x07")
    (found,) = caught
    assert str(found.message) == r"file \x1b]0;title\x07"
    assert found.filename == __file__


@pytest.mark.parametrize(
    "text",
    [
        "layers.0.q_proj.weight",
        "C:/models/a@b",
        "org/name@refs/pr/1",
        "https://huggingface.co/org/name",
        "/data/hf_checkpoints",
    ],
)
def test_what_holds_no_secret_is_left_alone(text):
    assert without_secrets(text) == text


def test_tokens_of_the_hub_are_left_out():
    assert without_secrets("Bearer hf_" + "aB1" * 11 + " refused") == "Bearer hf_*** refused"
    assert without_secrets("http://h/f?X-Amz-Signature=00ff") == "http://h/f?X-Amz-Signature=***"


def test_escapes_show_what_was_there():
    assert printable("a\tb") == r"a\tb"
