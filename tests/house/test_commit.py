"""Publishing, where nothing fails (tests/faults has what fails): folders replaced, many writers at once, seals."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mim_scale import commit, disk
from mim_scale.commit import has_seal, sealed, unsealed


def test_a_published_folder_replaces_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "export"
    for text in (b"one", b"two"):
        temporary = commit.temporary_beside(final)
        temporary.mkdir()
        (temporary / "model").write_bytes(text)
        commit.publish_folder(temporary, final)
        assert (final / "model").read_bytes() == text
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_without_an_exchange_a_folder_is_replaced_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "exchange", lambda one, other: False)
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
        monkeypatch.setattr(disk, "exchange", lambda one, other: False)
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
