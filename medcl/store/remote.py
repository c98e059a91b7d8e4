"""A store on any fsspec path, such as s3://bucket/store: volumes are fetched once into a local folder and read there.

The local folder is a store like any other, with a note of where its volumes come from. What is prepared here is sent
there, the `meta.json` last, so that a volume which has one is whole.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from medcl.errors import MedclError
from medcl.runtime.files import write_text

ORIGIN = "origin.txt"  # in the local folder: the address of the store that it mirrors


def is_remote(store: str) -> bool:
    """Whether a store is named by an fsspec address."""
    return "://" in str(store)


def mirror_of(store: str, cache: Path) -> Path:
    """The local folder for the store at an address.

    Raises:
        MedclError: the address cannot be used.
    """
    address = store.rstrip("/")
    _filesystem(address)
    root = cache / "mirrors" / hashlib.sha256(address.encode()).hexdigest()[:16]
    if not (root / ORIGIN).exists():
        write_text(root / ORIGIN, address)
    return root


def origin_of(path: Path) -> str:
    """Address of the volume that belongs into `path` of a local folder; empty where that mirrors no store."""
    root = path.parent.parent
    address = _address(root)
    return f"{address}/{path.parent.name}/{path.name}" if address else ""


def held(root: Path) -> set[str]:
    """Names of the volumes that the mirrored store holds, by one listing; empty where `root` mirrors none."""
    address = _address(root)
    if not address:
        return set()
    try:
        system, top = _filesystem(address)
        return {Path(name).parent.name for name in system.find(top) if name.endswith("/meta.json")}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise MedclError(f"cannot be listed ({error})", address, "Check the address and your rights.") from error


def fetch(path: Path) -> None:
    """Brings a volume into its local folder, whole or not at all; nothing where it is there, or mirrors no store.

    Raises:
        MedclError: it cannot be read.
    """
    source = origin_of(path)
    if not source or (path / "meta.json").exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=path.parent))
    try:
        system, top = _filesystem(source)
        for name in system.find(top):
            system.get_file(name, str(part / Path(name).name))
        if not (part / "meta.json").exists():
            raise MedclError("is not in the store", source, "Prepare it again.")
        if not (path / "meta.json").exists():
            os.replace(part, path)
    except OSError as error:
        raise MedclError(f"cannot be read ({error})", source, "Check the address and your rights.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def send(path: Path) -> None:
    """Sends a prepared volume to the store that its folder mirrors, if any.

    Raises:
        MedclError: it cannot be written.
    """
    target = origin_of(path)
    if not target:
        return
    try:
        system, top = _filesystem(target)
        system.makedirs(top, exist_ok=True)
        for file in sorted(path.iterdir(), key=lambda file: file.name == "meta.json"):
            system.put_file(str(file), f"{top}/{file.name}")
    except OSError as error:
        raise MedclError(f"cannot be written ({error})", target, "Check the address and your rights.") from error


def _filesystem(address: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, path = fsspec.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise MedclError(f"cannot be used ({error})", address, "Install the package named, or mend it.") from None
    return system, path


@functools.lru_cache(maxsize=8)
def _address(root: Path) -> str:
    try:
        return (root / ORIGIN).read_text().strip()
    except OSError:
        return ""
