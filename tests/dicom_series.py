"""Writes small DICOM series for the tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def write_series(
    folder: Path,
    volume: np.ndarray,
    positions: Sequence[Sequence[float]],
    *,
    axes: Sequence[float] = (1, 0, 0, 0, 1, 0),
    pitch: tuple[float, float] = (1.0, 1.0),
    names: Sequence[str] | None = None,
    numbers: Sequence[int | None] | None = None,
    uid: str | None = None,
    edit: Callable[[FileDataset, int], None] | None = None,
) -> list[Path]:
    """Writes `volume` `(X, Y, Z)` of stored int16 values, one file per slice, with an intercept of -1024.

    Args:
        positions: LPS mm of the first voxel of every slice.
        axes: LPS unit vectors along a row and along a column.
        pitch: mm between rows, mm between columns, in DICOM's order.
        names, numbers: file name and InstanceNumber of every slice.
        edit: changes a slice's data set before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series, paths = uid or generate_uid(), []
    for index, position in enumerate(positions):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        path = folder / (names[index] if names else f"{index:03}.dcm")
        data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.StudyInstanceUID = series, "1.2.3"
        data.PatientName, data.PatientID, data.Modality = "Doe^Jane", "MRN-4711", "CT"
        data.SeriesDescription = "Jane Doe thorax 3.0 B30f"
        data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        number = numbers[index] if numbers else index + 1
        if number is not None:
            data.InstanceNumber = number
        data.ImagePositionPatient = [float(number) for number in position]
        data.ImageOrientationPatient = [float(number) for number in axes]
        data.PixelSpacing = [float(number) for number in pitch]
        data.Columns, data.Rows = volume.shape[0], volume.shape[1]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 1
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.PixelData = np.ascontiguousarray(volume[:, :, index].T, dtype=np.int16).tobytes()
        if edit:
            edit(data, index)
        data.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def upright(count: int, step: float = 3.0) -> list[tuple[float, float, float]]:
    return [(-10.0, -20.0, 5.0 + step * index) for index in range(count)]
