"""Weights on disk: safetensors for the numbers, JSON beside them for everything else.

Nothing here unpickles, and nothing stands half-written under its final name. What is read is
checked: an error names the file and what is wrong in it.
"""

import dataclasses
import json
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from diffad_ref.detector import Detector

SHIPPED = Path(__file__).parent / "weights"  # tiny detectors that come with the package
CHECKSUM = "crc32"  # under this name among the metadata of a safetensors file
UNFINISHED = ".diffad_ref-"  # how names begin of what is being written


def save(
    detector: Detector, path: str | os.PathLike, record: dict | None = None, half: bool = False
) -> Path:
    """Write weights (.safetensors; float16, if `half`) and beside them what they are (.json)."""
    path = weights_path(path)
    state = {k: v.detach().cpu().contiguous() for k, v in detector.state_dict().items()}
    if half:
        state = {k: v.half() if v.dtype == torch.float32 else v for k, v in state.items()}
    description = {"method": type(detector).__name__, "categories": list(detector.categories)}
    description |= {"config": dataclasses.asdict(detector.config), "record": record or {}}
    text = as_text(description)  # first: if it cannot be, the old pair stays
    write_tensors(state, path)
    write_text(text, path.with_suffix(".json"))
    return path


def load(path: str | os.PathLike, method: str | None = None) -> Detector:
    """Read a detector that `save` wrote, in evaluation mode, on the CPU.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one or another method.
    """
    path = weights_path(path)
    description = read_description(path)
    found = description["method"]
    if method not in (None, found):
        raise ValueError(f"{path} holds weights of {found}, not of {method}")
    if found not in Detector.methods:
        known = ", ".join(Detector.methods)
        words = f"of methods, only {known} are imported: import the module that defines it"
        raise ValueError(f"{path} holds {found!r}; {words}")
    kind, before = Detector.methods[found], description["config"]
    try:
        detector = kind(config := config_of(kind.Config, before))
        unsaid = differences(before, json.loads(json.dumps(dataclasses.asdict(config))))
        if unsaid := [name for name in unsaid if name != "stages"]:  # they judge nothing
            raise ValueError(f"it does not say {', '.join(unsaid)}, and a default may be another")
        detector.categories = tuple(description["categories"])
        if len(set(detector.categories)) < len(detector.categories):
            raise ValueError("a category stands twice")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path.with_suffix('.json')} describes no {found}: {error!r}") from error
    load_weights(detector, read_tensors(path), path)
    return detector.eval()


def pretrained(name: str) -> Detector:
    """One of the tiny detectors that ship with the package, such as "diffusion_ad_toy"."""
    names = sorted(p.stem for p in SHIPPED.glob("*.safetensors"))
    if name not in names:
        raise ValueError(f"no weights {name!r} are shipped; there are {', '.join(names) or 'none'}")
    return load(SHIPPED / name)


def load_shipped(detector: Detector, name: str, own: Sequence[str] = ()) -> None:
    """Begin where shipped weights end, apart from `own` parts; ValueError for another size."""
    path = SHIPPED / f"{name}.safetensors"
    theirs = {k: v for k, v in read_tensors(path).items() if k.split(".")[0] not in own}
    kept = {k: v for k, v in detector.state_dict().items() if k.split(".")[0] in own}
    load_weights(detector, theirs | kept, f"{path} (start=None begins from scratch)")


def config_of(kind: type, plain: dict):
    """A config from what `json.loads` made of it (lists back to tuples), or ValueError."""
    try:
        return TypeAdapter(kind).validate_python(plain)
    except ValidationError as error:
        raise ValueError(said(error)) from error


def said(error: ValidationError) -> str:
    """What is wrong with settings, or with a file, on one line."""
    lines = []
    for found in error.errors():
        place = ".".join(str(part) for part in found["loc"])
        words = found["msg"].removeprefix("Value error, ")
        given = "" if found["type"] in ("value_error", "missing") else f", not {found['input']!r}"
        lines.append(f"{place}: {words}{given}" if place else words + given)
    return "; ".join(lines)


def read_json(path: Path, **kinds) -> dict:
    """The object in a JSON file, whose keys hold such types at least; see `parse_json`."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged, or of another kind: {error}") from error
    return parse_json(text, path, **kinds)


def parse_json(text: str, source: object, **kinds) -> dict:
    """The object that a text holds; ValueError says what is wrong in which `source`."""
    try:
        found = json.loads(text)
        return found | TypeAdapter(TypedDict("File", kinds)).validate_python(found)
    except (ValueError, RecursionError) as error:
        words = said(error) if isinstance(error, ValidationError) else error
        raise ValueError(f"{source} is damaged, or of another kind: {words}") from error


def read_description(path: str | os.PathLike) -> dict:
    """The JSON beside a weights file: method, categories, config, record."""
    path = weights_path(path).with_suffix(".json")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it belongs beside the .safetensors file")
    kinds = {"method": str, "categories": list[str], "config": dict}
    return read_json(path, **kinds, record=NotRequired[dict | None])


def as_text(description: dict) -> str:
    """JSON, one entry a line, with flat lists on one line."""
    text = json.dumps(description, indent=1)
    return re.sub(r"\[\n[^\[\]{}]*\]", lambda flat: re.sub(r"\n\s*", "", flat[0]), text)


def differences(before: dict, now: dict, under: str = "") -> list[str]:
    """Names, with dots, of the settings that differ between two plain dicts."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        a, b = before.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{under}{name}.")
        elif a != b:
            found.append(under + name)
    return found


def refuse_another(folder: Path, before: dict, now: dict) -> None:
    """ValueError if a folder holds a run with other settings than this one; it says which."""
    now = json.loads(json.dumps(now))  # as it looks after a round trip
    if different := differences(before, now):
        found = f"{folder} holds another run (different {', '.join(different)})"
        raise ValueError(f"{found}; choose another folder, or delete it to start anew")


def load_weights(module: torch.nn.Module, state: dict[str, Tensor], source: object) -> None:
    """Put tensors into a module; missing, surplus or misshapen ones raise ValueError."""
    own = module.state_dict()
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    kinds = {"missing": missing, "unexpected": surplus, "of another shape": wrong}
    if found := [f"{len(names)} {kind} {names[:3]}" for kind, names in kinds.items() if names]:
        raise ValueError(f"the weights in {source} do not fit: {', '.join(found)}")
    module.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()})


def weights_path(path: str | os.PathLike) -> Path:
    """The .safetensors file that a name with or without its ending means; "w-0.5" has none."""
    path = Path(path)
    if not path.name:
        raise ValueError(f"{str(path)!r} names no weights")
    stem = path.stem if path.suffix in (".safetensors", ".json") else path.name
    return path.with_name(f"{stem}.safetensors")


def write_tensors(state: dict[str, Tensor], path: Path, metadata: dict | None = None) -> None:
    """Save tensors to a safetensors file, whole or not at all, with a checksum of it all."""
    metadata = dict(metadata or {})
    metadata[CHECKSUM] = checksum(state, metadata)

    def write(unfinished: Path) -> None:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # safetensors would let nobody else read the file
        save_file(state, unfinished, metadata)
        unfinished.chmod(mode)

    if path.parent.is_dir():
        sweep(path.parent)
    write_whole(path, write)


def checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Of names, kinds, shapes and bits: a changed bit would only be another number."""
    found = zlib.crc32(repr(sorted(metadata.items())).encode())
    for name, value in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), found)
        found = zlib.crc32(value.cpu().contiguous().flatten().view(torch.uint8).numpy(), found)
    return f"{found:08x}"


def write_text(text: str, path: Path) -> None:
    """Save text, whole or not at all; names of files in it may be any bytes."""
    data = text.encode("utf-8", "surrogateescape")
    write_whole(path, lambda unfinished: unfinished.write_bytes(data))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a hidden file beside `path`, then give it that name; or nothing: OSError.

    All that this package leaves under a final name is written here. A link stays one.
    """
    path = Path(os.path.realpath(path))
    unfinished = path.with_name(f"{UNFINISHED}{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())  # or a power cut could leave the name without the content
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        near = next(p for p in path.absolute().parents if p.is_dir())
        free = f"{shutil.disk_usage(near).free / 1e6:.0f} MB are free there"
        raise OSError(f"cannot write {path} ({free}): {error}") from error
    finally:
        with suppress(OSError):  # where there is no folder, nothing was begun
            unfinished.unlink()


def try_writing(folder: Path) -> None:
    """Refuse, before the work, a folder that cannot be written to: OSError; and tidy up there."""
    write_whole(trial := folder / f"{UNFINISHED}trial", Path.touch)
    trial.unlink(missing_ok=True)
    sweep(folder)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder for one run: it is there, can be written to, and nobody else does."""
    try_writing(folder)
    # It goes with its process, however that ends; what holds it may ask for it again.
    lock = FileLock(folder / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        words = "another run is writing to it; wait for that one, or choose another folder"
        raise ValueError(f"{folder}: {words}") from error
    try:
        yield
    finally:
        lock.release()


def sweep(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder."""
    for path in folder.glob(f"{UNFINISHED}*-*"):
        if not psutil.pid_exists(int(path.name.split("-")[1])):
            path.unlink(missing_ok=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Load a safetensors file; a damaged one raises ValueError with its name."""
    tensors = _read(path, lambda file: {name: file.get_tensor(name) for name in file.keys()})
    metadata = read_metadata(path)
    expected = metadata.pop(CHECKSUM, None)  # files of others, and old ones, have none
    if expected not in (None, checksum(tensors, metadata)):
        raise ValueError(f"{path} is damaged: its checksum is not that of what it holds")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The text entries of a safetensors file; a damaged one raises ValueError with its name."""
    return _read(path, lambda file: file.metadata() or {})


def _read(path: Path, take: Callable):
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    try:
        with safe_open(path, "pt") as file:
            return take(file)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
