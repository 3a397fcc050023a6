"""Each data script, from a tiny archive in its own layout to what AnomalyFolder reads."""

import dataclasses
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import btad
import dagm
import dtd
import mpdd
import mtd
import mvtec_ad
import numpy as np
import pytest
import test_download
import torch
import visa
from PIL import EpsImagePlugin, Image

from diffad_ref.anomalies import texture_bank
from diffad_ref.data import AnomalyFolder, read_mask

SCRIPTS = Path(mvtec_ad.__file__).parent
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
MASK = np.zeros((12, 16), np.uint8)
MASK[2:5, 3:7] = 1  # where every defect lies


def raw_mvtec(root, write, categories=("bottle", "screw")):
    numbers = {"train/good": 3, "test/good": 2, "test/bent": 1, "test/cut": 2}
    for name in categories:
        for folder, number in numbers.items():
            truth = root / name / folder.replace("test", "ground_truth")
            for i in range(number):
                write(root / name / folder / f"{i:03}.png", PIXELS)
                if folder in ("test/bent", "test/cut"):
                    write(truth / f"{i:03}_mask.png", MASK * 255)
    (root / "license.txt").write_text("a licence")


def raw_visa(root, write):
    rows = ["object,split,label,image,mask"]
    for name in ("candle", "pcb1"):
        for i in range(6):
            label = "anomaly" if i >= 4 else "normal"
            image = f"{name}/Data/Images/{label.capitalize()}/{i:04}.JPG"
            mask = f"{name}/Data/Masks/Anomaly/{i:04}.png" if i >= 4 else ""
            write(root / image, PIXELS)
            if mask:
                write(root / mask, MASK * (i - 3))  # class numbers 1 and 2
            rows.append(f"{name},{'train' if i < 3 else 'test'},{label},{image},{mask}")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(rows))


def raw_btad(root, write):
    for name, number, ending in (("01", 3, "bmp"), ("02", 4, "png"), ("03", 5, "bmp")):
        folder = root / "BTech_Dataset_transformed" / name
        for i in range(number):
            write(folder / f"train/ok/{i:04}.{ending}", PIXELS)
        for i in range(2):
            write(folder / f"test/ok/{i:04}.{ending}", PIXELS)
            write(folder / f"test/ko/{i:04}.{ending}", PIXELS)
            write(folder / f"ground_truth/ko/{i:04}.{'png' if i else 'bmp'}", MASK * 255)


def raw_dagm(root, write, classes=10):
    for k in range(1, classes + 1):
        for split in ("Train", "Test"):
            for i in range(1, 4):
                write(root / f"Class{k}/{split}/{i:04}.PNG", PIXELS[..., 0])
            write(root / f"Class{k}/{split}/Label/0002_label.PNG", MASK * 255)
            write(root / f"Class{k}/{split}/Label/0003.PNG", MASK * 0)  # marks nothing: good
            (root / f"Class{k}/{split}/Label/Labels.txt").write_text("2")


def raw_dtd(root, write):
    for name in ("banded/0", "banded/1", "woven/0", "woven/1"):
        write(root / f"dtd/images/{name}.jpg", PIXELS)
    write(root / "dtd/labels/other/no_texture.jpg", PIXELS)


def raw_mtd(root, write):
    kinds = [kind for kind, tiles in MTD_COUNTS.items() for _ in range(tiles)]
    for i, kind in enumerate(kinds):
        path = root / f"Magnetic-x/MT_{kind.capitalize()}/Imgs/exp1_num_{1000 * i}.jpg"
        write(path, PIXELS)
        write(path.with_suffix(".png"), MASK * (0 if kind == "free" else 200))


MTD_COUNTS = {"free": 10, "blowhole": 1, "break": 1, "crack": 1, "fray": 1, "uneven": 1}
MVTEC = {name: {"train": 3, "test": 5} for name in ("bottle", "screw")}
MVTEC["all categories"] = {"train": 6, "good": 4, "defective": 6, "without mask": 0}
VISA = {"train": 3, "good": 1, "defective": 2, "without mask": 0}
raw_mpdd = partial(raw_mvtec, categories=mpdd.CATEGORIES)

# What arrives, a right and a wrong number of images, and what comes out of all categories: images
# for training, good and defective ones for testing.
Case = namedtuple("Case", "script raw counts wrong expected")
CASES = {
    "mvtec_ad": Case(mvtec_ad, raw_mvtec, MVTEC, {**MVTEC, "screw": {"train": 4}}, (6, 4, 6)),
    "visa": Case(visa, raw_visa, dict(candle=VISA, pcb1=VISA), {"pcb1": {"good": 2}}, (6, 2, 4)),
    "btad": Case(btad, raw_btad, (3, 4, 5), (3, 4, 6), (12, 6, 6)),
    "mpdd": Case(mpdd, raw_mpdd, mpdd.COUNTS, {"tubes": {"train": 4}}, (18, 12, 18)),
    "dagm": Case(dagm, raw_dagm, dagm.COUNTS, {"Class1": {"train": 5}}, (20, 20, 10)),
    "mtd": Case(mtd, raw_mtd, MTD_COUNTS, {**MTD_COUNTS, "crack": 2}, (7, 3, 5)),
    "dtd": Case(dtd, raw_dtd, 2, 3, None),
}


@pytest.fixture
def raw(tmp_path, write):
    """Makes a tiny data set and, given a form, an archive of it: arguments for the script."""

    def raw(name, form="gztar"):
        CASES[name].raw(tmp_path / "raw", write)
        archive = form and shutil.make_archive(tmp_path / "archive", form, tmp_path / "raw")
        return "--archive", Path(archive or tmp_path / "raw"), "--out", tmp_path / "out"

    return raw


server = test_download.server  # the fixture


def run(name, *arguments, counts=None, sha256=None):
    """Run a script's command line, by default with the numbers of its tiny data set."""
    script = CASES[name].script
    source = dataclasses.replace(script.SOURCE, sha256=sha256, size=None)
    script.main([str(a) for a in arguments], source, counts or CASES[name].counts)


def fails(capsys, name, *arguments, **options):
    """The one line with which a script ends, and its exit status is 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        run(name, *arguments, **options)
    line = capsys.readouterr().err
    assert error.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    return line


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("name", [name for name in CASES if name != "dtd"])
def test_archive_becomes_a_folder_that_anomaly_folder_reads(raw, tmp_path, name):
    out = tmp_path / "out"
    run(name, *raw(name))
    train, test = AnomalyFolder(out), AnomalyFolder(out, "test", image_size=None)
    labels = [record.label for record in test.samples]
    assert (len(train), labels.count(0), labels.count(1)) == CASES[name].expected
    assert test.has_masks
    for sample in test:
        assert torch.equal(sample["mask"][0], torch.from_numpy(MASK).float() * sample["label"])
    for mask in out.glob("*/ground_truth/*/*"):
        assert np.unique(np.asarray(Image.open(mask))).tolist() == [0, 255]
    assert set(os.listdir(tmp_path)) == {"raw", "archive.tar.gz", "out"}  # no work folder


@pytest.mark.parametrize("name", CASES)
def test_second_run_does_nothing(raw, tmp_path, capsys, name):
    arguments = raw(name)
    run(name, *arguments)
    arguments[1].unlink()
    before = times(tmp_path)
    run(name, *arguments)
    assert times(tmp_path) == before and "already: nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("name", CASES)
def test_wrong_number_of_images_leaves_nothing_at_the_target(raw, tmp_path, capsys, name):
    arguments = raw(name)
    line = fails(capsys, name, *arguments, counts=CASES[name].wrong)
    assert "of 3 categories, found 2" in line or "wrong number of images" in line
    assert not (tmp_path / "out").exists() and arguments[1].exists()


@pytest.mark.parametrize("name", CASES)
def test_folder_fetched_by_hand_serves_as_well_and_stays_as_it_is(raw, tmp_path, name):
    arguments = raw(name, None)
    before = times(tmp_path / "raw")
    run(name, *arguments)
    assert times(tmp_path / "raw") == before
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files and all(path.stat().st_nlink == 1 and not path.is_symlink() for path in files)


@pytest.mark.parametrize("name", CASES)
def test_folder_with_something_else_in_it_is_described(tmp_path, capsys, name):
    (tmp_path / "raw/unrelated").mkdir(parents=True)
    line = fails(capsys, name, "--archive", tmp_path / "raw", "--out", tmp_path / "out")
    assert "expected the folders" in line and "holds unrelated/" in line
    assert os.listdir(tmp_path) == ["raw"]


def test_dtd_becomes_a_folder_of_textures(raw, tmp_path):
    run("dtd", *raw("dtd"))
    assert len(list((tmp_path / "out/images").glob("*/*.jpg"))) == 4
    assert len(texture_bank(tmp_path / "out/images", size=8)) == 4


def test_numbers_of_images_add_up_to_those_that_are_stated():
    each = [numbers for name, numbers in mvtec_ad.COUNTS.items() if name != "all categories"]
    assert sum(numbers["train"] for numbers in each) == 3629
    assert sum(numbers["test"] for numbers in each) == 1725 == 467 + 1258
    good = sum(numbers["train"] + numbers["good"] for numbers in visa.COUNTS.values())
    assert good + sum(n["defective"] for n in visa.COUNTS.values()) == 10_821
    assert sum(mtd.COUNTS.values()) == 1344
    assert (len(visa.COUNTS), len(each), len(dagm.COUNTS)) == (12, 15, 10)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("object,", "class,", "lacks object; its columns are class, split"),
        ("candle/Data/Images/Normal/0000.JPG", "candle/gone.JPG", "names 'candle/gone.JPG', but"),
        ("candle/Data/Images/Normal/0000.JPG", "../../x", "'../../x' is refused"),
        ("candle/Data/Images/Normal/0000.JPG", "candle/" + "a" * 300, "of 307 bytes is too long"),
        ("candle,test,anomaly", "candle,train,anomaly", "0004.JPG', anomaly, in 'train'"),
        ("Normal/0001.JPG", "Normal/0000.JPG", "as another file of its folder has"),
    ],
)
def test_table_that_does_not_fit_is_named(raw, tmp_path, capsys, old, new, message):
    arguments = raw("visa", None)
    table = tmp_path / "raw/split_csv/1cls.csv"
    table.write_text(table.read_text().replace(old, new))
    assert message in fails(capsys, "visa", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", ["no image", "image of another size"])
def test_mask_that_does_not_fit_is_named(raw, tmp_path, write, capsys, data):
    arguments = raw("visa", None)
    mask = tmp_path / "raw/pcb1/Data/Masks/Anomaly/0005.png"
    mask.write_text(data) if data == "no image" else write(mask, MASK[:5])
    assert str(mask) in fails(capsys, "visa", *arguments)


@pytest.mark.parametrize(
    "name, path",
    [
        ("visa", "pcb1/Data/Masks/Anomaly/0005.png"),
        ("visa", "pcb1/Data/Images/Anomaly/0005.JPG"),
        ("mtd", "Magnetic-x/MT_Blowhole/Imgs/exp1_num_10000.png"),
        ("mtd", "Magnetic-x/MT_Blowhole/Imgs/exp1_num_10000.jpg"),
    ],
)
def test_postscript_under_the_name_of_an_image_never_reaches_ghostscript(
    raw, tmp_path, capsys, monkeypatch, name, path
):
    started, arguments = [], raw(name, None)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: started.append(path))
    (tmp_path / "raw" / path).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 12\n\n")
    Image.open(tmp_path / "raw" / path).close()  # Pillow by itself takes it for an image
    line = fails(capsys, name, *arguments)
    assert "cannot read the" in line and path in line and not started


@pytest.mark.parametrize("form", ["PNG", "JPEG", "MPO", "BMP", "TIFF", "WEBP"])
def test_mask_of_each_usual_format_is_read_whatever_its_suffix(tmp_path, form):
    white, path = Image.new("L", (16, 12), 255), tmp_path / "mask.png"
    more = {"save_all": True, "append_images": [white]} if form == "MPO" else {}
    white.save(path, form, **more)
    assert Image.open(path).format == form and mvtec_ad.mark_defect(path).all()


def test_missing_masks_of_btad_are_counted_but_no_error(raw, tmp_path, capsys):
    arguments = raw("btad", None)
    (tmp_path / "raw/BTech_Dataset_transformed/02/ground_truth/ko/0000.bmp").unlink()
    run("btad", *arguments)
    assert "note: 1 defective images have no mask" in capsys.readouterr().out
    assert not AnomalyFolder(tmp_path / "out", "test").has_masks


@pytest.mark.parametrize(
    "removed, added, message",
    [
        ("Class3", None, "lacks Class3 and holds Class1/, Class10/, Class2/"),
        (
            "Class3/Test/Label/*.PNG",
            None,
            "Class3/Test/Label; found 3 images, and in Label: Labels",
        ),
        (None, "Class3/Test/Label/0099.PNG", "0099.PNG fits no image in"),
        (None, "Class3/Test/Label/0002_label.PNG", "0002_label.PNG has no value above half"),
    ],
)
def test_odd_dagm_is_described(raw, tmp_path, write, capsys, removed, added, message):
    arguments = raw("dagm", None)
    for path in (tmp_path / "raw").glob(removed) if removed else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if added:
        write(tmp_path / "raw" / added, MASK)
    assert message in fails(capsys, "dagm", *arguments)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_masks_are_read_as_anomaly_folder_reads_them(tmp_path, mode):
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    deep = Image.fromarray((np.arange(256) * 257).astype(np.uint16).reshape(16, 16))
    image = deep.convert(mode) if mode.startswith("I") else grey.convert(mode)
    image.save(tmp_path / "mask.png")
    expected = read_mask(tmp_path / "mask.png")
    assert expected.any() and np.array_equal(mvtec_ad.mark_defect(tmp_path / "mask.png"), expected)


def test_whole_way_from_a_server_goes_on_where_it_broke_off(raw, tmp_path, server, capsys):
    server.body = raw("mvtec_ad")[1].read_bytes()
    sha256, out = hashlib.sha256(server.body).hexdigest(), tmp_path / "data/mvtec"
    server.cut = len(server.body) // 2
    arguments = ("mvtec_ad", "--url", server.url, "--out", out, "--yes")
    assert "run again to go on" in fails(capsys, *arguments, sha256=sha256)
    assert not out.exists()
    server.cut = None
    run(*arguments, sha256=sha256)
    assert server.requests == [None, f"bytes={len(server.body) // 2}-"]
    assert len(AnomalyFolder(out)) == 6 and set(os.listdir(tmp_path / "data")) == {"mvtec"}
    printed = capsys.readouterr().out
    assert "licence: CC BY-NC-SA 4.0" in printed and "complete" in printed


def test_verified_download_is_used_again_if_the_layout_fails(raw, tmp_path, server, capsys):
    server.body = raw("visa")[1].read_bytes()
    arguments = ("visa", "--url", server.url, "--out", tmp_path / "data/visa", "--yes")
    line = fails(capsys, *arguments, counts=CASES["visa"].wrong)
    assert "keeps what was fetched" in line and not (tmp_path / "data/visa").exists()
    run(*arguments)
    assert server.requests == [None] and (tmp_path / "data/visa").is_dir()


def test_damaged_archive_without_a_known_hash_is_fetched_anew(raw, tmp_path, server, capsys):
    body = raw("mtd")[1].read_bytes()
    server.body = body[: len(body) // 2]  # whole, as far as the server's word goes
    arguments = ("mtd", "--url", server.url, "--out", tmp_path / "mtd", "--yes")
    assert "discarded, run again" in fails(capsys, *arguments)
    server.body = body
    run(*arguments)
    assert AnomalyFolder(tmp_path / "mtd").categories == ["magnetic_tile"]


def test_nothing_is_downloaded_without_agreement(raw, tmp_path, server, capsys, monkeypatch):
    server.body = raw("btad")[1].read_bytes()
    arguments = ("btad", "--url", server.url, "--out", tmp_path / "out")
    Stdin = namedtuple("Stdin", "isatty")
    monkeypatch.setattr(sys, "stdin", Stdin(lambda: False))
    assert "--yes agrees" in fails(capsys, *arguments)
    monkeypatch.setattr(sys, "stdin", Stdin(lambda: True))
    answers = iter("ny")
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    assert "nothing was downloaded" in fails(capsys, *arguments)
    assert server.requests == [] and not list(tmp_path.glob("*out*"))
    run(*arguments)
    assert server.requests == [None] and (tmp_path / "out").is_dir()
    printed = capsys.readouterr().out
    assert "CC BY-SA according to its authors | CC BY-NC-SA 4.0 according to other" in printed
    assert f"size: {len(server.body):,} bytes" in printed


@pytest.mark.parametrize("name, what", [("mpdd", "web form"), ("dagm", "Class1 to Class10")])
def test_data_set_without_an_address_says_what_to_fetch(tmp_path, capsys, name, what):
    line = fails(capsys, name, "--out", tmp_path / "out", "--yes")
    assert what in line and "--archive" in line


def test_archive_with_another_hash_is_refused_and_left_alone(raw, tmp_path, capsys):
    arguments = raw("mvtec_ad")
    before = times(tmp_path)
    assert "expected " + "0" * 64 in fails(capsys, "mvtec_ad", *arguments, sha256="0" * 64)
    assert times(tmp_path) == before


def test_target_that_is_not_whole_is_not_touched(raw, tmp_path, capsys):
    arguments = raw("mvtec_ad")
    run("mvtec_ad", *arguments)
    (tmp_path / "out/screw/train/good/000.png").unlink()
    before = times(tmp_path)
    line = fails(capsys, "mvtec_ad", *arguments)
    assert "not whole (wrong number of images: screw has 2 train instead of 3" in line
    assert times(tmp_path) == before


@pytest.mark.parametrize("name", CASES)
def test_root_of_a_disk_is_no_folder_to_make(tmp_path, capsys, name):
    line = fails(capsys, name, "--archive", tmp_path, "--out", tmp_path.anchor)
    assert "is the root of a disk" in line


def test_disk_without_hard_links_gets_copies(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: os.stat(tmp_path / "nothing"))  # an OSError
    run("mvtec_ad", *raw("mvtec_ad", "zip"))
    assert len(AnomalyFolder(tmp_path / "out")) == 6
    assert (tmp_path / "out/license.txt").read_text() == "a licence"  # it travels along


def test_ctrl_c_keeps_what_has_arrived_and_says_how_to_go_on(tmp_path, server, capsys):
    server.cut = 150_000
    server.silence.clear()
    arguments = ["--yes", "--url", server.url, "--out", tmp_path / "data/mtd"]
    command = [sys.executable, SCRIPTS / "mtd.py", *arguments]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell may have it ignored
    script = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    while sum(p.stat().st_size for p in tmp_path.glob("data/.mtd.partial/*.part")) < 100_000:
        assert script.poll() is None
        time.sleep(0.01)
    script.send_signal(signal.SIGINT)
    errors = script.communicate(timeout=20)[1]
    assert script.returncode == 130 and "Traceback" not in errors
    assert "stopped" in errors and "run again to go on" in errors
    (part,) = tmp_path.glob("data/.mtd.partial/*.part")
    kept = part.read_bytes()
    assert len(kept) >= 100_000 and test_download.BODY.startswith(kept)
    assert not (tmp_path / "data/mtd").exists()
    server.cut = None
    assert "no zip or tar archive" in fails(capsys, "mtd", *arguments)  # random bytes
    assert server.requests == [None, f"bytes={len(kept)}-"]


def test_no_script_imports_torch():
    modules = ["download", *CASES]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
