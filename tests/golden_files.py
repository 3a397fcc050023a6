"""Where the golden numbers lie, and how to read them.

They lie in `tests/golden`, or in the folder that the variable DIFFAD_GOLDEN names. A file that is
missing fails the test that needs it.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

OWN = Path(__file__).parent / "golden"
FOLDER = Path(os.environ.get("DIFFAD_GOLDEN", OWN))


def arrays(name, folder=FOLDER):
    """The arrays of a case, by name."""
    return np.load(folder / f"{name}.npz")


def weights(name, folder=FOLDER):
    """A state dict with official names; its float8 numbers are exact in float32."""
    state = load_file(folder / f"{name}.safetensors")
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def settings(name, folder=FOLDER):
    """What the authors' constructor was called with to make a network."""
    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"])


def names(pattern):
    """Names of the cases that fit a pattern; without any, the pattern, which no file bears."""
    return sorted(path.stem for path in FOLDER.glob(f"{pattern}.safetensors")) or [pattern]


def matching(case, pattern):
    """Arrays of a case whose whole name fits a pattern, as (match, array); at least one."""
    case = arrays(case)
    found = [(match, case[match[0]]) for match in (re.fullmatch(pattern, n) for n in case) if match]
    assert found, f"no array is called like {pattern}"
    return found


def numbered(names, pattern):
    """Names that fit a pattern, in the order of the number in them; at least one."""
    found = [match for match in (re.fullmatch(pattern, name) for name in names) if match]
    assert found, f"nothing is called like {pattern}"
    return [match[0] for match in sorted(found, key=lambda match: int(match[1]))]


def shifted(abar):
    """What was left of the signal before each step: all of it before the first."""
    return torch.cat([torch.ones_like(abar[:1]), abar[:-1]])


def close(found, expected, atol=1e-5, rtol=1e-4):
    """Compare a tensor or array with golden numbers."""
    found = found.detach() if hasattr(found, "detach") else found
    np.testing.assert_allclose(np.asarray(found), expected, atol=atol, rtol=rtol)
