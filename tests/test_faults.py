"""A short form of ``python -m tests.faults``: kills, and two reproductions at once."""

from pathlib import Path

from tests import faults


def test_a_disturbed_reproduction_ends_in_the_same_metrics(tmp_path: Path) -> None:
    found = list(faults.try_all(tmp_path, count=2, rounds=0, sizes=[], times=1, seed=3))
    assert [each.kind for each in found] == ["SIGKILL", "SIGKILL", "two at once"]
    assert not [each for each in found if each.outcome == faults.FAILED], found
    page = faults.page(found, 60)
    assert "| SIGKILL | 2 | 2 | 0 | 0 |" in page
