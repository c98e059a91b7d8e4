"""Writing that loses nothing: temporary file, fsync, rename."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medcl.errors import MedclError

# what zipfile and numpy raise on one changed byte or another of an .npz file
BROKEN_NPZ = (
    OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, tokenize.TokenError,
)  # fmt: skip


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed over it.

    A reader sees the old file or the new one, never half of one. The temporary keeps the suffixes, because writers
    such as nibabel choose the format by them.

    Raises:
        MedclError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".part-", suffix="".join(path.suffixes), dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise disk_error(error, path) from error
    part = Path(name)
    try:
        yield part
        with open(part, "rb+") as stream:
            os.fsync(stream.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable, as far as the filesystem can sync a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def disk_error(error: OSError, path: str | Path) -> MedclError:
    """The one-line form of a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MedclError(
            "the disk is full", path, "Free some space and run the same command again; what was written before is kept."
        )
    reason = error.strerror or str(error)
    return MedclError(f"cannot be written ({reason})", path, "Choose another folder or mend its permissions.")


def write_text(path: str | Path, text: str) -> None:
    """Writes a text in UTF-8, whole or not at all."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
    """Writes JSON, whole or not at all."""
    with atomic_path(path) as part, open(part, "w", encoding="utf-8") as stream:
        json.dump(data, stream, indent=1, ensure_ascii=False, allow_nan=False)  # never the whole text in memory
        stream.write("\n")


def read_json(path: str | Path) -> Any:
    """Reads JSON.

    Raises:
        MedclError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MedclError("no such file", path) from None
    except (ValueError, OSError) as error:
        raise MedclError(f"cannot be read as JSON ({error})", path, "Mend it, or delete it and run again.") from None


def sha256(chunks: Callable[[], Iterator[bytes]] | bytes) -> str:
    """The SHA-256, in hexadecimal, of bytes or of chunks of them."""
    digest = hashlib.sha256()
    if isinstance(chunks, bytes):
        digest.update(chunks)
    else:
        for chunk in chunks():
            digest.update(chunk)
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, read a megabyte at a time."""
    with open(path, "rb") as stream:
        return (
            hashlib.file_digest(stream, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else sha256(lambda: iter(lambda: stream.read(1 << 20), b""))
        )


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV table of rows that have the columns of the first."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, out.getvalue())
