"""The report of a store is right, whole in one file, and readable: by people, by scripts, and in a browser."""

import json
import os
import re
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.leakage import certificate, load_side
from data_pipeline.report import make
from data_pipeline.report.numbers import collect
from mim_scale.cli import run
from mim_scale.errors import ConfigError, DamagedError, SourceError, StoreError
from mim_scale.store.dataset import Dataset, commit_dataset, volume_folder
from mim_scale.store.manifest import FingerprintRow, QuarantineRow, Row
from tests.synthetic import make_volume, store_volume

NASTY = "B30<script>alert(1)</script>&"
USUAL = 11
"""Volumes that are alike; one more is not."""
QUARANTINE = [
    *(QuarantineRow(f"a{i:015x}", "nifti", "duplicate", "equal to volume 00ff, voxel for voxel") for i in range(3)),
    *(QuarantineRow(f"b{i:015x}", "dicom", "not_ct", f"modality MR, expected CT: {i}") for i in range(9)),
]


def rows_of(path: Path) -> Iterator[Row]:
    for i in range(USUAL):
        row = store_volume(path, make_volume((30 + i % 3, 44, 40), seed=i), f"subject-{i // 2}")
        yield replace(
            row,
            manufacturer="Siemens" if i % 2 else "",
            kernel=NASTY if i == 3 else "Br40d",
            slice_thickness_mm=2.5 if i else 0.0,
            tube_kv=120.0,
            flags=("face_likely",) if i < 4 else (),
            repairs=("reoriented", "rescaled") if i == 5 else ("reoriented",),
            group="subject-1" if i // 2 == 4 else row.group,
        )
    odd = store_volume(path, make_volume((16, 120, 40), seed=99, spacing_mm=(9.0, 0.8, 0.8)), "subject-odd")
    yield replace(odd, manufacturer="GE", model="LightSpeed 16", flags=("face_likely",))


def commit(path: Path, rows: list[Row], quarantine: list[QuarantineRow] | None = None) -> Path:
    prints = [FingerprintRow(row.key, row.subject, row.series, row.content_hash, row.voxel_hash, b"") for row in rows]
    commit_dataset(path, rows, QUARANTINE if quarantine is None else quarantine, {"source": "synthetic"}, prints)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "archive"
    return commit(path, sorted(rows_of(path), key=lambda row: row.key))


@pytest.fixture(scope="module")
def odd(store: Path) -> Row:
    (row,) = (row for row in Dataset.open(store).rows if row.subject == "subject-odd")
    return row


@pytest.fixture(scope="module")
def page(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert run(["data", "report", str(store), "--out", str(out), "--sample", "4"]) == 0
    return out


class Outline(HTMLParser):
    """What the tests ask of a page: tags with attributes, and text."""

    VOID = frozenset({"meta", "img", "br", "input", "line", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"script", "style"}:
            self.text += f" {data}"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_numbers_are_those_of_the_rows(store: Path, odd: Row, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "report", str(store), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    rows = Dataset.open(store).rows
    assert values["inputs"] == {"total": 24, "stored": 12, "refused": 12, "each_has_one_row": True}
    assert sum(values["hu"]["voxels"]) == sum(row.bytes_raw for row in rows) // 2
    assert values["hu"]["voxels"] == np.sum([row.hu_histogram for row in rows], axis=0).tolist()
    assert (values["hu"]["min"], values["hu"]["max"]) == (
        min(row.hu_min for row in rows),
        max(row.hu_max for row in rows),
    )
    assert values["manufacturers"] == {"GE": 1, "Siemens": 5, "not said": 6}
    assert values["models"] == {"LightSpeed 16": 1, "not said": 11}
    assert values["tube_kv"] == {"120": 11, "not said": 1}
    assert values["flags"] == {"face_likely": 5}
    assert values["repairs"] == {"reoriented": 11, "rescaled": 1}
    assert values["quarantine_reasons"] == {"duplicate": 3, "not_ct": 9}
    assert values["duplicates"] == 3
    assert values["groups"] == [{"group": "subject-1", "subjects": 2, "volumes": 4}]
    assert values["distributions"]["slice thickness"]["known"] == 10
    assert values["distributions"]["spacing z"]["max"] == 9.0
    assert values["distributions"]["extent z"]["max"] == pytest.approx(16 * 9.0)
    assert values["num_subjects"] == 7
    assert [volume["key"] for volume in values["outliers"]["volumes"]] == [odd.key]
    assert run(["data", "stats", str(store), "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    shared = values.keys() & stats.keys()
    assert len(shared - {"hu"}) == 16
    assert {name: values[name] for name in shared - {"hu"}} == {name: stats[name] for name in shared - {"hu"}}


def test_two_rows_of_one_input_do_not_add_up(store: Path, tmp_path: Path) -> None:
    rows = list(Dataset.open(store).rows)
    other = commit(tmp_path / "store", rows, [QuarantineRow(rows[0].source_key, "nifti", "not_ct", "twice")])
    make.make_report(other, tmp_path / "r.html", num_sample=0)
    assert "this does not add up" in (tmp_path / "r.html").read_text()
    assert make.as_json(other)["inputs"]["each_has_one_row"] is False


def test_what_is_unusual_is_said(store: Path, odd: Row) -> None:
    (outlier,) = make.as_json(store)["outliers"]["volumes"]
    told = " / ".join(outlier["why"])
    assert "spacing z 9 mm, median 2.5" in told
    assert f"extent y {odd.shape[1] * odd.spacing_mm[1]:.4g} mm, median " in told
    assert "shape" not in told


def test_the_page_is_one_file_that_loads_nothing(page: Path) -> None:
    text = page.read_text()
    outline = Outline(text)
    assert not re.search(r"https?://|url\(|@import|//cdn", text)
    assert outline.all("link") == []
    assert [tag for tag in outline.all("script") if "src" in tag] == []
    assert all((tag["src"] or "").startswith("data:image/jpeg;base64,") for tag in outline.all("img"))
    policy = next(tag["content"] for tag in outline.all("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_page_says_what_the_store_says(page: Path, store: Path, odd: Row) -> None:
    outline = Outline(page.read_text())
    text = " ".join(outline.text.split())
    assert "24 inputs = 12 stored + 12 refused: every input has exactly one row." in text
    assert "not ct: 9, 5 of them here" in text
    assert "modality MR, expected CT: 4" in text
    assert "modality MR, expected CT: 5" not in text
    assert "3 inputs were refused as duplicate" in text
    assert "1 group of subjects share near-copies" in text
    assert "1 of 12 volumes are outliers" in text
    assert Dataset.open(store).fingerprint in text
    assert NASTY in outline.text
    assert "<script>alert" not in page.read_text()
    assert f"v-{odd.key}" in {tag.get("id") for tag in outline.all("tr")}


def test_the_page_can_be_read_without_eyes(page: Path) -> None:
    outline = Outline(page.read_text())
    assert outline.all("html")[0]["lang"] == "en"
    headings = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    assert len(outline.all("img")) == 5
    assert all(tag["alt"] for tag in outline.all("img"))
    assert all(tag["role"] == "img" and tag["aria-label"] for tag in outline.all("svg"))
    assert {tag["for"] for tag in outline.all("label")} == {"filter"}
    ids = [tag["id"] for _, tag in outline.tags if "id" in tag]
    assert len(ids) == len(set(ids))
    wanted = {(tag["href"] or "")[1:] for tag in outline.all("a")}
    assert wanted <= set(ids)


def test_the_coarsest_level_alone_is_read(store: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    for row in Dataset.open(copy).rows:
        for level in ("0", "1"):
            shutil.rmtree(volume_folder(copy, row.key) / level)
    assert run(["data", "report", str(copy), "--out", str(tmp_path / "r.html"), "--sample", "12"]) == 0


def test_a_damaged_volume_is_named_and_the_others_are_drawn(
    store: Path, odd: Row, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    shutil.rmtree(volume_folder(copy, odd.key) / "2" / "c")
    out = tmp_path / "r.html"
    assert run(["data", "report", str(copy), "--out", str(out), "--sample", "12"]) == DamagedError.exit_code
    assert f"damaged: volume {odd.key}: level 2" in capsys.readouterr().out
    outline = Outline(out.read_text())
    assert len(outline.all("img")) == USUAL
    assert f"volume {odd.key}: level 2, chunk (0, 0, 0)" in outline.text


def test_no_pictures_where_none_are_asked_for(store: Path, tmp_path: Path) -> None:
    assert run(["data", "report", str(store), "--out", str(tmp_path / "r.html"), "--sample", "0"]) == 0
    outline = Outline((tmp_path / "r.html").read_text())
    assert outline.all("img") == []
    assert len(outline.all("tr")) > 12


def test_the_same_seed_draws_the_same_sample(store: Path, tmp_path: Path) -> None:
    pages = []
    for seed in (1, 1, 2):
        make.make_report(store, tmp_path / "r.html", num_sample=3, seed=seed)
        pages.append((tmp_path / "r.html").read_bytes())
    assert pages[0] == pages[1] != pages[2]


def test_what_is_left_out_is_said(store: Path, odd: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "MOST_LISTED", 5)
    monkeypatch.setattr(make, "MOST_OUTLIERS", 0)
    make.make_report(store, tmp_path / "r.html", num_sample=2)
    outline = Outline((tmp_path / "r.html").read_text())
    assert "5 of 12 volumes: 7 are not on this page" in outline.text
    assert "; 1 not shown here" in outline.text
    listed = [tag["id"] for tag in outline.all("tr") if "id" in tag]
    assert len(listed) == 5
    assert listed[0] == f"v-{odd.key}"


def test_memory_does_not_grow_by_a_kilobyte_a_volume(store: Path, tmp_path: Path) -> None:
    (first, *_) = Dataset.open(store).rows

    def many(count: int) -> Iterator[Row]:
        for i in range(count):
            content = f"{i:016x}" + first.content_hash[16:]
            subject = f"{i:015x}s"
            yield replace(
                first, key=content[:16], content_hash=content, source_key=f"{i:016x}", subject=subject, group=subject
            )

    peaks = []
    for count in (1500, 4500):
        path = tmp_path / str(count)
        path.mkdir()
        commit_dataset(path, many(count), [], {"source": "synthetic"})
        tracemalloc.start()
        numbers = collect(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert numbers.num_inputs == numbers.num_volumes == count
    assert (peaks[1] - peaks[0]) / 3000 < 1024


def written(values: dict[str, Any], path: Path) -> Path:
    path.write_text(json.dumps(values))
    return path


def test_a_certificate_is_shown(store: Path, odd: Row, tmp_path: Path) -> None:
    benchmark = tmp_path / "benchmark"
    commit(benchmark, [store_volume(benchmark, make_volume((16, 120, 40), 99, (9.0, 0.8, 0.8)))], [])
    found = certificate(load_side(store), load_side(benchmark))
    path = written(found, tmp_path / "leakage.json")
    out = tmp_path / "r.html"
    assert run(["data", "report", str(store), "--out", str(out), "--sample", "0", "--leakage", str(path)]) == 0
    text = " ".join(Outline(out.read_text()).text.split())
    assert "1 of 1 benchmark images are in the corpus." in text
    assert "The corpus is this store" in text
    assert f"{odd.key} {odd.key} same voxels" in text
    assert found["not_compared"][0].split(":")[0] in text
    assert run(["data", "report", str(benchmark), "--out", str(out), "--leakage", str(path)]) == 0
    assert "The corpus of this certificate is not this store" in out.read_text()


def test_what_is_no_certificate_is_refused(store: Path, tmp_path: Path) -> None:
    found = certificate(load_side(store), load_side(store))
    path = tmp_path / "leakage.json"
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: None, "cannot be read"),
        (lambda: path.write_text("{"), "is no leakage certificate"),
        (lambda: path.write_text("[1]"), "is no leakage certificate"),
        (lambda: written(found | {"format_version": 2}, path), "another version"),
        (lambda: written(found | {"num_leaked": 0}, path), "not as it was written"),
    ]
    for act, words in cases:
        act()
        with pytest.raises(SourceError, match=words):
            run(["data", "report", str(store), "--out", str(tmp_path / "r.html"), "--leakage", str(path)])
        assert not (tmp_path / "r.html").exists()


def test_mistakes_are_one_line(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such store"):
        run(["data", "report", str(tmp_path / "nowhere"), "--out", str(tmp_path / "r.html")])
    with pytest.raises(ConfigError, match="--sample is -1"):
        run(["data", "report", str(store), "--out", str(tmp_path / "r.html"), "--sample", "-1"])
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- in a browser


def in_browser(page: Path, folder: Path, address: str = "", script: str = "") -> Outline:
    """The page as it stands after its script ran, and after another one did what a reader would do."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed here: the page is not driven")
    copy = folder / "page.html"
    copy.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    words = [found, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [*words, "--dump-dom", f"file://{copy}{address}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"HOME": str(folder)},
    )
    return Outline(done.stdout)


def rows_shown(outline: Outline) -> list[str]:
    return [str(tag["id"])[2:] for tag in outline.all("tr") if "id" in tag and "hidden" not in tag]


def test_an_address_sorts_and_filters(page: Path, store: Path, tmp_path: Path) -> None:
    outline = in_browser(page, tmp_path, "#filter=siemens&sort=mean-HU&order=descending")
    rows = [row for row in Dataset.open(store).rows if row.manufacturer == "Siemens"]
    assert rows_shown(outline) == [row.key for row in sorted(rows, key=lambda row: -row.hu_mean)]
    assert "5 of 12 rows shown" in outline.text
    sorted_by = {tag["data-name"]: tag["aria-sort"] for tag in outline.all("th") if "data-name" in tag}
    assert sorted_by["mean-HU"] == "descending"
    assert set(sorted_by.values()) == {"descending", "none"}


def test_clicks_and_typing_sort_and_filter(page: Path, store: Path, tmp_path: Path) -> None:
    outline = in_browser(
        page,
        tmp_path,
        script="""
        const head = document.querySelector('th[data-name="thickness"] button');
        head.click();
        const box = document.getElementById("filter");
        box.value = "face  SUBJECT-";
        box.dispatchEvent(new Event("input"));
        """,
    )
    rows = [row for row in Dataset.open(store).rows if row.flags]
    shown = rows_shown(outline)
    assert sorted(shown) == sorted(row.key for row in rows)
    # Both volumes whose thickness no header told come last.
    assert set(shown[-2:]) == {row.key for row in rows if not row.slice_thickness_mm}
    assert all("hidden" not in tag for tag in outline.all("form"))
