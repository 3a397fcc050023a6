"""Odd servers and archives: a whole file of the right hash, or exit status 2 and one line."""

import contextlib
import hashlib
import io
import stat
import tarfile
import tempfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import download
import pytest
from damage import damaged, other_json
from download import Source, command_line
from hypothesis import given, settings
from hypothesis import strategies as st
from mvtec_ad import provide

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore:Duplicate name")]
BODY = bytes(range(256)) * 40
NOTE = '{"etag": "\\"one\\"", "modified": null, "size": 10240}'  # of a download that has begun
SIZES = st.sampled_from(["0", "-1", "x", "", "10240", "10241", "99999999999999999999", "1e3"])
RANGES = ["bytes 0-10239/10240", "bytes 5000-10239/10240", "bytes 1-2/*", "bytes", "x", "bytes 5-/"]
HEADERS = {
    "Content-Length": SIZES,
    "Content-Range": st.sampled_from(RANGES),
    "ETag": st.sampled_from(['"one"', '"two"', 'W/"one"', "", "x"]),
    "Last-Modified": st.sampled_from(["Mon, 02 Nov 2026", "", "never"]),
    "Location": st.sampled_from(["/file", "ftp://x/y", "http://[", "//", "", "file:///etc/passwd"]),
    "Transfer-Encoding": st.sampled_from(["chunked", "gzip", "x"]),
    "Content-Encoding": st.sampled_from(["gzip", "x"]),
}
STATUS = [200, 200, 200, 206, 204, 301, 302, 304, 308, 401, 404, 416, 429, 500, 999]
ANSWERS = st.tuples(
    st.sampled_from(STATUS),
    st.lists(st.sampled_from(sorted(HEADERS)), max_size=3),
    st.sampled_from([BODY, BODY[5000:], BODY[:5000], BODY + b"x", b"", b"5\r\nhello\r\n0\r\n\r\n"]),
    st.booleans(),  # whether the line and the headers are damaged, too
)
NAMES = ["", ".", "..", "/", "a", "A", "a/b", "../x", "/etc/x", "a/../../x", "C:\\x", "\\x"]
NAMES += ["a\\..\\x", "a" * 300, "x/" * 600, "é", "e\u0301", "a\n", "a ", "a.", "nul", "a/"]
NAMES = st.sampled_from([*NAMES, "__MACOSX/._a", "\udcff"])


class Handler(BaseHTTPRequestHandler):
    """Says what the server has been told to say, first things first, and the last one for ever."""

    def do_GET(self):
        answers = self.server.answers
        self.wfile.write(answers.pop(0) if len(answers) > 1 else answers[0])
        self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *_):
        """Tests want no log."""


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@st.composite
def answers(draw) -> bytes:
    """What a server says, from the first line to the last byte."""
    status, names, body, broken = draw(ANSWERS)
    lines = [f"HTTP/1.1 {status} Words"] + [f"{n}: {draw(HEADERS[n])}" for n in names]
    head = "\r\n".join([*lines, "", ""]).encode()
    return (draw(damaged(head)) if broken else head) + body


@st.composite
def archives(draw) -> bytes:
    """A zip or tar archive with odd members, some of them damaged."""
    file, kind = io.BytesIO(), draw(st.sampled_from(["zip", "w", "w:gz", "w:xz"]))
    members = draw(st.lists(NAMES | st.text(max_size=8), max_size=4))
    with contextlib.suppress(UnicodeError, ValueError):  # no name that this kind can hold
        if kind == "zip":
            with zipfile.ZipFile(file, "w") as archive:
                for name in members:
                    info = zipfile.ZipInfo(name)
                    modes = [stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, 0]
                    info.external_attr = draw(st.sampled_from(modes)) << 16
                    archive.writestr(info, draw(st.binary(max_size=50)))
        else:
            with tarfile.open(fileobj=file, mode=kind) as archive:
                for name in members:
                    info = tarfile.TarInfo(name)
                    info.type = draw(st.sampled_from([b"0", b"0", b"1", b"2", b"3", b"5", b"6"]))
                    info.linkname, info.size = draw(NAMES), 9 * (info.type == b"0")
                    archive.addfile(info, io.BytesIO(b"some text"))
    return draw(damaged(file.getvalue()))


def run(out: Path, source: Source, *words: str) -> int:
    """A script's end: 0, or 2 with one line and nothing under the final name."""
    options = command_line(source, "Fetch it.").parse_args(["--out", str(out), "--yes", *words])
    said = io.StringIO()

    def lay_out(tree, target, place):
        """Nothing is laid out; what was unpacked is looked at."""
        inside = [path.resolve() for path in tree.rglob("*")]
        assert all(tree.resolve() in path.parents for path in inside)
        (target / "done").touch()

    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            provide(source, lay_out, lambda folder: None, options)
    except SystemExit as end:
        assert end.code == 2 and not out.exists()
        *bars, line = said.getvalue().rstrip("\n").split("\n")
        assert "error: " in line and "Traceback" not in said.getvalue()
        return 2
    return 0


@settings.get_profile("fuzz")
@given(
    st.lists(answers(), min_size=1, max_size=3),
    st.sampled_from([None, len(BODY)]),
    st.none() | st.just(NOTE) | other_json(NOTE),
)
def test_any_answers_end_in_the_right_file_or_in_one_line(server, said, size, note):
    """The same command twice: what the first one left must not spoil the second."""
    server.answers = said
    url, digest = f"http://127.0.0.1:{server.server_port}/file", hashlib.sha256(BODY).hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "file"
        if note is not None:  # half of it is there
            target.with_name("file.part").write_bytes(BODY[:5000])
            target.with_name("file.json").write_text(note)
        for _ in range(2):
            try:
                download.download(url, target, digest, size, timeout=5)
                assert target.read_bytes() == BODY
            except download.DataError as error:
                assert "\n" not in str(error) and not target.exists()


@settings.get_profile("fuzz")
@given(archives())
def test_any_archive_is_unpacked_into_its_folder_or_refused_in_one_line(data):
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / "inside"
        inside.mkdir()
        (archive := inside / "archive").write_bytes(data)
        run(inside / "out", Source("Odd", "odd", ("none",)), "--archive", str(archive))
        assert [path.name for path in Path(folder).iterdir()] == ["inside"]
        assert {path.name for path in inside.iterdir()} <= {"archive", "out"}
