"""Synthetic abdominal MRI: the embedded default, so that everything runs with nothing downloaded.

A reference anatomy of implicit shapes in millimetres (RAS+: x to the patient's right, y to the front, z to the head)
is deformed anew for every subject and painted with that subject's own contrast. It is made hard in the ways real
anatomy is: both kidneys look alike and only their place tells them apart, and every organ shares its intensity with
something unlabelled nearby (the vena cava with the aorta, bowel loops with all the others).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom

from medcl.runtime.files import atomic_path, write_json

LABELS = {0: "background", 1: "liver", 2: "spleen", 3: "left_kidney", 4: "right_kidney", 5: "stomach", 6: "aorta"}
ORIENTATIONS = ("RAS", "LPS", "RAS", "LAS", "PIR", "RSA")

_BODY = np.array([90.0, 66.0])  # half axes of the reference body in the axial plane, mm
# fat outshines the kidneys in both, so that no mixture of the two hides them; stomach and spleen do invert
_T1 = {
    "fat": 0.98, "visceral_fat": 0.82, "muscle": 0.36, "liver": 0.58, "spleen": 0.42, "kidney": 0.47, "stomach": 0.28,
    "vessel": 0.20, "bone": 0.64, "disc": 0.36, "csf": 0.18, "lung": 0.05,
}  # fmt: skip
_T2 = {
    "fat": 0.86, "visceral_fat": 0.74, "muscle": 0.20, "liver": 0.31, "spleen": 0.52, "kidney": 0.56, "stomach": 0.96,
    "vessel": 0.14, "bone": 0.44, "disc": 0.56, "csf": 1.05, "lung": 0.04,
}  # fmt: skip
_BOWEL = ("kidney", "spleen", "stomach", "liver", "vessel", "muscle")  # whose intensity a bowel loop may take

Array = NDArray[np.float32]
Shape = tuple[int, int, int]


class Subject(NamedTuple):
    """One synthetic subject as it would be stored.

    Attributes:
        image: (X, Y, Z) float32, non-negative, in the stored orientation.
        label: (X, Y, Z) uint8, values of `LABELS`.
        affine: (4, 4) from voxel index to RAS+ mm; its axis codes are the stored orientation.
    """

    image: NDArray[np.float32]
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]


@dataclass(frozen=True)
class _Shape:
    """An ellipsoid, or with an infinite radius a tube; several shapes of one `tissue` in a row may form an organ."""

    tissue: str
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    label: int = 0
    tilt: tuple[float, float, float] = (0.0, 0.0, 0.0)  # degrees about x, y, z
    power: float = 2.0  # above 2: boxier than an ellipsoid
    group: str = ""  # shapes of one group move together


_TUBE = float("inf")
_ANATOMY = (
    _Shape("lung", (46, -4, 98), (36, 50, 40), group="lung_r"),
    _Shape("lung", (-46, -4, 98), (36, 50, 40), group="lung_l"),
    _Shape("muscle", (25, -50, 0), (18, 11, _TUBE), power=2.5),
    _Shape("muscle", (-25, -50, 0), (18, 11, _TUBE), power=2.5),
    _Shape("muscle", (22, -31, -72), (12, 11, 50), tilt=(0, 12, 0)),
    _Shape("muscle", (-22, -31, -72), (12, 11, 50), tilt=(0, -12, 0)),
    _Shape("kidney", (63, -8, -40), (10, 10, 44), group="colon_r"),  # ascending and descending colon, kidney-like
    _Shape("kidney", (-63, -8, -40), (10, 10, 44), group="colon_l"),
    _Shape("spleen", (-4, 4, 2), (30, 8, 9), tilt=(0, 0, -15)),  # pancreas, spleen-like
    _Shape("stomach", (-31, 18, 20), (21, 22, 30), 5, tilt=(0, 28, 0), group="stomach"),
    _Shape("stomach", (-12, 26, 2), (20, 13, 12), 5, tilt=(0, 25, 0), group="stomach"),
    _Shape("liver", (38, 4, 26), (39, 44, 35), 1, power=2.6, group="liver"),
    _Shape("liver", (6, 28, 33), (36, 20, 18), 1, tilt=(0, -18, 0), group="liver"),
    _Shape("csf", (34, 31, -4), (9, 10, 14), tilt=(20, 0, 0)),  # gall bladder
    _Shape("spleen", (-57, -23, 30), (19, 26, 29), 2, tilt=(0, -12, 25)),
    _Shape("kidney", (-38, -28, -8), (18, 18, 28), 3, tilt=(8, 12, 0)),
    _Shape("kidney", (38, -28, -18), (18, 18, 28), 4, tilt=(8, -12, 0)),
    _Shape("bone", (0, -40, 0), (16, 14, _TUBE), group="spine"),
    _Shape("csf", (0, -55, 0), (6.5, 5.5, _TUBE), group="spine"),
    _Shape("vessel", (13, -17, 0), (8.5, 7.5, _TUBE)),  # vena cava, same blood as the aorta
    _Shape("vessel", (-7, -19, 0), (9, 9, _TUBE), 6),
)


def make_subject(
    seed: int | tuple[int, ...],
    *,
    shape: Shape = (56, 48, 48),
    spacing: float | None = None,
    thick: int = 1,
    orientation: str = "RAS",
    weighting: float | None = None,
) -> Subject:
    """Draws one subject, a pure function of its arguments.

    Args:
        seed: one integer or several.
        shape: voxels along right, front and head before slices are thickened.
        spacing: mm, isotropic before slices are thickened; drawn from 3.6 to 4.2 if None. Smaller fields of view than
            about 200x170x170 mm cut organs off.
        thick: how many slices are averaged into one along the head axis.
        orientation: axis codes in which the voxels are stored, such as `LPS`.
        weighting: of the contrast, from T1 (0) to T2 (1); drawn if None.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.uniform(3.6, 4.2)  # drawn even if given, so that the anatomy does not depend on it
    spacing = drawn if spacing is None else spacing
    clean, label = _paint(rng, _reference_coordinates(rng, shape, spacing), spacing, weighting)
    image, label = _acquire(rng, clean, thick), _thicken_label(label, thick)

    step = np.array([spacing, spacing, spacing * thick])
    affine = np.diag([*step, 1.0])
    affine[:3, 3] = -step * (np.array(image.shape) - 1) / 2 + rng.uniform(-15, 15, 3)
    return _store(image, label, affine, orientation)


def write_phantoms(
    out: str | Path,
    subjects: int = 24,
    seed: int = 0,
    *,
    shape: Shape = (56, 48, 48),
    spacing: float | None = None,
    weighting: float | None = None,
) -> Path:
    """Writes subjects as a Medical Segmentation Decathlon folder (`dataset.json`, `imagesTr/`, `labelsTr/`).

    Every third subject has slices two or three times thicker, and storage orientations differ. A subject depends on
    `seed` and its number alone, not on how many are written.

    Args:
        out: the folder, made if missing.
        subjects: how many.
        seed: of the whole set.
        shape, spacing: as in `make_subject`.
        weighting: as in `make_subject`; a number makes all subjects of one protocol.

    Returns:
        `out`, as a path.

    Raises:
        MedclError: the folder cannot be written.
    """
    import nibabel as nib

    out = Path(out)
    pairs = []
    for number in range(subjects):
        thick = (2 + number // 3 % 2) if number % 3 == 2 else 1
        orientation = ORIENTATIONS[number % len(ORIENTATIONS)]
        subject = make_subject(
            (seed, number), shape=shape, spacing=spacing, thick=thick, orientation=orientation, weighting=weighting
        )
        pair = {"image": f"./imagesTr/phantom_{number:03d}.nii.gz", "label": f"./labelsTr/phantom_{number:03d}.nii.gz"}
        for key, voxels, dtype in (("image", subject.image, np.int16), ("label", subject.label, np.uint8)):
            nifti = nib.Nifti1Image(voxels, subject.affine)
            nifti.set_data_dtype(dtype)  # images as scanners store them: integers with a slope
            nifti.header.set_xyzt_units("mm")
            with atomic_path(out / pair[key]) as part:
                nib.save(nifti, part)
        pairs.append(pair)
    dataset = {
        "name": "Phantom",
        "description": "Synthetic abdominal MRI with anatomical variation, made by medcl.dataset.phantom",
        "modality": {"0": "MRI"},
        "labels": {str(value): name for value, name in LABELS.items()},
        "numTraining": subjects,
        "numTest": 0,
        "training": pairs,
        "test": [],
    }
    write_json(out / "dataset.json", dataset)
    return out


def _smooth_field(rng: np.random.Generator, shape: tuple[int, ...], knots: int) -> Array:
    """A field of about unit spread that wanders on the scale of the volume divided by `knots`."""
    field = rng.standard_normal((knots + 2,) * 3)
    for n in shape:  # a spline is separable: one small matrix per axis, each pass moving the next axis to the front
        grow = [zoom(row, n / (knots + 2), order=3, mode="nearest", grid_mode=True) for row in np.eye(knots + 2)]
        field = np.tensordot(field, np.array(grow), axes=(0, 0))
    return field.astype(np.float32)


def _rotation(degrees: NDArray[np.float64] | tuple[float, ...]) -> NDArray[np.float64]:
    """Turns about x, then y, then z."""
    result = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[[i, j, i, j], [i, j, j, i]] = np.cos(angle), np.cos(angle), -np.sin(angle), np.sin(angle)
        result = turn @ result
    return result


def _reference_coordinates(rng: np.random.Generator, shape: tuple[int, ...], spacing: float) -> Array:
    """Where in the reference anatomy, in mm, each voxel of this subject lies: (3, X, Y, Z)."""
    axes = [(np.arange(n, dtype=np.float32) - (n - 1) / 2) * spacing for n in shape]
    world = np.stack(np.meshgrid(*axes, indexing="ij"))
    size = rng.uniform(0.92, 1.08) * rng.uniform(0.94, 1.06, 3)
    pull = _rotation(rng.normal(0, 4, 3)) / size[:, None]
    moved = world - rng.normal(0, 4, 3).astype(np.float32)[:, None, None, None]
    where = np.einsum("ij,jxyz->ixyz", pull.astype(np.float32), moved)
    for axis in range(3):
        # the slow part moves neighbouring organs together, the fast one gives each its own outline
        where[axis] += 5.0 * _smooth_field(rng, shape, 3) + 1.3 * _smooth_field(rng, shape, 8)
    return where


def _contrast(rng: np.random.Generator, weighting: float | None) -> dict[str, float]:
    """Mean intensity of each tissue: a weighting between T1 and T2, so that some pairs swap their order."""
    drawn = rng.beta(0.6, 1.0)  # drawn even if given, so that the anatomy does not depend on it
    weight = drawn if weighting is None else weighting
    return {
        tissue: float(np.clip((1 - weight) * _T1[tissue] + weight * _T2[tissue] + rng.normal(0, 0.04), 0.03, 1.1))
        for tissue in _T1
    }


def _bowel(rng: np.random.Generator) -> list[_Shape]:
    """Loops of bowel in the lower front, each with the intensity of some tissue."""
    loops = []
    for _ in range(int(rng.integers(14, 22))):
        x, y, z = rng.uniform((-56, -8, -95), (56, 44, -14))
        radii = tuple(float(r) for r in rng.uniform((9, 8, 8), (20, 13, 14)))
        tilt = tuple(float(a) for a in rng.uniform(-60, 60, 3))
        loops.append(_Shape(str(rng.choice(_BOWEL)), (x, y, z), radii, tilt=tilt))  # type: ignore[arg-type]
    return loops


def _paint(
    rng: np.random.Generator, where: Array, spacing: float, weighting: float | None
) -> tuple[Array, NDArray[np.uint8]]:
    """Noise-free intensities with partial-volume edges, and the label map."""
    mean = _contrast(rng, weighting)
    edge = 0.35 * spacing  # mm over which one tissue gives way to the next

    def cover(distance: Array) -> Array:
        return 1 / (1 + np.exp(np.clip(distance / edge, -30, 30)))

    radius = np.sqrt((where[0] / _BODY[0]) ** 2 + ((where[1] + 4) / _BODY[1]) ** 2)
    fat = rng.uniform(5, 13)  # mm under the skin
    skin = (radius - 1) * _BODY[1]
    body, wall, cavity = cover(skin), cover(skin + fat), cover(skin + fat + 6)
    image = body * mean["fat"]
    image += wall * (mean["muscle"] - mean["fat"]) + cavity * (mean["visceral_fat"] - mean["muscle"])
    label = np.zeros(image.shape, np.uint8)

    moves: dict[str, NDArray[np.float64]] = {}
    for number, shape in enumerate((*_bowel(rng), *_ANATOMY)):
        group = shape.group or str(number)
        if group not in moves:
            moves[group] = np.array([rng.normal(0, 2.5, 3), rng.uniform(0.86, 1.16, 3), rng.normal(0, 6, 3)])
        shift, scale, turn = moves[group]
        radii = np.array(shape.radii) * scale
        tube = np.isinf(radii[2])
        inverse = _rotation(np.array(shape.tilt) + (turn * 0.25 if tube else turn)).T / radii[:, None]
        offset = where - (np.array(shape.centre) + shift).astype(np.float32)[:, None, None, None]
        local = np.abs(np.einsum("ij,jxyz->ixyz", inverse.astype(np.float32), offset))
        reach = np.sum(local**shape.power, axis=0) ** (1 / shape.power)
        distance = (reach - 1) * float(min(radii))
        # the spine, and the muscles along it, lie in the wall; all else stays within the cavity
        room = wall if tube or shape.tissue == "muscle" else cavity
        alpha = cover(distance) * room
        level: float | Array = mean[shape.tissue]
        if shape.tissue == "bone":  # discs between the vertebrae
            level = np.where(np.mod(where[2] + 400, 26) < 7, mean["disc"], mean["bone"]).astype(np.float32)
        image += alpha * (level - image)
        label[alpha > 0.5] = shape.label
    texture = gaussian_filter(rng.standard_normal(image.shape).astype(np.float32), 0.8)
    image *= 1 + rng.uniform(0.02, 0.06) * texture / texture.std()
    return image.astype(np.float32), label


def _acquire(rng: np.random.Generator, clean: Array, thick: int) -> Array:
    """What the scanner makes of it: coil bias, slice averaging, Rician noise and an arbitrary unit."""
    bias = np.exp(rng.uniform(0.08, 0.22) * _smooth_field(rng, clean.shape, 1))
    image = gaussian_filter(clean * bias, 0.35)
    image = _slabs(image, thick).mean(axis=3)
    real, imaginary = rng.uniform(0.015, 0.045) * rng.standard_normal((2, *image.shape))
    return (np.hypot(image + real, imaginary) * 10 ** rng.uniform(0, 3)).astype(np.float32)


def _slabs(voxels: NDArray[Any], thick: int) -> NDArray[Any]:
    """Slices in groups of `thick`, (X, Y, Z // thick, thick); what is left over at the top is dropped."""
    return voxels[..., : voxels.shape[2] // thick * thick].reshape(*voxels.shape[:2], -1, thick)


def _thicken_label(label: NDArray[np.uint8], thick: int) -> NDArray[np.uint8]:
    """The commonest label of the slices that are averaged into one."""
    slabs = _slabs(label, thick)
    return np.stack([(slabs == value).sum(axis=3) for value in LABELS]).argmax(axis=0).astype(np.uint8)


def _store(image: Array, label: NDArray[np.uint8], affine: NDArray[np.float64], orientation: str) -> Subject:
    """Permutes and flips RAS voxels into `orientation` and lets the affine tell the same places."""
    affine = affine.copy()
    axes = ("LR", "PA", "IS")
    order = [next(i for i, pair in enumerate(axes) if code in pair) for code in orientation]
    image, label = np.transpose(image, order), np.transpose(label, order)
    affine[:, :3] = affine[:, order]
    for axis, (world_axis, code) in enumerate(zip(order, orientation, strict=True)):
        if code == axes[world_axis][0]:
            affine[:3, 3] += affine[:3, axis] * (image.shape[axis] - 1)
            affine[:3, axis] *= -1
            image, label = np.flip(image, axis), np.flip(label, axis)
    return Subject(np.ascontiguousarray(image), np.ascontiguousarray(label), affine)
