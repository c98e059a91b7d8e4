"""Watching a pretraining run: is it learning, and if not, at which trivial solution does it stand still?"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

import pytorch_lightning as pl
import torch

from medcl.errors import MedclError
from medcl.losses import diagnostics
from medcl.losses.diagnostics import MEANING, RankMemory, describe_pairs
from medcl.pretext.base import PretextTask, features_among
from medcl.runtime.run import log
from medcl.runtime.training import LAST, preserved

NEAR = 0.02  # of a trivial value: a loss this near to it, and moving by less than this, stands at it
SPREAD = 0.2  # below it embeddings count as equal
FALLEN = 0.5  # of the highest rank since the first fifth: below it the representation is collapsing
SPARE_STEPS = 0.2  # share of a run before a plateau is called one: warm-up passes by the trivial values
WINDOW = 100  # steps of loss behind a verdict


class Watch(pl.Callback):
    """Logs diagnostics of every so many steps, and warns of a plateau at a trivial solution or a falling rank.

    Args:
        task: whose embeddings are watched.
        steps: of the run.
        stop: end the run at the first warning.
        every: steps between two looks; by default a hundredth of the run, at least ten.
    """

    def __init__(self, task: PretextTask, steps: int, stop: bool = False, every: int = 0):
        self.task, self.steps, self.stop = task, steps, stop
        self.every = every or max(10, steps // 100)
        self.warned: set[str] = set()
        self.forget(())

    def forget(self, stage: tuple[str, ...]) -> None:
        """Starts anew: another stage of a task has another loss and other embeddings."""
        self.stage = stage  # names of the embeddings
        self.features, self.embeddings = RankMemory(), RankMemory()
        self.losses: deque[Any] = deque(maxlen=WINDOW)
        self.trivial: dict[str, deque[float]] = {}
        self.first_rank: float | None = None
        self.best_rank, self.last_rank = 0.0, float("nan")
        self.last_spread = 1.0
        self.rank_before: float | None = None  # of the same reads before and after training
        self.rank_after: float | None = None
        self.fresh = True  # no step of this stage yet
        self.since = 0  # the step at which it began

    def state_dict(self) -> dict[str, Any]:
        return {
            "first": self.first_rank, "best": self.best_rank, "before": self.rank_before, "warned": sorted(self.warned),
            "since": self.since,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first_rank, self.best_rank = state["first"], state["best"]
        self.rank_before, self.fresh, self.since = state.get("before"), False, state.get("since", 0)
        self.warned = set(state["warned"])

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.logger.together("loss and trivial solutions", "loss", "trivial_.*")  # type: ignore

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        if self.fresh and hasattr(module, "rows_of"):
            self.rank_before = self.rank_of_unseen(trainer, module)
        self.fresh = False

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self.rank_before is not None and trainer.global_step >= self.steps:
            self.rank_after = self.rank_of_unseen(trainer, module)
            for name, rank in (("rank_before", self.rank_before), ("rank_after", self.rank_after)):
                if rank is not None:
                    trainer.logger.log_metrics({name: rank}, trainer.global_step - 1)  # type: ignore[union-attr]

    def rank_of_unseen(self, trainer: pl.Trainer, module: Any) -> float | None:
        """Effective rank of the features of `ROWS` rows, of reads that no training step draws; the same at every call.

        As the task stands: before the first step it is what random weights give. Leaves no trace.
        """
        memory = RankMemory(diagnostics.ROWS)
        with preserved(module), trainer.precision_plugin.train_step_context():
            for number in range(memory.size):
                torch.manual_seed(number)  # dropout
                rows = features_among(module.rows_of(number))
                if not rows:
                    return None
                memory.add(rows[0])
                if (rank := memory.rank()) is not None:
                    return rank
        return None

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        # with a term beside the task's own loss, that is what compares with the trivial solutions
        loss = outputs["objective" if "objective" in outputs else "loss"] if isinstance(outputs, dict) else outputs
        z, marks = module.seen["z"], module.seen["marks"]
        if self.stage and self.stage != tuple(z):
            self.forget(tuple(z))
            self.since = trainer.global_step
        self.stage = tuple(z)
        self.losses.append(loss.detach())  # no number yet: that would wait for the device at every step
        embeddings = next(iter(z.values())).flatten(0, -2)
        self.embeddings.add(embeddings)
        self.features.add(next(iter(features_among(marks)), embeddings))
        if trainer.global_step % self.every and trainer.global_step < self.steps:
            return
        values = self.look(module.seen["views"], z, marks, trainer.global_step)
        trainer.logger.log_metrics(values, trainer.global_step - 1)  # type: ignore[union-attr]
        found = trainer.strategy.broadcast(self.verdicts(trainer.global_step))  # all processes stop, or none
        for name, message in found.items():
            self.warn(trainer, name, message)

    @torch.no_grad()
    def look(self, views: Any, z: Any, marks: Any, step: int) -> dict[str, float]:
        """Diagnostics of one step, and the loss at the trivial solutions of its own pairs."""
        values = {}
        for name, value in self.task.trivial(z, marks).items():
            self.trivial.setdefault(name, deque(maxlen=10)).append(value)
            values[f"trivial_{name}"] = value
        pairs = self.task.pairs(views, z, marks)
        if pairs is not None:
            values |= describe_pairs(pairs.z, pairs.positive, pairs.negative)
            self.last_spread = values["spread"]
        rank, own = self.features.rank(), self.embeddings.rank()
        if rank is not None and own is not None:
            values["embedding_rank"] = own
            values["effective_rank"] = self.last_rank = rank
            self.first_rank = rank if self.first_rank is None else self.first_rank
            if self.past_first_steps(step):  # random weights have many directions that mean nothing
                self.best_rank = max(self.best_rank, rank)
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def past_first_steps(self, step: int) -> bool:
        """Whether a stage is beyond its first steps, after which it may be judged."""
        return step - self.since > SPARE_STEPS * (self.steps - self.since)

    def verdicts(self, step: int) -> dict[str, str]:
        """What is wrong, by name of the trivial solution, with the remedy."""
        found = {}
        if len(self.losses) == WINDOW and self.past_first_steps(step):
            losses = [float(loss) for loss in self.losses]
            before, now = (statistics.median(half) for half in (losses[: WINDOW // 2], losses[WINDOW // 2 :]))
            still = abs(now - before) < NEAR * max(abs(now), 0.1)
            levels = {name: statistics.median(values) for name, values in self.trivial.items()}
            # no better than these; of several the nearest says where it stands
            reached = {name: abs(now - level) for name, level in levels.items()
                       if now > level - NEAR * max(abs(level), 0.1)}  # fmt: skip
            floor = levels.get("collapsed", -math.inf)
            if now > floor + NEAR * abs(floor):
                reached.pop("collapsed", None)
            nearest = min(reached.values(), default=math.inf)
            for name, gap in reached.items():
                if still and gap <= nearest + 1e-6:
                    found[name] = (
                        f"The loss stands still at {now:.3g}, no better than {MEANING.get(name, name)} "
                        f"({levels[name]:.3g}). " + self.task.remedies.get(name, "")
                    )
        if {"constant", "orthogonal"} <= set(found):  # where both cost the same, the embeddings tell which it is
            del found["orthogonal" if self.last_spread < SPREAD else "constant"]
        if self.first_rank is not None and self.last_rank < FALLEN * self.best_rank:
            found["rank"] = (
                f"The effective rank of the features fell from {self.best_rank:.3g} to {self.last_rank:.3g}. "
                + self.task.remedies["rank"]
            )
        return found

    def warn(self, trainer: pl.Trainer, name: str, message: str) -> None:
        """Logs a warning, one for each name; where `stop` is set, saves a checkpoint and ends the run instead.

        Raises:
            MedclError: `stop` is set.
        """
        if self.stop:
            trainer.save_checkpoint(trainer.default_root_dir + "/" + LAST)
            raise MedclError(message.rstrip("."), f"step {trainer.global_step}", "Or leave out --stop-on-collapse.")
        if name not in self.warned:
            self.warned.add(name)
            log.warning("Step %d: %s", trainer.global_step, message)

    def summary(self) -> str | None:
        """One line for the end of the log."""
        if self.first_rank is None or not self.losses:  # no losses: resumed when all steps were done
            return None
        loss = statistics.median(float(loss) for loss in self.losses)
        lines = {name: statistics.median(values) for name, values in self.trivial.items()}
        against = ", ".join(f"{value:.3g} {MEANING.get(name, name)}" for name, value in lines.items())
        if self.rank_before is not None and self.rank_after is not None:
            ranks = f"effective rank of the features {self.rank_before:.3g} before and {self.rank_after:.3g} after"
        else:
            ranks = f"effective rank of the features {self.first_rank:.3g} early, {self.last_rank:.3g} at the end"
        return f"Loss {loss:.3g} in the last {len(self.losses)} steps, against {against}; {ranks}."
