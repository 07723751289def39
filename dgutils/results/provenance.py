"""Where numbers come from: what a results file keeps of the code and of the artifacts behind its records.

With it report/trace.py prints a number's origin, and notices stale results, in a clone that has none of the artifacts.
"""

import ast
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def constant(module: str, name: str) -> Any:
    """A constant of dgutils/<module>.py that is written as a literal, without importing it (torch takes seconds)."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    return next(ast.literal_eval(node.value) for node in tree.body
                if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name)  # fmt: skip


def fingerprint(notebook: str) -> dict:
    """The code that a notebook's results follow from: its cells, the rules of its statements, the steps' versions."""
    rules = [(PACKAGE / "results" / f"{name}.py").read_text(encoding="utf-8") for name in ("statements", "ledger")]
    versions = constant("pipeline/jobs", "VERSIONS") | {"gradients": constant("results/gradients", "GRADIENTS_VERSION")}
    cells = digest_of_code(source for _, source in sections(notebook))
    return {"notebook": cells, "statements": digest_of_code(rules), "versions": versions}


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
                inputs |= {source: _source(role, source, config, stored)
                           for role, source in found[digest]["inputs"].items()}  # fmt: skip
            elif digest in known:
                found[digest] = known[digest]
                inputs |= dict.fromkeys(known[digest]["inputs"].values(), label)
            elif label:
                found[digest] = {"label": label, "inputs": {}}
        wanted = {digest: label for digest, label in inputs.items() if digest not in found}
    return found


def _entry(manifests: list[dict], n: int | None = None) -> dict:
    """The entry of one artifact, from its manifest; of a set's first n rows, from those of the shards they lie in."""
    identity = manifests[0]["identity"]
    used = manifests[: -(-n // identity["shards"]["size"])] if n else manifests
    last = max(used, key=lambda manifest: manifest["created"])
    return ({"rows": n, "first_seed": identity["shards"]["first_seed"]} if n else {}) | {
        **{name: last[name] for name in ("label", "created", "device", "revision")},
        **{name: identity[name] for name in ("step", "version", "inputs")},
        "folder": f"{identity['step']}/{last['digest'][:16]}",
        "seconds": round(sum(manifest["seconds"] for manifest in used), 3)}  # fmt: skip


def _rows_of(digests: set[str], stored: dict[str, list[dict]]) -> dict[str, tuple[str, int]]:
    """Which of these digests stand for the first n rows of a set (ShardedSet.digest): digest -> (the set's, n)."""
    found = {}
    for whole, shards in stored.items():
        size = shards[0]["identity"].get("shards", {}).get("size", 0)
        for n in range(1, size * len(shards) + 1) if len(found) < len(digests) else ():
            digest = hashlib.sha256(f'{{"n":{n},"set":"{whole}"}}'.encode()).hexdigest()
            if digest in digests:
                found[digest] = whole, n
    return found


def _source(role: str, digest: str, config: dict, stored: dict[str, list[dict]]) -> str:
    """What an input is that no step made: the network or the images that the config names, else its role."""
    if isinstance(config.get(role), str):
        return config[role]
    if role == "real":
        return f"{config['dataset']}, training images"
    labels = [manifests[0]["label"] for manifests in stored.values()
              if manifests[0]["identity"]["inputs"].get("images") == digest]  # the features of them say so
    return labels[0].rpartition(", ")[0] if labels else role
