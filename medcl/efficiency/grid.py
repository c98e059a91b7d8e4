"""The grid of a benchmark: which encoders and which fine-tunings there are, and whether comparing them is fair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medcl.config import BenchmarkConfig, FinetuneConfig, PretrainConfig, from_mapping, nearest
from medcl.errors import MedclError

# What an arm may do in fine-tuning by itself. Everything else is the same for all arms, or it would be no comparison.
OWN = ("pretrained_lr", "frozen", "layer_decay", "semi", "semi_options", "mix", "core_tuning")
KEYS = ("pretrain", "finetune", "labels")
# Set by the benchmark itself, for every stage.
FIXED = {
    "source", "out", "init", "labels", "draw", "plan", "store", "channel", "yes", "accelerator", "resume",
    "test_fraction", "val_fraction", "split_seed", "subjects",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One fine-tuning.

    Attributes:
        arm: its arm.
        labels: number of labelled subjects, or `all`.
        draw: which draw of them.
        config: everything it needs.
    """

    arm: str
    labels: str
    draw: int
    config: FinetuneConfig


@dataclass(frozen=True)
class Grid:
    """What a benchmark trains.

    Attributes:
        encoders: pretrainings by the name of their arm.
        cells: fine-tunings, those of few labels first.
    """

    encoders: dict[str, PretrainConfig]
    cells: tuple[Cell, ...]

    def runs(self, arm: str, labels: str) -> list[Path]:
        """Run folders of an arm at a number of labels, a draw each."""
        return [Path(cell.config.out) for cell in self.cells if (cell.arm, cell.labels) == (arm, labels)]


def make_grid(config: BenchmarkConfig) -> Grid:
    """Lays out a benchmark.

    Raises:
        MedclError: no arms, an unknown key, a schedule that only one arm would have, or an arm that shares the encoder
            of one that has none.
    """
    _check(config)
    shared: dict[str, Any] = {
        "source": config.source, "plan": config.plan, "store": config.store, "channel": config.channel,
        "accelerator": config.accelerator, "test_fraction": config.test_fraction, "val_fraction": config.val_fraction,
        "split_seed": config.split_seed,
    }  # fmt: skip
    out = Path(config.out)
    encoders = {}
    for name, arm in config.arms.items():
        recipe = arm.get("pretrain")
        if isinstance(recipe, Mapping):
            options = _recipe(recipe, f"arms.{name}.pretrain")
            values = {**_free(config.pretrain, "pretrain"), **options, **shared}
            where = f"arms.{name}.pretrain"
            encoders[name] = from_mapping(PretrainConfig, {**values, "out": str(out / "encoders" / name)}, where)
    cells = []
    for labels in config.labels:
        schedule = {**_free(config.finetune, "finetune"), **_free(config.by_labels.get(labels, {}), "by_labels")}
        for draw in range(schedule.pop("draws", config.draws)):
            for name, arm in config.arms.items():
                if labels not in map(str, arm.get("labels", config.labels)):
                    continue
                if labels == "all" and arm.get("finetune", {}).get("semi", "none") != "none":
                    continue  # nobody is left unlabelled to learn from
                values = {**schedule, **arm.get("finetune", {}), **shared, "labels": labels, "draw": draw}
                values["init"] = _init(name, arm.get("pretrain"), encoders)
                values["out"] = str(out / "runs" / f"{name}-{labels}-{draw}")
                cells.append(Cell(name, labels, draw, from_mapping(FinetuneConfig, values, f"arms.{name}.finetune")))
    return Grid(encoders, tuple(cells))


def _check(config: BenchmarkConfig) -> None:
    if not config.arms:
        raise MedclError("no arms to compare", "arms", "Name some; configs/ has examples.")
    if config.baseline not in config.arms:
        raise MedclError(f"{config.baseline!r} is no arm", "baseline", nearest(config.baseline, config.arms))
    if not config.labels:
        raise MedclError("nothing to run", "labels", "Give at least one number.")
    for labels in config.labels:
        if labels != "all" and not (labels.isdecimal() and int(labels) > 0):
            raise MedclError(f"{labels!r} is no number of labelled subjects", "labels", "Give 1 or more, or all.")
    if len(set(config.labels)) < len(config.labels):
        raise MedclError("the same number stands there twice", "labels", "Name each once; `draws` repeats them.")
    unknown = set(config.by_labels) - set(config.labels)
    if unknown:
        raise MedclError(f"{sorted(unknown)[0]!r} is not among the labels", "by_labels", "Quote numbers: '2'.")
    for name, arm in config.arms.items():
        where = f"arms.{name}"
        if not isinstance(arm, Mapping):
            raise MedclError("is not a list of `key: value` lines", where, "Use {} for an arm without options.")
        if any(sign in name for sign in "/\\ ") or not name:
            raise MedclError(f"{name!r} cannot be the name of a folder", "arms", "Use letters, digits, - and +.")
        for key in arm:
            if key not in KEYS:
                raise MedclError(f"unknown key {key!r}", where, nearest(key, KEYS))
        if not isinstance(arm.get("finetune", {}), Mapping):
            raise MedclError("is not a list of `key: value` lines", f"{where}.finetune", "Leave it out for no options.")
        if not isinstance(arm.get("labels", []), list):
            raise MedclError("is no list", f"{where}.labels", "Write it as [1, 2].")
        if name == config.baseline and "labels" in arm:
            raise MedclError("the baseline is run at every number of labels", where, "Leave out `labels`.")
        if set(map(str, arm.get("labels", ()))) - set(config.labels):
            raise MedclError(
                f"labels {arm['labels']} are not all among those of the benchmark", where, "Add them there."
            )
        for key in arm.get("finetune", {}):
            if key not in OWN:
                raise MedclError(
                    f"{key!r} must be the same for every arm, or they cannot be compared", f"{where}.finetune",
                    f"Move it to `finetune`, which all share; an arm may choose {', '.join(OWN)}.",
                )  # fmt: skip


def _recipe(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options of a pretraining, over those of the recipe file that they name."""
    values = dict(options)
    file = values.pop("config", None)
    if file is None:
        return _free(values, where)
    import yaml

    try:
        base = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise MedclError(f"cannot be read ({error.strerror})", file, f"Check `config` in {where}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MedclError(f"is not YAML ({' '.join(str(error).split())[:120]})", file, "Mend it.") from None
    if not isinstance(base, dict):
        raise MedclError("is not a list of `key: value` lines", file, "See configs/ for examples.")
    return _free({**base, **values}, where)


def _free(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    fixed = sorted(FIXED & set(options))
    if fixed:
        raise MedclError(f"{fixed[0]!r} is set by the benchmark", where, "Leave it out there.")
    return dict(options)


def _init(name: str, recipe: Any, encoders: Mapping[str, PretrainConfig]) -> str:
    if recipe is None:
        return "none"
    source = name if isinstance(recipe, Mapping) else str(recipe)
    if source not in encoders:
        raise MedclError(f"{source!r} is no arm with a pretraining", f"arms.{name}.pretrain", nearest(source, encoders))
    return encoders[source].out
