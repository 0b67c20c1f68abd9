"""Names planted wherever an archive can hold them come out nowhere: no store, no print, no log, no error."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mim_scale.store.dataset import RECORD, Dataset
from tests.pipeline import canaries

ROOT = Path(__file__).parents[2]
_PROGRAM = """
import json, logging, sys, types
logging.basicConfig(level=logging.DEBUG)
calls, note = json.loads(sys.argv[1]), sys.argv[2]
if any("ray" in words for words in calls):
    import mim_scale.ray_cluster as cluster
    # Ray's session with its logs stays for the test to search.
    cluster.shutil = types.SimpleNamespace(rmtree=lambda folder, **options: open(note, "w").write(str(folder)))
from mim_scale.cli import run
from mim_scale.errors import exit_with
codes = []
for words in calls:
    try:
        exit_with(lambda: run(words))
    except SystemExit as ended:
        codes.append(ended.code)
print()
print(json.dumps(codes))
"""
"""The command line with every logger of every library turned up; exit codes last."""


class Shell:
    """Runs data verbs, and fails where anything that they say names somebody."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "store"
        self.note = folder / "ray"

    def run(self, *calls: Sequence[str | Path]) -> list[int]:
        """Run `mim-scale data ...` for each call; their exit codes."""
        words = json.dumps([["data", *map(str, call)] for call in calls])
        command = [sys.executable, "-W", "always", "-c", _PROGRAM, words, str(self.note)]
        homes = {f"XDG_{name}_HOME": str(self.folder / name.lower()) for name in ("CONFIG", "CACHE")}
        environment = os.environ | homes | {"PYTHONPATH": str(ROOT), "COLUMNS": "400"}
        environment.pop("MIM_SCALE_KEY_FILE", None)
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, check=False)
        said = done.stdout + b"\n" + done.stderr
        assert [line for line in said.splitlines() if canaries.found_in(line) or self._secret_in(line)] == []
        assert done.returncode == 0, said.decode()[-2000:]
        codes: list[int] = json.loads(done.stdout.splitlines()[-1])
        return codes

    def check_folder(self, folder: Path) -> None:
        """Nobody is named below a folder, and the secret of the pseudonyms is not in it."""
        assert canaries.found_below(folder) == {}
        assert [path for path in folder.rglob("*") if path.is_file() and self._secret_in(path.read_bytes())] == []

    def _secret_in(self, data: bytes) -> bool:
        key = self.folder / "config" / "mim-scale" / "pseudonym.key"
        if not key.is_file():
            return False
        secret = key.read_text().strip()
        return secret.encode() in data or bytes.fromhex(secret) in data


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("archive") / "in"
    assert canaries.write_archive(root) >= 60
    return root


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_the_search_finds_what_was_planted(archive: Path) -> None:
    hits = canaries.found_below(archive)
    assert set().union(*hits.values()) >= set(canaries.NEEDLES)
    assert len(hits) >= 60
    assert canaries.found_in(canaries.WORD.encode("utf-16-le"))
    assert canaries.found_in(min(canaries.digests()).encode())


def test_no_verb_names_anybody(archive: Path, shell: Shell) -> None:
    store = shell.store
    build = ["build", archive, store, "--executor", "local", "--workers", "2"]
    assert shell.run(["scan", archive], ["plan", *build[1:]], ["plan", *build[1:], "--json"], build) == [0, 0, 0, 0]
    dataset = Dataset.open(store)
    assert {row.source_format for row in dataset.rows} == {"dicom", "nifti", "nrrd", "mha"}
    assert len(dataset.quarantine) >= 20
    codes = shell.run(
        ["scan", archive, "--store", store],
        ["quarantine", "list", store],
        ["quarantine", "list", store, "--json"],
        ["quarantine", "show", store],
        ["quarantine", "retry", store],
        build,
        ["verify", store, "--deep"],
        ["stats", store],
        ["stats", store, "--json"],
        ["report", store, "--out", shell.folder / "pages" / "report.html"],
        ["peek", store, "--out", shell.folder / "pages" / "peek.png"],
        ["leakage", store, store, "--out", shell.folder / "pages" / "leakage"],
    )
    assert set(codes) == {0}
    shell.check_folder(store)
    shell.check_folder(shell.folder / "pages")
    _check_cache(shell.folder / "cache" / "mim-scale")
    assert "113100" in (store / RECORD).read_text()


def _check_cache(cache: Path) -> None:
    """What is kept of headers between runs has paths in it: it is for its owner alone."""
    for path in cache.rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_no_error_names_anybody(archive: Path, shell: Shell) -> None:
    """Builds that end in an error: nothing to store, a table that cannot be used, a store of something else."""
    broken = shell.folder / "broken"
    shutil.copytree(archive / f"{canaries.WORD}^FOLDER" / f"{canaries.WORD}_{canaries.DATE}" / "cut", broken)
    build = ["build", broken, shell.store, "--executor", "local", "--workers", "1"]
    assert shell.run(build) == [2]
    (broken / "subjects.csv").write_text(f"path,subject\n{canaries.WORD}/gone,{canaries.WORD}\n")
    assert shell.run(build) == [2]
    (broken / "subjects.csv").write_bytes(f"{canaries.WORD}\xff\0".encode("latin-1"))
    assert shell.run(build) == [2]


@pytest.mark.soak
@pytest.mark.ray
def test_ray_and_its_logs_name_nobody(archive: Path, shell: Shell) -> None:
    assert shell.run(["build", archive, shell.store, "--executor", "ray", "--workers", "2"]) == [0]
    session = Path(shell.note.read_text())
    try:
        assert list(session.rglob("*.log"))
        shell.check_folder(session)
    finally:
        shutil.rmtree(session, ignore_errors=True)
    shell.check_folder(shell.store)
