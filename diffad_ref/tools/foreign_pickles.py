"""Checkpoints of other people's code, read without bringing anything in them to life.

Such a file holds Python objects beside its tensors, and unpickling a foreign object can run any
code. Here only tensors and dictionaries are rebuilt, and what comes out are plain ones.
"""

from __future__ import annotations

import os
import pickle
import types
from pathlib import Path

import torch
from torch import Tensor


def read_foreign(path: str | os.PathLike) -> dict:
    """What `torch.save` wrote, with an inert object in place of all that is no tensor or dict.

    Nothing that the file holds changes a later load. Dicts within dicts and their tensors are plain
    ones, without attributes that would hide their methods, and without hooks.

    Raises FileNotFoundError, or ValueError for a damaged file and one that holds no dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # it holds more than tensors
            content = torch.load(
                path, map_location="cpu", weights_only=False, pickle_module=_RESTRICTED_PICKLE
            )
        content = _plain(content, {})
    except Exception as error:  # what a damaged pickle raises is anything
        raise ValueError(f"{path} is damaged or no checkpoint: {error}") from error
    finally:
        torch._utils._sparse_tensors_to_validate.clear()  # else the next load stumbles over them
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no checkpoint, but a {type(content).__name__}")
    return content


def weights_under(content: dict, key: str, path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict that a checkpoint holds under a key, or ValueError."""
    state = content.get(key)
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise ValueError(f"{path} has no weights under {key!r}; it holds {list(content)}")
    return state


def _plain(value, seen: dict[int, dict]):
    """Dicts within dicts, and their tensors, without attributes; one that is met again stays one.

    Methods are those of the class, because an object's own may be hidden by its attributes.
    """
    if isinstance(value, Tensor):
        return Tensor.detach(value)
    if not isinstance(value, dict):
        return value
    if id(value) not in seen:
        seen[id(value)] = plain = {}
        plain.update((key, _plain(item, seen)) for key, item in dict.items(value))
    return seen[id(value)]


class _Inert:
    """Stands in for a foreign class, function or object: takes everything, does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __call__(self, *args, **kwargs):
        return self

    append = extend = add = update = __setitem__ = __setstate__ = __call__
    dump_patches = False  # torch asks the class of a whole network that an old file holds


class _Dict(dict):
    """Stands in for an OrderedDict; attributes, such as `_metadata` of a state dict, are lost."""

    __slots__ = ()

    def __setstate__(self, state):
        """Take nothing."""


class _RestrictedUnpickler(pickle.Unpickler):
    """Knows the names that tensors need; every other name means `_Inert`."""

    KNOWN = {
        ("collections", "OrderedDict"): _Dict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    }

    def find_class(self, module, name):
        """A new function each time: a pickle can set attributes on whatever it gets from here."""
        known = self.KNOWN.get((module, name))
        return _Inert if known is None else lambda *arguments: known(*arguments)


_RESTRICTED_PICKLE = types.SimpleNamespace(  # the two names that torch.load uses of a pickle module
    __name__="restricted_pickle",
    Unpickler=_RestrictedUnpickler,
    load=lambda file, **options: _RestrictedUnpickler(file, **options).load(),
)
