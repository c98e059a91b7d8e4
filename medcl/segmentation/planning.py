"""What a fine-tuning is planned by: the plan of the pretrained weights, fitted to this folder, and the label values."""

from __future__ import annotations

from dataclasses import replace

from medcl.checkpoint import Contract
from medcl.config import FinetuneConfig
from medcl.dataset.case import Manifest
from medcl.dataset.checks import check_label_values, values_of
from medcl.dataset.labels import read_label
from medcl.errors import MedclError
from medcl.store.plan import Plan, derive_plan, round_up
from medcl.store.stage import measured, plan_for, tell_growth, with_nan


def choose_plan(manifest: Manifest, config: FinetuneConfig, contract: Contract | None, device: str) -> Plan:
    """The plan of the pretrained network, with patches for this data set; else the user's, else a derived one.

    Spacing, normalisation and strides belong to the weights; patch size and labels belong to the task.
    """
    if config.plan or contract is None:
        plan = plan_for(manifest, config.plan, device=device, n4=config.n4, store=config.store,
                        nan=config.nan)  # fmt: skip
        if 2 in (config.spatial_dims, contract.backbone.spatial_dims if contract else 3):
            plan = plan.slicewise()
        if contract and plan.preparation() != replace(contract.plan, nan=plan.nan).preparation():
            raise MedclError(
                "prepares volumes otherwise than the pretrained network has seen them", config.plan,
                f"Use the plan of {config.init}, or leave out --plan.",
            )  # fmt: skip
        return plan if plan.labels else replace(plan, labels=manifest.label_names)
    kept = with_nan(contract.plan, config.nan)
    if config.n4 and not kept.n4:
        raise MedclError(
            f"{config.init} was pretrained without bias-field correction", "--n4", "Leave it out, or pretrain with it."
        )
    if manifest.cases and {kept.modality, *(c.modality for c in manifest.cases)} >= {"CT", "MR"}:
        raise MedclError(
            f"was pretrained on {kept.modality}, this folder holds the other modality", config.init,
            "Use --init none, or pretrain on such scans.",
        )  # fmt: skip
    tell_growth(manifest, kept, config.init)
    headers = derive_plan(manifest, spacing=kept.spacing, device=device)
    own = measured(manifest, replace(kept, labels=headers.labels), device, config.store)
    patch = round_up(own.patch_size, kept.total_stride)
    return replace(kept, patch_size=patch, volume_size=own.volume_size, labels=own.labels)


def label_values(manifest: Manifest, plan: Plan) -> tuple[int, ...]:
    """Label values that are classes: those that the data set names, else those found in its label maps."""
    if plan.labels:
        return tuple(sorted(plan.labels))
    found: set[int] = set()
    for case in manifest.labelled:
        try:
            array = read_label(manifest, case).array
            check_label_values(array, case.label_files[0])
            found |= values_of(array)
        except MedclError:
            continue  # reported when the case is prepared
    values = tuple(sorted(found))
    if not values:
        raise MedclError(
            "the label maps hold no foreground", manifest.root, "Check which files are labels: `medcl scan`."
        )
    return values
