"""Files that look like volumes by their ending and are not read: one problem for each ending, with a count."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from medcl.dataset.case import Problem
from medcl.io.detached import volume_files

_CONVERT = "Convert each to NIfTI with its spacing and orientation."
_UNPACK = "Unpack them."
# endings, why files with them are not read, what to do
_KINDS = (
    (".npy .npz", "NumPy arrays hold no spacing or orientation", "Write each as NIfTI with its affine (nibabel.save)."),
    (".h5 .hdf5", "HDF5 arrays hold no spacing or orientation", _CONVERT),
    (".raw .zraw", "voxels without a header", "Add a header for each (MetaImage's .mhd)."),
    (".img", "voxels without a header", "Restore the .hdr file of each."),
    (".img.gz", "voxels without a header", "Restore the .hdr.gz file of each."),
    (".rec", "voxels without a header", "Restore the .par file of each."),
    (".brik .brik.gz .brik.bz2", "voxels without a header", "Restore the .HEAD file of each."),
    (
        ".png .jpg .jpeg .bmp .jp2",
        "single pictures without spacing or orientation",
        "Where they are slices, join those of each scan to one NIfTI or NRRD file with its spacing.",
    ),
    (".zip .tar .tar.gz .tgz .tar.bz2 .tar.xz .7z .rar", "archives, which may hold scans", _UNPACK),
    (".nii.xz .nii.zst .nii.zip", "packed in a way that is not read", "Unpack them, or pack them as .nii.gz."),
    (".nrrd.gz .mha.gz .mnc.gz .dcm.bz2 .dcm.xz .dcm.zip", "packed in a way that is not read", _UNPACK),
    (".mgh.gz", "packed in a way that is not read", "Name them .mgz."),
    (".mif .mif.gz .mih", "MRtrix images are not read", "Convert each to NIfTI with mrconvert."),
    (".v .ecat", "ECAT images are not read", _CONVERT),
    (".vtk .vti", "VTK images are not read", _CONVERT),
    (".gipl .gipl.gz", "GIPL images are not read", _CONVERT),
    (".mrc .vff .isq .am .vol .fdf", "images of this format are not read", _CONVERT),
    (
        ".czi .lif .lsm .nd2 .oib .oif .ims",
        "a microscope's own format",
        "Export each as OME-TIFF with its spacing, or as NIfTI.",
    ),
)
_REASONS = {ending: (why, remedy) for endings, why, remedy in _KINDS for ending in endings.split()}
_LONGEST_FIRST = sorted(_REASONS, key=len, reverse=True)


def passed_over(root: Path, volumes: Iterable[str], others: Iterable[str]) -> list[Problem]:
    """One problem for each ending among the files that no reader takes.

    Args:
        root: the folder that paths are relative to.
        volumes: files that are read; the files beside them that hold their voxels are not passed over.
        others: all other files.
    """
    theirs = {file for name in volumes for file in volume_files(root / name)[1:]}
    found: dict[str, list[str]] = defaultdict(list)
    for name in others:
        ending = next((ending for ending in _LONGEST_FIRST if name.lower().endswith(ending)), None)
        if ending and root / name not in theirs:
            found[ending].append(name)
    problems = []
    for ending, names in sorted(found.items()):
        why, remedy = _REASONS[ending]
        count = f"{len(names)} {ending} files are" if len(names) > 1 else f"1 {ending} file is"
        problems.append(Problem(min(names), f"{count} passed over ({why})", remedy))
    return problems
