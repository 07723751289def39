"""The registry of published weights: downloads that resume and are verified, checksums that are kept."""

import bz2
import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import socket
import threading
import types

import pytest
import requests
import yaml

from dgutils.errors import UserError
from dgutils.networks import weights

CONTENT = b"PK" + bytes(range(256)) * 9000  # 2.3 MB: more than two blocks


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` with ranges; each number in `breaks` ends one connection after so many bytes."""

    content, tag = CONTENT, '"one"'

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.breaks = [], []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.requests.append(asked)
        if self.path == "/absent.pt":
            return self.send_error(404)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        resumes = asked and self.headers["If-Range"] == server.tag
        body = server.content[start:] if resumes else server.content
        self.send_response(206 if resumes else 200)
        self.send_header("ETag", server.tag)
        if resumes:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.breaks.pop(0)] if server.breaks else body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch, folder):
    """What the registry's entry names is here; between two tries nobody waits."""
    monkeypatch.setattr("random.uniform", lambda *bounds: 0.0)
    with Server() as server:
        enter(monkeypatch, dataclasses.replace(ENTRY, url=f"http://127.0.0.1:{server.server_port}/net.pt"))
        yield server
        server.shutdown()


ENTRY = weights.Published("net", "extractor", "a network", "net.pt", "https://weights.test/net.pt", "MIT", 2.3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DGUTILS_WEIGHTS", str(tmp_path / "weights"))
    enter(monkeypatch, ENTRY)
    return tmp_path / "weights"


def enter(monkeypatch, *entries):
    monkeypatch.setattr(weights, "registry", lambda: {entry.name: entry for entry in entries})


def fetch():
    weights.fetch(["net"])


def test_registry_is_complete():
    names = list(weights.registry())
    assert len(names) == 14 and {"edm-cifar10-32x32-uncond-vp", "discriminator_60", "inception"} <= set(names)
    for entry in weights.registry().values():
        assert entry.url.startswith("https://") and entry.licence and entry.what and entry.megabytes > 0
        assert entry.kind in ("denoiser", "extractor", "discriminator", "inception", "data")
        assert (entry.config is not None) == (entry.kind in ("denoiser", "extractor", "discriminator"))
        assert os.path.splitext(entry.file)[1] in weights._MAGIC
        if not entry.url.startswith(weights.DRIVE):
            assert entry.url.endswith("/" + entry.file)
    assert len({entry.file for entry in weights.registry().values()}) == 14
    assert weights.published("64x64_classifier").clock == "cosine"
    with pytest.raises(UserError, match="no published file 'edm'; there are: edm-cifar10"):
        weights.published("edm")


def test_files_that_a_profile_names(monkeypatch):
    parameters = {"profile": "paper", "score_network": "edm-cifar10-32x32-uncond-vp", "num_steps": 18,
                  "feature_spaces": ["inception", "efficientnet-lite0@128"], "min_times": [0.1],
                  "feature_extractor": "32x32_classifier", "again": "32x32_classifier"}  # fmt: skip
    assert weights.mentioned(parameters) == ["edm-cifar10-32x32-uncond-vp", "inception", "32x32_classifier"]


def test_fetch_verifies_records_and_is_found(folder, server, capsys):
    fetch()
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert weights.find("net") == folder / "net.pt" and (folder / "net.pt").read_bytes() == CONTENT
    assert json.loads((folder / "checksums.json").read_text())["net.pt"]["sha256"] == digest
    assert digest in capsys.readouterr().out
    assert list((folder / "partial").iterdir()) == [] and server.requests == [None]
    fetch()  # nothing more to do
    assert server.requests == [None] and "here already" in capsys.readouterr().out


def test_a_broken_connection_is_resumed(folder, server):
    server.breaks = [3 * 2**19, 2**19]
    fetch()
    assert (folder / "net.pt").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=1572864-", "bytes=2097152-"]


def test_a_download_that_was_given_up_is_resumed_by_the_next_command(folder, server):
    server.breaks = [3 * 2**19, 0, 0, 0]
    with pytest.raises(UserError, match="cannot fetch net.pt .*1572864 bytes.*2304002.*run the same command again"):
        fetch()
    assert not (folder / "net.pt").exists() and not (folder / "checksums.json").exists()
    server.requests.clear()
    fetch()
    assert (folder / "net.pt").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=1572864-"]


def test_two_versions_of_a_file_do_not_mix_within_a_download(folder, server):
    server.breaks, real = [1_500_000], server.finish_request

    def other_version(*arguments):
        real(*arguments)
        server.content, server.tag = b"PK" + CONTENT[::-1], '"two"'

    server.finish_request = other_version
    with pytest.raises(UserError, match="cannot fetch net.pt .*or delete .*partial to begin anew"):
        fetch()
    assert not (folder / "net.pt").exists()


@pytest.mark.parametrize(
    "record, fault",
    [
        ({"sha256": "0" * 64}, "has sha256 [0-9a-f]{16}..., not the 0000000000000000... expected"),
        ({"bytes": 17, "sha256": ""}, "has 2,304,002 bytes, not the 17 expected"),
    ],
)
@pytest.mark.parametrize("stated", [False, True], ids=["recorded", "stated by the registry"])
def test_wrong_checksum_or_size_is_deleted(record, fault, stated, folder, server, monkeypatch):
    if stated:
        fault = "has sha256 .* not the ffffffffffffffff... expected"
        enter(monkeypatch, dataclasses.replace(weights.published("net"), sha256="f" * 64))
    folder.mkdir()
    (folder / "checksums.json").write_text(json.dumps({"net.pt": record}))
    with pytest.raises(UserError, match=fault + ", and was deleted"):
        fetch()
    assert not (folder / "net.pt").exists() and list((folder / "partial").iterdir()) == []


def test_a_web_page_is_no_network(folder, server):
    server.content = b"<!DOCTYPE html>Sorry, too many users have viewed or downloaded this file recently."
    with pytest.raises(UserError, match="begins like a web page"):
        fetch()
    assert not (folder / "net.pt").exists()


def test_a_recorded_checksum_is_enforced(folder, server):
    fetch()
    assert weights.find("net") == folder / "net.pt"
    data = bytearray(CONTENT)
    data[1000] ^= 1
    (folder / "net.pt").write_bytes(data)
    for use in (lambda: weights.find("net"), fetch):
        with pytest.raises(UserError, match="delete it and fetch it again, or, if you replaced it on purpose"):
            use()
    (folder / "net.pt").unlink()
    server.content = bytes(data)
    with pytest.raises(UserError, match="if the publisher changed it, remove its entry from"):
        fetch()
    (folder / "net.pt").write_bytes(CONTENT)
    (folder / "checksums.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        weights.find("net")


def test_a_file_placed_by_hand_is_recorded_at_first_use(folder):
    folder.mkdir()
    (folder / "net.pt").write_bytes(CONTENT)
    assert weights.find("net") == folder / "net.pt" and not (folder / "checksums.json").exists()
    weights.record("net")
    (folder / "net.pt").write_bytes(CONTENT + b"x")
    with pytest.raises(UserError, match=f"has {len(CONTENT) + 1:,} bytes, not the {len(CONTENT):,} expected"):
        weights.find("net")


def test_absent_file_is_one_line_with_where_and_whence(folder, monkeypatch):
    drive = dataclasses.replace(ENTRY, url="https://drive.google.com/drive/folders/x")
    for entry, whence in ((ENTRY, "from https://weights.test/net.pt"), (drive, "a file of https://drive.google.com/")):
        enter(monkeypatch, entry)
        with pytest.raises(UserError, match=f"net.pt is not in {folder}: run .*{whence}") as caught:
            weights.find("net")
        assert "\n" not in str(caught.value)


def test_no_network_and_no_such_file(folder, server, monkeypatch):
    def offline(*arguments, **options):
        try:
            raise socket.gaierror(-2, "Name or service not known")
        except OSError as error:  # as requests wraps it, whom gdown asks
            raise ConnectionError(f"HTTPSConnectionPool: Max retries\nexceeded {'and so on' * 99}") from error

    enter(monkeypatch, dataclasses.replace(ENTRY, url=weights.published("net").url.replace("net.pt", "absent.pt")))
    with pytest.raises(UserError, match="cannot fetch net.pt .404 Client Error"):
        fetch()
    enter(monkeypatch, ENTRY)
    monkeypatch.setattr("gdown.download", offline)
    remedy = ("run the same command again to go on, or delete /.*partial to begin anew, or download it by hand from "
              "https://weights.test/net.pt to /.*net.pt")
    with pytest.raises(UserError, match=r"cannot fetch net.pt \(Name or service not known\): " + remedy) as caught:
        fetch()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["http://127.0.0.1:9/net.pt", "HTTP://weights.test/net.pt", "ftp://weights.test/net.pt"])
def test_a_redirect_that_leaves_https_is_refused(folder, monkeypatch, target):
    class Redirecting(requests.adapters.HTTPAdapter):
        def send(self, request, **options):
            answer = requests.Response()
            answer.status_code, answer.url, answer.request = 302, request.url, request
            answer.headers["Location"], answer.raw = target, io.BytesIO()
            return answer

    monkeypatch.setattr(requests.sessions, "HTTPAdapter", Redirecting)
    monkeypatch.setattr("gdown.download", lambda **source: pytest.fail(f"downloads {source}"))
    enter(monkeypatch, ENTRY)
    with pytest.raises(UserError, match="cannot fetch net.pt .No connection adapters were found for"):
        fetch()
    assert not (folder / "net.pt").exists()


def test_google_drive_through_gdown(folder, monkeypatch):
    import gdown

    calls = []

    @functools.wraps(gdown.download_folder)
    def listing(url, **options):
        calls.append((url, options["skip_download"]))
        return [types.SimpleNamespace(id=i, path=p) for i, p in (("1", "sub/other.pt"), ("2", "sub/net.pt"))]

    def download(id, output, resume, **options):
        assert resume and set(options) <= {"use_cookies", "retries", "timeout"}
        calls.append(id)
        with open(output, "wb") as file:
            file.write(CONTENT)

    url = "https://drive.google.com/drive/folders/abc"
    monkeypatch.setattr(gdown, "download_folder", listing)
    monkeypatch.setattr(gdown, "download", download)
    enter(monkeypatch, dataclasses.replace(ENTRY, url=url))
    weights.fetch(["net"])
    assert calls == [(url, True), "2"] and (folder / "net.pt").read_bytes() == CONTENT
    enter(monkeypatch, dataclasses.replace(ENTRY, url=url, file="moved.pt"))
    with pytest.raises(UserError, match="the folder .*abc lists no moved.pt"):
        weights.fetch(["net"])


def test_a_rehearsal_folder_is_left_alone(folder, server):
    folder.mkdir()
    (folder / "REHEARSAL").touch()
    assert weights.is_rehearsal()
    with pytest.raises(UserError, match="set DGUTILS_WEIGHTS to another folder"):
        fetch()
    assert server.requests == []


def test_the_registry_file_has_only_known_fields():
    fields = {field.name for field in dataclasses.fields(weights.Published)}
    for entry in yaml.safe_load(weights.REGISTRY.read_text()).values():
        assert set(entry) < fields


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_another_archive_in_the_place_of_a_file(folder, pack):
    folder.mkdir()
    (folder / "net.pt").write_bytes(pack(CONTENT))
    with pytest.raises(UserError, match="net.pt begins like a web page, an archive or another format"):
        weights.find("net")
