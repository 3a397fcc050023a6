"""Downloads that go on where they stopped, and archives that cannot write outside their folder."""

import contextlib
import hashlib
import io
import shutil
import stat
import tarfile
import threading
import unicodedata
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from http.client import BadStatusLine
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import Request

import download
import numpy as np
import pytest
from download import DamagedError, DataError

BODY = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)
HASH = hashlib.sha256(BODY).hexdigest()
HALF = 150_000


class Server(ThreadingHTTPServer):
    """Serves one file, and misbehaves as its attributes say."""

    daemon_threads = True

    def __init__(self, body=BODY):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/file"
        self.body, self.status, self.etag, self.modified = body, 200, '"one"', "Mon, 02 Nov 2026"
        self.ranges = self.if_range = True  # False: ignores this header
        self.shift = 0  # the bytes begin so much later than was asked for
        self.length = True  # False: names none; a number: claims that the file has so many bytes
        self.location = None  # where it redirects to, with a status that says so
        self.cut = None  # the connection ends after so many bytes of a body
        self.silence = threading.Event()  # a cut connection ends when this is set
        self.silence.set()
        self.requests = []  # the Range header of each GET
        self.sent = 0  # bytes of bodies that went out

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.005,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.silence.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        """Tests want no log."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.server.requests.append(self.headers["Range"])
        server, body = self.server, self.answer()[: self.server.cut]
        with contextlib.suppress(ConnectionError):  # nobody wants more
            for start in range(0, len(body), 10_000):
                server.sent += self.wfile.write(body[start : start + 10_000])
        if server.cut is not None:
            self.wfile.flush()
            server.silence.wait(20)

    def answer(self):
        server, span = self.server, self.headers["Range"]
        size = server.length if type(server.length) is int else len(server.body)
        fresh = self.headers["If-Range"] in (None, server.etag, server.modified)
        partly = span is not None and server.ranges and (fresh or not server.if_range)
        start = int(span[6:-1]) + server.shift if partly else 0
        status = server.status if server.status != 200 else 206 if partly else 200
        status = 416 if partly and start >= len(server.body) else status
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if status in (200, 206) and server.length is not False:
            self.send_header("Content-Length", str(size - start))
        facts = {
            "ETag": server.etag,
            "Last-Modified": server.modified,
            "Location": server.location,
        }
        for name, value in facts.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        return server.body[start:] if status in (200, 206) else b""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        yield server


@pytest.fixture
def broken(server, tmp_path):
    """A download that broke off in the middle, and the server, which is well again."""
    server.cut = HALF
    with pytest.raises(DataError, match="ended after 150,000 of 300,000 bytes; run again"):
        download.download(server.url, tmp_path / "file", HASH)
    server.cut = None
    server.requests.clear()
    return server


def names(folder):
    """Everything in a folder, hidden things too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------- download


def test_file_arrives_whole_and_a_second_run_asks_for_nothing(server, tmp_path):
    path = download.download(server.url, tmp_path / "new/file", HASH, len(BODY))
    assert path.read_bytes() == BODY and server.requests == [None]
    assert download.download(server.url, path, HASH) == path
    assert server.requests == [None]


def test_broken_download_keeps_its_bytes_and_only_the_rest_is_asked_for(broken, tmp_path):
    assert names(tmp_path) == {"file.part", "file.json"}
    assert (tmp_path / "file.part").read_bytes() == BODY[:HALF]
    assert download.download(broken.url, tmp_path / "file", HASH).read_bytes() == BODY
    assert broken.requests == ["bytes=150000-"]


def test_server_that_ignores_ranges_is_read_from_the_beginning(broken, tmp_path, capsys):
    broken.ranges = False
    assert download.download(broken.url, tmp_path / "file", HASH).read_bytes() == BODY
    assert broken.requests == ["bytes=150000-"]
    assert "beginning anew" in capsys.readouterr().out


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize(
    "change", [{"etag": '"two"'}, {"modified": "Tue, 03 Nov 2026"}, {"body": OTHER + b"more"}]
)
def test_file_that_changed_between_two_runs_is_never_mixed_with_the_old_one(
    broken, tmp_path, change, if_range
):
    vars(broken).update({"body": OTHER, "if_range": if_range, **change})
    assert download.download(broken.url, tmp_path / "file").read_bytes() == broken.body


def test_file_that_became_shorter_than_what_is_here_is_fetched_anew(broken, tmp_path):
    broken.body, broken.if_range = b"short", False
    assert download.download(broken.url, tmp_path / "file").read_bytes() == b"short"
    assert broken.requests == ["bytes=150000-", None]


def test_answer_with_other_bytes_than_asked_for_is_not_appended(broken, tmp_path):
    broken.shift = 10
    assert download.download(broken.url, tmp_path / "file", HASH).read_bytes() == BODY
    assert broken.requests == ["bytes=150000-", None]


def test_server_that_says_nothing_of_its_file_is_never_resumed(server, tmp_path):
    server.etag = server.modified = None
    server.length, server.cut = False, HALF  # the end of the connection looks like that of the file
    with pytest.raises(DataError, match="expected " + HASH):
        download.download(server.url, tmp_path / "file", HASH)
    assert not (tmp_path / "file").exists()
    server.cut = None
    assert download.download(server.url, tmp_path / "file", HASH).read_bytes() == BODY
    assert server.requests == [None, None]


def test_weak_etag_is_not_sent_as_a_condition_but_still_compared(broken, tmp_path):
    (tmp_path / "file.json").write_text('{"etag": "W/1", "modified": null, "size": 300000}')
    broken.etag, broken.body = "W/2", OTHER
    assert download.download(broken.url, tmp_path / "file").read_bytes() == OTHER
    assert broken.requests == ["bytes=150000-", None]


def test_body_without_a_length_is_stopped_soon_after_the_known_size(server, tmp_path):
    server.length, server.body = False, BODY + bytes(30_000_000)
    with pytest.raises(DataError, match="sends more than the 300,000 bytes .* run again"):
        download.download(server.url, tmp_path / "file", HASH, len(BODY))
    assert server.sent < 25_000_000 and names(tmp_path) == {"file.json"}
    server.body = BODY
    assert download.download(server.url, tmp_path / "file", HASH).read_bytes() == BODY


def test_body_without_a_length_that_ends_before_the_known_size_is_kept(server, tmp_path):
    server.length, server.cut = False, HALF
    with pytest.raises(DataError, match="ended after 150,000 of 300,000 bytes; run again"):
        download.download(server.url, tmp_path / "file", HASH, len(BODY))
    server.cut = None
    download.download(server.url, tmp_path / "file", HASH, len(BODY))
    assert server.requests == [None, "bytes=150000-"]


def test_length_that_is_too_long_counts_as_broken_off(server, tmp_path):
    server.length = 400_000
    with pytest.raises(DataError, match="ended after 300,000 of 400,000 bytes"):
        download.download(server.url, tmp_path / "file", HASH)
    assert (tmp_path / "file.part").read_bytes() == BODY and not (tmp_path / "file").exists()
    server.length = True
    assert download.download(server.url, tmp_path / "file", HASH).read_bytes() == BODY


@pytest.mark.parametrize("lie", [{"length": HALF}, {"body": OTHER}])
def test_short_or_wrong_file_is_found_out_by_its_hash_and_fetched_anew(server, tmp_path, lie):
    vars(server).update(lie)
    got = hashlib.sha256(server.body[: lie.get("length")]).hexdigest()
    with pytest.raises(DataError, match=f"SHA-256 {got}, expected {HASH}; .* discarded, run again"):
        download.download(server.url, tmp_path / "file", HASH)
    assert names(tmp_path) == {"file.json"}
    server.length, server.body = True, BODY
    assert download.download(server.url, tmp_path / "file", HASH).read_bytes() == BODY


def test_other_size_than_the_known_one_is_refused_before_the_transfer(server, tmp_path):
    with pytest.raises(DataError, match="offers 300,000 bytes where 299,999 are expected"):
        download.download(server.url, tmp_path / "file", HASH, 299_999)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("status, hint", [(404, "may have moved"), (503, "try again later")])
def test_refusal_of_the_server_says_what_to_do_and_loses_nothing(broken, tmp_path, status, hint):
    broken.status = status
    with pytest.raises(DataError, match=f"answers {status} .*{hint}.*--url.*--archive"):
        download.download(broken.url, tmp_path / "file", HASH)
    assert (tmp_path / "file.part").read_bytes() == BODY[:HALF]
    broken.status = 200
    assert download.download(broken.url, tmp_path / "file", HASH).read_bytes() == BODY
    assert broken.requests == ["bytes=150000-"] * 2


def test_server_that_is_not_there_loses_nothing(broken, tmp_path):
    with Server() as gone:
        pass
    with pytest.raises(DataError, match="cannot reach .*refused"):
        download.download(gone.url, tmp_path / "file", HASH)
    assert (tmp_path / "file.part").read_bytes() == BODY[:HALF]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (BadStatusLine("HTTP/1\t1 200 \x1b[2J\r\n"), r"HTTP/1 1 200  \[2J"),
        (OverflowError("cannot fit 'int'"), "cannot fit 'int'"),  # a chunk of so many bytes
    ],
)
def test_what_a_broken_server_says_stays_on_the_line_of_the_refusal(
    monkeypatch, tmp_path, error, words
):
    def answer(*_):
        raise error

    monkeypatch.setattr(download, "_send", answer)
    with pytest.raises(DataError, match=f"^cannot reach http://x/y: {words}$"):
        download.download("http://x/y", tmp_path / "file")


def test_silent_server_is_given_up_and_all_that_it_sent_is_kept(server, tmp_path):
    server.cut = 1000
    server.silence.clear()
    with pytest.raises(DataError, match="after 1,000 of 300,000 bytes .timed out.; run again"):
        download.download(server.url, tmp_path / "file", HASH, timeout=0.2)
    assert (tmp_path / "file.part").read_bytes() == BODY[:1000]


def test_second_download_of_a_file_is_refused_while_the_first_one_goes_on(server, tmp_path):
    server.cut = HALF
    server.silence.clear()
    arguments = server.url, tmp_path / "file", HASH
    with ThreadPoolExecutor() as pool:
        first = pool.submit(download.download, *arguments)
        while sum(path.stat().st_size for path in tmp_path.glob("*.part")) < HALF:
            assert not first.done()
        with pytest.raises(DataError, match="another run downloads .*file"):
            download.download(*arguments)
        server.cut = None
        server.silence.set()
        with pytest.raises(DataError, match="run again to go on"):
            first.result()
    assert download.download(*arguments).read_bytes() == BODY
    assert server.requests == [None, "bytes=150000-"] and names(tmp_path) == {"file", "file.json"}


def test_lock_of_a_run_that_was_killed_does_not_count(server, tmp_path):
    (tmp_path / "file.lock").touch()
    assert download.download(server.url, tmp_path / "file", HASH).read_bytes() == BODY


@pytest.mark.parametrize("scheme", ["ftp", "file", "data"])
def test_redirect_to_anything_but_http_is_refused(server, tmp_path, scheme):
    server.status, server.location = 302, f"{scheme}://127.0.0.1/etc/hostname"
    with pytest.raises(DataError, match=f"302 .*'{scheme}://127.0.0.1/etc/hostname'"):
        download.download(server.url, tmp_path / "file")
    assert names(tmp_path) == set() and download._ask_size(server.url) is None


def test_redirect_to_another_http_address_is_followed(server, tmp_path):
    with Server() as other:
        other.status, other.location = 302, server.url
        assert download.download(other.url, tmp_path / "file", HASH).read_bytes() == BODY


@pytest.mark.parametrize("start, end", [("http", "https"), ("https", "https")])
def test_redirect_may_lead_to_https(start, end):
    request = Request(f"{start}://here/file")
    answer = 302, "Found", Message(), f"{end}://there/file"
    assert download.Redirects().redirect_request(request, None, *answer).type == "https"


def test_redirect_from_https_to_http_is_refused():
    answer = 302, "Found", Message(), "http://there/file"
    with pytest.raises(HTTPError, match="leads to 'http://there/file', which is refused"):
        download.Redirects().redirect_request(Request("https://here/file"), None, *answer)


def test_bytes_that_all_arrived_before_a_run_was_killed_are_not_asked_for_again(broken, tmp_path):
    (tmp_path / "file.part").write_bytes(BODY)
    assert download.download(broken.url, tmp_path / "file", HASH).read_bytes() == BODY
    assert broken.requests == []


NOTES = ["", "{", "[]", '{"etag": 1}', '{"etag": 1, "modified": null, "size": 9}', "[" * 100_000]
NOTES += ['{"etag": "x", "modified": [], "size": 9}', '{"etag": "x", "modified": "", "size": "9"}']


@pytest.mark.parametrize("note", NOTES, ids=range(len(NOTES)))
def test_bytes_whose_note_is_damaged_are_not_trusted(broken, tmp_path, note):
    (tmp_path / "file.json").write_text(note)
    assert download.download(broken.url, tmp_path / "file", HASH).read_bytes() == BODY
    assert broken.requests == [None]


def test_local_file_is_no_address(tmp_path):
    with pytest.raises(DataError, match="does not begin with http"):
        download.download("file:///etc/hostname", tmp_path / "file")


def test_full_disk_is_noticed_before_anything_is_written(server, tmp_path, monkeypatch):
    disk = namedtuple("usage", "free")(2 * len(BODY) - 1)  # the archive, and what is in it
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    with pytest.raises(DataError, match="600,000 bytes are needed .* has 599,999 free"):
        download.download(server.url, tmp_path / "file", HASH)
    assert names(tmp_path) == set()


# ---------------------------------------------------------------------------------------- unpack

FORMATS = ("tar", "tar.gz", "tar.xz", "zip")


def pack(path, members):
    """Write an archive of (name, bytes), or of TarInfo and ZipInfo objects as they are."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in members:
                file.writestr(name, data)
        return path
    with tarfile.open(path, f"w:{path.suffix[1:].replace('tar', '')}") as file:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def special(name, kind, link=""):
    """A member of a tar archive that is no file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b""


def unix_mode(name, mode):
    """A member of a zip archive that says it is no file."""
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info, b"/etc/hostname"


@pytest.fixture
def refused(tmp_path):
    """A function that expects a refusal, and that no trace of the archive is left anywhere."""

    def refused(archive, match, error=DataError, **options):
        before = names(tmp_path)
        with pytest.raises(error, match=match):
            download.unpack(archive, tmp_path / "deep/er/tree", **options)
        assert names(tmp_path) - before <= {"deep", "deep/er"}

    return refused


@pytest.mark.parametrize("ending", FORMATS)
def test_archive_comes_out_as_it_went_in_and_a_finished_one_is_left_alone(tmp_path, ending):
    members = [("top/a.bin", BODY), ("top/empty", b""), ("./b c é.txt", b"text")]
    archive = pack(tmp_path / f"a.{ending}", members)
    tree = download.unpack(archive, tmp_path / "tree")
    assert names(tree) == {"top", "top/a.bin", "top/empty", "b c é.txt"}
    assert all((tree / name).read_bytes() == data for name, data in members)
    archive.unlink()
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    assert download.unpack(archive, tree) == tree
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*")} == before


@pytest.mark.parametrize("ending", ["tar", "zip"])
@pytest.mark.parametrize(
    "name", ["../evil", "/abs", "a/../../evil", "..\\evil", "C:\\evil", "a/.. /b"]
)
def test_name_that_leads_out_of_the_folder_is_refused(tmp_path, refused, ending, name):
    archive = pack(tmp_path / f"a.{ending}", [("good", b"1"), (name, b"2")])
    refused(archive, r"is refused: it would leave")


@pytest.mark.parametrize("ending", ["tar", "zip"])
@pytest.mark.parametrize("name", ["a" * 256, "é" * 128, "a/" * 400 + "b" * 201])
def test_name_that_no_disk_takes_is_refused(tmp_path, refused, ending, name):
    archive = pack(tmp_path / f"a.{ending}", [(name, b"1")])
    refused(archive, f"'{name[:40]}'... is refused: a name of .* bytes is too long")


@pytest.mark.parametrize("ending", ["tar", "zip"])
@pytest.mark.parametrize("name", ["", ".", ".//."])
def test_file_without_a_name_is_refused(tmp_path, refused, ending, name):
    archive = pack(tmp_path / f"a.{ending}", [("named", b"1")])
    if ending == "tar":
        pack(archive, [("named", b"1"), (name, b"2")])
    else:  # zipfile writes none with an empty name
        data = archive.read_bytes().replace(b"named", name.encode().ljust(5, b"\0"))
        archive.write_bytes(data)
    refused(archive, "is refused: one of its files has no name")


@pytest.mark.parametrize("ending", ["tar", "zip"])
def test_folder_that_stands_for_the_whole_archive_is_no_refusal(tmp_path, ending):
    top = special("./", tarfile.DIRTYPE) if ending == "tar" else ("./", b"")
    archive = pack(tmp_path / f"a.{ending}", [top, ("./file", b"1")])
    assert names(download.unpack(archive, tmp_path / "tree")) == {"file"}


@pytest.mark.parametrize(
    "members, match",
    [
        ([special("out", tarfile.SYMTYPE, "../..")], "'out' is a symbolic link"),
        ([special("a", tarfile.SYMTYPE, "/tmp"), ("a/file", b"1")], "'a' is a symbolic link"),
        ([("a", b"1"), special("hard", tarfile.LNKTYPE, "a")], "'hard' is a hard link"),
        ([special("hard", tarfile.LNKTYPE, "/etc/hostname")], "'hard' is a hard link"),
        ([special("null", tarfile.CHRTYPE)], "'null' is a device"),
        ([special("disk", tarfile.BLKTYPE)], "'disk' is a device"),
        ([special("pipe", tarfile.FIFOTYPE)], "'pipe' is a device or another special"),
    ],
)
def test_links_and_devices_in_a_tar_archive_are_refused(tmp_path, refused, members, match):
    refused(pack(tmp_path / "a.tar", members), match)


@pytest.mark.parametrize("mode, kind", [(stat.S_IFLNK, "a symbolic link"), (stat.S_IFIFO, "a dev")])
def test_links_and_devices_in_a_zip_archive_are_refused(tmp_path, refused, mode, kind):
    refused(pack(tmp_path / "a.zip", [unix_mode("x", mode | 0o777)]), f"'x' is {kind}")


@pytest.mark.parametrize("ending", ["tar", "zip"])
@pytest.mark.parametrize(
    "second", ["a/é", "A/É", "./a//é", unicodedata.normalize("NFD", "a/é"), "a/é/below", "a"]
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_collide_on_any_disk_are_refused(tmp_path, refused, ending, second):
    archive = pack(tmp_path / f"a.{ending}", [("a/é", b"1"), (second, b"2")])
    refused(archive, "collides with another member|below another member that is a file")


@pytest.mark.parametrize("ending", FORMATS)
def test_bomb_is_stopped_at_the_limit_before_it_is_written(tmp_path, refused, monkeypatch, ending):
    archive = pack(tmp_path / f"a.{ending}", [("small", b"1"), ("zeros", bytes(5_000_000))])
    refused(archive, "more than 5,000,000 bytes, at 'zeros'", limit=5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(4_000_000))
    refused(archive, "more than 4,000,000 bytes, at 'zeros'")


def test_member_larger_than_it_says_is_refused(tmp_path, refused):
    archive = pack(tmp_path / "a.zip", [("zeros", bytes(100_000))])
    data = archive.read_bytes()
    assert data.count((100_000).to_bytes(4, "little")) == 2  # before the member, and in the table
    archive.write_bytes(data.replace((100_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    refused(archive, "damaged", DamagedError, limit=1000)


@pytest.mark.parametrize("ending", FORMATS)
def test_truncated_archive_is_refused_wherever_it_ends(tmp_path, refused, ending):
    archive = pack(tmp_path / f"a.{ending}", [("a", BODY[:3000]), ("b", b"2"), ("c", BODY[:700])])
    data = archive.read_bytes()
    end = 512 * 11 if ending == "tar" else len(data) - 1  # a tar archive is filled up with zeros
    for cut in [*range(1, end, 501), end]:
        archive.write_bytes(data[:cut])
        refused(archive, "damaged or no zip or tar", DamagedError)


@pytest.mark.parametrize("data", [b"", b"PK", b"Rar!\x1a\x07", b"<html>not found</html>" * 99])
def test_file_that_is_no_archive_is_named(tmp_path, refused, data):
    (tmp_path / "a.rar").write_bytes(data)
    refused(tmp_path / "a.rar", "a.rar is damaged or no zip or tar archive", DamagedError)


def test_random_damage_ends_in_an_error_or_in_the_right_bytes(tmp_path):
    rng, members = np.random.default_rng(0), [("a/b", BODY[:2000]), ("c", b"2" * 600)]
    archives = [pack(tmp_path / f"a.{ending}", members) for ending in FORMATS[1:]]
    for i, whole in enumerate([archive.read_bytes() for archive in archives] * 30):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        archives[i % 3].write_bytes(bytes(data))
        try:
            tree = download.unpack(archives[i % 3], tmp_path / f"tree{i}")
        except (ValueError, OSError):
            assert not (tmp_path / f"tree{i}").exists()
        else:
            files = [path.read_bytes() for path in tree.rglob("*") if path.is_file()]
            assert sorted(files) == sorted(data for _, data in members)
