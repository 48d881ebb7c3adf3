"""The faults still fit the package, so that the mutation check (`mutate.py`, in `make kernels`) can run."""

from __future__ import annotations

from cases import faults

from mutation import mutate

FAULTS = faults()


def test_every_fault_has_its_place() -> None:
    assert len(FAULTS) >= 30
    assert mutate.misplaced(FAULTS) == []


def test_a_fault_that_does_not_fit_is_an_error() -> None:
    moved = FAULTS[0]._replace(old="text that is not there")
    assert len(mutate.misplaced([moved, FAULTS[1]])) == 1


def test_faults_differ_and_change_something() -> None:
    places = {(fault.file, fault.old, fault.new) for fault in FAULTS}
    assert len(places) == len(FAULTS) and all(fault.old != fault.new for fault in FAULTS)
