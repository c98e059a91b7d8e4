"""The dataclass of `medcl benchmark`: see `medcl.config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medcl.config.groups import SplitSettings
from medcl.config.kinds import Absent, Accelerator, Count, Natural, Settings


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(SplitSettings, Settings):
    """Does pretraining help? Arms at several numbers of labelled subjects, paired draw by draw, with intervals.

    Args:
        source: folder of labelled scans, or a manifest written by `medcl scan`.
        out: folder to write; what is there already is kept, and only what is missing is run.
        arms: what to compare, by name. `pretrain` of an arm holds options of `medcl pretrain` (`config: FILE` reads
            them from a recipe first, which is looked for where the command runs, then near the benchmark's own file),
            or the name of the arm whose encoder it shares; an arm without it starts from random weights. `finetune`
            holds what this arm alone does in fine-tuning; `labels` the numbers of labels it is run at, if not all.
        labels: numbers of labelled subjects; `all` takes every one of the training subjects.
        draws: draws of labelled subjects at each number; the draws of the numbers are nested.
        baseline: the arm that the others are compared with.
        pretrain: options of `medcl pretrain` that every arm shares.
        finetune: options of `medcl finetune` that every arm shares: the schedule, the network.
        by_labels: further options of fine-tuning at one number of labels, such as a longer schedule with `all`, and
            `draws` if there are to be others; every arm shares them.
        subjects: whom to score: `test`, or `val` while recipes are being chosen.
        plan: a plan.json to prepare by; by default one is derived from the scans.
        parallel: trainings at a time; 0 takes one a core on a CPU, and four a device on a GPU.
        accelerator: what to train on.
        store: folder for prepared volumes; by default `$MEDCL_STORE`, or `~/.cache/medcl`.
        channel: which channel of 4D files to take.
        yes: take what was guessed of the scans where `medcl scan` asks.
        absent: what a structure counts that the reference and all runs lack: nothing, or one (Dice of 1).
    """

    source: str = field(kw_only=False)
    out: str = field(kw_only=False)
    arms: dict[str, Any] = field(default_factory=dict, kw_only=False)
    labels: list[Any] = field(kw_only=False, default_factory=lambda: ["1", "2", "4", "8", "all"])
    draws: Count = 3
    baseline: str = "scratch"
    pretrain: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)
    by_labels: dict[str, Any] = field(default_factory=dict)
    subjects: Literal["test", "val"] = "test"
    plan: str = ""
    parallel: Natural = 0
    accelerator: Accelerator = "auto"
    store: str = ""
    channel: int | None = None
    yes: bool = False
    absent: Absent = "nothing"

    def __post_init__(self) -> None:
        super().__post_init__()
        # YAML reads 2 as a number; a number of labels is a name here, as `all` is
        object.__setattr__(self, "labels", [str(labels) for labels in self.labels])
        object.__setattr__(self, "by_labels", {str(labels): options for labels, options in self.by_labels.items()})


def recipes_near(arms: Any, file: str | Path) -> Any:
    """The arms of a benchmark's file, with recipes that are not where the command runs taken from beside the file.

    `config: configs/x.yaml` in `/here/configs/b.yaml` is `/here/configs/x.yaml`, from wherever it is run.
    """
    folder = Path(file).resolve().parent

    def near(arm: Any) -> Any:
        recipe = arm.get("pretrain") if isinstance(arm, Mapping) else None
        if not isinstance(recipe, Mapping) or not isinstance(recipe.get("config"), str):
            return arm
        name = recipe["config"]
        found = [path for path in (Path(name), folder / name, folder.parent / name) if path.is_file()]
        if not found or found[0] == Path(name):
            return arm
        return {**arm, "pretrain": {**recipe, "config": str(found[0])}}

    return {key: near(arm) for key, arm in arms.items()} if isinstance(arms, Mapping) else arms
