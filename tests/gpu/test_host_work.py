"""Launches and reads of a wave do not grow with the number of its matrices."""

from host_work import resolved


def test_two_thousand_small_matrices_take_the_launches_and_reads_of_six():
    _, few, reads = resolved(6)
    found, many, reads_of_many = resolved(2000)
    assert {(entry.status, entry.method) for entry in found} == {("ok", "weights16")}
    assert many == few
    assert len(few) < 1100
    assert reads_of_many == reads < 30
