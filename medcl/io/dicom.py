"""DICOM files: what each slice's header says of its series, its place and its person, with every identifier hashed."""

from __future__ import annotations

import gzip
import hashlib
import re
import struct
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
    "PerFrameFunctionalGroupsSequence", "ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence",
]
_VRS = {
    "AE", "AS", "AT", "CS", "DA", "DS", "DT", "FD", "FL", "IS", "LO", "LT", "OB", "OW", "PN", "SH", "SL", "SQ", "SS",
    "ST", "TM", "UI", "UL", "UN", "US", "UT",
}
# fmt: on
_SUFFIX = re.compile(r"\.(dcm|ima|dicom|dic|dc3)(\.gz)?$", re.I)
_MODALITIES = {"MR": "MR", "CT": "CT", "PT": "PET"}
SEGMENTATIONS = ("SEG", "RTSTRUCT")  # kinds of objects that outline structures of another series


@dataclass(frozen=True)
class Slice:
    """One slice's header: what orders it and places it, and hashed identifiers; never a name.

    Attributes:
        path: the file, and `frame` the index within a multi-frame file.
        reason: why this is no part of a volume (no geometry, localiser, ...); empty for a usable slice. `remedy` says
            what to do about it.
        kind: DICOM's own modality, such as `MR` or `SEG`; `modality` is medcl's.
        refers: the SeriesInstanceUIDs that a segmentation outlines structures of.
        position: centre of the first voxel, LPS mm. `axes` are the unit vectors along a row and along a column.
        size: columns and rows; `pitch` the mm between them.
        subject: the hashed patient number; of a SEG or an RTSTRUCT without one, empty.
        number: DICOM's InstanceNumber, or None.
        slope, intercept: from stored values to HU or the like.
    """

    path: Path
    frame: int = 0
    reason: str = ""
    remedy: str = "Set aside."
    kind: str = ""
    refers: tuple[str, ...] = ()
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


def is_named(name: str) -> bool:
    """Whether a name ends as only DICOM files do."""
    return bool(_SUFFIX.search(name))


def may_be_dicom(name: str) -> bool:
    """By name alone: `.dcm`, `.ima`, no suffix, or a number after the last dot, as in `1.2.840.113619`."""
    stem, dot, suffix = name.rpartition(".")
    return name != "DICOMDIR" and (not dot or not stem or is_named(name) or suffix.isdigit())


def is_dicom(path: str | Path) -> bool:
    """Whether the file starts as DICOM files do: 128 bytes and `DICM`, or without them a first tag of group 2 or 8.

    Files without the preamble come from old archives and from data sets sent over the network as they are.
    """
    try:
        with _opened(path) as stream:
            start = stream.read(132)
    except (EOFError, gzip.BadGzipFile):
        return False
    return start[128:] == b"DICM" or _starts_with_tag(start)


def _starts_with_tag(start: bytes) -> bool:
    """Whether bytes are a data element of group 2 or 8, with its type in letters or a short even length."""
    for order in "<>":
        if len(start) >= 8 and struct.unpack(f"{order}H", start[:2])[0] in (2, 8):
            element, length = struct.unpack(f"{order}HI", start[2:8])
            lettered = start[4:6].decode("latin-1") in _VRS
            return element < 0x2000 and (lettered or (length % 2 == 0 and 0 < length <= 256))
    return False


def _opened(path: str | Path) -> Any:
    """The file's stream, unpacked where its name ends in `.gz`."""
    return gzip.open(path) if str(path).lower().endswith(".gz") else open(path, "rb")


def read_dataset(path: str | Path, **options: Any) -> Any:
    """A file as a pydicom data set that names its transfer syntax, whether or not the file has preamble and header.

    Args:
        path: the file; one that ends in `.gz` is unpacked.
        options: of `pydicom.dcmread`.
    """
    import pydicom
    from pydicom import uid

    with warnings.catch_warnings(), _opened(path) as stream:  # odd values in tags that nobody needs
        warnings.simplefilter("ignore")
        bare = _starts_with_tag(stream.read(132))
        stream.seek(0)
        data = pydicom.dcmread(stream, force=bare, **options)
    if not data.file_meta.get("TransferSyntaxUID"):
        implicit, little = data.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return data


def short_hash(text: object, length: int = 10) -> str:
    """The first digits of the SHA-256 of a text: a name for an identifier that is kept secret."""
    return hashlib.sha256(str(text).encode()).hexdigest()[:length]


def read_slices(path: str | Path) -> list[Slice]:
    """Reads the header of one file: one slice, or the slices of a multi-frame file.

    Raises:
        MedclError: the file is empty or is not DICOM.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        raise MedclError("the file is empty (0 bytes)", path, EXPORT_AGAIN)
    try:
        data = read_dataset(path, stop_before_pixels=True, specific_tags=list(_TAGS))
        if "SOPClassUID" not in data and "Modality" not in data:
            raise MedclError("is not a DICOM file", path, "Copy or export it again, or leave it out.")
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
        "kind": str(data.get("Modality", "")),
        "modality": _MODALITIES.get(str(data.get("Modality", "")), "unknown"),
        "refers": tuple(_referred(data)),
    }
    if data.get("Modality") in SEGMENTATIONS:
        common["subject"] = common["subject"] if data.get("PatientID") else ""
        return [Slice(reason=f"is a {data.Modality} object, not a scan", **common)]
    if "Rows" not in data:
        return [Slice(reason=f"holds no image ({data.get('Modality', 'no modality')} object)", **common)]
    if "LOCALIZER" in kinds or "SCOUT" in kinds:
        return [Slice(reason="is a localiser", **common)]
    if sop.startswith("1.2.840.10008.5.1.4.1.1.7") or "SCREEN SAVE" in kinds:
        return [Slice(reason="is a secondary capture", **common)]
    if "MOSAIC" in kinds:
        what = "is a Siemens mosaic: every file holds all slices of a volume side by side"
        return [Slice(reason=what, remedy="Convert it to NIfTI with dcm2niix.", **common)]
    if data.get("Modality") == "RTDOSE":
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


def _referred(data: Any) -> list[str]:
    """The SeriesInstanceUIDs of the series that a SEG or an RTSTRUCT outlines structures of, each once."""
    found = list(data.get("ReferencedSeriesSequence") or ())
    for frame in data.get("ReferencedFrameOfReferenceSequence") or ():
        for study in frame.get("RTReferencedStudySequence") or ():
            found += study.get("RTReferencedSeriesSequence") or ()
    return list(dict.fromkeys(str(series.get("SeriesInstanceUID", "")) for series in found))


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
