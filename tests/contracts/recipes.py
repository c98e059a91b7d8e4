"""What the battery runs: every task, small, on every backbone.

A task that is not named here is tested all the same, with its default options made small.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from medcl.networks.backbones import BACKBONES, Backbone, BackboneSpec, SwinUNETRBackbone, build_backbone
from medcl.pretext.registry import TASKS, task_class
from medcl.store.plan import Plan

PLAN = Plan(volume_size=(24, 24, 24), patch_size=(24, 24, 24), strides=((2, 2, 2),) * 2)
SWIN_PLAN = dataclasses.replace(PLAN, volume_size=(64, 64, 32), patch_size=(64, 64, 32))
WIDTHS = {"unet": 4, "dynunet": 4, "swin_unetr": 12}
TINY = {"hidden": 32, "embedding": 16}  # where a task has these options
EXACT = {"feature_dropout": 0.0, "dropout": 0.0}  # what draws from torch's own generator


class SmallSwin(SwinUNETRBackbone):
    """The same network with one attention block a stage and small windows: a tenth of the time."""

    def monai_arguments(self) -> tuple[str, dict[str, Any]]:
        name, arguments = super().monai_arguments()
        return name, {**arguments, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2), "window_size": 2}


@dataclass(frozen=True)
class Recipe:
    """How the battery runs a task.

    Attributes:
        options: of the task, over the tiny ones.
        variants: further options to test on the cheapest backbone.
        volumes: volumes a step.
        swin: options for `swin_unetr`, whose inputs of 64 voxels an axis are slow.
        steps, lr: of the over-fitting.
        goal: share of the trivial loss that over-fitting must get below.
    """

    options: dict[str, Any] = field(default_factory=dict)
    variants: tuple[dict[str, Any], ...] = ()
    volumes: int = 3
    swin: dict[str, Any] = field(default_factory=dict)
    steps: int = 60
    lr: float = 3e-3
    goal: float = 0.6


RECIPES: dict[str, Recipe] = {
    "simclr": Recipe(options={"size": [16, 16, 16]}, swin={"size": [32, 32, 32]}, variants=({"loss": "dclw"},)),
    "dcl": Recipe(options={"size": [16, 16, 16]}, swin={"size": [32, 32, 32]}),
    "global_contrast": Recipe(
        options={"partitions": [1, 1, 2], "size": [16, 16, 8]},
        swin={"size": [32, 32, 16]},
        variants=({"strategy": "GR"}, {"strategy": "GD-"}),
    ),
    "local_contrast": Recipe(
        options={"partitions": [1, 1, 2], "region": 1, "regions": 3, "size": [16, 16, 16]},
        swin={"size": [64, 64, 32]},
        variants=({"strategy": "LD"}, {"freeze_encoder": False, "rotate_deg": 10.0, "region": 2}),
    ),
    "global_local": Recipe(
        options={
            "mode": "joint",
            "global_contrast": {"partitions": [1, 1, 2], "size": [16, 16, 8], **TINY},
            "local_contrast": {"region": 1, "regions": 3, "embedding": 16},
        },
        swin={"global_contrast": {"partitions": [1, 1, 2], "size": [64, 64, 16], **TINY}},
    ),
    "pixpro": Recipe(
        options={"size": [16, 16, 16], "blocks": 1},
        swin={"size": [64, 64, 32]},
        variants=({"blocks": 0},),
        steps=30,
    ),
    "pixcontrast": Recipe(
        options={"size": [12, 12, 12]},
        swin={"size": [64, 64, 32]},
        variants=({"blocks": 0, "momentum": 0.9},),
        steps=45,
        lr=1e-2,
        goal=0.85,  # its teacher follows slowly
    ),
    "voco": Recipe(
        options={"crops": 2, "grid": [2, 2, 1]},
        variants=({"variant": "paper"}, {"variant": "v2"}),
        swin={"crops": 1, "grid": [2, 1, 1], "crop_size": [64, 64, 32]},
    ),
}


@dataclass(frozen=True)
class Case:
    """A task with options, on a backbone."""

    task: str
    backbone: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def recipe(self) -> Recipe:
        return RECIPES.get(self.task, Recipe())

    @property
    def plan(self) -> Plan:
        return PLAN if self.backbone != "swin_unetr" else SWIN_PLAN

    @property
    def volumes(self) -> int:
        return self.recipe.volumes if self.backbone != "swin_unetr" else 2

    def resolved(self, **more: Any) -> dict[str, Any]:
        known = {f.name for f in dataclasses.fields(task_class(self.task).Options)}
        tiny = {name: value for name, value in {**TINY, **EXACT}.items() if name in known}
        swin = self.recipe.swin if self.backbone == "swin_unetr" else {}
        return {**tiny, **self.recipe.options, **swin, **dict(self.options), **more}

    def network(self) -> Backbone:
        spec = BackboneSpec(self.backbone, strides=self.plan.strides, width=WIDTHS[self.backbone])
        return SmallSwin(spec) if self.backbone == "swin_unetr" else build_backbone(spec)

    def __str__(self) -> str:
        return "-".join([self.task, self.backbone, *(f"{name}={value}" for name, value in self.options)])


def cases(backbones: tuple[str, ...] = tuple(BACKBONES)) -> list[Case]:
    """Every task on these backbones, and its variants on the first."""
    out = [Case(task, backbone) for task in TASKS for backbone in backbones]
    for task in TASKS:
        for options in RECIPES.get(task, Recipe()).variants:
            out.append(Case(task, backbones[0], tuple(options.items())))
    return out
