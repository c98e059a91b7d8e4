"""What every training run shares: hardware choice, the run folder, logging, checkpoints, the Lightning trainer."""

from __future__ import annotations

import contextlib
import logging
import platform
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.plugins.io import TorchCheckpointIO

from medcl.errors import MedclError
from medcl.networks.sharding import full
from medcl.runtime.files import atomic_path
from medcl.runtime.run import log, write_metrics
from medcl.runtime.scale import is_follower, strategy_for

LAST = "checkpoints/last.ckpt"
FLUSH_SECONDS = 5.0
DIVERGED = "Lower --lr, or use --precision 32; the last checkpoint is from before."


def choose_accelerator(wish: str = "auto") -> str:
    """`gpu` or `cpu`.

    Raises:
        MedclError: a GPU is asked for and torch sees none.
    """
    if wish not in ("auto", "cpu", "gpu"):
        raise MedclError(f"unknown accelerator {wish!r}", "--accelerator", "Use auto, cpu or gpu.")
    if wish == "gpu" and not torch.cuda.is_available():
        raise MedclError("torch sees no GPU", "--accelerator", "Use auto or cpu, or install a CUDA build of torch.")
    return "gpu" if wish != "cpu" and torch.cuda.is_available() else "cpu"


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or absent, and are read without unpickling code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        # into an open file: given a path, torch reports a full disk as an assertion of its own
        with atomic_path(Path(path)) as part, open(part, "wb") as stream:
            torch.save(checkpoint, stream)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:  # torch raises several kinds for a damaged archive
            raise MedclError(
                f"cannot be read ({type(error).__name__})", path, "Start anew without --resume."
            ) from error


class RunLogger(Logger):
    """metrics.csv, rewritten whole and atomically, and TensorBoard event files.

    After a resume the rows past the checkpoint are dropped: those steps are run again.
    """

    def __init__(self, run: Path, resume_step: int = 0):
        super().__init__()
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._written = run, 0.0
        from medcl.runtime.run import read_metrics

        self._rows: dict[int, dict[str, float]] = {
            int(row["step"]): row for row in read_metrics(run) if row["step"] <= resume_step
        }
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resume_step or None)

    @property
    def name(self) -> str:
        return "medcl"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass  # config.yaml holds them

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        number = int(step or 0) + 1  # Lightning counts from 0; the files say how many steps were done
        values = {k: float(v) for k, v in metrics.items() if k != "epoch"}
        self._rows.setdefault(number, {"step": number}).update(values)
        for name, value in values.items():
            self._board.add_scalar(name, value, number)
        if time.monotonic() - self._written > FLUSH_SECONDS:
            self.save()

    def together(self, title: str, *names: str) -> None:
        """Draws these series in one chart of TensorBoard's custom scalars."""
        self._board.add_custom_scalars({"medcl": {title: ["Multiline", [f"^{name}$" for name in names]]}})

    def save(self) -> None:
        write_metrics(self._run, [self._rows[step] for step in sorted(self._rows)])
        self._written = time.monotonic()

    def finalize(self, status: str) -> None:
        self.save()
        self._board.close()


class SilentLogger(Logger):
    """What a process that does not write the run folder logs to."""

    name = version = "medcl"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        pass

    def together(self, title: str, *names: str) -> None:
        """Does nothing: this process draws no charts."""
        pass


class Progress(Callback):
    """A bar with loss and learning rate on a terminal; a line every tenth of the way elsewhere."""

    def __init__(self, steps: int, title: str):
        self.steps, self.title = steps, title
        self._bar: Any = None
        self._began, self._first = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._began, self._first = time.monotonic(), trainer.global_step
        if trainer.is_global_zero and Console(stderr=True).is_terminal:
            columns = (TextColumn(self.title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                       TextColumn("{task.fields[note]}"))  # fmt: skip
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._bar.add_task(self.title, total=self.steps, completed=self._first, note="")

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        step = trainer.global_step
        shown = {k: float(v) for k, v in trainer.callback_metrics.items() if k in ("loss", "lr")}
        if getattr(module, "last_dice", None) is not None:
            shown["val_dice"] = float(module.last_dice)  # type: ignore[arg-type]
        note = "  ".join(f"{k} {v:.3g}" for k, v in shown.items())
        if self._bar is not None:
            self._bar.update(0, completed=step, note=note)
        elif step * 10 // self.steps > (step - 1) * 10 // self.steps:
            pace = (time.monotonic() - self._began) / max(1, step - self._first)
            log.info("%s %d/%d  %s  %.2f s a step", self.title, step, self.steps, note, pace)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()


class Checkpoints(Callback):
    """Writes `checkpoints/last.ckpt` every so many steps and at the end, as long as all weights are finite."""

    def __init__(self, run: Path, every: int):
        self.path, self.every = run / LAST, max(1, every)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step % self.every and trainer.global_step < trainer.max_steps:
            return
        if not all(torch.isfinite(full(p)).all() for p in module.parameters()):
            raise MedclError(f"weights are not finite at step {trainer.global_step}", "training", DIVERGED)
        trainer.save_checkpoint(self.path)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        # between two steps the state is whole; inside one it is not, and the last written checkpoint stands
        if isinstance(exception, KeyboardInterrupt):
            log.info("Interrupted at step %d. Go on with --resume.", trainer.global_step)


class SeedEveryStep(Callback):
    """Makes whatever draws from torch's global generator (dropout) a function of seed and step."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        torch.manual_seed((self.seed * 1_000_003 + trainer.global_step * 64 + trainer.global_rank) % 2**63)


class StopOnNaN(Callback):
    """Ends the run at the first loss that is not finite, with the last good checkpoint kept."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if loss is not None and not torch.isfinite(loss):
            raise MedclError(
                f"the loss is not finite at step {trainer.global_step}", "training",
                DIVERGED,
            )  # fmt: skip


def trainer_for(
    run: Path, *, steps: int, accelerator: str, precision: str, seed: int, every: int, title: str, resume_step: int = 0,
    callbacks: tuple[Callback, ...] = (), clip: float = 1.0, scale: Any = None,
) -> pl.Trainer:  # fmt: skip
    """A quiet Lightning trainer that logs into `run` and runs `steps` optimiser steps.

    Args:
        scale: a config with `devices`, `nodes` and `strategy`; one device without.
    """
    quiet_lightning()
    many: dict[str, Any] = {"devices": 1}
    if scale is not None:
        many = {"devices": scale.devices, "num_nodes": scale.nodes, "strategy": strategy_for(scale)}
    follower = scale is not None and is_follower(scale)
    return pl.Trainer(
        accelerator=accelerator,
        **many,
        precision=precision,  # type: ignore[arg-type]
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=clip,
        logger=SilentLogger() if follower else RunLogger(run, resume_step),
        log_every_n_steps=max(1, min(50, steps // 100)),
        callbacks=[SeedEveryStep(seed), StopOnNaN(), *callbacks, Progress(steps, title), Checkpoints(run, every)],
        plugins=[AtomicCheckpoints()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=str(run),
    )


def quiet_lightning() -> None:
    """Silences Lightning's messages and the warnings that concern no user of medcl."""
    for name in ("pytorch_lightning", "lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for text in (".*does not have many workers.*", ".*torch.cpu.amp.autocast.*", ".*LeafSpec.*", ".*in eval mode.*"):
        warnings.filterwarnings("ignore", message=text)


def fit(trainer: pl.Trainer, module: pl.LightningModule, resumed: Path | None) -> None:
    """Trains, from the last checkpoint of `resumed` if given. An interruption comes out as `KeyboardInterrupt`."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, ckpt_path=str(resumed / LAST) if resumed else None, weights_only=True)
    except SystemExit as error:  # how Lightning ends on Ctrl-C, with the signal ignored from then on
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


def resume_step(run: Path) -> int:
    """Optimiser steps in the last checkpoint; 0 where the run was cut off before its first."""
    path = run / LAST
    if not path.exists():
        return 0
    return int(AtomicCheckpoints().load_checkpoint(path)["global_step"])


def peak_memory(accelerator: str) -> float:
    """GiB this process has held at most: device memory on a GPU, resident memory on a CPU."""
    if accelerator == "gpu":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # not on Windows
        return float("nan")
    scale = 2**30 if platform.system() == "Darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def hours(seconds: float) -> str:
    """`35 s`, `12 min` or `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def preserved(module: torch.nn.Module) -> Iterator[None]:
    """Leaves parameters, buffers, gradients and the global generator as they were, also where a trial step fails."""
    state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    grads = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in grads:
        parameter.grad = None  # set aside: a trial must not add to them
    try:
        with torch.random.fork_rng():
            yield
    finally:
        module.load_state_dict(state)
        for parameter, grad in grads:
            parameter.grad = grad
