"""Global, then local contrast in one run: the encoder learns first, the decoder on top of it.

Chaitanya et al., NeurIPS 2020: G^D on the encoder, then, with the encoder frozen, L^R on the first decoder blocks. The
joint form trains both by the sum of the two losses from the start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from medcl.errors import MedclError
from medcl.networks.backbones import Backbone
from medcl.pretext.base import Pairs, PretextTask, Tensors
from medcl.pretext.checks import Checks
from medcl.pretext.global_contrast import GlobalContrast
from medcl.pretext.local_contrast import LocalContrast
from medcl.runtime.run import log
from medcl.store.plan import Plan

MODES = ("stagewise", "joint")


@dataclass(frozen=True)
class GlobalLocalOptions:
    """Settings of global and local contrast together.

    Attributes:
        mode: `stagewise`: global contrast for a share of the run, then local contrast with the encoder frozen. `joint`:
            the sum of both, nothing frozen.
        switch: share of the run that the first stage takes.
        weight: of the local loss in the joint form.
        global_contrast: options of global contrast.
        local_contrast: options of local contrast; its views have the size of the global ones unless it says otherwise.
    """

    mode: str = "stagewise"
    switch: float = 0.5
    weight: float = 1.0
    global_contrast: dict[str, Any] = field(default_factory=dict)
    local_contrast: dict[str, Any] = field(default_factory=dict)


class GlobalLocal(PretextTask):
    """Global contrast on the encoder and local contrast on the decoder."""

    Options = GlobalLocalOptions
    trains = ("encoder", "decoder")
    before: ClassVar[dict[str, Any]] = {"global_contrast": {"pool": "mean"}}

    def __init__(self, backbone: Backbone, plan: Plan, options: dict[str, Any]):
        super().__init__(backbone, plan, options)
        chosen: GlobalLocalOptions = self.options
        check_options(chosen)
        with options_below("global_contrast"):
            whole = GlobalContrast(backbone, plan, chosen.global_contrast)
        joint = chosen.mode == "joint"
        shared = {"size": list(whole.size), "partitions": list(whole.partitions), "freeze_encoder": not joint}
        with options_below("local_contrast"):
            local = LocalContrast(backbone, plan, {**shared, **chosen.local_contrast})
        self.parts: dict[str, PretextTask] = {"global": whole, "local": local}
        for part in self.parts.values():
            lend_backbone(part)
        self.heads = torch.nn.ModuleDict(self.parts)
        self.needs_volumes = max(part.needs_volumes for part in self.parts.values())
        self.places = whole.places
        a, b, c = (max(sizes) for sizes in zip(whole.read_size, local.read_size, strict=True))
        self.read_size = (a, b, c)
        self.done: Tensor
        self.register_buffer("done", torch.zeros(()))  # share of the run; a resumed one goes on in its stage

    def active(self) -> tuple[str, ...]:
        """The parts that this step trains."""
        if self.options.mode == "joint":
            return ("global", "local")
        return ("global",) if float(self.done) < self.options.switch else ("local",)

    def describe(self) -> str:
        each = "; ".join(part.describe() for part in self.parts.values())
        return f"{self.options.mode}: {each}"

    def views(self, batch: Tensors) -> Tensors:
        """Those of the active parts, each name behind the part's."""
        out: Tensors = {}
        for name in self.active():
            out |= {f"{name}.{key}": value for key, value in self.parts[name].views(batch).items()}
        return out

    def embed(self, views: Tensors) -> tuple[Tensors, Tensors]:
        z: Tensors = {}
        marks: Tensors = {}
        for name in present(views):
            own_z, own_marks = self.parts[name].embed(of(name, views))
            z |= {f"{name}.{key}": value for key, value in own_z.items()}
            marks |= {f"{name}.{key}": value for key, value in own_marks.items()}
        return z, marks

    def objective(self, z: Tensors, marks: Tensors) -> Tensors:
        losses = {name: self.parts[name].objective(of(name, z), of(name, marks))["loss"] for name in present(z)}
        total = sum(loss * (self.options.weight if name == "local" else 1.0) for name, loss in losses.items())
        parts = {f"loss_{name}": loss for name, loss in losses.items()} if len(losses) > 1 else {}
        return {"loss": torch.as_tensor(total), **parts}

    def pairs(self, views: Tensors, z: Tensors, marks: Tensors) -> Pairs | None:
        name = present(z)[0]
        return self.parts[name].pairs(of(name, views), of(name, z), of(name, marks))

    def train(self, mode: bool = True) -> GlobalLocal:
        super().train(mode)
        frozen = self.active() == ("local",)
        for module in self.backbone.encoder_modules():
            module.train(mode and not frozen)
        return self

    def after_step(self, progress: float) -> None:
        before = self.active()
        self.done.fill_(progress)
        if self.active() != before:
            self.train(self.training)
            log.info("Global contrast is done; local contrast from here on, with the encoder frozen.")

    def resolved(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self.options),
            **{f"{name}_contrast": part.resolved() for name, part in self.parts.items()},
        }


def lend_backbone(part: PretextTask) -> None:
    """Keeps the backbone reachable, and leaves its registration to the task that owns it: weights are saved once."""
    part.__dict__["backbone"] = part._modules.pop("backbone")


def of(name: str, tensors: Tensors) -> Tensors:
    """The tensors of one part, `global` or `local`, under the names they have there."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def present(tensors: Tensors) -> tuple[str, ...]:
    """The parts, `global` and `local`, that have tensors among these."""
    return tuple(name for name in ("global", "local") if any(key.startswith(f"{name}.") for key in tensors))


@contextmanager
def options_below(part: str) -> Iterator[None]:
    """Names options as the user gives them here: those of a part stand below its name."""
    try:
        yield
    except MedclError as error:
        where, remedy = (
            str(text).replace("--options.", f"--options.{part}.") if text is not None else None
            for text in (error.where, error.remedy)
        )
        raise MedclError(error.what, where, remedy) from None


def check_options(options: GlobalLocalOptions) -> None:
    """Refuses values that cannot work.

    Raises:
        MedclError: an unknown mode, a share out of its range, or options that are no mapping.
    """
    checks = Checks(options, "global_local")
    checks.one_of("mode", MODES)
    checks.between("switch", 0, 1, above=True, below=True)
    checks.between("weight", 0)
    for name in ("global_contrast", "local_contrast"):
        if not isinstance(getattr(options, name), dict):
            checks.refuse(name, f"Give options by name, as --options.{name}.temperature 0.1.")
