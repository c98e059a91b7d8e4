"""Whether bags were seen before they are tested: by the encoder of their features, or by a classifier of bags.

`medcl mil prepare` keeps what the encoder has seen in `encoder/` beside the features, and in every feature file the
marks of what it was made from. Scores of bags are made from predictions and a `BagAudit`; there is no other way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medcl.errors import MedclError
from medcl.leakage.audit import AUDIT_VERSION, compared
from medcl.leakage.overlap import KINDS
from medcl.leakage.seen import Seen, SeenVolume, save_seen, seen_by
from medcl.mil.bags import Bag, Features
from medcl.mil.patch_encoders import WIDTHS
from medcl.runtime.files import read_json, write_json
from medcl.runtime.run import log
from medcl.store.signature import sign, subject_hash

FITTING = "fitting"  # the stage in which a classifier of bags sees them
BAG_KINDS = {**KINDS, "exact": "the same content", "subject": "the same group"}
BY = {
    "encoder": "in training of their encoder",
    "classifier": "in training of the classifier",
    "group": "under another group",
}
UNKNOWN = "nothing says what the encoder of these bags has seen: it was not compared with them"


@dataclass(frozen=True)
class BagAudit:
    """What is known of bags that are tested.

    Attributes:
        leakage: a sentence for every way in which they were seen before; every result is marked with them.
        gaps: a sentence for whatever could not be compared.
        overlaps: as `medcl.leakage.audit.Overlap`, as dictionaries, with who has seen the bag: a key of `BY`.
        subjects: hashes of the groups that were seen, for groups that are named later.
    """

    leakage: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()
    overlaps: tuple[dict[str, Any], ...] = ()
    subjects: tuple[str, ...] = ()

    def __add__(self, other: BagAudit) -> BagAudit:
        leakage, gaps, subjects = (
            tuple(dict.fromkeys(getattr(self, name) + getattr(other, name))) for name in ("leakage", "gaps", "subjects")
        )
        return BagAudit(leakage, gaps, self.overlaps + other.overlaps, subjects)

    @property
    def seen(self) -> dict[str, str]:
        """By the bags that were seen, the column `seen` of `predictions.csv`: `yes` where the classifier has."""
        order = sorted(self.overlaps, key=lambda each: each["by"] == "classifier")
        return {each["case"]: "yes" if each["by"] == "classifier" else each["by"] for each in order}

    def with_groups(self, groups: Mapping[str, str]) -> BagAudit:
        """The audit of the same bags, some of whose groups are known only now.

        Args:
            groups: by bag.
        """
        late = [bag for bag, group in groups.items() if subject_hash(group) in self.subjects and bag not in self.seen]
        if not late:
            return self
        line = f"leakage: {len(late)} of {len(groups)} held-out bags, such as {late[0]}, are of groups seen in training"
        return self + BagAudit((line,))

    def refuse(self, allowed: bool, where: object) -> None:
        """Stops where bags were seen.

        Raises:
            MedclError: they were, and that is not allowed.
        """
        if self.leakage and not allowed:
            raise MedclError(
                self.leakage[0], where,
                "Use an encoder that has not seen these bags, or add --allow_leakage, which marks every result.",
            )  # fmt: skip

    def log(self) -> None:
        """Logs what could not be compared, and warns of every leakage."""
        for gap in self.gaps:
            log.info("Audit: %s.", gap)
        for line in self.leakage:
            log.warning("%s.", line)

    def save(self, folder: Path) -> None:
        """Writes `audit.json`, which `load` reads, into a folder."""
        write_json(folder / "audit.json", {"medcl_audit": AUDIT_VERSION, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, folder: Path) -> BagAudit:
        """The audit of a folder of predictions; of one made before there were such, what is not known."""
        path = folder / "audit.json"
        return cls.of(read_json(path)) if path.exists() else cls(gaps=(UNKNOWN,))

    @classmethod
    def of(cls, result: dict[str, Any]) -> BagAudit:
        """The marks of a result, such as metrics.json; where it has none, what is not known."""
        if "leakage" not in result:
            return cls(gaps=(UNKNOWN,))
        return cls(*(tuple(result.get(field.name, ())) for field in dataclasses.fields(cls)))


def audit_bags(bags: Sequence[Bag], features: Sequence[Features], classifier: Seen | None = None) -> BagAudit:
    """Compares bags that are tested with what their encoder has seen, and with what a classifier was fitted to.

    Args:
        bags, features: what is tested.
        classifier: its record; None in a cross-validation, where bags of one group alone are held out. There the same
            content under two groups is reported.
    """
    held = record_of(bags, features)
    found = _compared(encoder_of(features, bags), held, "encoder")
    if classifier is not None:
        return found + _compared(classifier, held, "classifier")
    # thumbnails of the bags are not compared with one another: strangers of one kind are many, copies keep their voxels
    exact = Seen(tuple(dataclasses.replace(volume, picture=None) for volume in held.volumes))
    return found + _compared(exact, exact, "group")


def _compared(seen: Seen, held: Seen, by: str) -> BagAudit:
    result = compared(seen, held, by == "group", what="bags", how=BY[by], kinds=BAG_KINDS)
    gaps = tuple(gap.rstrip(".") for gap in (*result["gaps"], result["question"]) if gap)
    overlaps = tuple({**each, "by": by} for each in result["overlaps"])
    subjects = () if by == "group" else tuple(dict.fromkeys(v.subject for v in seen.volumes if v.subject))
    return BagAudit((result["sentence"],) if result["sentence"] else (), gaps, overlaps, subjects)


def record_of(bags: Sequence[Bag], features: Sequence[Features], stage: str = "", run: str | Path = "") -> Seen:
    """Bags as volumes of a record: group, and the marks of what their features were made from."""
    volumes, bare = [], []
    for bag, each in zip(bags, features, strict=True):
        meta = each.meta or {}
        content, values = (str(meta.get(name, "")) for name in ("content", "values"))
        picture = partial(np.asarray, meta["thumbnail"]) if "thumbnail" in meta else None
        group = subject_hash(bag.group)
        volumes.append(SeenVolume(content, values, group, stage, Path(run).name, picture, bag.id))
        if not content:
            bare.append(bag.id)
    whose = "the classifier was fitted to" if stage else f"tested, such as {bare[0] if bare else ''},"
    gap = f"{len(bare)} of {len(bags)} bags {whose} do not say what they were made from: groups alone were compared"
    return Seen(tuple(volumes), (gap,) if bare else ())


def encoder_of(features: Sequence[Features], bags: Sequence[Bag]) -> Seen:
    """What the encoder of these features has seen, as kept beside them by `record_encoder`."""
    identity = next((each.encoder for each in features if each.encoder), "")
    for folder in dict.fromkeys(bag.path.resolve().parent.parent / "encoder" for bag in bags):
        path = folder / "encoder.json"
        # features of cells add to the encoder's name how they were pooled
        if path.exists() and f"{identity}:".startswith(f"{read_json(path)['encoder']}:"):
            return seen_by(folder)
    return Seen(gaps=(UNKNOWN,))


def record_encoder(out: Path, name: str, identity: str) -> None:
    """Writes what an encoder has seen into `encoder/` of a folder of features.

    Args:
        out: the folder.
        name: what `--encoder` named.
        identity: of its weights.
    """
    run = Path(name)
    if (run / "weights").exists():
        seen = seen_by(run)
    elif name in WIDTHS:
        seen = Seen()  # random weights
    else:
        seen = Seen(gaps=(f"what {name} was trained on is not known: it was not compared with the bags",))
    save_seen(out / "encoder", seen)
    write_json(out / "encoder" / "encoder.json", {"encoder": identity, "name": run.name})


def classifier_of(run: str | Path, facts: dict[str, Any]) -> Seen:
    """The bags that a classifier was fitted to; of an older run their groups."""
    if (Path(run) / "weights" / "seen.json").exists():
        return seen_by(run)
    gap = f"{Path(run).name} was fitted before medcl kept what bags are made from: only their groups were compared"
    groups = [SeenVolume(subject=subject_hash(g), stage=FITTING, run=Path(run).name) for g in facts.get("groups", ())]
    return Seen(tuple(groups), (gap,))


def volume_marks(canonical: np.ndarray) -> dict[str, Any]:
    """What a feature file says of the volume (X, Y, Z) in RAS orientation that it is made from."""
    signature = sign(canonical)
    return {"content": signature.voxels, "values": signature.values, "thumbnail": signature.thumbnail}
