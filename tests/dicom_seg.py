"""Writes small DICOM SEG objects for the tests, frame by frame as PS3.3 C.8.20 has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels import pack_bits
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRLittleEndian, SegmentationStorage, generate_uid


def items(**values) -> Items:
    """A sequence of one item with these values; without any, an empty sequence."""
    data = Dataset()
    for name, value in values.items():
        setattr(data, name, value)
    return Items([data] if values else [])


def saved(data: Dataset, path: Path, edit: Callable[[Dataset], None] | None) -> Path:
    """Writes an object to a file, after what a test wants to change in it."""
    if edit:
        edit(data)
    data.ensure_file_meta()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.save_as(path, enforce_file_format=True)
    return path


def write_seg(
    path: Path,
    masks: Mapping[int, np.ndarray],
    positions: Sequence[Sequence[float]],
    series: str,
    *,
    names: Mapping[int, str] | None = None,
    pitch: tuple[float, float] = (1.0, 1.0),
    kind: str = "BINARY",
    edit: Callable[[Dataset], None] | None = None,
) -> Path:
    """Writes masks `(X, Y, Z)` by segment number, as frames of the slices that are not empty, last slice first.

    A `LABELMAP` holds one frame for every slice instead, of segment numbers.
    """
    count = len(positions)
    if kind == "BINARY":
        frames = [
            (number, z, mask[:, :, z].T > 0)
            for number, mask in masks.items()
            for z in reversed(range(count))
            if mask[:, :, z].any()
        ]
    else:
        labels = sum(number * (mask > 0).astype(np.uint8) for number, mask in masks.items())
        frames = [(0, z, labels[:, :, z].T) for z in range(count)]
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = SegmentationStorage, generate_uid(), "SEG"
    data.SeriesInstanceUID, data.StudyInstanceUID, data.PatientID = generate_uid(), "1.2.3", "MRN-4711"
    data.SegmentationType, data.NumberOfFrames = kind, len(frames)
    data.Rows, data.Columns = frames[0][2].shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    bits = 1 if kind == "BINARY" else 8
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    data.SegmentSequence = Items()
    for number in masks:
        label = (names or {}).get(number, f"structure {number}")
        data.SegmentSequence += items(SegmentNumber=number, SegmentLabel=label)
    data.ReferencedSeriesSequence = items(SeriesInstanceUID=series)
    shared, per_frame = Dataset(), Items()
    shared.PixelMeasuresSequence = items(PixelSpacing=list(pitch))
    shared.PlaneOrientationSequence = items(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    for number, z, _ in frames:
        frame = items(PlanePositionSequence=items(ImagePositionPatient=[float(mm) for mm in positions[z]]))
        if kind == "BINARY":
            frame[0].SegmentIdentificationSequence = items(ReferencedSegmentNumber=number)
        per_frame += frame
    data.SharedFunctionalGroupsSequence = Items([shared])
    data.PerFrameFunctionalGroupsSequence = per_frame
    pixels = np.stack([plane for _, _, plane in frames]).astype(np.uint8)
    data.PixelData = pack_bits(pixels.ravel()) if kind == "BINARY" else pixels.tobytes() + b"\0" * (pixels.size % 2)
    return saved(data, path, edit)
