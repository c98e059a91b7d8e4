"""Signatures of many cases in the store: those it has, and those made by reading the volumes once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from medcl.dataset.case import Case, Manifest
from medcl.dataset.checks import check_image
from medcl.errors import MedclError
from medcl.io.geometry import to_canonical
from medcl.io.volumes import read_volume
from medcl.runtime.pool import map_safely
from medcl.store.prepare import ContentKeys
from medcl.store.signature import save_signature, sign, signature_path
from medcl.store.volumes import store_folder


def signatures(
    manifest: Manifest, cases: Sequence[Case], store: str | Path = "", workers: int = 0, title: str | None = None
) -> dict[str, Path]:
    """Where the store has the signature of each case, by its id; a volume that cannot be read has none.

    Args:
        manifest: says where the cases lie.
        cases: some of its cases.
        store: folder; by default `default_store()`.
        workers: processes; 0 takes one a core.
        title: of a progress bar; none without.
    """
    root = store_folder(store)
    contents = ContentKeys(root)
    paths: dict[str, Path] = {}
    for case in cases:
        with contextlib.suppress(OSError):  # reported where the volume is used
            files = [contents.of(file) for file in manifest.image_paths(case)]
            paths[case.id] = signature_path(root, files, case.channel)
    contents.save()
    missing = [case for case in cases if case.id in paths and not paths[case.id].exists()]
    bare = dataclasses.replace(manifest, cases=(), problems=())
    tasks = [(bare, case, paths[case.id]) for case in missing]
    map_safely(_sign, tasks, [False] * len(tasks), workers or None, title if missing else None, fewest=8)
    return {name: path for name, path in paths.items() if path.exists()}


def _sign(task: tuple[Manifest, Case, Path]) -> bool:
    manifest, case, path = task
    try:
        image = read_volume(manifest.image_paths(case), channel=case.channel)
        check_image(image.array, where=case.image[0])
    except MedclError:
        return False
    save_signature(path, sign(to_canonical(image).array))
    return True
