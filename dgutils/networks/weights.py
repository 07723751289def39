"""Published weights: what there is, where it comes from, and whether the file at hand is the right one.

`assets/registry.yaml` describes the files; they lie in `paths.weights_dir()`, fetched or put there by hand. Only
`fetch` touches the network. A file's sha256 is recorded in `checksums.json` beside it when it is first fetched or
used, and enforced from then on. A folder with a file REHEARSAL holds random stand-ins (tests/standins.py).
"""

import functools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from dgutils.errors import UserError, require
from dgutils.files import digest_of_file, disk_errors, write_file
from dgutils.paths import weights_dir

REGISTRY = Path(__file__).resolve().parent.parent / "assets" / "registry.yaml"
REHEARSAL = "REHEARSAL"
DRIVE = "https://drive.google.com/"
_MAGIC = {".pkl": (b"\x80",), ".pt": (b"PK", b"\x80"), ".npz": (b"PK",)}  # \x80: a pickle; PK: a zip archive


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
    sha256: str | None = None  # enforced where it is known

    @property
    def path(self) -> Path:
        return weights_dir() / self.file


@functools.cache
def registry() -> dict[str, Published]:
    """All published files by name."""
    return {name: Published(name, **fields) for name, fields in yaml.safe_load(REGISTRY.read_text()).items()}


def published(name: str) -> Published:
    """The registry's entry `name`. Raises UserError, naming those that exist."""
    require(name in registry(), f"no published file '{name}'; there are: {', '.join(registry())}")
    return registry()[name]


def mentioned(parameters: dict) -> list[str]:
    """The published files that a profile's parameters name, in their order."""
    values = [v for value in parameters.values() for v in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(v for v in values if isinstance(v, str) and v in registry()))


def is_rehearsal() -> bool:
    """Whether the weights folder holds random stand-ins."""
    return (weights_dir() / REHEARSAL).exists()


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file, computed once while the file stays the same by its inode, size and time of change."""
    return _sha256(path, (stat := path.stat()).st_ino, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _sha256(path, *unchanged):
    return digest_of_file(path)


def _checksums() -> Path:
    return weights_dir() / "checksums.json"


def _records() -> dict:
    """File -> what was recorded of it: bytes, sha256, url."""
    try:
        return json.loads(_checksums().read_text()) if _checksums().is_file() else {}
    except ValueError as error:
        raise UserError(f"{_checksums()} is not JSON ({error}): restore it, or delete it to record anew") from error


def _difference(entry: Published, path: Path) -> str | None:
    """What is wrong with a file, in words; None if nothing is known to be."""
    known = {"sha256": entry.sha256} if entry.sha256 else _records().get(entry.file, {})
    with open(path, "rb") as file:
        if not file.read(2).startswith(_MAGIC[path.suffix]):
            return f"begins like a web page, an archive or another format, not like a {path.suffix} file"
    if (size := path.stat().st_size) != known.get("bytes", size):
        return f"has {size:,} bytes, not the {known['bytes']:,} expected"
    if sha256_of(path) != known.get("sha256", sha256_of(path)):
        return f"has sha256 {sha256_of(path)[:16]}..., not the {known['sha256'][:16]}... expected"
    return None


def record(name: str) -> None:
    """Remember a file's size and sha256, to be enforced from now on. Call it when the file has proved readable."""
    entry, records = published(name), _records()
    if entry.file in records:
        return
    size, digest = entry.path.stat().st_size, sha256_of(entry.path)
    records[entry.file] = {"bytes": size, "sha256": digest, "url": entry.url}
    with disk_errors(weights_dir()):  # of a shared folder links in one of your own will do
        write_file(_checksums(), (json.dumps(records, indent=1, sort_keys=True) + "\n").encode())


def find(name: str) -> Path:
    """The file of `name`, checked. Raises UserError if it is absent or altered, saying how to get it."""
    entry = published(name)
    if not entry.path.is_file():
        where = "a file of" if entry.url.startswith(DRIVE) else "from"
        raise UserError(f"{entry.file} is not in {weights_dir()}: run `python -m dgutils fetch {name}`, "
                        f"or download it by hand ({where} {entry.url}), unpack what is packed, and put it there")
    if difference := _difference(entry, entry.path):
        raise UserError(f"{entry.path} {difference}: delete it and fetch it again, or, if you replaced it on "
                        f"purpose, remove its entry from {_checksums()}")
    return entry.path


def _download(entry: Published, target: Path) -> None:
    """Download through the gdown library, which goes on from what an earlier try left in the target's folder."""
    import gdown
    import requests

    source = {"url": entry.url}
    if entry.url.startswith(DRIVE):
        listed = gdown.download_folder(entry.url, skip_download=True, quiet=True, use_cookies=False)
        ids = [file.id for file in listed if Path(file.path).name == entry.file]
        if not ids:
            raise FileNotFoundError(f"the folder {entry.url} lists no {entry.file}")
        source = {"id": ids[0]}
    elif entry.url.startswith("https:"):
        with requests.Session() as session:
            del session.adapters["http://"]  # a redirect that leaves https is an error
            with session.get(entry.url, stream=True, timeout=60) as answer:
                source = {"url": answer.url}
    gdown.download(**source, output=str(target), resume=True, use_cookies=False, retries=3, timeout=60)


def fetch(names: Iterable[str]) -> None:
    """Bring the named files into the weights folder: resumed, verified, renamed when whole.

    Raises UserError, which says what to do by hand.
    """
    require(not is_rehearsal(), f"{weights_dir()} holds a rehearsal's stand-ins: set DGUTILS_WEIGHTS to another folder")
    for entry in [published(name) for name in names]:
        if entry.path.is_file():
            print(f"{find(entry.name)}: here already")
            continue
        partial = weights_dir() / "partial" / entry.file
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            _download(entry, partial)
            if not (difference := _difference(entry, partial)):
                os.replace(partial, entry.path)
        except UserError:
            raise
        except Exception as error:  # gdown's, requests' and the system's are a dozen types; all mean: not fetched
            first = error
            while first.__context__:  # the system's own words, if it is the system that refused first
                first = first.__context__
            reason = str(getattr(first, "strerror", None) or error)[:200]
            raise UserError(f"cannot fetch {entry.file} ({reason}): run the same command again to go on, or delete "
                            f"{partial.parent} to begin anew, or download it by hand from {entry.url} to "
                            f"{entry.path}") from error
        if difference:
            partial.unlink()
            raise UserError(f"what {entry.url} sent for {entry.file} {difference}, and was deleted: try again; if the "
                            f"publisher changed it, remove its entry from {_checksums()}")
        record(entry.name)
        print(f"{entry.path}: fetched, sha256 {sha256_of(entry.path)}")
