"""The stage `medcl mil fit`: bags to a cross-validated classifier, whole groups held out; and `mil predict`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from medcl.config.mil import MILFitConfig, MILPredictConfig
from medcl.errors import MedclError
from medcl.leakage.seen import save_seen
from medcl.mil.audit import FITTING, audit_bags, classifier_of, record_of
from medcl.mil.bag_set import Loaded, load
from medcl.mil.bags import Bag, Features, classes_of
from medcl.mil.classifier import BagClassifier, Prediction, build, predict
from medcl.mil.evaluation import score
from medcl.mil.training import train
from medcl.runtime.files import atomic_path, read_json, sha256, write_json, write_rows
from medcl.runtime.run import log, open_run, write_provenance
from medcl.runtime.training import choose_accelerator, hours
from medcl.transforms.random import mixed_seed


def fit(config: MILFitConfig) -> Path:
    """Cross-validates a classifier of bags with whole groups held out, then fits one on all of them.

    Nothing is chosen on held-out bags: the number of epochs is the config's. Every bag is held out in one fold, so all
    are compared with what the encoder of their features has seen.

    Returns:
        The run folder: `predictions.csv` (of bags held out), `metrics.json`, `audit.json`, `folds.json`, `weights/`.

    Raises:
        MedclError: a setting cannot work, or the bags do not allow so many folds; or bags were seen and that is not
            allowed.
    """
    began = time.monotonic()
    loaded = load(config.bags)
    bags, features = loaded.bags, loaded.features
    classes = classes_of(bags)
    labels = np.array([classes.index(str(bag.label)) for bag in bags])
    groups = [bag.group for bag in bags]
    check_folds(bags, config.folds)
    build(config, features[0].h.shape[1], len(classes))  # refuses what cannot be built, before a folder is made
    audit = audit_bags(bags, features)
    audit.refuse(config.allow_leakage, config.bags)
    run = open_run(config.out, config, "mil fit")
    log_contents(loaded, classes)
    audit.log()
    audit.save(run)
    device = "cuda" if choose_accelerator(config.accelerator) == "gpu" else "cpu"
    rows: list[dict[str, Any]] = []
    divisions = []
    for repeat in range(config.repeats):
        division = divide(labels, groups, config.folds, mixed_seed(config.seed, repeat))
        for fold, (learn, held) in enumerate(division):
            seed = mixed_seed(config.seed, repeat, fold)
            model = train(config, [features[i] for i in learn], labels[learn].tolist(), len(classes), seed, device)
            for i, prediction in zip(held, predict(model, [features[i] for i in held]), strict=True):
                seen = audit.seen.get(bags[i].id, "")
                rows.append(_row(bags[i], prediction, classes, repeat=repeat, fold=fold, seen=seen))
            divisions.append({"repeat": repeat, "fold": fold, "test": sorted({groups[i] for i in held})})
        log.info("Repeat %d of %d done after %s.", repeat + 1, config.repeats, hours(time.monotonic() - began))
    write_rows(run / "predictions.csv", rows)
    write_json(run / "folds.json", divisions)
    result = score(rows, classes, audit)
    write_json(run / "metrics.json", {**result, "aside": loaded.aside, "read": facts_of(loaded)})
    if config.final:
        model = train(config, features, labels.tolist(), len(classes), config.seed, device)
        save_seen(run, record_of(bags, features, FITTING, run))
        save(run, model, config, classes, loaded.encoder, groups)
    facts = {"leakage": list(audit.leakage)} if audit.leakage else {}
    write_provenance(run, began, seed=config.seed, accelerator=device, **facts)
    log.info("In %s after %s.", run, hours(time.monotonic() - began))
    return run


def check_folds(bags: Sequence[Bag], folds: int) -> None:
    """Refuses more folds than every class has groups for.

    Raises:
        MedclError: a class occurs in fewer groups than there are folds.
    """
    having: dict[str, set[str]] = {}
    for bag in bags:
        having.setdefault(str(bag.label), set()).add(bag.group)
    for label, groups in having.items():
        if len(groups) < folds:
            remedy = f"Give at most {len(groups)}." if len(groups) > 1 else "Add bags of it, from other groups."
            raise MedclError(
                f"class {label} occurs in {len(groups)} groups, fewer than {folds} folds", "--folds", remedy
            )


def divide(labels: np.ndarray, groups: Sequence[str], folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Folds in which no group is divided and classes are as even as that allows: indices to train on and held out."""
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    return [(learn, held) for learn, held in splitter.split(np.zeros(len(labels)), labels, groups)]


def facts_of(loaded: Loaded) -> dict[str, str]:
    """What was read, for the report."""
    sizes = [len(f.h) for f in loaded.features]
    return {
        "instances": f"{sum(sizes)}; in a bag {min(sizes)} to {max(sizes)}, median {int(np.median(sizes))}",
        "features": str(loaded.features[0].h.shape[1]),
        "encoder": loaded.encoder,
    }


def log_contents(loaded: Loaded, classes: Sequence[str]) -> None:
    """Says what was read."""
    found = Counter(str(bag.label) for bag in loaded.bags)
    sizes = [len(f.h) for f in loaded.features]
    each = ", ".join(f"{found[name]} {name}" for name in classes)
    log.info(
        "%d bags of %d groups (%s); %d to %d instances of %d features.",
        len(loaded.bags), len({bag.group for bag in loaded.bags}), each, min(sizes), max(sizes),
        loaded.features[0].h.shape[1],
    )  # fmt: skip
    for reason in list(loaded.aside.values())[:10]:
        log.warning("set aside: %s", reason)
    if len(loaded.aside) > 10:
        log.warning("and %d more bags set aside; metrics.json lists them.", len(loaded.aside) - 10)


def _row(bag: Bag, prediction: Prediction, classes: Sequence[str], **more: Any) -> dict[str, Any]:
    shares = {f"p_{name}": f"{p:.6g}" for name, p in zip(classes, prediction.probabilities, strict=True)}
    return {**more, "bag_id": bag.id, "group": bag.group, "label": bag.label or "", **shares}


def save(
    run: Path, model: BagClassifier, config: MILFitConfig, classes: Sequence[str], encoder: str, groups: Sequence[str]
) -> None:
    """Writes `weights/mil.safetensors` and, last, `weights/mil.json` that vouches for it."""
    from safetensors.torch import save as to_bytes

    data = to_bytes({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()})
    with atomic_path(run / "weights" / "mil.safetensors") as part:
        part.write_bytes(data)
    write_json(run / "weights" / "mil.json", {
        "config": asdict(config), "classes": list(classes), "features": model.aggregator.features,
        "encoder": encoder, "sha256": sha256(data), "groups": sorted(set(groups)),
    })  # fmt: skip


def restore(run: str | Path) -> tuple[BagClassifier, dict[str, Any]]:
    """The classifier of a run, and what goes with it: `classes`, `features`, `encoder`, and `groups` it was fitted to.

    Raises:
        MedclError: no such weights, or damaged ones.
    """
    from safetensors.torch import load as from_bytes

    folder = Path(run) / "weights"
    if not (folder / "mil.json").exists():
        raise MedclError("holds no classifier of bags", run, "Give the --out of `medcl mil fit`.")
    facts = read_json(folder / "mil.json")
    data = (folder / "mil.safetensors").read_bytes()
    if sha256(data) != facts["sha256"]:
        raise MedclError("is not what mil.json vouches for", folder / "mil.safetensors", "Fit again.")
    model = build(MILFitConfig(**facts["config"]), facts["features"], len(facts["classes"]))
    state = {k: v for k, v in from_bytes(data).items() if not k.startswith("projection.")}
    model.load_state_dict(state, strict=True)
    return model.eval(), facts


def predict_bags(config: MILPredictConfig) -> Path:
    """Writes `predictions.csv` and, a file a bag, the attention of every instance with its coordinates.

    Raises:
        MedclError: features of another encoder or width than the classifier was fitted to; or bags that encoder or
            classifier have seen, where that is not allowed.
    """
    model, facts = restore(config.run)
    loaded = load(config.bags)
    width = loaded.features[0].h.shape[1]
    if width != facts["features"]:
        raise MedclError(
            f"features have width {width}, the classifier wants {facts['features']}", config.bags,
            "Extract them with the encoder that the classifier was fitted to.",
        )  # fmt: skip
    if loaded.encoder != facts["encoder"] and loaded.encoder and facts["encoder"]:
        raise MedclError(
            f"features are of encoder {loaded.encoder}, the classifier was fitted to {facts['encoder']}", config.bags,
            "Extract them with that encoder, or run `medcl mil fit` on these features.",
        )  # fmt: skip
    out = Path(config.out)
    audit = audit_bags(loaded.bags, loaded.features, classifier_of(config.run, facts))
    audit.refuse(config.allow_leakage, config.bags)
    audit.log()
    predictions = predict(model, loaded.features)
    classes = facts["classes"]
    seen = {bag.id for bag in loaded.bags if bag.group in set(facts.get("groups", []))}
    if seen:
        log.warning(
            "%d of %d bags, such as %s, are of groups that the classifier was fitted to: their scores say nothing "
            "about new ones.", len(seen), len(predictions), min(seen),
        )  # fmt: skip
    marks = {**audit.seen, **dict.fromkeys(seen, "yes")}
    rows = [_row(b, t, classes, seen=marks.get(b.id, "")) for b, t in zip(loaded.bags, predictions, strict=True)]
    audit.save(out)
    write_rows(out / "predictions.csv", rows)
    for bag, features, each in zip(loaded.bags, loaded.features, predictions, strict=True):
        write_attention(out / "attention" / f"{bag.id}.csv", features, each, classes)
    write_json(out / "sources.json", {bag.id: str(bag.path.resolve()) for bag in loaded.bags})
    for reason in loaded.aside.values():
        log.warning("set aside: %s", reason)
    log.info("%d bags in %s.", len(predictions), out / "predictions.csv")
    return out


def write_attention(path: Path, features: Features, prediction: Prediction, classes: Sequence[str]) -> None:
    """A row an instance: its number, coordinates where known, attention, and its own classes where the model says them.

    The most attended comes first.
    """
    where = features.coordinates
    rows = []
    for i in np.argsort(-prediction.attention, kind="stable"):
        place = {} if where is None else {"xyz"[axis]: int(c) for axis, c in enumerate(where[i])}
        row = {"instance": int(i), **place, "attention": f"{prediction.attention[i]:.6g}"}
        if prediction.instances is not None:
            row |= {f"p_{name}": f"{p:.6g}" for name, p in zip(classes, prediction.instances[i], strict=True)}
        rows.append(row)
    write_rows(path, rows)
