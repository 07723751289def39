"""Content-addressed artifacts: what was computed once is found again, checked, and not computed twice.

An artifact is a folder root/<step>/<first 16 hex digits of its digest>/; the digest is the SHA-256 of its
identity {step, version, config, inputs} as canonical JSON. A sharded set is an artifact cut into folders
shard_00000/, shard_00001/ ..., each a fixed range of seeds: how many rows are wanted is no part of its
identity, so a larger set extends a smaller one, and an interrupted run goes on where it was.

A folder is written under a temporary name, synced, and renamed whole, with a manifest of checksums. Locks go with
the process that holds them (`lock`): after a kill there is nothing to clean up by hand.
Work that takes long inside one artifact keeps its state in partial/, one sealed file that is replaced whole.
What does not match its checksum is moved to quarantine/, said, and computed again: never used, never deleted.
"""

import errno
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property, partial
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from tqdm import tqdm

from dgutils.errors import UserError
from dgutils.paths import cores, inherited
from dgutils.pipeline import ranks

FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


# --- digests


def plain(value: Any, where: str = "config") -> Any:
    """The JSON form of a value, one form per meaning: 2.0 becomes 2, tuples lists, NumPy scalars numbers.

    Raises UserError for what JSON cannot hold (NaN, infinities, paths, arrays), naming its place.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {value}, which JSON cannot hold; use null for 'no limit'")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}.{i}") for i, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    raise UserError(f"{where} is a {type(value).__name__}, which JSON cannot hold; use numbers, text, lists")


def canonical_json(value: Any) -> str:
    """JSON text that is equal for equal values, whatever the order of their keys."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"))


def digest_of_json(value: Any) -> str:
    """SHA-256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_of_file(path: Path | str) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- writing


def write_file(path: Path, data: bytes) -> None:
    """Write a file whose name only ever shows the old or the whole new content, even after a power cut."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
    try:
        temporary.write_bytes(data)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def save_array(path: Path, array: np.ndarray) -> None:
    """np.save by way of memory, because NumPy's own short writes on a full disk carry no error number."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    path.write_bytes(buffer.getbuffer())


def sync(path: Path) -> None:
    """Have the kernel put a file, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turn a full disk, or a folder that refuses writing, into one line; other errors pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # any: on a full disk safetensors and NumPy raise errors of their own
        number, name = getattr(error, "errno", None), str(getattr(error, "filename", None) or root)
        if number in FULL_DISK or re.search(r"No space left|\d requested and \d+ written", str(error)):
            raise UserError(f"no space left under {root}: free some and run again;"
                            " what is done is kept") from error
        if number in NOT_WRITABLE and (Path(name).is_relative_to(root) or root.is_relative_to(name)):
            raise UserError(f"cannot read and write under {root} ({os.strerror(number).lower()}): make it a"
                            " folder where you can, or choose another one") from error
        raise


@contextmanager
def lock(path: Path, wait: bool, log: Callable[[str], None]) -> Iterator[bool]:
    """Hold an exclusive lock that ends with the process. If it is busy and not `wait`, yields False at once.

    It is the kernel's (flock); where the file system has none, as Lustre and NFS may, it is a file that names its
    holder, and that others on the same machine remove once the holder is dead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(path, fallback_to_soft=False)
    try:
        free = _try(held)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        free = _try(held := SoftFileLock(path.with_suffix(".held")))
    if not free and not wait:
        yield False
        return
    if not free:
        log(f"WAIT {path.stem}: another process is computing it")
        held.acquire()
    try:
        yield True
    finally:
        held.release()


def _try(held: BaseFileLock) -> bool:
    """Whether a lock was free, and is ours now."""
    try:
        held.acquire(blocking=False)
    except Timeout:
        return False
    return True


@cache
def revision_of(root: Path) -> str | None:
    """The git revision of a clone, with -dirty if its code is changed; None of a folder that is none, or unreadable."""

    def git(*arguments):
        command = ["git", "--no-optional-locks", "-C", root, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True,
                              env=inherited() | {"LC_ALL": "C"}).stdout.strip()  # fmt: skip

    try:
        if not root.samefile(git("rev-parse", "--show-toplevel")):
            return None  # a copy inside another repository
        # What notebooks write beside the code, results and figures, makes no other code.
        code = (":/", ":(top,exclude)report/results", ":(top,exclude)figures")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return git("rev-parse", "HEAD") + "-dirty" * bool(changed)
    except (OSError, subprocess.CalledProcessError) as error:
        if "dubious ownership" in getattr(error, "stderr", ""):
            log_line(f"git does not tell the code's revision, since {root} belongs to another user: none is recorded;"
                     f" to mend it: git config --global --add safe.directory {root}")  # fmt: skip
        return None


@cache
def provenance() -> dict:
    """What makes the results of this process: device, package versions, code revision (None outside git)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
        device = f"{model[1].strip() if model else platform.machine()}, {cores()} cores"
    versions = {name: metadata.version(name) for name in ("torch", "numpy")}
    versions["python"] = platform.python_version()
    return {"device": device, "revision": revision_of(Path(__file__).resolve().parents[2]), "versions": versions}


def now() -> str:
    """The present moment, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- the store


class Status(NamedTuple):
    """Whether an artifact is there, and if not, why not."""
    hit: bool
    reason: str = ""


def log_line(line: str) -> None:
    """Print a line to stderr without breaking a progress bar."""
    tqdm.write(line, file=sys.stderr)


@dataclass
class Store:
    """A folder of artifacts. `log` receives the HIT, MISS, WAIT and QUARANTINED lines.

    keeps: the file of small results that the repository keeps (`read_kept`).
    """
    root: Path | str
    log: Callable[[str], None] = log_line
    keeps: Path | None = None

    def __post_init__(self):
        self.root = Path(self.root).absolute()

    def artifact(self, step: str, version: int, config: dict, inputs: dict[str, str] | None = None,
                 label: str | None = None) -> "Artifact":
        """Name an artifact; nothing is read, written or computed yet.

        step: what makes it, [a-z0-9_-]. version: the step's numerical version, raised when its numbers
        change. config: JSON values. inputs: name -> digest of what it is made from. label: for the log.
        """
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", step):
            raise UserError(f"step name {step!r}: use lower-case letters, digits, - and _")
        identity = {"step": step, "version": version, "config": config, "inputs": inputs or {}}
        return Artifact(self, plain(identity, step), label)

    def save_partial(self, name: str, data: bytes) -> None:
        """Keep the state of unfinished work, so that it goes on from there after a kill; replaces what was kept.

        Called by who holds the artifact's lock, which is inside `Artifact.ensure`.
        """
        (self.root / "partial").mkdir(parents=True, exist_ok=True)
        write_file(self.root / "partial" / name, hashlib.sha256(data).digest() + data)

    def load_partial(self, name: str) -> bytes | None:
        """What was kept last; None if nothing was, or if it was damaged and is in quarantine now."""
        path = self.root / "partial" / name
        if not os.path.lexists(path):
            return None
        sealed = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(sealed[32:]).digest() == sealed[:32]:
            return sealed[32:]
        self.quarantine(path, name, "the state of unfinished work has another checksum", "beginning it again")
        return None

    def drop_partial(self, name: str) -> None:
        """Forget the state of work that is finished; where it cannot be removed it does no harm."""
        with suppress(OSError):
            (self.root / "partial" / name).unlink()

    @cached_property
    def kept(self) -> dict[str, dict]:
        """digest -> scores, of those that the repository keeps."""
        return read_kept(self.keeps)["scores"] if self.keeps else {}

    def quarantine(self, path: Path, name: str, damage: str, what_now: str) -> None:
        """Move a damaged file or folder out of the way, and say so. The caller holds its lock."""
        folder = self.root / "quarantine"
        folder.mkdir(exist_ok=True)
        target = next(target for i in count() if not os.path.lexists(target := folder / f"{name}.{i}"))
        os.rename(path, target)
        self.log(f"QUARANTINED {name}: {damage}; moved to {target}; {what_now}")


@dataclass
class Artifact:
    """One folder of files, named by its identity (and by its number, if it is a shard of a set)."""
    store: Store
    identity: dict
    label: str | None = None
    shard: int | None = None

    def __post_init__(self):
        self.digest = digest_of_json(self.identity)
        parts = [self.identity["step"], self.digest[:16]]
        if self.shard is not None:
            parts.append(f"shard_{self.shard:05d}")
        self.path, self.name = self.store.root.joinpath(*parts), "-".join(parts)

    @property
    def manifest(self) -> dict:
        """What was recorded when it was made. Raises UserError if it is not there."""
        manifest = read_manifest(self.path)
        if manifest is None:
            raise UserError(f"{self.name} is not under {self.store.root}, or damaged: run its step")
        return manifest

    def status(self) -> Status:
        """Is it here, whole? If not: what is damaged, or what changed against what is stored."""
        if not os.path.lexists(self.path):
            return Status(False, self.what_changed())
        damage = self.damage()
        return Status(not damage, damage)

    def damage(self) -> str:
        """What is wrong with the stored files, or ''. Files that the manifest does not list are not read."""
        manifest = read_manifest(self.path)
        if manifest is None or (manifest["digest"], manifest["shard"]) != (self.digest, self.shard):
            return "manifest.json is missing, damaged, or another artifact's"
        for name, seal in manifest["files"].items():
            try:
                size, sha256 = (self.path / name).stat().st_size, digest_of_file(self.path / name)
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                return f"{name} is missing"
            if size != seal["bytes"]:
                return f"{name} has {size} bytes instead of {seal['bytes']}"
            if sha256 != seal["sha256"]:
                return f"{name} has another checksum"
        return ""

    def what_changed(self) -> str:
        """The fewest differences between this identity and one stored for the same step, in words."""
        folders = sorted((self.store.root / self.identity["step"]).glob("*"))
        manifests = [read_manifest(folder) or read_manifest(folder / "shard_00000") for folder in folders]
        differences = [identity_differences(manifest["identity"], self.identity)
                       for manifest in manifests if manifest and manifest["digest"] != self.digest]
        if not differences:
            return "nothing stored yet"
        fewest = min(differences, key=len)
        return ", ".join(fewest[:3]) + (f" and {len(fewest) - 3} more" if len(fewest) > 3 else "")

    def say(self, status: Status) -> None:
        """Log HIT, or MISS with its reason."""
        words = [self.identity["step"], self.digest[:16]] + ([f"({self.label})"] if self.label else [])
        self.store.log(" ".join(["HIT" if status.hit else "MISS", *words])
                       + (f": {status.reason}" if status.reason else ""))

    def kept(self) -> dict | None:
        """The scores that the repository keeps, of an artifact that is not in the store; else None."""
        if self.digest not in self.store.kept or self.status().hit:
            return None
        self.say(Status(True, f"kept in {self.store.keeps}"))
        return self.store.kept[self.digest]

    def ensure(self, make: Callable[[Path], dict | None], wait: bool = True) -> "Artifact":
        """Have the artifact: find it, or call make(folder), which writes its files there.

        What `make` returns (JSON values: seeds, notes) becomes manifest["extra"]. Of two processes that want the same
        artifact one computes it, and the other waits and finds it; unless `wait`, it goes on without.
        """
        with disk_errors(self.store.root):
            status = self.status()
            self.say(status)
            if not status.hit:
                self.obtain(make, wait)
        return self

    def obtain(self, make: Callable[[Path], dict | None], wait: bool = True) -> bool:
        """Under the artifact's lock: quarantine what is damaged, compute what is missing. False if busy."""
        with lock(self.store.root / "locks" / f"{self.name}.lock", wait, self.store.log) as ours:
            if not ours:
                return False
            damage = self.damage() if os.path.lexists(self.path) else ""
            if damage:
                self.store.quarantine(self.path, self.name, damage, "computing it again")
            if not os.path.lexists(self.path):
                self.write(make)
        return True

    def write(self, make: Callable[[Path], dict | None]) -> None:
        """Call `make` on a temporary folder; checksum, sync, and rename it into place with its manifest."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        with suppress(FileNotFoundError):
            shutil.rmtree(temporary)  # a killed run's: we hold the lock, nobody else uses it
        temporary.mkdir(parents=True)
        try:
            start = time.perf_counter()
            extra = make(temporary) or {}
            seconds, files = round(time.perf_counter() - start, 3), {}
            for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
                sync(path)
                files[str(path.relative_to(temporary))] = {"sha256": digest_of_file(path),
                                                           "bytes": path.stat().st_size}
            write_manifest(temporary, {
                "identity": self.identity, "digest": self.digest, "shard": self.shard, "label": self.label,
                "files": files, "extra": extra, "seconds": seconds, "created": now()} | provenance())
            os.rename(temporary, self.path)
            sync(self.path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def shards(self, shard_size: int, first_seed: int = 0) -> "ShardedSet":
        """This artifact as a set of rows, row i made from seed first_seed + i, in shards of `shard_size`.

        Both numbers enter the identity, since a row's last bits may depend on what was computed with it.
        """
        if shard_size < 1 or first_seed < 0:
            raise UserError(f"shard size {shard_size}, first seed {first_seed}: at least 1 and 0, please")
        identity = self.identity | {"shards": {"size": shard_size, "first_seed": first_seed}}
        return ShardedSet(Artifact(self.store, plain(identity), self.label), shard_size, first_seed)


@dataclass
class ShardedSet:
    """Named arrays whose row i belongs to seed first_seed + i. Made by `Artifact.shards`."""
    artifact: Artifact
    shard_size: int
    first_seed: int
    verified: set[int] = field(default_factory=set)  # shards whose checksums were seen to be right

    def digest(self, n: int) -> str:
        """Digest of the first n rows: what a step that uses them names as its input."""
        return digest_of_json({"set": self.artifact.digest, "n": n})

    def status(self, n: int) -> Status:
        """Are the first n rows here, whole?"""
        total, missing = len(self.parts(n)), len(self.missing(n))
        reason = f"{total - missing} of {total} shards stored"
        return Status(not missing, reason if missing < total else self.artifact.what_changed())

    def ensure(self, n: int, compute_shard: Callable[[range], dict[str, np.ndarray]],
               progress: bool = True) -> "ShardedSet":
        """Have the first n rows: compute the shards that are missing, compute_shard(seeds) -> {name: rows}.

        Any number of processes may do this at once: each takes shards that nobody else is computing, then
        waits for those that others took. The last shard is computed whole even if n ends inside it. The ranks
        of a group, which call it together, are dealt the shards and leave when all are there, or the time is up.
        """
        with disk_errors(self.artifact.store.root):
            status, group = self.status(n), ranks.group()
            self.artifact.say(status._replace(reason=f"{n} rows, {status.reason}"))
            size, parts = self.shard_size, self.parts(n)
            here = {part.shard for part in parts} & self.verified
            group.barrier()  # all have seen what was here before any of them adds to it
            with tqdm(total=len(parts) * size, initial=len(here) * size, unit=" rows",
                      desc=self.artifact.label or self.artifact.identity["step"],
                      disable=status.hit or not progress or not group.main) as bar:
                for position, part in group.deal(parts):  # first what is free
                    if part.shard in here:
                        continue
                    if group.late:
                        break
                    if part.obtain(partial(self.make, part, compute_shard), wait=False):
                        self.verified.add(part.shard)
                        bar.update(len(here.union(range(position + 1))) * size - bar.n)
                group.stop_if_late()
                for part in self.missing(n):  # then what others were computing
                    part.obtain(partial(self.make, part, compute_shard))
                    self.verified.add(part.shard)
        return self

    def make(self, part: Artifact, compute_shard: Callable[[range], dict[str, np.ndarray]],
             folder: Path) -> dict:
        """Compute the arrays of one shard into its folder."""
        seeds = range(self.first_seed + part.shard * self.shard_size,
                      self.first_seed + (part.shard + 1) * self.shard_size)
        for name, rows in compute_shard(seeds).items():
            if len(rows) != len(seeds):
                raise ValueError(f"{part.name}: {len(rows)} rows of {name} for {len(seeds)} seeds")
            save_array(folder / f"{name}.npy", rows)
        return {"first_seed": seeds[0], "seeds": len(seeds)}

    def load(self, n: int, name: str) -> np.ndarray:
        """The first n rows of one array, [n, ...]. Raises UserError if a shard is missing or damaged."""
        with disk_errors(self.artifact.store.root):
            missing = self.missing(n)
        if missing:
            raise UserError(f"{missing[0].name} is missing or damaged: run its step")
        paths = [part.path / f"{name}.npy" for part in self.parts(n)]
        if not paths[0].exists():
            raise UserError(f"{self.artifact.name} holds no array named {name!r}")
        return np.concatenate([np.load(path, allow_pickle=False) for path in paths])[:n]

    def parts(self, n: int) -> list[Artifact]:
        """The shards that hold the first n rows."""
        if n < 1:
            raise UserError(f"{self.artifact.identity['step']}: {n} rows asked for; ask for at least 1")
        return [Artifact(self.artifact.store, self.artifact.identity, self.artifact.label, shard)
                for shard in range(-(-n // self.shard_size))]

    def missing(self, n: int) -> list[Artifact]:
        """Those of the first n rows' shards that are not here, whole. Each is read once."""
        parts = self.parts(n)
        self.verified |= {part.shard for part in parts
                          if part.shard not in self.verified and part.path.is_dir() and not part.damage()}
        return [part for part in parts if part.shard not in self.verified]


# --- what the repository keeps

KEPT = "kept/scores.json"  # below a profile's results


def read_kept(path: Path) -> dict[str, dict]:
    """The scores that a results folder keeps, so that a study goes on where another machine left it.

    {"scores": digest of the artifact -> its scores, "lineage": as of `provenance.lineage`}, both empty without it.
    Raises UserError if it is damaged.
    """
    try:
        content = json.loads(path.read_bytes())
        if content.pop("sha256") == digest_of_json(content):
            return content
    except FileNotFoundError:
        return {"scores": {}, "lineage": {}}
    except (ValueError, KeyError, AttributeError, TypeError):
        pass
    raise UserError(f"{path} is damaged: restore it with git, or remove it, and its scores will be computed again")


def write_kept(path: Path, scores: dict[str, dict], lineage: dict[str, dict]) -> None:
    """Write that file, with a checksum of its own."""
    content = {"scores": scores, "lineage": lineage}
    content["sha256"] = digest_of_json(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(content, sort_keys=True, indent=0) + "\n").encode())


# --- manifests


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write manifest.json, which carries the digest of its own content."""
    manifest = plain(manifest, "manifest")
    manifest["sha256"] = digest_of_json(manifest)
    write_file(folder / "manifest.json", (json.dumps(manifest, sort_keys=True, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a folder, or None if it is missing or not exactly what was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        return manifest if manifest.pop("sha256") == digest_of_json(manifest) else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, AttributeError, TypeError):
        return None


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts, and lists of dicts, as one dict with dotted keys."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {str(i): item for i, item in enumerate(value)}
    if not isinstance(value, dict) or not value and prefix:
        return {prefix: value}
    return {key: leaf for name, item in value.items()
            for key, leaf in flatten(item, f"{prefix}.{name}" if prefix else name).items()}


def identity_differences(old: dict, new: dict) -> list[str]:
    """Each place where two identities differ, as 'config.num_steps 18 -> 35'."""
    old, new = flatten(old), flatten(new)

    def show(values: dict, key: str) -> str:
        if key not in values:
            return "(absent)"
        return values[key][:8] if key.startswith("inputs.") else json.dumps(values[key])

    return [f"{key} {show(old, key)} -> {show(new, key)}" for key in sorted(old | new)
            if key not in old or key not in new or old[key] != new[key]]
