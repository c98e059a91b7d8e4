"""A run is a folder: config, plan, manifest, metrics, checkpoints/, weights/, report.html and log.txt."""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medcl.errors import MedclError
from medcl.runtime.files import write_json, write_text
from medcl.runtime.scale import is_follower
from medcl.version import VERSION

log = logging.getLogger("medcl")
logging.raiseExceptions = False  # a log line that cannot be written (full disk) is no reason for a traceback


def open_run(path: str | Path, config: Any, stage: str, resume: bool = False) -> Path:
    """Creates a run folder, or opens it to resume, and sends the log into it.

    Raises:
        MedclError: the folder holds another run and `resume` is off; or nothing to resume; or another config.
    """
    run = Path(path)
    if hasattr(config, "devices") and is_follower(config):
        log.setLevel(logging.ERROR)  # the first process tells and writes
        return run
    kept = run / "config.yaml"
    if resume:
        if not kept.exists():
            raise MedclError("holds no run to resume", run, "Start without --resume.")
        changed = changes(run, config, stage)
        if changed:
            raise MedclError(
                f"was started with another {', '.join(changed)}",
                run,
                "Resume with the same settings, or use another --out.",
            )
    elif kept.exists():
        raise MedclError("already holds a run", run, "Add --resume to go on with it, or choose another --out.")
    write_config(run, stage, config)
    follow_log(run / "log.txt")
    return run


def previous_run(config: Any) -> Path | None:
    """The folder of the run to go on with; None where `config` starts one, or it was cut off before its manifest.

    The manifest is the last file a stage writes before it trains.
    """
    run = Path(config.out)
    return run if config.resume and (run / "manifest.json").exists() else None


def to_plain(config: Any) -> dict[str, Any]:
    """A dataclass as YAML can hold it."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    return {k: plain(v) for k, v in dataclasses.asdict(config).items()}


def write_config(run: Path, stage: str, config: Any) -> None:
    """Writes `config.yaml`: the stage and every setting."""
    import yaml

    write_text(run / "config.yaml", yaml.safe_dump({"stage": stage, **to_plain(config)}, sort_keys=False))


def read_config(run: Path) -> dict[str, Any]:
    """The resolved config of a run.

    Raises:
        MedclError: the folder is not a run.
    """
    import yaml

    path = Path(run) / "config.yaml"
    if not path.exists():
        raise MedclError("is not a run folder (no config.yaml)", run, "Give the --out of a pretrain or finetune.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MedclError(f"is not YAML ({str(error).splitlines()[0]})", path, "Mend it.") from None
    return dict(data or {})


def is_finished(run: Path, config: Any, stage: str) -> bool:
    """Whether the folder holds this very run, ended; False where it is not begun or not ended.

    Raises:
        MedclError: it holds a run with other settings.
    """
    if not (run / "config.yaml").exists():
        return False
    changed = changes(run, config, stage)
    if changed:
        raise MedclError(f"was run with another {', '.join(changed)}", run, "Delete it, or choose another --out.")
    return (run / "provenance.json").exists()


def changes(run: Path, config: Any, stage: str) -> list[str]:
    """Settings in which a run differs from this config, of those that change what is computed.

    A setting that the version which made the run did not know yet counts as its default.
    """
    made = ((f.name, f.default if f.default_factory is dataclasses.MISSING else f.default_factory())
            for f in dataclasses.fields(config))  # fmt: skip
    defaults = {name: value for name, value in made if value is not dataclasses.MISSING}
    old, new = {**defaults, **read_config(run)}, {"stage": stage, **to_plain(config)}
    # none of these changes what is computed
    free = {"resume", "workers", "store", "checkpoint_every", "out", "allow_leakage", "parts", "compile"}
    paths = {"source", "init", "plan"}

    def same(key: str) -> bool:
        a, b = old.get(key), new.get(key)
        if key == "batch_size" and b == 0:  # to be chosen, and the run has chosen
            return True
        return a == b or (key in paths and bool(a and b) and Path(str(a)).resolve() == Path(str(b)).resolve())

    return sorted(key for key in old.keys() | new.keys() if key not in free and not same(key))


def follow_log(path: Path) -> None:
    """Sends the log into this file too, and no longer into an earlier one."""
    setup_log()
    for handler in [h for h in log.handlers if isinstance(h, logging.FileHandler)]:
        log.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)


class _Screen(logging.Handler):
    """Log lines to stderr, whatever `sys.stderr` is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print(mark + record.getMessage(), file=sys.stderr, flush=True)


def setup_log() -> None:
    """Sends the log to the screen; calling it again changes nothing."""
    log.setLevel(logging.INFO)
    log.propagate = False
    if not any(isinstance(h, _Screen) for h in log.handlers):
        log.addHandler(_Screen())


def write_provenance(run: Path, began: float, **facts: Any) -> None:
    """Versions, commit and what else makes a number repeatable."""
    import torch

    versions = {"python": platform.python_version(), "medcl": VERSION, "torch": torch.__version__}
    for name in ("monai", "pytorch_lightning", "numpy"):
        if name in sys.modules:
            versions[name] = sys.modules[name].__version__
    write_json(
        run / "provenance.json",
        {"versions": versions, "commit": commit(), "seconds": round(time.monotonic() - began, 1), **facts},
    )


def commit() -> str | None:
    """The git commit of medcl's own source, where it is a checkout, with a mark where files differ from it."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        call = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=10"]
        return subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_metrics(run: Path, rows: Sequence[dict[str, float]]) -> None:
    """metrics.csv: a row a logged step; a series not logged at a step is blank there."""
    names = ["step", *sorted({name for row in rows for name in row} - {"step"})]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.8g}" for k, v in row.items()} for row in rows)
    write_text(run / "metrics.csv", out.getvalue())


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Rows of metrics.csv, blanks left out; empty where there is none."""
    path = run / "metrics.csv"
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as stream:
        return [{k: float(v) for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(stream)]
