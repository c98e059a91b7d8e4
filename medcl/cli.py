"""The `medcl` command: one thin function a subcommand. Everything heavy is imported inside them."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medcl.errors import MedclError
from medcl.runtime.scale import is_follower

Command = Callable[[Any], "int | None"]
OVERLAP = 3  # exit status of an audit that found one


def _quoted(path: object) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def _scan(config: Any) -> None:
    from medcl.dataset.scan import print_summary, summary_dict
    from medcl.store.stage import scan

    manifest = scan(config)
    if config.json:
        print(json.dumps(summary_dict(manifest), indent=1))
        return
    print_summary(manifest)
    source = _quoted(config.source)
    if config.write_table:
        print(f"Table in {config.write_table}.")
        following = f" Next: mend the table, then medcl pretrain {_quoted(config.write_table)} --out runs/NAME"
    elif manifest.questions:
        following = f" Next: medcl scan {source} --write-table cases.csv"
    else:
        # what the options have chosen is in the manifest only
        chosen = config.yes or config.table or config.include or config.exclude or config.nan != "reject"
        source = _quoted(config.out) if chosen or config.channel is not None else source
        following = f" Next: medcl pretrain {source} --out runs/NAME" if manifest.cases else ""
    print(f"Manifest in {config.out}.{following}")


def _prepare(config: Any) -> None:
    from medcl.store.stage import prepare

    prepare(config)


def _pretrain(config: Any) -> None:
    from medcl.pretext.stage import pretrain

    run = pretrain(config)
    if is_follower(config):
        return  # the first process tells
    _report(run)
    print(f"Next: medcl finetune LABELLED --init {_quoted(run)} --labels 2 --out runs/NAME")


def _finetune(config: Any) -> None:
    from medcl.dataset.splits import Split
    from medcl.segmentation.stage import finetune

    run = finetune(config)
    if is_follower(config):
        return
    _report(run)
    tested = f"medcl evaluate {_quoted(run)}, or " if Split.load(run / "split.json").test else ""
    print(f"Next: {tested}medcl predict {_quoted(run)} SCANS OUT")


def _predict(config: Any) -> None:
    from medcl.segmentation.predict import predict

    predict(config)


def _evaluate(config: Any) -> None:
    from medcl.evaluation.evaluate import print_table
    from medcl.evaluation.stage import evaluate

    print_table(evaluate(config))
    run = Path(config.predictions)
    if (run / "config.yaml").exists() and not config.out:
        _report(run)


def _compare(config: Any) -> None:
    from medcl.evaluation.compare import print_comparison
    from medcl.evaluation.stage import compare
    from medcl.report.html import write_comparison_report

    result = compare(config)
    print_comparison(result)
    out = Path(config.out)
    page = write_comparison_report(out, result, [Path(r) for r in config.runs], [Path(r) for r in config.baseline])
    print(f"Report: {page}")


def _benchmark(config: Any) -> None:
    from medcl.efficiency.stage import benchmark
    from medcl.efficiency.table import print_benchmark
    from medcl.report.benchmark import write_benchmark_report

    result = benchmark(config)
    print_benchmark(result)
    print(f"Report: {write_benchmark_report(Path(config.out), result)}")


def _audit(config: Any) -> int:
    from medcl.leakage.audit import audit, print_audit

    result = audit(config)
    print_audit(result)
    return OVERLAP if result["overlaps"] else 0


def _report_again(config: Any) -> None:
    _report(Path(config.run))


def _export(config: Any) -> None:
    from medcl.checkpoint import export

    export(config)


def _doctor(config: Any) -> None:
    from medcl.checkup import report

    report(config)


def _mil_pretrain(config: Any) -> None:
    from medcl.mil.pretrain import pretrain_patches

    run = pretrain_patches(config)
    _report(run)
    print(f"Next: medcl mil prepare {_quoted(config.bags)} FOLDER --encoder {_quoted(run)} --tile {config.tile}")


def _mil_prepare(config: Any) -> None:
    from medcl.mil.prepare import prepare_bags

    print(f"Next: medcl mil fit {_quoted(prepare_bags(config))} --out runs/NAME")


def _mil_fit(config: Any) -> None:
    from medcl.mil.evaluation import print_scores
    from medcl.mil.stage import fit
    from medcl.runtime.files import read_json

    run = fit(config)
    print_scores(read_json(run / "metrics.json"))
    _report(run)
    print(f"Next: medcl mil predict {_quoted(run)} NEW_BAGS OUT")


def _mil_predict(config: Any) -> None:
    from medcl.mil.stage import predict_bags
    from medcl.report.attention import draw_attention
    from medcl.report.bags import write_prediction_report

    print(f"Report: {write_prediction_report(draw_attention(predict_bags(config)))}")


def _mil_evaluate(config: Any) -> None:
    from medcl.mil.evaluation import evaluate_bags, print_scores

    print_scores(evaluate_bags(config))


def _report(run: Path) -> None:
    from medcl.config import ReportConfig
    from medcl.report.stage import write_report

    print(f"Report: {write_report(ReportConfig(str(run)))}")


# name: (what it does, positional arguments, config class, function)
COMMANDS: dict[str, tuple[str, tuple[str, ...], str, Command]] = {
    "scan": ("what is in a folder of scans, and what is wrong with it", ("source",), "ScanConfig", _scan),
    "prepare": (
        "one orientation, spacing and intensity scale, for random crops",
        ("source",),
        "PrepareConfig",
        _prepare,
    ),
    "pretrain": ("an encoder from unlabelled scans", ("source",), "PretrainConfig", _pretrain),
    "finetune": ("a segmentation network from a few labelled subjects", ("source",), "FinetuneConfig", _finetune),
    "predict": ("label maps on each input's own grid", ("run", "input", "output"), "PredictConfig", _predict),
    "evaluate": (
        "Dice and surface distances, with intervals",
        ("predictions", "reference"),
        "EvaluateConfig",
        _evaluate,
    ),
    "compare": ("did pretraining help? paired, with intervals", ("runs",), "CompareConfig", _compare),
    "benchmark": (
        "label efficiency of several arms, paired, with intervals",
        ("config", "source"),
        "BenchmarkConfig",
        _benchmark,
    ),
    "audit": ("were test volumes seen in training?", ("seen", "held"), "AuditConfig", _audit),
    "report": ("write the page of a run again", ("run",), "ReportConfig", _report_again),
    "export": ("weights for the plain MONAI class", ("run",), "ExportConfig", _export),
    "doctor": ("this machine: how fast it is, and what to change", (), "DoctorConfig", _doctor),
    "mil pretrain": ("a patch encoder, without labels", ("bags", "out"), "MILPretrainConfig", _mil_pretrain),
    "mil prepare": ("features of slides, images or volumes", ("bags", "out"), "MILPrepareConfig", _mil_prepare),
    "mil fit": ("a classifier of bags, cross-validated by group", ("bags",), "MILFitConfig", _mil_fit),
    "mil predict": ("class and attention of new bags", ("run", "bags", "out"), "MILPredictConfig", _mil_predict),
    "mil evaluate": (
        "AUROC and more, with intervals over groups",
        ("predictions", "reference"),
        "MILEvaluateConfig",
        _mil_evaluate,
    ),
}


def usage() -> str:
    """The list of commands, as `medcl --help` prints it."""
    lines = [f"  {name:<13}{text}" for name, (text, *_) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: medcl COMMAND ... [--debug]",
            "",
            "Self-supervised learning on 3D medical images: a folder of scans, an encoder, few-label results.",
            "",
            *lines,
            "",
            "medcl COMMAND --help tells the options; --config FILE.yaml reads them from a file.",
            "medcl --version prints the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 2 for an error that a user can mend, 3 for an overlap in an audit, 130 at ^C."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if args[0] == "--version":
        from medcl.version import VERSION

        print(VERSION)
        return 0
    try:
        words = 2 if args[0] == "mil" else 1
        if args[:words] in (["mil"], ["mil", "--help"], ["mil", "-h"]):
            print("\n".join(f"medcl {name:<14}{text}" for name, (text, *_) in COMMANDS.items() if name[:3] == "mil"))
            return 0
        return _run(" ".join(args[:words]), args[words:])
    except KeyboardInterrupt:
        how = "the same command goes on" if args[0] == "benchmark" else "--resume goes on from the last checkpoint"
        print(f"medcl: interrupted; what was written is kept, {how}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `medcl scan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        print(f"medcl: error: {one_line(error)}", file=sys.stderr)
        return 2


def one_line(error: Exception) -> str:
    """The line that a user sees of an error; only one that medcl did not foresee mentions --debug."""
    if isinstance(error, MedclError):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        from medcl.runtime.files import disk_error

        return str(disk_error(error, error.filename))
    if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
        return "out of memory. Lower --batch_size, or the patch_size in plan.json and pass it with --plan."
    text = " ".join(str(error).split())[:300]
    return f"unexpected {type(error).__name__}: {text}. Run again with --debug for the traceback, and report it."


def _run(name: str, args: list[str]) -> int:
    if name not in COMMANDS:
        from medcl.config import nearest

        raise MedclError(f"unknown command {name!r}", remedy=nearest(name, COMMANDS))
    _, positional, config_name, function = COMMANDS[name]
    from medcl.config.parsing import parse

    config = parse(name, positional, config_name, args)
    if config is not None:
        from medcl.runtime.run import setup_log

        setup_log()
        return function(config) or 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
