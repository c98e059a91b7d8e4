"""Writes small DICOM RTSTRUCT objects for the tests, contour by contour as PS3.3 C.8.8.5 and C.8.8.6 have them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from dicom_seg import items, saved
from pydicom.dataset import Dataset
from pydicom.uid import RTStructureSetStorage, generate_uid


def write_rtstruct(
    path: Path,
    rois: Sequence[tuple[str, Sequence[np.ndarray]]],
    series: str,
    *,
    patient: str = "MRN-4711",
    kinds: Mapping[str, str] | None = None,
    external: Collection[str] = (),
    first_number: int = 1,
    edit: Callable[[Dataset], None] | None = None,
) -> Path:
    """Writes ROIs by name, each with its contours `(points, 3)` in LPS mm.

    Args:
        series: the SeriesInstanceUID that is outlined.
        kinds: the geometric type of an ROI's contours where they are not `CLOSED_PLANAR`.
        external: ROIs that are body outlines.
        first_number: ROI number of the first.
    """
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = RTStructureSetStorage, generate_uid(), "RTSTRUCT"
    data.SeriesInstanceUID, data.StudyInstanceUID, data.PatientID = generate_uid(), "1.2.3", patient
    study = items(RTReferencedSeriesSequence=items(SeriesInstanceUID=series))
    data.ReferencedFrameOfReferenceSequence = items(RTReferencedStudySequence=study)
    data.StructureSetROISequence, data.RTROIObservationsSequence, data.ROIContourSequence = items(), items(), items()
    for number, (name, contours) in enumerate(rois, first_number):
        kind = "EXTERNAL" if name in external else "ORGAN"
        data.StructureSetROISequence += items(ROINumber=number, ROIName=name)
        data.RTROIObservationsSequence += items(ReferencedROINumber=number, RTROIInterpretedType=kind)
        drawn = items()
        for points in contours:
            drawn += items(
                ContourGeometricType=(kinds or {}).get(name, "CLOSED_PLANAR"),
                NumberOfContourPoints=len(points),
                ContourData=[f"{number:.4f}" for number in np.ravel(points)],
            )
        data.ROIContourSequence += items(ReferencedROINumber=number, ContourSequence=drawn)
    return saved(data, path, edit)
