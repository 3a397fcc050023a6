"""How a result came to be: what is written beside weights and into reports."""

import platform
from pathlib import Path

import torch
import torchvision

import diffad_ref as da
from diffad_ref.checkpoints import as_text, read_description, weights_path, write_text


def add_to_record(path: str | Path, entries: dict) -> None:
    """Add entries to the record in the JSON beside a weights file; the weights stay as they are."""
    description = read_description(path)
    description["record"] = (description.get("record") or {}) | entries
    write_text(as_text(description), weights_path(path).with_suffix(".json"))


def device_name(device: torch.device) -> str:
    """A GPU's name, or how many threads a CPU has for this."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"CPU, {count} thread{'s' * (count > 1)}"


def megabytes(module: torch.nn.Module) -> float:
    """What must be kept of a detector or a baseline to judge images, as it lies in memory."""
    return sum(value.nbytes for value in module.state_dict().values()) / 1e6


def versions() -> dict[str, str]:
    """Of everything that may change a number."""
    return {
        "diffad_ref": da.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }
