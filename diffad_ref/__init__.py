"""Minimal, readable reference of diffusion-based anomaly detection.

>>> from diffad_ref import AnomalyFolder, evaluate, pretrained, toy_factory
>>> report = evaluate(pretrained("diffusion_ad_toy"), AnomalyFolder(toy_factory(), "test"))
"""

from diffad_ref.checkpoints import load_checkpoint, pretrained, save_checkpoint
from diffad_ref.data import AnomalyFolder
from diffad_ref.deco_diff import DecoDiff
from diffad_ref.detector import Detector, Prediction, Rate, Stage
from diffad_ref.diffusion_ad import DiffusionAD
from diffad_ref.evaluation import evaluate
from diffad_ref.one_for_more import OneForMore
from diffad_ref.toy import toy_factory
from diffad_ref.training import fit

__version__ = "0.1.0"
__all__ = [
    "AnomalyFolder",
    "DecoDiff",
    "Detector",
    "DiffusionAD",
    "OneForMore",
    "Prediction",
    "Rate",
    "Stage",
    "evaluate",
    "fit",
    "load_checkpoint",
    "pretrained",
    "save_checkpoint",
    "toy_factory",
]
