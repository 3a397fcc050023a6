"""Minimal, readable reference of diffusion-based anomaly detection.

>>> import diffad_ref as da
>>> detector = da.DecoDiff.tiny(classes=15)
>>> da.fit(detector, detector.folder("mvtec", "train"))
>>> report = da.evaluate(detector, detector.folder("mvtec", "test"))
>>> da.save(detector, "runs/mvtec")
"""

import importlib
import signal
import sys

if sys.argv[:1] == ["-m"]:  # a command is being loaded, which Ctrl-C should just end
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from diffad_ref.checkpoints import load, pretrained, save
from diffad_ref.continual import fit_continual
from diffad_ref.data import AnomalyFolder
from diffad_ref.deco_diff import DecoDiff
from diffad_ref.detector import Detector, Prediction, Rate, Stage
from diffad_ref.diffusion_ad import DiffusionAD
from diffad_ref.evaluation import Report, evaluate
from diffad_ref.one_for_more import OneForMore
from diffad_ref.training import fit

__version__ = "0.1.0"

# What lies behind the wall is there on demand: `da.plots`, `da.toy_factory()`.
_TOOLS = ("baselines", "intervals", "plan", "plots", "protocols", "sampling", "tables", "toy")


def __getattr__(name: str):
    if name == "toy_factory":
        return importlib.import_module("diffad_ref.tools.toy").toy_factory
    if name in _TOOLS:
        return importlib.import_module(f"diffad_ref.tools.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["AnomalyFolder", "DecoDiff", "Detector", "DiffusionAD", "OneForMore", "Prediction"]
__all__ += ["Rate", "Report", "Stage", "evaluate", "fit", "fit_continual", "load", "pretrained"]
__all__ += ["save", "toy_factory"]
