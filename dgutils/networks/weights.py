"""Published weights: what there is, where it comes from, and whether the file at hand is the right one.

`assets/registry.yaml` describes the files; they lie in `paths.weights_dir()`, fetched or put there by hand. Only
`fetch` touches the network. A file's sha256 is recorded in `checksums.json` beside it when it is first fetched or
used, and enforced from then on. A folder with a file REHEARSAL holds random stand-ins (tests/standins.py).
"""

import functools
import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from tqdm import tqdm

from dgutils.errors import UserError
from dgutils.paths import weights_dir

REGISTRY = Path(__file__).resolve().parent.parent / "assets" / "registry.yaml"
REHEARSAL = "REHEARSAL"
_MAGIC = {".pkl": (b"\x80",), ".pt": (b"PK", b"\x80"), ".npz": (b"PK",)}  # \x80: a pickle; PK: a zip archive
_PACKED = (("tar", 257, b"ustar"), ("gzip", 0, b"\x1f\x8b"), ("bzip2", 0, b"BZh"), ("xz", 0, b"\xfd7zXZ"),
           ("7z", 0, b"7z\xbc\xaf"), ("rar", 0, b"Rar!"))  # fmt: skip


@dataclass(frozen=True)
class Published:
    """One file of the registry."""

    name: str
    kind: str  # denoiser, extractor, discriminator, inception or data
    what: str
    file: str
    url: str  # of the file, or of the Google Drive folder that has it
    licence: str
    megabytes: float
    config: dict | None = None  # of its network, where that is one of ours
    clock: str = "linear"  # or "cosine", the schedule by which its network reads time (noise.vp_to_cosine_time)
    bytes: int | None = None  # enforced where known, as is
    sha256: str | None = None

    @property
    def path(self) -> Path:
        return weights_dir() / self.file


@dataclass(frozen=True)
class Status:
    """A file of the registry on this machine; state: absent, verified, unrecorded (its first use), altered."""

    published: Published
    state: str
    bytes: int  # on disk; of an absent file: known or estimated


@functools.cache
def registry() -> dict[str, Published]:
    """All published files by name."""
    return {name: Published(name, **fields) for name, fields in yaml.safe_load(REGISTRY.read_text()).items()}


def published(name: str) -> Published:
    """The registry's entry `name`. Raises UserError, naming those that exist."""
    if name not in registry():
        raise UserError(f"no published file '{name}'; there are: {', '.join(registry())}")
    return registry()[name]


def mentioned(parameters: dict) -> list[str]:
    """The published files that a profile's parameters name, in their order."""
    values = [v for value in parameters.values() for v in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(v for v in values if isinstance(v, str) and v in registry()))


def is_rehearsal() -> bool:
    """Whether the weights folder holds random stand-ins."""
    return (weights_dir() / REHEARSAL).exists()


@contextmanager
def writing(path: Path):
    """Whoever cannot write `path`, below the weights folder, is told what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): set DGUTILS_WEIGHTS to a folder where you can; "
                        "links to the files will do") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader sees the old file or the whole new one, also if several processes write."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file, computed once while the file stays the same by its inode, size and time of change."""
    return _sha256(path, (stat := path.stat()).st_ino, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _sha256(path, inode, size, changed):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _records() -> dict:
    path = weights_dir() / "checksums.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): restore it, or delete it to record anew") from error


def _known(entry: Published) -> dict:
    """The size and sha256 that a file must have, as far as the registry or an earlier use tells."""
    stated = {"bytes": entry.bytes, "sha256": entry.sha256}
    return _records().get(entry.file, {}) | {key: value for key, value in stated.items() if value is not None}


def packed(path: Path) -> str | None:
    """What a file is if it is packed and has to be unpacked first, in words; None for others."""
    with open(path, "rb") as file:
        start = file.read(262)
    if start.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if Path(name).suffix in _MAGIC and
                      Path(name).name not in ("data.pkl", "constants.pkl")]  # those are torch's own  # fmt: skip
        return f"is a zip that holds {', '.join(inside[:3])}" if inside else None
    return next((f"is a {kind} archive" for kind, at, magic in _PACKED if start[at:].startswith(magic)), None)


def _difference(entry: Published, path: Path) -> str | None:
    """What is wrong with a file, in words; None if nothing is known to be."""
    known, size = _known(entry), path.stat().st_size
    if archive := packed(path):
        return archive
    with open(path, "rb") as file:
        if not file.read(2).startswith(_MAGIC[Path(entry.file).suffix]):
            return f"begins like a web page or another format, not like a {Path(entry.file).suffix} file"
    if size != known.get("bytes", size):
        return f"has {size:,} bytes, not the {known['bytes']:,} expected"
    if sha256_of(path) != known.get("sha256", sha256_of(path)):
        return f"has sha256 {sha256_of(path)[:16]}..., not the {known['sha256'][:16]}... expected"
    return None


def record(name: str) -> None:
    """Remember a file's size and sha256, to be enforced from now on. Call it when the file has proved readable."""
    entry, records, path = published(name), _records(), weights_dir() / "checksums.json"
    if entry.file not in records:
        size, digest = entry.path.stat().st_size, sha256_of(entry.path)
        records[entry.file] = {"bytes": size, "sha256": digest, "url": entry.url}
        with writing(path):
            write_whole(path, (json.dumps(records, indent=1, sort_keys=True) + "\n").encode())


def find(name: str) -> Path:
    """The file of `name`, checked. Raises UserError if it is absent or altered, saying how to get it."""
    entry = published(name)
    if not entry.path.is_file():
        for archive in filter(zipfile.is_zipfile, weights_dir().glob("*.zip")):
            if entry.file in [Path(inside).name for inside in zipfile.ZipFile(archive).namelist()]:
                raise UserError(f"{archive} holds {entry.file}: unpack it there, so that it is {entry.path}")
        where = "a file of" if _is_drive(entry.url) else "from"
        raise UserError(f"{entry.file} is not in {weights_dir()}: run `python -m dgutils fetch {name}`, "
                        f"or download it by hand ({where} {entry.url}) and put it there")
    if archive := packed(entry.path):
        raise UserError(f"{entry.path} {archive}: unpack it, and put {entry.file} itself in its place")
    if difference := _difference(entry, entry.path):
        raise UserError(f"{entry.path} {difference}: delete it and fetch it again, or, if you replaced it on "
                        f"purpose, remove its entry from {weights_dir() / 'checksums.json'}")
    return entry.path


def status(names: Iterable[str]) -> list[Status]:
    """What is here, and what a fetch would bring. Touches no network."""

    def one(entry):
        known = _known(entry)
        if not entry.path.is_file():
            return Status(entry, "absent", known.get("bytes") or int(entry.megabytes * 1e6))
        intact = "verified" if "sha256" in known else "unrecorded"
        return Status(entry, "altered" if _difference(entry, entry.path) else intact, entry.path.stat().st_size)

    return [one(published(name)) for name in names]


def _is_drive(url: str) -> bool:
    return url.startswith("https://drive.google.com/")


def _https(url):
    if not url.startswith("https://"):
        raise UserError(f"{url} is not https: weights are fetched over https only")
    return url


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, fp, code, msg, headers, newurl):
        return super().redirect_request(request, fp, code, msg, headers, _https(newurl))


def _open(url: str, headers: dict):
    """A response whose whole way is https."""
    request = urllib.request.Request(_https(url), headers={"Accept-Encoding": "identity"} | headers)
    return urllib.request.build_opener(_HttpsOnly).open(request, timeout=60)


def _from_url(url: str, partial: Path, open_url: Callable) -> None:
    """Download with as many connections as it takes, while each brings something; goes on from a partial file.

    The server's tag (ETag or date) is kept beside it, so that two versions never mix.
    """
    tag_file = partial.with_name(partial.name + ".tag")
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        tag = tag_file.read_text() if tag_file.exists() else ""
        try:
            with open_url(url, {"Range": f"bytes={before}-", "If-Range": tag} if before and tag else {}) as response:
                start = before if response.status == 206 else 0
                tag_file.write_text(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
                length = response.headers.get("Content-Length")
                total = start + int(length) if length else None
                bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=partial.name)
                with open(partial, "ab" if start else "wb") as file, bar:
                    while block := response.read(1 << 20):
                        bar.update(file.write(block))
                    file.flush()
                    os.fsync(file.fileno())
            if total not in (None, size := partial.stat().st_size):
                raise ConnectionError(f"the connection broke at {size:,} of {total:,} bytes")
            return tag_file.unlink()
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            partial.unlink()  # 416: there is nothing beyond what we have, so that is not this file
        except (OSError, http.client.HTTPException):
            if not partial.exists() or partial.stat().st_size <= before:
                raise


def _from_drive(entry: Published, partial: Path) -> None:
    """A file of a public Google Drive folder, through the gdown library, which resumes too."""
    import gdown

    listed = gdown.download_folder(entry.url, skip_download=True, quiet=True, use_cookies=False)
    ids = [file.id for file in listed if Path(file.path).name == entry.file]
    if not ids:
        raise FileNotFoundError(f"the folder {entry.url} lists no {entry.file}")
    gdown.download(id=ids[0], output=str(partial), resume=True, use_cookies=False, retries=3)


def _reason(error: Exception) -> str:
    """Why a file was not fetched, on one line: the system's own words, if it is the system that refused first."""
    first = error
    while first.__context__:
        first = first.__context__
    words = first.strerror if isinstance(first, OSError) and first.strerror else error
    return " ".join(str(words).split())[:200]


def fetch(names: Iterable[str], open_url: Callable = _open) -> None:
    """Bring the named files into the weights folder: https only, resumed, verified, renamed when whole.

    open_url(url, headers) -> response is there for tests. Raises UserError, which says what to do by hand.
    """
    if is_rehearsal():
        raise UserError(f"{weights_dir()} holds a rehearsal's stand-ins: set DGUTILS_WEIGHTS to another folder")
    for entry in [published(name) for name in names]:
        if entry.path.is_file():
            print(f"{find(entry.name)}: here already")
            continue
        partial = weights_dir() / "partial" / entry.file
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            _from_drive(entry, partial) if _is_drive(entry.url) else _from_url(entry.url, partial, open_url)
            if not (difference := _difference(entry, partial)):
                os.replace(partial, entry.path)
        except UserError:
            raise
        except Exception as error:  # urllib's, gdown's and requests' are a dozen types; all mean: not fetched
            raise UserError(f"cannot fetch {entry.file} ({_reason(error)}): run the same command again to go on, or "
                            f"download it by hand from {entry.url} to {entry.path}") from error
        if difference:
            partial.unlink()
            raise UserError(f"what {entry.url} sent for {entry.file} {difference}, and was deleted: try again; if the "
                            f"publisher changed it, remove its entry from {weights_dir() / 'checksums.json'}")
        record(entry.name)
        print(f"{entry.path}: fetched, sha256 {sha256_of(entry.path)}")
