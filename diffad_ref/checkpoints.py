"""Weights on disk: safetensors for the numbers, JSON beside them for everything else.

Nothing here unpickles, and nothing stands half-written under its final name.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import threading
import types
import typing
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffad_ref.deco_diff import DecoDiff
from diffad_ref.detector import Detector
from diffad_ref.diffusion_ad import DiffusionAD
from diffad_ref.one_for_more import OneForMore

METHODS = {"DiffusionAD": DiffusionAD, "DecoDiff": DecoDiff, "OneForMore": OneForMore}
SHIPPED = Path(__file__).parent / "weights"


def save_checkpoint(
    detector: Detector, path: str | os.PathLike, record: dict | None = None, half: bool = False
) -> Path:
    """Write a detector's weights to `path` (.safetensors) and its description beside it (.json).

    Parameters
    ----------
    record : dict, optional
        How the weights came to be: command, seed, steps, data, versions, metrics.
    half : bool
        Store float32 as float16: half the size, for weights that are shipped.
    """
    path = _weights_path(path)
    state = {
        name: value.detach().cpu().contiguous() for name, value in detector.state_dict().items()
    }
    if half:
        state = {k: v.half() if v.dtype == torch.float32 else v for k, v in state.items()}
    description = {
        "method": type(detector).__name__,
        "categories": list(detector.categories),
        "config": dataclasses.asdict(detector.config),
        "record": record or {},
    }
    text = _as_text(description)  # first: if it cannot be, the old pair stays
    write_tensors(state, path)
    write_text(text, path.with_suffix(".json"))
    return path


def load_checkpoint(path: str | os.PathLike, method: str | None = None) -> Detector:
    """Read a detector that `save_checkpoint` wrote, in evaluation mode, on the CPU.

    Parameters
    ----------
    method : str, optional
        The method that the caller needs; weights of another one are refused.

    Raises
    ------
    FileNotFoundError
        One of the two files is missing.
    ValueError
        The files are damaged, do not belong together, or hold another method.
    """
    path = _weights_path(path)
    description = read_description(path)
    found = description["method"]
    if str(found) not in METHODS:
        raise ValueError(f"{path} holds the unknown method {found!r}; known: {', '.join(METHODS)}")
    if method is not None and found != method:
        raise ValueError(f"{path} holds weights of {found}, not of {method}")
    kind = METHODS[found]
    try:
        detector = kind(from_plain(kind.Config, description["config"]))
        detector.categories = tuple(description["categories"])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path.with_suffix('.json')} describes no {found}: {type(error).__name__}: {error}"
        ) from error
    load_weights(detector, read_tensors(path), path)
    return detector.eval()


def pretrained(name: str) -> Detector:
    """One of the tiny detectors that ship with the package, such as "diffusion_ad_toy"."""
    names = sorted(p.stem for p in SHIPPED.glob("*.safetensors"))
    if name not in names:
        raise ValueError(
            f"no weights called {name!r} are shipped; there are {', '.join(names) or 'none'}"
        )
    return load_checkpoint(SHIPPED / name)


def read_description(path: str | os.PathLike) -> dict:
    """The JSON beside a weights file: method, categories, config, record."""
    path = _weights_path(path).with_suffix(".json")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it belongs beside the .safetensors file")
    try:
        description = json.loads(path.read_text("utf-8"))
        missing = {"method", "categories", "config"} - set(description)
    except (ValueError, TypeError) as error:  # no text, no JSON, or no dict
        raise ValueError(f"{path} is damaged: {error}") from error
    if missing:
        raise ValueError(f"{path} is no description of a detector: it lacks {sorted(missing)}")
    return description


def add_to_record(path: str | os.PathLike, entries: dict) -> None:
    """Add entries to the record in the JSON beside a weights file; the weights stay as they are."""
    description = read_description(path)
    description["record"] = (description.get("record") or {}) | entries
    write_text(_as_text(description), _weights_path(path).with_suffix(".json"))


def _as_text(description: dict) -> str:
    """JSON, one entry a line, with flat lists on one line."""
    text = json.dumps(description, indent=1)
    return re.sub(r"\[\n[^\[\]{}]*\]", lambda flat: re.sub(r"\n\s*", "", flat[0]), text)


def load_weights(module: torch.nn.Module, state: dict[str, Tensor], source: object) -> None:
    """Put tensors into a module; missing, surplus or misshapen ones raise ValueError."""
    own = module.state_dict()
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or surplus or wrong:
        raise ValueError(
            f"the weights in {source} do not fit: {len(missing)} missing {missing[:3]}, "
            f"{len(surplus)} unexpected {surplus[:3]}, {len(wrong)} of another shape {wrong[:3]}"
        )
    module.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()})


def _weights_path(path: str | os.PathLike) -> Path:
    """The .safetensors file that a name with or without its ending means; "w-0.5" has none."""
    path = Path(path)
    stem = path.stem if path.suffix in (".safetensors", ".json") else path.name
    return path.with_name(f"{stem}.safetensors")


# ----------------------------------------------------------------------------------- safe on disk


def write_tensors(state: dict[str, Tensor], path: Path, metadata: dict | None = None) -> None:
    """Save tensors under a temporary name, then rename: the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # safetensors would let nobody else read the file
        save_file(state, unfinished, metadata)
        unfinished.chmod(mode)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(text: str, path: Path) -> None:
    """Like `write_tensors`, for text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    """A hidden name beside `path`; what `tempfile` makes is readable for its owner alone."""
    return path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Load a safetensors file; a damaged one raises ValueError with its name."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The text entries of a safetensors file; a damaged one raises ValueError with its name."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def from_plain(kind: type, value: object):
    """Rebuild a nested dataclass from what `json.loads` made of it (lists back to tuples)."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints)
        if unknown:
            raise ValueError(f"{kind.__qualname__} has no setting {', '.join(sorted(unknown))}")
        return kind(**{name: from_plain(hints[name], v) for name, v in value.items()})
    if origin is tuple:
        item = [args[0]] * len(value) if args[-1] is ... else args
        return tuple(from_plain(k, v) for k, v in zip(item, value, strict=True))
    if origin is dict:
        return {key: from_plain(args[1], v) for key, v in value.items()}
    if origin in (typing.Union, types.UnionType):
        present = [k for k in args if k is not type(None)]
        return None if value is None else from_plain(present[0], value)
    fitting = {bool: [bool], int: [int], float: [int, float], str: [str]}
    if kind in fitting and type(value) not in fitting[kind]:
        raise ValueError(f"expected {kind.__name__}, got {value!r}")
    return value
