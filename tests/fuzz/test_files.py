"""Damaged files, read as their readers do: the same result, or a refusal in one line."""

import contextlib
import hashlib
import io
import json
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from damage import damaged, other_json
from hypothesis import given, settings
from hypothesis import strategies as st

import diffad_ref as da
from diffad_ref.__main__ import main
from diffad_ref.tools import tables
from diffad_ref.tools.latents import CachedLatents
from diffad_ref.tools.toy import toy_factory

pytestmark = [
    *(pytest.mark.fuzz, pytest.mark.filterwarnings("ignore")),
    pytest.mark.usefixtures("few_draws"),
]
SMALL = {"start": None, "width": 8, "norm_groups": 4, "window": (3, 3), "feed_forward": 16}
SMALL |= {"image_size": 32, "condition_layers": 1}
IMAGES = [{"image": torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))}] * 4


def small() -> da.OneForMore:
    torch.manual_seed(0)
    return da.OneForMore.tiny(**SMALL)


def command(*words) -> str:
    """What a command prints; ValueError with its message, if it refuses."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main([str(word) for word in words])
    assert code in (0, 2) and "Traceback" not in errors.getvalue()
    if code == 2:
        raise ValueError(errors.getvalue().rpartition("diffad_ref: ")[2].removesuffix("\n"))
    return out.getvalue()


# ------------------------------------------------------------------------- who reads which file


def predict(folder: Path):
    found = da.load(folder / "weights").predict(IMAGES[0]["image"][None])
    assert found.score.isfinite().all()
    return found.anomaly_map.tolist()


def evaluate(folder: Path):
    words = ("--categories", "gear", "--json")
    return json.loads(command("evaluate", folder / "weights", folder / "toy", *words))["images"]


def go_on(folder: Path):
    da.fit(detector := small(), IMAGES, 4, 2, out=folder / "run", progress=False)
    return {name: value.tolist() for name, value in detector.state_dict().items()}


def tasks(folder: Path):
    learnt = ["gear", "brick"]
    options = {"steps": 2, "batch_size": 2, "progress": False}
    result = da.fit_continual(
        detector := small(), folder / "toy", [[c] for c in learnt], folder / "tasks", **options
    )
    state = {name: value.tolist() for name, value in detector.state_dict().items()}
    shown = tables.summarise({"update": result}), tables.after_tasks(result, "loss")
    return state, result.rows, result.taken, [str(table) for table in shown]


def compare(folder: Path):
    shutil.copy(folder / "report.json", folder / "other.json")
    return [command("compare", folder / "report.json", *form) for form in ((), ["--json"])]


def latents(folder: Path):
    detector = da.load(folder / "weights")
    data = detector.folder(folder / "toy", categories=["gear"])
    return CachedLatents(
        data, detector.codec, folder / "latents", progress=False
    ).posteriors.tolist()


# With what in it may be otherwise and yet right: then the result is another.
READERS = {
    "weights.json": ((predict, evaluate), ("config",)),
    "weights.safetensors": ((predict, evaluate), ()),
    "run/training.safetensors": ((go_on,), ()),
    "tasks/run.json": ((tasks,), ()),
    "tasks/task_1/training.safetensors": ((tasks,), ()),
    "tasks/task_1/memory.safetensors": ((tasks,), ()),
    "tasks/task_1/result.json": ((tasks,), ("rows", "taken")),
    "report.json": ((compare,), ("report",)),
    "latents": ((latents,), ()),
}


class Breaks(list):
    """Images of which so many are given before the power goes."""

    left = 12  # codec and features learn from four each; then come two steps

    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().__getitem__(i)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with one of everything that is read again, and what its readers make of it."""
    folder = tmp_path_factory.mktemp("whole")
    toy = toy_factory(folder, 32, n_train=4, n_good=1, n_per_kind=1, progress=False)
    toy.rename(folder / "toy")
    detector = small()
    detector.prepare(IMAGES)
    detector.categories = ("gear",)
    da.save(detector, folder / "weights", {"command": "train"})
    with pytest.raises(KeyboardInterrupt):
        da.fit(small(), Breaks(IMAGES), 4, 2, out=folder / "run", save_every=1, progress=False)
    words = ("--categories", "gear", "--save", folder / "report.json")
    command("evaluate", folder / "weights", folder / "toy", *words)
    assert tasks(folder) and latents(folder)
    with copy_of(folder) as copy:
        readers = {reader for readers, _ in READERS.values() for reader in readers}
        return folder, {reader: digest(reader(copy)) for reader in readers}


def digest(found) -> str:
    """Short for a result that two readings must share, to the last bit."""
    return hashlib.sha256(repr(found).encode()).hexdigest()


@contextlib.contextmanager
def copy_of(folder: Path):
    """What a test may spoil."""
    with tempfile.TemporaryDirectory() as place:
        for path in folder.iterdir():
            copy = Path(place) / path.name
            if path.name == "toy":
                copy.symlink_to(path)
            else:
                (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
        yield Path(place)


# ------------------------------------------------------------------------------------ what breaks


def header_of(data: bytes) -> tuple[str, bytes]:
    """The JSON with which a safetensors file begins, and the numbers after it."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return data[8:end].decode(), data[end:]


@st.composite
def broken(draw, path: Path) -> bytes:
    """What stands in a file after some damage."""
    data = path.read_bytes()
    if path.suffix == ".json":
        text = data.decode()
        return draw(damaged(data) | other_json(text).map(lambda text: text.encode()))
    header, numbers = header_of(data)
    plain = json.loads(header)
    way = draw(st.sampled_from(["bytes", "length", "header", "header", "state", "state"]))
    if way == "bytes":
        return draw(damaged(data) | damaged(data, 8 + len(header)))
    if way == "state" and "state" in plain.get("__metadata__", {}):
        plain["__metadata__"]["state"] = draw(other_json(plain["__metadata__"]["state"]))
        header = json.dumps(plain)
    else:
        header = draw(other_json(header))
    lengths = [0, len(header) - 1, 2**40, 2**64 - 1]
    length = draw(st.sampled_from(lengths)) if way == "length" else len(header)
    return struct.pack("<Q", length) + header.encode() + numbers


def told(data: bytes, names: tuple[str, ...]) -> str:
    """What JSON says that may rightly change the result; weights have a checksum."""
    try:
        plain = json.loads(data)
        return repr([plain[name] for name in names])
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""


@settings.get_profile("fuzz")
@given(st.data(), st.sampled_from(sorted(READERS)))
def test_a_damaged_file_is_refused_in_one_line_or_changes_nothing(whole, data, name):
    folder, results = whole
    before = (folder / name).read_bytes()
    after = data.draw(broken(folder / name))
    readers, names = READERS[name]
    reader = data.draw(st.sampled_from(readers))
    same = not names or told(before, names) == told(after, names)
    with copy_of(folder) as copy:
        (copy / name).write_bytes(after)
        try:
            found = digest(reader(copy))
        except (ValueError, OSError) as error:
            assert str(error) and "\n" not in str(error)
        else:
            assert found == results[reader] or not same
