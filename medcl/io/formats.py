"""Which files hold volumes, and one-line errors for what a reading library raises."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path
from typing import Any

from medcl.errors import MedclError

SUFFIXES = {
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".nii.bz2": "nifti",
    ".nrrd": "nrrd",
    ".nhdr": "nrrd",
    ".mha": "meta",
    ".mhd": "meta",
    ".hdr": "analyze",
    ".hdr.gz": "analyze",
    ".mgh": "mgh",
    ".mgz": "mgh",
    ".mnc": "minc",
    ".par": "parrec",
    ".head": "afni",
    ".tif": "tiff",
    ".tiff": "tiff",
}
_FORMAT_NAMES = {
    "nifti": "NIfTI",
    "nrrd": "NRRD",
    "meta": "MetaImage",
    "analyze": "Analyze or NIfTI pair",
    "mgh": "FreeSurfer's MGH",
    "minc": "MINC",
    "parrec": "PAR/REC",
    "afni": "AFNI",
    "tiff": "TIFF",
    "dicom": "DICOM",
}
COPY_AGAIN = "Copy or export it again from its source, or leave it out."


def volume_suffix(name: str) -> str:
    """The suffix that marks a volume file (`.nii.gz` counts as one), in lower case; empty where there is none.

    Of a volume in two files, it is the suffix of the header: `.hdr`, not `.img`.
    """
    lower = name.lower()
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if lower.endswith(suffix)), "")


def format_of(path: str | Path) -> str:
    """A volume's format by suffix, such as `nifti` (`SUFFIXES`); anything else can only be DICOM."""
    return SUFFIXES.get(volume_suffix(Path(path).name), "dicom")


class one_line_errors:
    """Turns whatever a reading library raises about a file into one line."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, MedclError) or not isinstance(error, Exception):
            return
        name, text = _FORMAT_NAMES[format_of(self.path)], str(error)
        if isinstance(error, FileNotFoundError) and not self.path.exists():
            raise MedclError("no such file", self.path) from None
        if isinstance(error, PermissionError):
            raise MedclError("may not be read (permission denied)", self.path, "Mend its permissions.") from None
        if isinstance(error, MemoryError):
            raise MedclError("does not fit in memory", self.path, "Crop or resample it first.") from None
        if isinstance(error, EOFError) or ("Expected" in text and "bytes" in text) or "less than expected" in text:
            raise MedclError("is truncated: the file ends before its voxels do", self.path, COPY_AGAIN) from None
        if isinstance(error, (zlib.error, gzip.BadGzipFile)):
            raise MedclError("the gzip compression is damaged", self.path, COPY_AGAIN) from None
        reason = text.strip().splitlines()[-1] if text.strip() else type(error).__name__
        reason = re.sub(r"^ITK ERROR: |\(0x[0-9a-f]+\)", "", reason)
        raise MedclError(f"cannot be read as {name} ({reason[:160].rstrip('.')})", self.path, COPY_AGAIN) from None
