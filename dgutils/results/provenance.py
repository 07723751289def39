"""Where numbers come from: what a results file keeps of the code and of the artifacts behind its records.

With it report/trace.py prints a number's origin, and notices stale results, in a clone that has none of the artifacts.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from dgutils.paths import repo_root, results_dir, runs_dir
from dgutils.pipeline.store import KEPT, read_kept, read_manifest

PACKAGE = Path(__file__).resolve().parents[1]


# --- the code


def sections(notebook: str) -> list[tuple[str, str]]:
    """(section, source) of each code cell of notebooks/<notebook>.ipynb, without the parameters; [] if it is gone."""
    path, heading, found = repo_root() / "notebooks" / f"{notebook}.ipynb", notebook, []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = next((line[3:] for line in reversed(source.splitlines()) if line.startswith("## ")), heading)
        elif "parameters" not in cell["metadata"].get("tags", []):
            found.append((heading, source))
    return found


def section_of(name: str, cells: list[tuple[str, str]]) -> str:
    """The section of the first cell that holds this name as a string, where a figure or a table is made; or ''."""
    return next((heading for heading, source in cells if f'"{name}"' in source), "")


def digest_of_code(sources: Iterable[str]) -> str:
    """A digest of program text that empty lines and comments on lines of their own do not change."""
    lines = [line.rstrip() for source in sources for line in source.splitlines()]
    text = "\n".join(line for line in lines if line and not line.lstrip().startswith("#"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(notebook: str) -> dict:
    """The code that a notebook's results follow from: its cells, the rules of its statements, the steps' versions."""
    from dgutils.pipeline.jobs import VERSIONS  # late: it takes seconds, which a table that is read alone does not need

    rules = [(PACKAGE / "results" / f"{name}.py").read_text(encoding="utf-8") for name in ("statements", "ledger")]
    cells = [source for _, source in sections(notebook)]
    return {"notebook": digest_of_code(cells), "statements": digest_of_code(rules), "versions": dict(VERSIONS)}


# --- the artifacts


def lineage(profile: str, digests: Iterable[str]) -> dict[str, dict]:
    """All that these artifacts of a profile's store were made from, themselves included: digest -> entry.

    An entry has step, version, label, seconds, created, device, revision, folder (below the store) and inputs
    {name: digest}; that of a set of images also rows and first_seed. What no step made, a network or real images,
    has a label and no step. What is not stored has the entry that is kept with its scores (`store.read_kept`), or none.
    """
    known, found = read_kept(results_dir(profile) / KEPT)["lineage"], {}
    stored: dict[str, list[dict]] = {}  # an artifact's digest -> its manifest, or those of its shards in order
    for pattern in ("*/*", "*/*/shard_?????"):
        for folder in sorted((runs_dir(profile) / "store").glob(pattern)):
            if manifest := read_manifest(folder):
                stored.setdefault(manifest["digest"], []).append(manifest)
    wanted = dict.fromkeys(digests, "")  # digest -> what it is if no step made it
    while wanted:
        rows, inputs = _rows_of(wanted.keys() - stored.keys(), stored), {}
        for digest, label in wanted.items():
            whole, n = rows.get(digest, (digest, None))
            if whole in stored:
                found[digest] = _entry(stored[whole], n)
                config = stored[whole][0]["identity"]["config"]
                inputs |= {source: _made_by_none(role, config) for role, source in found[digest]["inputs"].items()}
            elif digest in known:
                found[digest] = known[digest]
                inputs |= dict.fromkeys(known[digest]["inputs"].values(), label)
            elif label:
                found[digest] = {"label": label, "inputs": {}}
        wanted = {digest: label for digest, label in inputs.items() if digest not in found}
    return found


def _made_by_none(role: str, config: dict) -> str:
    """What an input is if no step made it: the network that the config names, real images, or its role."""
    images = {"real", "arm", "reference", "images"}
    return config[role] if isinstance(config.get(role), str) else "real images" if role in images else role


def _entry(manifests: list[dict], n: int | None = None) -> dict:
    """The entry of one artifact, from its manifest; of a set's first n rows, from those of the shards they lie in."""
    identity = manifests[0]["identity"]
    used = manifests[: -(-n // identity["shards"]["size"])] if n else manifests
    last = max(used, key=lambda manifest: manifest["created"])
    return ({"rows": n, "first_seed": identity["shards"]["first_seed"]} if n else {}) | {
        **{name: last[name] for name in ("label", "created", "device", "revision")},
        **{name: identity[name] for name in ("step", "version", "inputs")},
        "folder": f"{identity['step']}/{last['digest'][:16]}",
        "seconds": round(sum(manifest["seconds"] for manifest in used), 3)}


def _rows_of(digests: set[str], stored: dict[str, list[dict]]) -> dict[str, tuple[str, int]]:
    """Which of these digests stand for the first n rows of a set (`ShardedSet.digest`): digest -> (the set's, n)."""
    found = {}
    for whole, shards in stored.items():
        size = shards[0]["identity"].get("shards", {}).get("size", 0)
        for n in range(1, size * len(shards) + 1) if len(found) < len(digests) else ():
            digest = hashlib.sha256(f'{{"n":{n},"set":"{whole}"}}'.encode()).hexdigest()
            if digest in digests:
                found[digest] = whole, n
    return found
