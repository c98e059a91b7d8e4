"""How public data sets lay out their files, as small volumes: for each image its person and its label maps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

Images = dict[str, tuple[str, tuple[str, ...]]]  # path: person, label maps
SIZE = (12, 10, 8)


def image(grid: int) -> np.ndarray:
    rng = np.random.default_rng(grid)
    array = rng.normal(100, 10, SIZE) + grid % 100  # may be HU: some of these names say CT
    array[3:9, 3:8, 2:6] += 200
    return array.astype(np.float32)


def label(number: int, binary: bool) -> np.ndarray:
    array = np.zeros(SIZE, np.uint8)
    array[3:9, 3:8, 2:6] = 1
    array[5:7, 4:7, 3:5] = 1 if binary else 2
    array[2, :, 1] = [number >> bit & 1 for bit in range(SIZE[1])]  # no two people have one label map
    return array


def write(path: Path, array: np.ndarray, spacing: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".mha", ".mhd", ".nrrd")):
        volume = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
        volume.SetSpacing((spacing, 1.0, 1.5))
        volume.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))  # RAS, as the affine below
        sitk.WriteImage(volume, str(path))
    else:
        nib.save(nib.Nifti1Image(array, np.diag([spacing, 1, 1.5, 1])), path)


def people(persons: Iterable[object], made: Callable[[object], Images]) -> Images:
    return {path: told for person in persons for path, told in made(person).items()}


def one(person: object, image: str, *labels: str) -> Images:
    p = {"p": person}
    return {image.format(**p): (str(person), tuple(name.format(**p) for name in labels))}


def simple(image: str, label: str, persons: Iterable[object] = range(1, 6), without: Iterable[object] = ()) -> Images:
    """One image and one label map a person; `without` are persons without a label map."""
    return {
        **people(persons, lambda p: one(p, image, label)),
        **people(without, lambda p: one(p, image)),
    }


def channels(image: str, names: Iterable[str], label: str, persons: Iterable[object] = range(1, 6)) -> Images:
    """Several images of equal grid a person, and one label map for all of them."""
    return people(
        persons, lambda p: {image.format(p=p, c=c): (str(p), (label.format(p=p, c=c),) if label else ()) for c in names}
    )


def times(image: str, names: Iterable[str], label: str, moments: dict[object, Iterable[str]]) -> Images:
    """As `channels`, for persons who were seen several times."""
    return {
        image.format(p=p, t=t, c=c): (str(p), (label.format(p=p, t=t),) if label else ())
        for p, seen in moments.items()
        for t in seen
        for c in names
    }


HASHES = ("0RZDK210BSMWAA6467LU", "4OZLOV1C7PKJVC0A5ZLA", "A0R6AOAS9KKM2PQ7B3XY", "ZQYJ3T1M88LA0GW5D2EC")
SIMPLE: dict[str, Images] = {
    "KiTS": simple("case_{p:05}/imaging.nii.gz", "case_{p:05}/segmentation.nii.gz", range(4), (4, 5)),
    "SegTHOR": {
        **simple("train/Patient_{p:02}/Patient_{p:02}.nii.gz", "train/Patient_{p:02}/GT.nii.gz"),
        **people((41, 42), lambda p: one(p, "test/Patient_{p}.nii.gz")),
    },
    "LiTS": simple("volume-{p}.nii", "segmentation-{p}.nii", range(4), (7,)),
    "BTCV": simple("RawData/Training/img/img{p:04}.nii.gz", "RawData/Training/label/label{p:04}.nii.gz")
    | people((61, 62), lambda p: one(p, "RawData/Testing/img/img{p:04}.nii.gz")),
    "PROMISE12": simple("Case{p:02}.mhd", "Case{p:02}_segmentation.mhd", range(4)),
    "SLIVER07": simple("liver-orig{p:03}.mhd", "liver-seg{p:03}.mhd"),
    "LA 2018": simple("Training Set/{p}/lgemri.nrrd", "Training Set/{p}/laendo.nrrd", HASHES),
    "VerSe": simple("verse{p:03}.nii.gz", "verse{p:03}_seg.nii.gz"),
    "VerSe 2020": simple(
        "dataset-01training/rawdata/sub-verse{p:03}/sub-verse{p:03}_ct.nii.gz",
        "dataset-01training/derivatives/sub-verse{p:03}/sub-verse{p:03}_seg-vert_msk.nii.gz",
        range(4, 9),
    ),
    "NIH pancreas": simple("Pancreas-CT/PANCREAS_{p:04}.nii.gz", "TCIA_pancreas_labels-02-05-2017/label{p:04}.nii.gz"),
    "FLARE": simple(
        "FLARE22_LabeledCase50/images/FLARE22_Tr_{p:04}_0000.nii.gz",
        "FLARE22_LabeledCase50/labels/FLARE22_Tr_{p:04}.nii.gz",
    ),
    "AbdomenCT-1K": simple("Image/Case_{p:05}_0000.nii.gz", "Mask/Case_{p:05}.nii.gz"),
    "M&Ms": simple(
        "Training/Labeled/{p}/{p}_sa.nii.gz", "Training/Labeled/{p}/{p}_sa_gt.nii.gz", ("A0S9V9", "B3D0N1", "C5S0Y1")
    ),
    "RibFrac": simple(
        "ribfrac-train-images-1/RibFrac{p}-image.nii.gz", "ribfrac-train-labels-1/RibFrac{p}-label.nii.gz"
    ),
    "ImageCAS": simple("{p}.img.nii.gz", "{p}.label.nii.gz"),
    "TDSC-ABUS": simple("DATA/DATA_{p:03}.nrrd", "MASK/MASK_{p:03}.nrrd"),
    "EMIDEC": simple("Case_{p}/Images/Case_{p}.nii.gz", "Case_{p}/Contours/Case_{p}.nii.gz", ("N006", "P007", "N012")),
    "KiPA22": simple("train/image/{p}.nii.gz", "train/label/{p}.nii.gz"),
    "LUNA16": people(
        range(4),
        lambda p: one(
            f"1.3.6.1.4.1.14519.5.2.1.6279.6001.{10**9 + int(str(p)) * 7}", f"subset{int(str(p)) // 2}/{{p}}.mhd"
        ),
    ),
    "crossMoDA": simple("source_training/crossmoda_{p}_ceT1.nii.gz", "source_training/crossmoda_{p}_Label.nii.gz"),
    "UPENN-GBM": times(
        "images_structural/UPENN-GBM-{p:05}_{t}/UPENN-GBM-{p:05}_{t}_{c}.nii.gz",
        ("T1", "FLAIR", "T1GD"),
        "images_segm/UPENN-GBM-{p:05}_{t}_segm.nii.gz",
        {1: ("11",), 2: ("11", "21"), 3: ("11",), 4: ("11",), 5: ("11",)},
    ),
    "BraTS 2020": channels(
        "BraTS20_Training_{p:03}/BraTS20_Training_{p:03}_{c}.nii.gz",
        ("flair", "t1", "t1ce", "t2"),
        "BraTS20_Training_{p:03}/BraTS20_Training_{p:03}_seg.nii.gz",
    ),
    "BraTS 2023": times(
        "BraTS-GLI-{p:05}-{t}/BraTS-GLI-{p:05}-{t}-{c}.nii.gz",
        ("t1c", "t1n", "t2f", "t2w"),
        "BraTS-GLI-{p:05}-{t}/BraTS-GLI-{p:05}-{t}-seg.nii.gz",
        {0: ("000", "001"), 2: ("000",), 3: ("000",), 5: ("000",)},
    ),
    "IXI": {
        f"IXI-{c}/IXI{p:03}-{site}-0{800 + p * 7}-{c}.nii.gz": (str(p), ())
        for p, site in ((2, "Guys"), (12, "HH"), (13, "HH"), (14, "Guys"))
        for c in ("T1", "T2", "PD")
    },
    "MSSEG": people(
        ("01016SACH", "01038PAGU", "07001MOEL"),
        lambda p: {
            f"{p}/Preprocessed_Data/{c}_preprocessed.nii.gz": (str(p), (f"{p}/Masks/Consensus.nii.gz",))
            for c in ("FLAIR", "T1", "DP")
        },
    ),
    "MRBrainS18": channels(
        "training/{p}/pre/{c}.nii.gz", ("FLAIR", "T1", "IR"), "training/{p}/segm.nii.gz", (1, 4, 5, 7)
    ),
    "ISLES 2022": channels(
        "rawdata/sub-strokecase{p:04}/ses-0001/dwi/sub-strokecase{p:04}_ses-0001_{c}.nii.gz",
        ("dwi", "adc"),
        "derivatives/sub-strokecase{p:04}/ses-0001/sub-strokecase{p:04}_ses-0001_msk.nii.gz",
    ),
    "ISLES 2022 with FLAIR": {
        f"rawdata/sub-strokecase{p:04}/ses-0001/{folder}/sub-strokecase{p:04}_ses-0001_{c}.nii.gz": (
            str(p),
            (f"derivatives/sub-strokecase{p:04}/ses-0001/sub-strokecase{p:04}_ses-0001_msk.nii.gz",)
            if folder == "dwi"
            else (),
        )
        for p in range(1, 5)
        for folder, c in (("dwi", "dwi"), ("dwi", "adc"), ("anat", "FLAIR"))
    },
    "ATLAS R2": people(
        (1, 2, 4),
        lambda p: one(
            p,
            "Training/R001/sub-r001s{p:03}/ses-1/anat/sub-r001s{p:03}_ses-1_space-MNI152NLin2009aSym_T1w.nii.gz",
            "Training/R001/sub-r001s{p:03}/ses-1/anat/"
            "sub-r001s{p:03}_ses-1_space-MNI152NLin2009aSym_label-L_desc-T1lesion_mask.nii.gz",
        ),
    ),
    "UK Biobank": channels("{p}_20252_2_0/T1/{c}.nii.gz", ("T1", "T1_unbiased"), "", (1000011, 1000029, 1000036)),
    "HCP": channels("{p}/T1w/{c}_acpc_dc_restore.nii.gz", ("T1w", "T2w"), "", (100206, 100307, 100408)),
    "LUMIERE": times(
        "Imaging/Patient-{p:03}/{t}/{c}.nii.gz",
        ("T1", "FLAIR"),
        "",
        {p: ("week-000-1", "week-000-2", "week-044") for p in range(1, 6)},
    ),
    "SPIDER": people(
        range(1, 5), lambda p: {f"images/{p}_{c}.mha": (str(p), (f"masks/{p}_{c}.mha",)) for c in ("t1", "t2")}
    ),
    "MyoPS": channels(
        "train25/myops_training_{p}_{c}.nii.gz",
        ("C0", "DE", "T2"),
        "train25_myops_gd/myops_training_{p}_gd.nii.gz",
        (101, 102, 105),
    ),
    "OASIS": {
        f"disc{1 + p // 3}/OAS1_{p:04}_MR1/PROCESSED/MPRAGE/T88_111/OAS1_{p:04}_MR1_mpr_n4_anon_111_t88_gfc.nii.gz": (
            str(p),
            (),
        )
        for p in range(1, 7)
    },
    "OASIS-3": {
        f"OAS3{p:04}_MR_d{day:04}/anat1/sub-OAS3{p:04}_ses-d{day:04}_T1w.nii.gz": (str(p), ())
        for p, day in ((1, 129), (1, 757), (2, 653), (3, 12))
    },
    "PI-CAI": {
        f"images/{p}/{p}_{t}_{c}.mha": (
            str(p),
            (f"picai_labels/csPCa_lesion_delineations/human_expert/resampled/{p}_{t}.nii.gz",) if c == "t2w" else (),
        )
        for p, t in ((10000, 1000000), (10001, 1000001), (10002, 1000002), (10002, 1000003))
        for c in ("t2w", "cor", "adc", "hbv")
    },
    "FreeSurfer": channels(
        "{p}/mri/{c}.nii.gz", ("T1", "orig", "brain", "norm"), "{p}/mri/aseg.nii.gz", ("bert", "ernie")
    ),
    "FreeSurfer of one person": channels(
        "{p}/mri/{c}.nii.gz", ("T1", "orig", "brain"), "{p}/mri/aseg.nii.gz", ("bert",)
    ),
    "MSSEG-2": channels(
        "{p}/flair_time0{c}_on_middle_space.nii.gz", "12", "{p}/ground_truth.nii.gz", ("013", "015", "016")
    ),
    "autoPET": {
        f"FDG-PET-CT-Lesions/PETCT_{p}/{day}-NA-PET-CT Ganzkoerper-{n}/{c}.nii.gz": (
            p,
            (f"FDG-PET-CT-Lesions/PETCT_{p}/{day}-NA-PET-CT Ganzkoerper-{n}/SEG.nii.gz",),
        )
        for p, day, n in (
            ("0011f3deaf", "03-23-2003", 10445),
            ("01140d52d8", "08-13-2005", 56839),
            ("0143bab87a", "11-16-2001", 1234),
        )
        for c in ("SUV", "CTres")
    },
    "ISBI 2015": times(
        "training/training{p:02}/preprocessed/training{p:02}_{t}_{c}_pp.nii.gz",
        ("flair", "mprage"),
        "training/training{p:02}/masks/training{p:02}_{t}_mask1.nii.gz",
        {p: ("01", "02", "03", "04") for p in range(1, 6)},
    ),
    "M&Ms-2": times(
        "dataset/{p}/{p}_SA_{t}.nii.gz",
        ("",),
        "dataset/{p}/{p}_SA_{t}_gt.nii.gz",
        {p: ("ED", "ES") for p in ("001", "002")},
    ),
    "HECKTOR": {
        f"imagesTr/CHUM-{p:03}__{c}.nii.gz": (str(p), (f"labelsTr/CHUM-{p:03}.nii.gz",) if c == "CT" else ())
        for p in range(1, 5)
        for c in ("CT", "PT")
    },
    "iSeg": channels(
        "iSeg-2017-Training/subject-{p}-{c}.nii.gz", ("T1", "T2"), "iSeg-2017-Training/subject-{p}-label.nii.gz"
    ),
    "WORD": simple("WORD-V0.1.0/imagesTr/word_{p:04}.nii.gz", "WORD-V0.1.0/labelsTr/word_{p:04}.nii.gz")
    | simple("WORD-V0.1.0/imagesVal/word_{p:04}.nii.gz", "WORD-V0.1.0/labelsVal/word_{p:04}.nii.gz", (11, 12)),
    "two channels": {f"{c.lower()}/Subj{p}_{c}.nii": (str(p), ()) for c in ("T1", "FL") for p in (1, 2, 3)},
    "any script": {f"{name}.nii.gz": (name, ()) for name in ("张三", "李四", "王五", "Müller", "Möller", "Иванов")},
    "AbdomenCT-1K in parts": {
        f"AbdomenCT-1K-ImagePart{1 + p // 4}/Case_{p:05}_0000.nii.gz": (str(p), (f"Mask/Case_{p:05}.nii.gz",))
        for p in range(1, 8)
    },
    "labels without a telling name": {
        f"{p}/MRT.nii.gz": (p, (f"{p}/korrigiert.nii.gz",)) for p in ("anna", "bert", "carl")
    },
    "labels of equal name": {f"数据/{p}.nii.gz": (p, (f"分割/{p}.nii.gz",)) for p in ("张三", "李四", "王五")},
    "a few scans by number": {f"scan_{p:03}.nii.gz": (str(p), ()) for p in range(4)},
    "scans by number": {f"abdomen_scan_{p:03}.nii.gz": (str(p), ()) for p in range(12)},
    "visits of people with names": {
        f"{p}/q{t}.nii.gz": (p, ()) for p in ("anna", "bert", "carl", "dora") for t in (1, 2)
    },
}


MASKS: dict[str, Images] = {
    "TotalSegmentator": people(
        range(4),
        lambda p: one(
            p, "s{p:04}/ct.nii.gz", *(f"s{{p:04}}/segmentations/{s}.nii.gz" for s in ("aorta", "liver", "rib_left_1"))
        ),
    ),
    "HaN-Seg": people(
        (1, 2, 3),
        lambda p: one(
            p,
            "case_{p:02}/case_{p:02}_IMG_CT.nrrd",
            *(f"case_{{p:02}}/case_{{p:02}}_OAR_{s}.seg.nrrd" for s in ("Bone_Mandible", "Brainstem", "Parotid_L")),
        ),
    ),
    "LA 2018 with its wall": people(
        HASHES,
        lambda p: one(
            p, "Training Set/{p}/lgemri.nrrd", "Training Set/{p}/laendo.nrrd", "Training Set/{p}/lawall.nrrd"
        ),
    ),
}


ASKED: dict[str, Images] = {
    "TopCoW": {
        f"imagesTr/topcow_{m}_{p:03}_0000.nii.gz": (str(p), (f"cow_seg_labelsTr/topcow_{m}_{p:03}.nii.gz",))
        for p in range(1, 5)
        for m in ("ct", "mr")
    },
    "ADNI": {
        f"ADNI/{site}_S_{p}/MP-RAGE/{day}_08_20_30.0/I{n}/ADNI_{site}_S_{p}_MR_MP-RAGE_br_raw_{n}.nii": (
            f"{site}{p}",
            (),
        )
        for n, (site, p, day) in enumerate(
            (
                ("002", "0295", "2006-04-18"),
                ("002", "0413", "2006-05-19"),
                ("011", "0003", "2005-09-01"),
                ("011", "0003", "2006-09-01"),
                ("013", "0203", "2006-09-01"),
            )
        )
    },
    "one person twice": times(
        "BraTS-GLI-{p:05}-{t}/BraTS-GLI-{p:05}-{t}-{c}.nii.gz", ("t1c", "t2f"), "", {0: ("000", "001")}
    ),
    "WMH 2017": {
        f"{site}/{p}/pre/{c}.nii.gz": (f"{site}{p}", (f"{site}/{p}/wmh.nii.gz",))
        for site in ("Utrecht", "Singapore")
        for p in range(4)
        for c in ("FLAIR", "T1")
    },
    "MM-WHS": {
        f"{m}_train/{m}_train_100{p}_image.nii.gz": (f"{m}{p}", (f"{m}_train/{m}_train_100{p}_label.nii.gz",))
        for m in ("ct", "mr")
        for p in (1, 2, 3)
    },
    "ASOCA": {
        f"{group}/CTCA/{group}_{p}.nrrd": (f"{group}{p}", (f"{group}/Annotations/{group}_{p}.nrrd",))
        for group in ("Normal", "Diseased")
        for p in range(1, 5)
    },
    "parts with equal numbers": {
        f"BraTS20_{part}_{p:03}/BraTS20_{part}_{p:03}_flair.nii.gz": (f"{part}{p}", ())
        for part in ("Training", "Validation")
        for p in (1, 2, 3)
    },
    "TCGA": {
        f"TCGA-{site}-{p:04}.nii.gz": (f"{site}{p}", ())
        for site, p in (("02", 11), ("02", 12), ("06", 33), ("06", 34), ("08", 5))
    },
}


def made(root: Path, images: Images, masks: bool = False) -> None:
    grids: dict[str, float] = defaultdict(lambda: 1 + len(grids) / 64)
    for number, (path, (_, labels)) in enumerate(images.items()):
        spacing = grids[labels[0] if labels else path]
        write(root / path, image(number), spacing)
        for place, name in enumerate(labels):
            if not (root / name).exists():
                write(root / name, label(place + number, masks), spacing)
