"""The pretext tasks by name."""

from __future__ import annotations

import importlib

from medcl.config import nearest
from medcl.errors import MedclError
from medcl.pretext.base import PretextTask

TASKS = {
    "dcl": "medcl.pretext.simclr:DCL",
    "global_contrast": "medcl.pretext.global_contrast:GlobalContrast",
    "global_local": "medcl.pretext.global_local:GlobalLocal",
    "local_contrast": "medcl.pretext.local_contrast:LocalContrast",
    "mae": "medcl.pretext.mae:MAE",
    "pixcontrast": "medcl.pretext.pixpro:PixContrast",
    "pixpro": "medcl.pretext.pixpro:PixPro",
    "simclr": "medcl.pretext.simclr:SimCLR",
    "voco": "medcl.pretext.voco:VoCo",
}


def task_class(name: str) -> type[PretextTask]:
    """The class of a task.

    Raises:
        MedclError: no task has that name.
    """
    if name not in TASKS:
        raise MedclError(f"unknown task {name!r}", "--task", nearest(name, TASKS))
    module, cls = TASKS[name].split(":")
    return getattr(importlib.import_module(module), cls)
