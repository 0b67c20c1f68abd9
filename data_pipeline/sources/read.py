"""One source in, one scan out, whatever its format."""

import os
from pathlib import Path

from data_pipeline.reasons import Reason, Rejected
from data_pipeline.sources.source import Scan, Source


def read_source(root: Path, source: Source) -> Scan:
    """Read a source's voxels and geometry.

    Raises:
        Rejected: it cannot be read, or is no CT volume.
    """
    if source.problem is not None:
        raise Rejected(*source.problem)
    paths = source.paths(root)
    is_there = os.path.isdir if source.format == "ome_zarr" else os.path.isfile
    gone = [path for path in paths if not is_there(path)]
    if gone:
        raise Rejected(Reason.IO_ERROR, f"{len(gone)} of {len(paths)} files are gone since the folder was scanned")
    match source.format:
        case "nifti":
            from data_pipeline.sources.nifti import read_nifti

            return read_nifti(paths[0])
        case "nrrd" | "mha":
            from data_pipeline.sources.itk import read_itk

            return read_itk(paths[0])
        case "dicom":
            from data_pipeline.sources.dicom_read import read_series

            return read_series(paths)
        case "ome_zarr":
            from data_pipeline.sources.ome_zarr import read_ome_zarr

            return read_ome_zarr(paths[0])
        case "unknown":
            raise Rejected(Reason.UNREADABLE, "neither DICOM nor a volume file by its name")
