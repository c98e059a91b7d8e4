"""DICOM files: what each slice's header says of its series, its place and its person, with every identifier hashed."""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medcl.errors import MedclError

EXPORT_AGAIN = "Export the whole series again from the archive, or leave it out."
# fmt: off
_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "PatientName", "Modality",
    "ImageType", "InstanceNumber", "SeriesDescription", "ImagePositionPatient", "ImageOrientationPatient",
    "PixelSpacing", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated",
    "PixelRepresentation", "RescaleSlope", "RescaleIntercept", "NumberOfFrames", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]
# fmt: on


@dataclass(frozen=True)
class Slice:
    """One slice's header: what orders it and places it, and hashed identifiers; never a name.

    Attributes:
        path: the file, and `frame` the index within a multi-frame file.
        reason: why this is no part of a volume (no geometry, localiser, ...); empty for a usable slice.
        position: centre of the first voxel, LPS mm. `axes` are the unit vectors along a row and along a column.
        size: columns and rows; `pitch` the mm between them.
        number: DICOM's InstanceNumber, or None.
        slope, intercept: from stored values to HU or the like.
    """

    path: Path
    frame: int = 0
    reason: str = ""
    series: str = ""
    subject: str = ""
    instance: str = ""
    description: str = ""
    modality: str = "unknown"
    dtype: str = "int16"
    position: tuple[float, ...] = ()
    axes: tuple[float, ...] = ()
    size: tuple[int, int] = (0, 0)
    pitch: tuple[float, float] = (0.0, 0.0)
    number: int | None = None
    slope: float = 1.0
    intercept: float = 0.0


def has_magic(path: str | Path) -> bool:
    """Whether the file starts as DICOM files do: 128 bytes of anything, then `DICM`."""
    with open(path, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def short_hash(text: object, length: int = 10) -> str:
    """The first digits of the SHA-256 of a text: a name for an identifier that is kept secret."""
    return hashlib.sha256(str(text).encode()).hexdigest()[:length]


def read_slices(path: str | Path) -> list[Slice]:
    """Reads the header of one file: one slice, or the slices of a multi-frame file.

    Raises:
        MedclError: the file is empty or is not DICOM.
    """
    import pydicom

    path = Path(path)
    if path.stat().st_size == 0:
        raise MedclError("the file is empty (0 bytes)", path, EXPORT_AGAIN)
    try:
        with warnings.catch_warnings():  # odd values in tags that nobody needs
            warnings.simplefilter("ignore")
            data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
            return _slices(data, path)
    except (OSError, MedclError):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise MedclError(f"cannot be read as DICOM ({reason.rstrip('.')})", path, EXPORT_AGAIN) from None


def _slices(data: Any, path: Path) -> list[Slice]:
    kinds = [str(kind).upper() for kind in data.get("ImageType") or ()]
    sop = str(data.get("SOPClassUID", ""))
    patient = data.get("PatientID") or data.get("StudyInstanceUID") or data.get("SeriesInstanceUID") or path
    common: dict[str, Any] = {
        "path": path,
        "series": str(data.get("SeriesInstanceUID", "") or path),
        "subject": f"sub-{short_hash(patient)}",
        "instance": str(data.get("SOPInstanceUID", "")),
        "description": _safe_description(data),
        "modality": {"MR": "MR", "CT": "CT", "PT": "PET"}.get(str(data.get("Modality", "")), "unknown"),
    }
    if "Rows" not in data:
        return [Slice(reason=f"holds no image ({data.get('Modality', 'no modality')} object)", **common)]
    if "LOCALIZER" in kinds or "SCOUT" in kinds:
        return [Slice(reason="is a localiser", **common)]
    if sop.startswith("1.2.840.10008.5.1.4.1.1.7") or "SCREEN SAVE" in kinds:
        return [Slice(reason="is a secondary capture", **common)]
    if data.get("Modality") in ("SEG", "RTDOSE"):
        return [Slice(reason=f"is a {data.Modality} object, not a scan", **common)]
    if int(data.get("SamplesPerPixel", 1) or 1) > 1:
        return [Slice(reason="is a colour image", **common)]

    shared = (data.get("SharedFunctionalGroupsSequence") or [None])[0]
    frames = list(data.get("PerFrameFunctionalGroupsSequence") or [None])
    slices = []
    for index, frame in enumerate(frames):
        position = _find("PlanePositionSequence", "ImagePositionPatient", frame, shared, data)
        axes = _find("PlaneOrientationSequence", "ImageOrientationPatient", frame, shared, data)
        pitch = _find("PixelMeasuresSequence", "PixelSpacing", frame, shared, data)
        if position is None or axes is None or pitch is None:
            return [Slice(reason="has no position in space (no patient geometry)", **common)]
        if frame is None and int(data.get("NumberOfFrames") or 1) > 1:
            return [Slice(reason="is a multi-frame image without a position for every frame", **common)]
        stored = f"{'int' if int(data.get('PixelRepresentation', 0)) else 'uint'}{int(data.get('BitsAllocated', 16))}"
        number = data.get("InstanceNumber") if frame is None else index + 1
        scale = "PixelValueTransformationSequence"
        slices.append(
            Slice(
                frame=index,
                position=tuple(map(float, position)),
                axes=tuple(map(float, axes)),
                size=(int(data.Columns), int(data.Rows)),
                pitch=(float(pitch[1]), float(pitch[0])),  # DICOM names the distance between rows first
                number=None if number in (None, "") else int(number),
                slope=float(_find(scale, "RescaleSlope", frame, shared, data) or 1),
                intercept=float(_find(scale, "RescaleIntercept", frame, shared, data) or 0),
                dtype=stored,
                **common,
            )
        )
    return slices


def _find(sequence: str, name: str, *places: Any) -> Any:
    """A value from a frame's functional groups, those that all frames share, or the plain data set."""
    for place in places:
        if place is None:
            continue
        group = place.get(sequence)
        value = (group[0] if group else place).get(name)
        if value is not None and value != "":
            return value
    return None


def _safe_description(data: Any) -> str:
    """The series description as part of a file name, without any piece of the patient's name or number."""
    text = re.sub(r"[^A-Za-z0-9]+", "-", str(data.get("SeriesDescription", "") or ""))
    private = re.split(r"[^A-Za-z0-9]+", f"{data.get('PatientName', '')} {data.get('PatientID', '')}")
    for piece in private:
        if len(piece) > 2:
            text = re.sub(re.escape(piece), "", text, flags=re.IGNORECASE)
    return re.sub(r"-+", "-", text).strip("-").lower()[:40]
