"""The progress bar tells a terminal how far things are, and everybody else nothing."""

import io
import sys

import pytest

from mim_scale.bar import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> list[str]:
    """The last state of a bar of headers and volumes, of one of bytes, and of one of samples and their bytes."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    ends = []
    for what, in_bytes, act in (
        ("volumes", False, lambda bar: (bar.looked(7, 9), bar.began(3, 12), bar.advanced(), bar.at(6, 12))),
        ("sent", True, lambda bar: (bar.began(0, 4_000_000), bar.advanced(3_000_000))),
        ("samples", False, lambda bar: (bar.began(0, 8), bar.advanced(2, 10**6), bar.advanced(2, 10**6))),
    ):
        with Bar(what, in_bytes) as bar:
            act(bar)
        ends.append(stream.getvalue())
        stream.truncate(0)
        stream.seek(0)
    return ends


def test_a_terminal_sees_counts_rates_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    volumes, sent, samples = shown(monkeypatch, Terminal())
    assert "headers read" in volumes
    assert "7/9" in volumes
    assert "6/12" in volumes
    assert "sent" in sent
    assert "3.0/4.0 MB" in sent
    assert "4/8" in samples
    assert "MB/s" in samples


def test_nobody_is_told_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, io.StringIO()) == ["", "", ""]
