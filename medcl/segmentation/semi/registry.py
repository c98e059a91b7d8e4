"""The semi-supervised methods by name."""

from __future__ import annotations

import importlib
from typing import Any

from medcl.config import nearest
from medcl.errors import MedclError
from medcl.networks.backbones import Backbone
from medcl.segmentation.semi.base import SemiMethod

METHODS = {
    "mean_teacher": "medcl.segmentation.semi.mean_teacher:MeanTeacher",
    "pixel_contrast": "medcl.segmentation.semi.pixel_contrast:PixelContrast",
    "self_training": "medcl.segmentation.semi.self_training:SelfTraining",
}


def method_class(name: str) -> type[SemiMethod]:
    """The class of a method.

    Raises:
        MedclError: no method has that name.
    """
    if name not in METHODS:
        raise MedclError(f"unknown method {name!r}", "--semi", nearest(name, ["none", *METHODS]))
    module, cls = METHODS[name].split(":")
    return getattr(importlib.import_module(module), cls)


def build_method(name: str, backbone: Backbone, options: dict[str, Any]) -> SemiMethod | None:
    """The method with its teacher, a copy of `backbone` as it is now; None for `none`.

    Raises:
        MedclError: unknown method or option, or a value that cannot work.
    """
    if name == "none":
        if options:
            raise MedclError("options without a method", "--semi_options", "Name one with --semi.")
        return None
    return method_class(name)(backbone, options)
