"""The stage `benchmark`: runs the grid, whatever of it is missing, and sums it up.

Encoders and fine-tunings run in processes of their own, several at a time: small networks leave most of a device idle.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from medcl.config import BenchmarkConfig, EvaluateConfig, FinetuneConfig, PretrainConfig
from medcl.efficiency.grid import make_grid
from medcl.efficiency.table import rows_by_key, summarise, write_summary
from medcl.errors import MedclError
from medcl.runtime.pool import available_cores, map_safely
from medcl.runtime.precision import choose_precision, keep_precision, name_of
from medcl.runtime.run import follow_log, is_finished, log, read_config, setup_log, write_config, write_provenance
from medcl.runtime.training import choose_accelerator, hours
from medcl.store.plan import Plan
from medcl.store.stage import confirm, describe, load_source, log_problems, plan_for, prepare_all

ON_A_GPU = 4  # trainings at a time


@dataclass(frozen=True)
class _Task:
    """A training to be done in a process: a pretraining, or a fine-tuning with its evaluation."""

    config: PretrainConfig | FinetuneConfig
    subjects: Literal["test", "val"]
    threads: int


def benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Runs what is missing of the grid and sums it up.

    Returns:
        What benchmark.json holds.

    Raises:
        MedclError: the grid is no fair comparison, or a training in it failed; what was done is kept.
    """
    began = time.monotonic()
    setup_log()
    make_grid(config)  # refuses before anything is read
    out = Path(config.out)
    _same_scans(config)
    write_config(out, "benchmark", config)
    follow_log(out / "log.txt")
    accelerator = choose_accelerator(config.accelerator)
    at_once = config.parallel or (ON_A_GPU if accelerator == "gpu" else available_cores())
    # settled once: a timing in every process may come out otherwise, and arms must not differ in it
    settled = {"precision": name_of(choose_precision("auto", accelerator, out))}
    keep_precision(out, choose_precision(settled["precision"], accelerator), accelerator)
    grid = make_grid(
        replace(
            config, source=_manifest(config), plan=_plan(config, accelerator),
            pretrain={**settled, **config.pretrain}, finetune={**settled, **config.finetune},
        )
    )  # fmt: skip
    threads = max(1, available_cores() // at_once)

    def task(each: PretrainConfig | FinetuneConfig) -> _Task:
        return _Task(each, config.subjects, threads)

    log.info("%d encoders and %d fine-tunings, %d at a time.", len(grid.encoders), len(grid.cells), at_once)
    # arms without a missing encoder fill the cores while encoders are trained
    encoders = {recipe.out: task(recipe) for recipe in grid.encoders.values()}
    missing = {out for out, encoder in encoders.items() if not _done(encoder)}
    cells = [(cell.config.init in missing, task(cell.config)) for cell in grid.cells]
    problems = _run([*encoders.values(), *(each for late, each in cells if not late)], at_once)
    problems += _run([each for late, each in cells if late], at_once)
    if problems:
        raise MedclError(
            f"{len(problems)} of {len(grid.encoders) + len(grid.cells)} trainings failed: {problems[0]}", out,
            "Mend that and run the same command again: what is done is kept.",
        )  # fmt: skip
    result = summarise(config, grid)
    write_summary(out, result, rows_by_key(config, grid))
    write_provenance(out, began, accelerator=accelerator)
    log.info("Benchmark in %s after %s.", out, hours(time.monotonic() - began))
    return result


def _same_scans(config: BenchmarkConfig) -> None:
    """Refuses other scans than those of what is already there, or their numbers would stand under a new name."""
    out = Path(config.out)
    if not (out / "config.yaml").exists():
        return
    before = read_config(out)
    where = {str(Path(str(source)).resolve()) for source in (before.get("source"), config.source)}
    if len(where) > 1 or before.get("channel") != config.channel:
        raise MedclError(f"holds a benchmark of {before.get('source')}", out, "Choose another --out.")


def _manifest(config: BenchmarkConfig) -> str:
    """Path of the manifest every stage takes: the folder is looked through once."""
    path = Path(config.out) / "manifest.json"
    if not path.exists():
        manifest = confirm(load_source(config.source, config.channel), config.source, config.yes)
        log.info("%s: %s.", config.source, describe(manifest))
        log_problems(manifest)
        manifest.save(path)
    return str(path)


def _plan(config: BenchmarkConfig, accelerator: str) -> str:
    """Path of the plan every stage takes; volumes are prepared by it, so that no two processes do it at a time."""
    path = Path(config.out) / "plan.json"
    manifest = load_source(_manifest(config))
    if not path.exists():
        plan_for(manifest, config.plan, device=accelerator, store=config.store).save(path)
    plan = Plan.load(path)
    if config.plan and replace(Plan.load(config.plan), labels=plan.labels) != plan:
        raise MedclError("differs from the plan of what was already run", config.plan, "Choose another --out.")
    prepare_all(manifest, plan, config.store)
    return str(path)


def _run(tasks: Sequence[_Task], at_once: int) -> list[str]:
    """Runs tasks, several at a time; returns what went wrong, a line each."""
    waiting = [task for task in tasks if not _done(task)]
    if not waiting:
        return []
    died = [f"{task.config.out}: its process died (out of memory?)" for task in waiting]
    threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS",)}
    os.environ["OMP_NUM_THREADS"] = str(waiting[0].threads)  # read by the processes when they load torch
    try:
        return [line for line in map_safely(_train, waiting, died, at_once, fewest=2, chunk=1) if line]
    finally:
        for name, value in threads.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _done(task: _Task) -> bool:
    run = Path(task.config.out)
    if isinstance(task.config, PretrainConfig):
        return is_finished(run, task.config, "pretrain")
    return is_finished(run, task.config, "finetune") and (run / task.subjects / "evaluation.json").exists()


def _train(task: _Task) -> str:
    """One training, its output in the run's own log; returns what went wrong, if anything."""
    run, began = Path(task.config.out), time.monotonic()
    name = run.name
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            outcome = _steps(task, run)
    except MedclError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return str(error)
    except Exception as error:  # foreseen by nobody, and the other trainings go on all the same
        run.mkdir(parents=True, exist_ok=True)
        with open(run / "log.txt", "a", encoding="utf-8") as stream:
            stream.write(traceback.format_exc())
        line = f"{run}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(line, file=sys.stderr, flush=True)
        return line
    print(f"{name}: {outcome} after {hours(time.monotonic() - began)}", file=sys.stderr, flush=True)
    return ""


def _steps(task: _Task, run: Path) -> str:
    from medcl.evaluation.stage import evaluate
    from medcl.pretext.stage import pretrain
    from medcl.runtime.files import read_json
    from medcl.segmentation.stage import finetune

    stage: Callable[[Any], Path] = pretrain if isinstance(task.config, PretrainConfig) else finetune
    name = "pretrain" if isinstance(task.config, PretrainConfig) else "finetune"
    if not is_finished(run, task.config, name):
        stage(replace(task.config, resume=(run / "config.yaml").exists()))
    if isinstance(task.config, PretrainConfig):
        return "encoder trained"
    result = evaluate(EvaluateConfig(str(run), subjects=task.subjects))
    dice = result["mean"]["dice"]["estimate"]
    if task.subjects == "val":
        return f"validation Dice {100 * dice:.1f}"
    best = read_json(run / "provenance.json").get("val_dice")
    return "scored" if best is None else f"validation Dice {100 * best:.1f}, test subjects scored"
