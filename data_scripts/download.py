"""Fetch an archive, check it, unpack it and lay it out: what the scripts of this folder share.

Downloads go on where they stopped, archives cannot write outside their folder, and nothing stands
half-written under its final name: the work is done in a hidden folder beside the target,
`.<name>.partial`, and the last step renames.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import stat
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from filelock import FileLock, Timeout
from tqdm import tqdm

HEADERS = {"User-Agent": "diffad_ref data scripts", "Accept-Encoding": "identity"}
UNREACHABLE = (OSError, HTTPException, ValueError, OverflowError)  # of sizes that are no sizes
NOTE = {"etag": str, "modified": str, "size": int}  # of a download that has begun
DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError),
    *(NotImplementedError, RuntimeError),  # zipfile: unknown compression, password
)


class DataError(ValueError):
    """What went wrong and what to do, in one line, whatever a server or an archive put into it."""

    def __init__(self, words: str):
        super().__init__("".join(c if c.isprintable() else " " for c in words).strip())


class DamagedError(DataError):
    """The archive is truncated, damaged, or no archive."""


@dataclass(frozen=True)
class Source:
    """What is known about a data set before any of it is here."""

    name: str
    folder: str  # the default target is data/<folder>
    licences: tuple[str, ...]  # one entry for each source that states one
    url: str | None = None  # None: to be fetched by hand
    sha256: str | None = None  # of the archive
    size: int | None = None  # of the archive, bytes
    exact: bool = True  # False: `size` is rounded
    by_hand: str = ""  # what to fetch where there is no address


# ------------------------------------------------------------------------------------- download


def download(
    url: str, target: Path, sha256: str | None = None, size: int | None = None, timeout: float = 60
) -> Path:
    """Fetch `url` into `target`, and go on where an earlier run stopped.

    The bytes so far lie in `target` + ".part"; ".json" beside it holds what the server said of the
    file (ETag, Last-Modified, size). If that has changed, the download begins anew. One run at a
    time may do this: ".lock" is there, and held, as long as it lasts.

    Parameters
    ----------
    target : Path
        Left as it is if it exists: only a complete and verified file bears this name.
    sha256 : str, optional
        Expected hash, hexadecimal; a file with another one is discarded.
    size : int, optional
        Expected bytes; a server that offers another number is refused before the transfer, and
        one that names none is stopped when it sends more.
    timeout : float
        Longest silence of the server, seconds.

    Raises
    ------
    DataError
        For an answer other than the file, a broken connection, too little space, a wrong hash,
        another run that downloads the same.
    """
    if target.is_file():
        return target
    if not url.lower().startswith(("http://", "https://")):
        raise DataError(f"the address {url!r} does not begin with http:// or https://")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target):
        if not target.is_file():  # another run may have finished just now
            _download(url, target, sha256, size, timeout)
    return target


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold the lock of a download; DataError at once if another run holds it."""
    lock = FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(f"another run downloads {target}: wait until it has ended") from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file, but filelock does so there
            os.unlink(lock.lock_file)
        lock.release()


def _download(url: str, target: Path, sha256: str | None, size: int | None, timeout: float) -> None:
    part, note = (target.with_name(target.name + ending) for ending in (".part", ".json"))
    known = _read_note(note)
    have = part.stat().st_size if part.is_file() and any(known.values()) else 0
    if not have or have != known["size"]:
        response, found, have = _open(url, have, known, timeout)
        with response:
            total = found["size"]
            if None not in (size, total) and size != total:
                raise DataError(f"{url} offers {total:,} bytes where {size:,} are expected")
            expected = total or size
            # As much again is set aside for unpacking: images hardly shrink in an archive.
            require_space(part.parent, 2 * (expected or 0) - have, "to download and unpack it")
            if not have:
                part.unlink(missing_ok=True)  # what it holds does not go with this note
                note.write_text(json.dumps(found), encoding="utf-8")
            _receive(response, part, expected)
    try:
        verify(part, sha256)
    except DataError as error:
        part.unlink()
        raise DataError(f"{error}; it was discarded, run again to fetch it anew") from None
    os.replace(part, target)


def _read_note(path: Path) -> dict:
    """What the server said when the download began; all None if that is not known."""
    try:
        note = json.loads(path.read_text("utf-8"))
        if all(isinstance(note[key], kind | None) for key, kind in NOTE.items()):
            return {key: note[key] for key in NOTE}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    return dict.fromkeys(NOTE)


def _open(url: str, have: int, known: dict, timeout: float):
    """Ask for the bytes from `have` on: the response, its description, where it really begins."""
    for start in (have, 0) if have else (0,):
        response = _request(url, start, known, timeout)
        if response is not None:
            first, found = _describe(response)
            if response.status == 200:
                if start:
                    print("the server sends the whole file again: beginning anew")
                return response, found, 0
            both = [key for key in known if known[key] and found[key]]
            if start and first == start and both and all(known[k] == found[k] for k in both):
                return response, found, start
            response.close()
        if start:
            print("the file on the server is not the one that was begun: beginning anew")
    raise DataError(f"{url} answers with another part of the file than was asked for")


def _request(url: str, start: int, known: dict, timeout: float):
    headers = dict(HEADERS)
    if start:
        headers["Range"] = f"bytes={start}-"
        strong = known["etag"] if not (known["etag"] or "W/").startswith("W/") else None
        if strong or known["modified"]:
            headers["If-Range"] = strong or known["modified"]
    try:
        return _send(Request(url, headers=headers), timeout)
    except HTTPError as error:
        error.close()
        if error.code == 416 and start:  # the file has become shorter
            return None
        later = error.code == 429 or error.code >= 500
        hint = "try again later" if later else "the file may have moved"
        raise DataError(
            f"{url} answers {error.code} {error.reason}: {hint}, or give another address with "
            "--url, or an archive fetched by hand with --archive"
        ) from None
    except UNREACHABLE as error:
        raise DataError(f"cannot reach {url}: {getattr(error, 'reason', error)}") from None


class Redirects(HTTPRedirectHandler):
    """Follows to http and https alone, and never from https to http; HTTPError for the others."""

    def redirect_request(self, request, response, code, message, headers, url):
        allowed = ("https",) if request.type == "https" else ("http", "https")
        if urlsplit(url).scheme not in allowed:
            message = f"{message} and leads to {url!r}, which is refused"
            raise HTTPError(request.full_url, code, message, headers, response)
        return super().redirect_request(request, response, code, message, headers, url)


def _send(request: Request, timeout: float):
    return build_opener(Redirects).open(request, timeout=timeout)


def _describe(response) -> tuple[int, dict]:
    """Where the body begins in the file, and what identifies the file."""
    headers = response.headers
    part = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    length = part[2] if part else headers.get("Content-Length", "")
    size = int(length) if length.isdecimal() and (part or response.status == 200) else None
    found = {"etag": headers.get("ETag"), "modified": headers.get("Last-Modified"), "size": size}
    return int(part[1]) if part else 0, found


def _receive(response, part: Path, expected: int | None) -> None:
    """Append the body to `part`; what has arrived stays, unless it is more than expected."""
    have, reason = part.stat().st_size if part.exists() else 0, ""
    limit = float("inf") if expected is None else expected
    bar = partial(tqdm, total=expected, initial=have, unit="B", unit_scale=True, disable=None)
    try:
        with open(part, "ab") as file, bar(desc="download") as progress:
            # read1 takes what is there, where read would wait for the rest and lose it all.
            while have <= limit and (block := response.read1(1 << 16)):
                have += file.write(block)
                file.flush()
                progress.update(len(block))
    except (OSError, HTTPException) as error:
        reason = f" ({error or type(error).__name__})"
    got = part.stat().st_size
    if got > limit:
        part.unlink()
        raise DataError(
            f"the server sends more than the {expected:,} bytes that are expected; they were "
            "discarded, run again to fetch it anew"
        )
    if reason or expected not in (None, got):
        of = "" if expected is None else f" of {expected:,}"
        raise DataError(f"the download ended after {got:,}{of} bytes{reason}; run again to go on")


def verify(path: Path, sha256: str | None) -> None:
    """Raise DataError unless the file has this SHA-256; None accepts any file."""
    if sha256 is None:
        return
    digest, size = hashlib.sha256(), path.stat().st_size
    bar = partial(tqdm, total=size, unit="B", unit_scale=True, disable=None)
    with open(path, "rb") as file, bar(desc="check SHA-256") as progress:
        while block := file.read(1 << 20):
            digest.update(block)
            progress.update(len(block))
    if digest.hexdigest() != sha256:
        raise DataError(f"{path} has SHA-256 {digest.hexdigest()}, expected {sha256}")


def require_space(folder: Path, size: int, purpose: str) -> None:
    """Raise DataError if the disk of `folder` has fewer than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(f"{size:,} bytes are needed {purpose}, but {folder} has {free:,} free")


# --------------------------------------------------------------------------------------- unpack


def safe_path(name: str) -> PurePosixPath:
    """A relative path out of a name that somebody else chose.

    Raises DataError if it is absolute, climbs with "..", holds control characters, or is longer
    than disks allow for a name (255 bytes) or than any data set needs for a path.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    climbs = any(part.rstrip(" .") == "" for part in parts)  # Windows drops dots and spaces
    absolute = name.startswith(("/", "\\")) or PureWindowsPath(name).drive
    if climbs or absolute or any(ord(character) < 32 for character in name):
        raise DataError(f"{name!r} is refused: it would leave its folder")
    size, longest = len(os.fsencode(name)), max((len(os.fsencode(p)) for p in parts), default=0)
    if longest > 255 or size > 1000:
        raise DataError(f"{name[:40]!r}... is refused: a name of {size:,} bytes is too long")
    return PurePosixPath(*parts)


def unpack(archive: Path, target: Path, limit: int | None = None) -> Path:
    """Unpack a zip or tar archive (plain, gz, xz); a finished one is left as it is.

    Each member is looked at before it is written; `target` appears when all of them are there.

    Parameters
    ----------
    limit : int, optional
        Most bytes to write; by default, what the disk has free.

    Raises
    ------
    DamagedError
        The archive is truncated, damaged, or none.
    DataError
        A member would leave the folder, is no file, collides with another, or is too large.
    """
    if target.is_dir():
        return target
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    if limit is None:
        limit = shutil.disk_usage(unfinished).free
    try:
        _unpack_all(archive, unfinished, limit)
        os.replace(unfinished, target)
    except DAMAGE as error:
        raise DamagedError(f"{archive} is damaged or no zip or tar archive: {error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _unpack_all(archive: Path, folder: Path, limit: int) -> None:
    written, seen = 0, {}
    with open(archive, "rb") as file:
        members = _zip_members if file.read(2) == b"PK" else _tar_members
    for name, kind, size, opened in tqdm(members(archive), "unpack", unit=" files", disable=None):
        if kind not in ("file", "folder"):
            raise DataError(f"{archive} is refused: {name!r} is {kind}")
        path = safe_path(name)
        if kind == "file" and not path.parts:
            raise DataError(f"{archive} is refused: one of its files has no name")
        _claim(path, kind, seen, f"{archive} is refused: {name!r}")
        written += size
        if written > limit:
            raise DataError(f"{archive} would unpack to more than {limit:,} bytes, at {name!r}")
        if kind == "folder":
            (folder / path).mkdir(parents=True, exist_ok=True)
            continue
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with opened() as stream, open(folder / path, "xb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
        if (folder / path).stat().st_size != size:
            raise EOFError(f"{name!r} is not of the size that is stated")


def _claim(path: PurePosixPath, kind: str, seen: dict[str, str], refused: str) -> None:
    """Note a path as taken; disks that ignore case or accents' spelling would mix up equal ones."""
    keys = [unicodedata.normalize("NFC", str(p)).casefold() for p in (path, *path.parents)]
    for key in keys[1:]:
        if seen.setdefault(key, "folder") != "folder":
            raise DataError(f"{refused} lies below another member that is a file")
    if seen.get(keys[0], kind) != kind or (kind == "file" and keys[0] in seen):
        raise DataError(f"{refused} collides with another member of that name")
    seen[keys[0]] = kind


def _tar_members(archive: Path) -> Iterator[tuple[str, str, int, Callable]]:
    kinds = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link"}
    with tarfile.open(archive, "r:*") as tar:
        for info in tar:
            kind = "folder" if info.isdir() else "file" if info.isreg() else None
            kind = kind or kinds.get(info.type, "a device or another special file")
            yield info.name, kind, info.size, partial(tar.extractfile, info)
        # tarfile takes any broken header for the end. Look for the real one, and read past it,
        # so that a compressed stream gets to its checksum.
        tar.fileobj.seek(tar.offset)
        end = tar.fileobj.read(1 << 20)
        if len(end) < 512 or any(end[:512]):
            raise tarfile.ReadError("the end is missing")


def _zip_members(archive: Path) -> Iterator[tuple[str, str, int, Callable]]:
    kinds = {
        0: "file",
        stat.S_IFREG: "file",
        stat.S_IFDIR: "folder",
        stat.S_IFLNK: "a symbolic link",
    }
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            kind = kinds.get(stat.S_IFMT(info.external_attr >> 16), "a device or special file")
            # Not info.is_dir(), which looks for the last letter of an empty name.
            kind = "folder" if info.filename.endswith("/") and kind == "file" else kind
            yield info.filename, kind, info.file_size, partial(file.open, info)


# ------------------------------------------------------------------------------------- the script


def command_line(source: Source, description: str) -> argparse.ArgumentParser:
    """The options that every script has."""
    first = description.splitlines()[0]
    parser = argparse.ArgumentParser(description=first, epilog=source.by_hand)
    out = Path("data") / source.folder
    parser.add_argument("--out", type=Path, default=out, help="folder to make (%(default)s)")
    parser.add_argument("--archive", type=Path, help="archive fetched by hand, or its folder")
    parser.add_argument("--url", default=source.url, help="address to fetch the archive from")
    parser.add_argument("--yes", action="store_true", help="download without asking")
    return parser


def obtain(source: Source, options: argparse.Namespace, work: Path) -> Path:
    """The folder with what the archive held: unpacked below `work`, or given by hand.

    Raises DataError as `download` and `unpack` do, and if the licence was not agreed to.
    """
    print(f"{source.name}\n  licence: {' | '.join(source.licences)}")
    archive = options.archive or _fetch(source, options, work)
    if archive.is_dir():
        return archive
    if not archive.is_file():
        raise DataError(f"there is no archive or folder {archive}")
    state = archive.stat()
    tree = work / f"tree-{_key(f'{archive.resolve()} {state.st_size} {state.st_mtime_ns}')}"
    if options.archive and not tree.is_dir():
        verify(archive, source.sha256)
    try:
        return unpack(archive, tree)
    except DamagedError as error:
        if options.archive:
            raise
        archive.unlink()
        raise DataError(f"{error}; it was discarded, run again to fetch it anew") from None


def _fetch(source: Source, options: argparse.Namespace, work: Path) -> Path:
    if options.url is None:
        raise DataError(f"{source.name} has no address. {source.by_hand}")
    target = work / f"download-{_key(options.url)}"
    if not target.exists():
        size = source.size or _ask_size(options.url)
        known = f"{size:,} bytes" if size else "not known"
        print(f"  address: {options.url}\n  size: {'about ' * (not source.exact)}{known}")
        _agree(options.yes)
    return download(options.url, target, source.sha256, source.size if source.exact else None)


def _ask_size(url: str) -> int | None:
    """The size that the server names for a file, or None."""
    try:
        with _send(Request(url, headers=HEADERS, method="HEAD"), timeout=20) as response:
            return _describe(response)[1]["size"]
    except UNREACHABLE:
        return None


def _agree(yes: bool) -> None:
    if not yes and not (sys.stdin and sys.stdin.isatty()):
        raise DataError("nothing was downloaded: --yes agrees to the licence and the size above")
    if not yes and input("Download? [y/N] ").strip().lower() not in ("y", "yes"):
        raise DataError("nothing was downloaded")


def _key(text: str) -> str:
    """A short file name that stands for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
