"""When a kept result answers a query: never less than was asked for, and what a run without a cache would get."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kappa_fast.cache.records import LowerBoundQuery, Probe, Record, ResolutionQuery, StoredResolution, decode, encode
from kappa_fast.spectrum.resolution import Goal, Resolution

NAN, INF = math.nan, math.inf


def resolved(lower: float, upper: float, **changes: object) -> Resolution:
    middle = (lower + upper) / 2
    return replace(Resolution("ok", middle, lower, upper, middle, 1.0, "lu64", False, 0.1), **changes)


WIDE = resolved(9.9, 10.1)  # half-width 1e-2
NARROW = resolved(9.999, 10.001)  # 1e-4
SINGULAR = Resolution("rank_deficient", INF, 1e16, INF, 1.0, 0.0, "svd64")
BROKEN = Resolution("non_finite", NAN, NAN, NAN, NAN, NAN, "none")
VECTOR = resolved(1.0, 1.0, certified=True, method="vector")


def plain(found: Resolution, rtol: float = 1e-2) -> Record:
    return Record(plain=StoredResolution(found, rtol))


def proven(found: Resolution, rtol: float = 1e-2) -> Record:
    return Record(proven=StoredResolution(replace(found, certified=True), rtol))


def ask(record: Record, rtol: float, certify: bool = False, cutoff: float = INF) -> Resolution | None:
    return ResolutionQuery(Goal(rtol, certify, cutoff)).answer(record)


@pytest.mark.parametrize("rtol", [0.5, 1e-2 * (1 + 1e-9)])
def test_an_interval_that_is_narrow_enough_is_used(rtol):
    assert ask(plain(WIDE), rtol) is WIDE
    assert ask(plain(NARROW), rtol) is NARROW


def test_an_interval_that_is_too_wide_is_not_used():
    assert ask(plain(WIDE), 1e-3) is None
    assert ask(Record(), 1e-2) is None


def test_what_could_not_be_had_narrower_is_not_tried_again_unless_more_is_asked_for():
    hard = plain(WIDE, rtol=1e-4)
    assert ask(hard, 1e-3) is WIDE
    assert ask(hard, 1e-4) is WIDE
    assert ask(hard, 1e-5) is None


def test_a_proof_is_used_where_none_is_asked_for_unless_it_is_wider_than_an_estimate_would_be():
    assert ask(proven(NARROW), 1e-2).certified
    assert ask(proven(WIDE, rtol=1e-4), 1e-3) is None
    assert ask(proven(WIDE, rtol=1e-4), 1e-3, certify=True).certified


def test_where_both_are_known_each_query_gets_what_it_would_have_computed():
    both = plain(WIDE).merged(proven(NARROW))
    assert ask(both, 0.1) is WIDE
    assert ask(both, 0.1, certify=True).certified


def test_an_estimate_is_no_proof():
    assert ask(plain(NARROW), 1e-2, certify=True) is None


@pytest.mark.parametrize("found", [SINGULAR, BROKEN, VECTOR])
@pytest.mark.parametrize("certify", [False, True])
def test_what_no_proof_and_no_width_can_change_is_always_used(found, certify):
    assert ask(plain(found), 1e-8, certify) is found


def test_an_answer_without_a_proof_stays_one_where_float64_cannot_prove():
    tried = Record(proven=StoredResolution(WIDE, 1e-2))  # certified=False
    assert ask(tried, 1e-2, certify=True) is WIDE


def test_above_the_cutoff_any_interval_will_do():
    assert ask(plain(WIDE), 1e-4, cutoff=9) is WIDE
    assert ask(plain(WIDE), 1e-4, certify=True, cutoff=9) is WIDE
    assert ask(plain(WIDE), 1e-4, cutoff=9.95) is None


def test_what_was_given_up_at_a_cutoff_serves_no_other_query():
    given_up = ResolutionQuery(Goal(1e-3, cutoff=5.0)).record_of(WIDE)
    assert ask(given_up, 1e-3, cutoff=5.0) is WIDE
    assert ask(given_up, 1e-3, cutoff=20.0) is None
    assert ask(given_up, 1e-3) is None
    assert ask(given_up, 2e-2) is WIDE


@pytest.mark.parametrize("certify", [False, True])
def test_a_result_answers_the_query_that_it_was_computed_for(certify):
    for found in (WIDE, NARROW, SINGULAR, BROKEN, VECTOR):
        for cutoff in (5.0, INF):
            query = ResolutionQuery(Goal(1e-3, certify, cutoff))
            assert query.answer(query.record_of(found)) is found


def test_of_two_resolutions_the_tighter_one_is_kept_and_what_was_tried():
    assert plain(WIDE).merged(plain(NARROW, 1e-3)) == plain(NARROW, 1e-3)
    assert plain(NARROW, 1e-3).merged(plain(WIDE)) == plain(NARROW, 1e-3)
    assert plain(NARROW, 1e-2).merged(plain(WIDE, 1e-5)) == plain(NARROW, 1e-5)
    assert plain(WIDE).merged(plain(SINGULAR, 1e-5)) == plain(SINGULAR, 1e-5)
    assert plain(SINGULAR, 1e-5).merged(plain(WIDE)) == plain(SINGULAR, 1e-5)
    assert Record().merged(plain(WIDE)) == plain(WIDE).merged(Record()) == plain(WIDE)


def test_a_probe_answers_for_its_cutoff_and_for_all_below_its_bound():
    shown, failed = Record(probe=Probe(50.0, 40.0)), Record(probe=Probe(1.0, 40.0))
    assert LowerBoundQuery(40.0).answer(shown) == LowerBoundQuery(49.0).answer(shown) == 50.0
    assert LowerBoundQuery(60.0).answer(shown) is None
    assert LowerBoundQuery(40.0).answer(failed) == 1.0
    assert LowerBoundQuery(30.0).answer(failed) is None
    assert shown.merged(LowerBoundQuery(60.0).record_of(1.0)).probe == Probe(1.0, 60.0)


def test_a_resolved_matrix_needs_no_probe_and_a_singular_one_is_not_hidden_behind_a_bound():
    assert LowerBoundQuery(5.0).answer(plain(WIDE)) == 9.9
    assert LowerBoundQuery(5.0).answer(plain(WIDE).merged(proven(NARROW))) == 9.999
    assert LowerBoundQuery(5.0).answer(plain(SINGULAR)) == 1.0
    assert LowerBoundQuery(5.0).answer(plain(BROKEN)) == 1.0
    assert LowerBoundQuery(5.0).answer(plain(WIDE).merged(Record(probe=Probe(1.0, 5.0)))) == 1.0


numbers = st.floats(1, 1e300)


@given(lower=numbers, width=st.floats(1, 1e5), other=st.floats(), rtol=numbers, cutoff=st.floats(allow_nan=False))
def test_json_gives_back_the_same_bits(lower, width, other, rtol, cutoff):
    found = Resolution("ok", lower, lower, lower * width, 1.0, other, "qr64", True, other)
    record = Record(StoredResolution(found, rtol), StoredResolution(SINGULAR, INF), Probe(lower, cutoff))
    again = decode(json.loads(json.dumps(encode(record), allow_nan=False)))
    assert repr(again) == repr(record)


def test_what_is_not_finite_survives_too():
    for found in (SINGULAR, BROKEN):
        assert repr(decode(json.loads(json.dumps(encode(plain(found)), allow_nan=False)))) == repr(plain(found))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "fine"}, "no status, method or certified"),
        ({"method": 3}, "no status, method or certified"),
        ({"certified": 1}, "no status, method or certified"),
        ({"kappa": "ten"}, "'kappa' is no number"),
        ({"lower": True}, "'lower' is no number"),
        ({"upper": None}, "'upper' is no number"),
        ({"rtol": [1]}, "'rtol' is no number"),
        ({"lower": 11.0}, "an interval that is none"),
        ({"lower": 0.5}, "an interval that is none"),
        ({"upper": "nan"}, "an interval that is none"),
        ({"kappa": "inf"}, "an interval that is none"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    document = encode(plain(WIDE))
    document["plain"] |= changes
    with pytest.raises(ValueError, match=message):
        decode(document)


def test_what_is_no_record_is_refused():
    with pytest.raises(ValueError, match="no record"):
        decode([1])
    with pytest.raises(ValueError, match="no probe"):
        decode({"probe": 3})
    with pytest.raises(ValueError, match="'lower' is no number"):
        decode({"probe": {"cutoff": 1.0}})
    with pytest.raises(ValueError, match="no resolution"):
        decode({"plain": [3]})
