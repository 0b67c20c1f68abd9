"""Rows to Parquet and back; the split keeps people, and copies of one scan, together."""

import string

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mim_scale.errors import ConfigError, DamagedError
from mim_scale.store.manifest import (
    QuarantineRow,
    Row,
    iter_rows,
    read_quarantine,
    read_rows,
    split_subjects,
    write_quarantine,
    write_rows,
)

hexes = st.text("0123456789abcdef", min_size=16, max_size=16)
finite = st.floats(-1e6, 1e6)
rows = st.builds(
    Row,
    key=hexes,
    subject=hexes,
    group=st.text(string.ascii_lowercase, min_size=1, max_size=2),
    study=hexes,
    series=hexes,
    content_hash=hexes,
    voxel_hash=hexes,
    shape=st.tuples(*[st.integers(1, 4000)] * 3),
    spacing_mm=st.tuples(*[st.floats(0.1, 10)] * 3),
    affine=st.tuples(*[finite] * 16),
    hu_min=st.integers(-32767, 0),
    hu_max=st.integers(0, 32767),
    hu_mean=finite,
    hu_histogram=st.lists(st.integers(0, 2**40), max_size=4).map(tuple),
    foreground=st.binary(max_size=40),
    bytes_raw=st.integers(1, 2**50),
    bytes_stored=st.integers(1, 2**50),
    bytes_source=st.integers(1, 2**50),
    source_format=st.sampled_from(["nifti", "nrrd", "mha", "dicom"]),
    source_key=hexes,
    manufacturer=st.sampled_from(["", "GE", "other"]),
    model=st.just(""),
    kernel=st.just(""),
    slice_thickness_mm=st.floats(0, 10),
    tube_kv=st.floats(0, 150),
    flags=st.lists(st.sampled_from(["face_likely"]), unique=True).map(tuple),
    repairs=st.lists(st.sampled_from(["reoriented", "rescaled"]), unique=True).map(tuple),
)
row_lists = st.lists(rows, max_size=8, unique_by=lambda row: row.key)


@given(row_lists)
def test_rows_come_back_in_their_order(tmp_path_factory, many):
    path = tmp_path_factory.mktemp("m") / "manifest.parquet"
    write_rows(path, iter(many))
    assert read_rows(path) == tuple(many) == tuple(iter_rows(path))


def test_quarantine_comes_back_and_any_reader_opens_it(tmp_path):
    refused = [QuarantineRow("b", "dicom", "missing_slice", "gap"), QuarantineRow("a", "nifti", "not_ct", "no HU")]
    write_quarantine(tmp_path / "q.parquet", refused)
    assert read_quarantine(tmp_path / "q.parquet") == tuple(refused)
    table = pyarrow.parquet.read_table(tmp_path / "q.parquet")
    assert table.column_names == ["source_key", "source_format", "reason", "detail"]


def test_what_is_no_manifest_is_refused(tmp_path):
    with pytest.raises(DamagedError, match="not readable as Parquet"):
        read_rows(tmp_path / "missing.parquet")
    write_quarantine(tmp_path / "q.parquet", [])
    with pytest.raises(DamagedError, match="has columns"):
        read_rows(tmp_path / "q.parquet")


@given(row_lists, st.integers(0, 2**63 - 1), st.integers(0, 8), st.randoms())
def test_split_keeps_subjects_together_whatever_the_order(many, seed, held_out, random):
    subjects = {row.group for row in many}
    if held_out >= len(subjects):
        with pytest.raises(ConfigError, match="nothing is left to train on"):
            split_subjects(many, seed, held_out)
        return
    train, kept = split_subjects(many, seed, held_out)
    assert len({row.group for row in kept}) == held_out
    assert not {row.group for row in kept} & {row.group for row in train}
    assert sorted(map(repr, (*train, *kept))) == sorted(map(repr, many))
    shuffled = random.sample(many, len(many))
    again, kept_again = split_subjects(shuffled, seed, held_out)
    assert set(again) == set(train)
    assert set(kept_again) == set(kept)


@given(row_lists.filter(bool), st.integers(0, 99), rows)
def test_a_new_subject_moves_at_most_one_across(many, seed, newcomer):
    groups = {row.group for row in many}
    if len(groups) < 2 or newcomer.group in groups:
        return
    before = {row.group for row in split_subjects(many, seed, 1)[1]}
    after = {row.group for row in split_subjects([*many, newcomer], seed, 1)[1]}
    assert after in (before, {newcomer.group})
