"""Publishing: whatever instant a writer dies at, a reader sees the old thing or the new one, whole."""

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mim_scale import commit
from mim_scale.commit import has_seal, sealed, unsealed


class Died(Exception):
    """Stands for SIGKILL at this very call."""


def die_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let the first `count` system calls through, then die at the next."""
    calls = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > count:
                raise Died
            return real(*values, **named)

        return call

    for name in ("replace", "fsync", "open"):
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))


@pytest.mark.parametrize("count", range(6))
def test_a_file_is_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    path = tmp_path / "record.json"
    commit.write_file(path, b"old")
    with monkeypatch.context() as patch:
        die_at(patch, count)
        try:
            commit.write_file(path, b"new")
            finished = True
        except Died:
            finished = False
    assert path.read_bytes() == b"new" if finished else path.read_bytes() in (b"old", b"new")
    commit.write_file(path, b"newer")
    assert path.read_bytes() == b"newer"


@pytest.mark.parametrize("count", range(14))
def test_a_new_folder_is_absent_or_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    final = tmp_path / "checkpoint"
    temporary = commit.temporary_beside(final)
    temporary.mkdir()
    (temporary / "weights").write_bytes(b"weights")
    (temporary / "run.json").write_bytes(b"{}")
    with monkeypatch.context() as patch:
        die_at(patch, count)
        with contextlib.suppress(Died):
            commit.publish_folder(temporary, final)
    if final.exists():
        assert sorted(p.name for p in final.iterdir()) == ["run.json", "weights"]
        assert (final / "weights").read_bytes() == b"weights"


def test_a_published_folder_replaces_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "export"
    for text in (b"one", b"two"):
        temporary = commit.temporary_beside(final)
        temporary.mkdir()
        (temporary / "model").write_bytes(text)
        commit.publish_folder(temporary, final)
        assert (final / "model").read_bytes() == text
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("count", range(14))
def test_a_replaced_folder_is_old_or_new_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    final = tmp_path / "export"
    _publish(final, b"old")
    real = commit._exchange

    def exchange(one: Path, other: Path) -> bool:
        os.open(tmp_path, os.O_RDONLY)  # counted: the kill may come before the exchange
        return real(one, other)

    with monkeypatch.context() as patch:
        die_at(patch, count)
        patch.setattr(commit, "_exchange", exchange)
        with contextlib.suppress(Died):
            _publish(final, b"new")
    assert sorted(path.name for path in final.iterdir()) == ["run.json", "weights"]
    assert {path.read_bytes() for path in final.iterdir()} in ({b"old"}, {b"new"})


def test_without_an_exchange_a_folder_is_replaced_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "_exchange", lambda one, other: False)
    for text in (b"old", b"new"):
        _publish(tmp_path / "export", text)
        assert (tmp_path / "export" / "weights").read_bytes() == text
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("has_exchange", [True, False])
def test_writers_of_one_process_id_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_exchange: bool
) -> None:
    """Two pods on one store: equal process ids, equal content, at the same moment."""
    if not has_exchange:
        monkeypatch.setattr(commit, "_exchange", lambda one, other: False)
    final = tmp_path / "volume"
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(_publish, final, b"same") for _ in range(64)]:
            done.result()
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]
    assert sorted(path.name for path in final.iterdir()) == ["run.json", "weights"]
    assert commit.temporary_beside(final) != commit.temporary_beside(final)


def _publish(final: Path, data: bytes) -> None:
    temporary = commit.temporary_beside(final)
    temporary.mkdir()
    for name in ("weights", "run.json"):
        (temporary / name).write_bytes(data)
    commit.publish_folder(temporary, final)


def test_every_flipped_bit_of_a_sealed_file_is_found():
    values = {
        "text": "\xe4\udcff",
        "rate": 1e-05,
        "none": None,
        "rows": [{"name": "a", "stop": 12}],
        "plan": {"b": 0.5},
    }
    data, digest = sealed(values)
    assert unsealed(data) == {**values, "digest": digest}
    assert has_seal({**values, "digest": digest})
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r"\w"):
            unsealed(bytes(damaged))
    for other in (b"", b"[]", b"7", b"[" * 100_000, data + b"\n", data.replace(b" ", b"")):
        with pytest.raises(ValueError, match=r"\w"):
            unsealed(other)
    assert not has_seal(values)
