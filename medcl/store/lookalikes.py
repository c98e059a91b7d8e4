"""Two subjects of a manifest who may be one: volumes of one grid that show nearly the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from medcl.dataset.case import BY_TABLE, Case, Manifest, Problem
from medcl.errors import MedclError
from medcl.store.near_equal import near_equal
from medcl.store.signature import load_thumbnail
from medcl.store.signatures import signatures

FEWEST = 3  # subjects on a grid, from which a pair can stand out; of two, nobody knows how alike others are


def lookalikes(manifest: Manifest, cases: Sequence[Case], store: str = "", workers: int = 0) -> list[Problem]:
    """Questions, or warnings where a grid has two subjects only, about volumes that may show one person.

    Args:
        manifest: says where the cases lie, with affines in their headers.
        cases: those to compare.
        store: folder that keeps thumbnails.
        workers: processes that read volumes which have none yet; 0 takes one a core.
    """
    grids = {case.id: (case.shape, case.affine) for case in cases}
    subjects: dict[object, set[str]] = defaultdict(set)
    for case in cases:
        subjects[grids[case.id]].add(case.subject)
    shared = [case for case in cases if len(subjects[grids[case.id]]) > 1]
    if not shared:
        return []
    try:
        found = signatures(manifest, shared, store, workers)
        shared = [case for case in shared if case.id in found]
        pictures = [load_thumbnail(found[case.id]) for case in shared]
    except MedclError:
        return []  # the store cannot be written: told where something is prepared
    problems = []
    for pair in near_equal(pictures, [case.subject for case in shared], [grids[case.id] for case in shared]):
        first, second = shared[pair.first], shared[pair.second]
        what = (
            f"shows nearly what {first.image[0]} does (likeness {pair.likeness:.2f}), "
            f"although one is subject {first.subject} and the other {second.subject}"
        )
        many = len(subjects[grids[first.id]]) >= FEWEST
        remedy = f"If they are one person, give both one subject. {BY_TABLE}"
        problems.append(Problem(second.image[0], what, remedy, aside=False, question=many))
    return problems
