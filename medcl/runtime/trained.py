"""Which tensors of a network training has changed: what may be handed on as pretrained, and what is still random."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch

from medcl.networks.backbones import Backbone
from medcl.networks.sharding import full


class Trained(NamedTuple):
    """Sorted state-dict names, every alias included.

    Attributes:
        tensors: what was trained, in a run or in those that it started from.
        doubtful: those of them that only the contract of an older run says, part by part: some may be random.
    """

    tensors: tuple[str, ...]
    doubtful: tuple[str, ...] = ()


class Record:
    """The tensors of a network as they are before its first step, to tell afterwards which of them were trained.

    A parameter counts as trained where a gradient has moved it: its values differ from those at the start, and a
    gradient other than zero has reached it. Weight decay alone shrinks random values and teaches them nothing, and a
    rate of 0 changes nothing. How large the gradient was plays no part: rounding leaves one of about 1e-9 at the bias
    in front of an instance normalisation, AdamW makes steps of it, and the bias counts. A buffer (running statistics)
    counts where it has changed.

    Args:
        backbone: as it starts. Built from the run's seed, so a resumed run has the same beginning.
        given: what the run was given by another one, which had trained it.
    """

    def __init__(self, backbone: Backbone, given: Trained | None = None):
        self.given = given or Trained(())
        self.start = {name: tensor.detach().cpu().clone() for name, tensor in backbone.net.state_dict().items()}

    def trained(
        self, student: Backbone, optimizers: Sequence[torch.optim.Optimizer], kept: Backbone
    ) -> Trained:
        """What this run or the one that it started from has trained.

        Args:
            student: what the gradients went to. All ranks must call this where it is divided.
            optimizers: AdamW that moved it.
            kept: the network that is saved, whole: the student, or a momentum teacher that follows it.
        """
        reached = _reached(student, optimizers)
        parameters = {name for name, _ in kept.net.named_parameters(remove_duplicate=False)}
        now = kept.net.state_dict()
        changed = {name for name, tensor in now.items() if not torch.equal(tensor.detach().cpu(), self.start[name])}
        changed = {name for name in changed if name in reached or name not in parameters}
        return Trained(
            tuple(sorted(changed.union(self.given.tensors))), tuple(sorted(set(self.given.doubtful) - changed))
        )


def _reached(backbone: Backbone, optimizers: Sequence[torch.optim.Optimizer]) -> set[str]:
    """Names of the parameters that a gradient other than zero has ever reached.

    Read off AdamW's moments: they are in the checkpoint, so that an interrupted run tells what a whole one does, and a
    step that the gradient scaler has skipped leaves no mark. The second one forgets a gradient of 1e-3 after 80,000
    steps without any.
    """
    moved: dict[int, bool] = {}
    names = set()
    for name, parameter in backbone.net.named_parameters(remove_duplicate=False):
        if id(parameter) not in moved:
            states = [optimizer.state[parameter] for optimizer in optimizers if parameter in optimizer.state]
            moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq") if key in state]
            moved[id(parameter)] = any([bool(full(moment).any()) for moment in moments])  # every rank joins every one
        if moved[id(parameter)]:
            names.add(name)
    return names


def count(backbone: Backbone, names: Iterable[str]) -> int:
    """Different tensors among these names: one with several names counts once, and counters and indices do not."""
    state = backbone.net.state_dict(keep_vars=True)
    return len({id(state[name]) for name in names if state[name].is_floating_point()})


def summary(names: Collection[str], everything: Collection[str]) -> list[str]:
    """The fewest patterns that stand for exactly these state-dict names: `decoder1.*` where all of that is meant."""
    chosen, others = set(names), set(everything) - set(names)
    mixed = {name[: i + 1] for name in others for i, letter in enumerate(name) if letter == "."}
    patterns = set()
    for name in chosen:
        modules = [name[: i + 1] for i, letter in enumerate(name) if letter == "."]
        patterns.add(next((module + "*" for module in modules if module not in mixed), name))
    return sorted(patterns)
