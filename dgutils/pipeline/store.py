"""Content-addressed artifacts: what was computed once is found again, checked, and not computed twice.

An artifact is a folder root/<step>/<first 16 hex digits of its digest>/; the digest is the SHA-256 of its identity
{step, version, config, inputs} as canonical JSON. A sharded set is an artifact cut into folders shard_00000/, ...,
each a fixed range of seeds: how many rows are wanted is no part of its identity, so a larger set extends a smaller one.

A folder is written under a temporary name, synced, and renamed whole, with a manifest of checksums. Locks go with
the process that holds them: after a kill there is nothing to clean up by hand, and the next run goes on where it was.
Long work inside one artifact keeps its state in partial/, one sealed file that is replaced whole.
What does not match its checksum is moved to quarantine/, said, and computed again: never used, never deleted.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from dgutils.errors import UserError, require
from dgutils.files import digest_of_file, disk_errors, lock, save_array, sync, write_file
from dgutils.machine import log_line, now, provenance
from dgutils.pipeline import ranks
from dgutils.terminal import bar

# --- digests


def plain(value: Any, where: str = "config") -> Any:
    """The JSON form of a value, one form per meaning: 2.0 becomes 2, tuples lists.

    Raises UserError for what JSON cannot hold (NaN, infinities, paths, arrays), naming its place.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, str | bool | int) or isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}.{i}") for i, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    raise UserError(f"{where} is {value!r:.40}, which JSON cannot hold; use numbers, text, lists, null for 'no limit'")


def canonical_json(value: Any) -> str:
    """JSON text that is equal for equal values, whatever the order of their keys."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"))


def digest_of_json(value: Any) -> str:
    """SHA-256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


# --- the store


@dataclass
class Store:
    """A folder of artifacts. log: receives HIT, MISS, WAIT and QUARANTINED lines. keeps: a file for `read_kept`."""
    root: Path | str
    log: Callable[[str], None] = log_line
    keeps: Path | None = None

    def __post_init__(self):
        self.root = Path(self.root).absolute()

    def artifact(self, step: str, version: int, config: dict, inputs: dict[str, str] | None = None,
                 label: str | None = None) -> "Artifact":
        """Name an artifact; nothing is read, written or computed yet.

        step: what makes it, a folder's name. version: raised when its numbers change. config: JSON values. inputs:
        name -> digest of what it is made from. label: for the log.
        """
        identity = {"step": step, "version": version, "config": config, "inputs": inputs or {}}
        return Artifact(self, plain(identity, step), label)

    def save_partial(self, name: str, data: bytes) -> None:
        """Keep the state of unfinished work in the place of an earlier one; the caller holds the artifact's lock."""
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
        """Forget the state of finished work; where it cannot be removed it does no harm."""
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
        shard = [] if self.shard is None else [f"shard_{self.shard:05d}"]
        parts = [self.identity["step"], self.digest[:16], *shard]
        self.path, self.name = self.store.root.joinpath(*parts), "-".join(parts)

    def lacks(self) -> str:
        """Why it is not here, whole; '' if it is."""
        return self.damage() if os.path.lexists(self.path) else "not found"

    def damage(self) -> str:
        """What is wrong with the stored files, or ''. Files that the manifest does not list are not read."""
        manifest = read_manifest(self.path)
        if manifest is None or (manifest["digest"], manifest["shard"]) != (self.digest, self.shard):
            return "manifest.json is missing, damaged, or another artifact's"
        for name, seal in manifest["files"].items():
            try:
                if digest_of_file(self.path / name) != seal["sha256"]:
                    return f"{name} has another checksum"
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                return f"{name} is missing"
        return ""

    def say(self, hit: bool, why: str) -> None:
        """Log HIT or MISS, and what is stored of it."""
        label, why = f" ({self.label})" if self.label else "", f": {why}" if why else ""
        self.store.log(f"{'HIT' if hit else 'MISS'} {self.identity['step']} {self.digest[:16]}{label}{why}")

    def ensure(self, make: Callable[[Path], None], wait: bool = True) -> "Artifact":
        """Have the artifact: find it, or call make(folder), which writes its files there.

        Of two processes one computes it, and the other waits and finds it; unless `wait`, it goes on without.
        """
        with disk_errors(self.store.root):
            why = self.lacks()
            self.say(not why, why)
            if why:
                self.obtain(make, wait)
        return self

    def obtain(self, make: Callable[[Path], None], wait: bool = True) -> bool:
        """Under the artifact's lock: quarantine what is damaged, compute what is missing. False if busy."""
        with lock(self.store.root / "locks" / f"{self.name}.lock", wait, self.store.log) as ours:
            if ours and os.path.lexists(self.path) and (damage := self.damage()):
                self.store.quarantine(self.path, self.name, damage, "computing it again")
            if ours and not os.path.lexists(self.path):
                self.write(make)
        return ours

    def write(self, make: Callable[[Path], None]) -> None:
        """Call `make` on a temporary folder; checksum, sync, and rename it into place with its manifest."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # a killed run's: we hold the lock, nobody else uses it
        temporary.mkdir(parents=True)
        try:
            start, files = time.perf_counter(), {}
            make(temporary)
            seconds = round(time.perf_counter() - start, 3)
            for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
                sync(path)
                files[str(path.relative_to(temporary))] = {"sha256": digest_of_file(path)}
            manifest = {"identity": self.identity, "digest": self.digest, "shard": self.shard, "label": self.label,
                        "files": files, "seconds": seconds, "created": now()} | provenance()
            write_sealed(temporary / "manifest.json", plain(manifest, "manifest"), 1)
            os.rename(temporary, self.path)
            sync(self.path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def shards(self, shard_size: int, first_seed: int = 0) -> "ShardedSet":
        """This artifact as a set of rows, row i made from seed first_seed + i, in shards of `shard_size`.

        Both numbers enter the identity, since a row's last bits may depend on what was computed with it.
        """
        require(shard_size > 0 and first_seed >= 0, f"shard size {shard_size}, first seed {first_seed}: too small")
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

    def parts(self, n: int) -> list[Artifact]:
        """The shards that hold the first n rows."""
        require(n > 0, f"{self.artifact.identity['step']}: {n} rows asked for; ask for at least 1")
        return [replace(self.artifact, shard=shard) for shard in range(-(-n // self.shard_size))]

    def missing(self, n: int) -> list[Artifact]:
        """Those of the first n rows' shards that are not here, whole. Each is read once."""
        parts = self.parts(n)
        self.verified |= {part.shard for part in parts
                          if part.shard not in self.verified and part.path.is_dir() and not part.damage()}
        return [part for part in parts if part.shard not in self.verified]

    def ensure(self, n: int, compute_shard: Callable[[range], dict[str, np.ndarray]]) -> "ShardedSet":
        """Have the first n rows: compute the shards that are missing, compute_shard(seeds) -> {name: rows}.

        Of processes that do this at once each takes shards that nobody else is computing, then waits for those that
        others took; the ranks of a group, which call it together, are dealt them. The last shard is computed whole.
        """
        def obtain(part: Artifact, wait: bool) -> None:
            first = self.first_seed + part.shard * self.shard_size

            def make(folder):
                for name, rows in compute_shard(range(first, first + self.shard_size)).items():
                    if len(rows) != self.shard_size:
                        raise ValueError(f"{part.name}: {len(rows)} rows of {name} for {self.shard_size} seeds")
                    save_array(folder / f"{name}.npy", rows)

            if part.obtain(make, wait):
                self.verified.add(part.shard)

        with disk_errors(self.artifact.store.root):
            group, size, parts, missing = ranks.group(), self.shard_size, self.parts(n), self.missing(n)
            stored = f", {len(parts) - len(missing)} of {len(parts)} shards stored" if missing else ""
            self.artifact.say(not missing, f"{n} rows{stored}")
            here = {part.shard for part in parts} & self.verified
            group.barrier()  # all have seen what was here before any of them adds to it
            label = self.artifact.label or self.artifact.identity["step"]
            with bar(len(parts) * size, label, len(here) * size, bool(missing) and group.main) as rows:
                for position, part in group.deal(parts):  # first what is free
                    if part.shard in here:
                        continue
                    if group.late:
                        break
                    obtain(part, wait=False)
                    rows.update(len(here.union(range(position + 1))) * size - rows.n)
                group.stop_if_late()
                for part in self.missing(n):  # then what others were computing
                    obtain(part, wait=True)
        return self

    def load(self, n: int, name: str) -> np.ndarray:
        """The first n rows of one array, [n, ...]. Raises UserError if a shard is missing or damaged."""
        with disk_errors(self.artifact.store.root):
            missing = self.missing(n)
        if missing:
            raise UserError(f"{missing[0].name} is missing or damaged: run its step")
        return np.concatenate([np.load(part.path / f"{name}.npy", allow_pickle=False) for part in self.parts(n)])[:n]


# --- JSON files that carry the digest of their own content


def write_sealed(path: Path, content: dict, indent: int) -> None:
    """Write a dict as JSON, with its digest beside its keys."""
    text = json.dumps(content | {"sha256": digest_of_json(content)}, sort_keys=True, indent=indent)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, f"{text}\n".encode())


def read_sealed(path: Path) -> dict | None:
    """What `write_sealed` wrote; None if the file is missing or not exactly that."""
    try:
        content = json.loads(path.read_bytes())
        return content if content.pop("sha256") == digest_of_json(content) else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, AttributeError, TypeError):
        return None


def read_manifest(folder: Path) -> dict | None:
    """The manifest of an artifact's folder, or None if it is missing or damaged."""
    return read_sealed(folder / "manifest.json")


KEPT = "kept/scores.json"  # below a profile's results


def read_kept(path: Path) -> dict[str, dict]:
    """The scores that a results folder keeps (`write_sealed`), so that a study goes on where another machine left it.

    {"scores": digest of the artifact -> its scores, "lineage": as of `provenance.lineage`}, both empty without it.
    Raises UserError if it is damaged.
    """
    if not path.exists():
        return {"scores": {}, "lineage": {}}
    if content := read_sealed(path):
        return content
    raise UserError(f"{path} is damaged: restore it with git, or remove it, and its scores will be computed again")
