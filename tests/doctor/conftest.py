"""Doctors of the suite write little."""

import pytest

from mim_scale.doctor import disk as doctor_disk


@pytest.fixture(autouse=True)
def _little_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is not looked at here."""
    monkeypatch.setattr(doctor_disk, "PIECES", 1)
