"""What a file of weights or arrays holds, found out without running anything of it."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from dgutils.errors import UserError, require
from dgutils.networks.checkpoints import fault, fitting, read_edm, read_state_dict, read_tensors
from dgutils.networks.weights import packed, sha256_of

OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch files before 1.6 begin with


def inspect(path: Path) -> list[str]:
    """What a file of weights or arrays holds, in lines of text. Runs nothing of it and builds no network.

    A file that no network would be made from is described as far as that is safe, and its last line begins with
    REFUSED. Raises UserError if there is no such file.
    """
    path = Path(path)
    require(path.is_file(), f"no file {path}")
    form, found = "broken zip archive", []
    try:
        form, describe = _format(path)
        found = describe(path)
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:  # UserErrors, and NumPy's of damaged files
        found = [f"REFUSED: {UserError(error)}"]
    return [f"{path}: {form}", f"{path.stat().st_size:,} bytes, sha256 {sha256_of(path)}", *found]


def _format(path):
    """A file's format by its content, and the function that finds its lines."""
    with open(path, "rb") as file:
        start = file.read(16)
    if archive := packed(path):
        return "packed file", lambda path: [f"REFUSED: it {archive}: unpack it"]
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return "safetensors", _safetensors
    if start.startswith(b"PK") and zipfile.is_zipfile(path):
        inside = zipfile.ZipFile(path).namelist()
        if all(name.endswith(".npy") for name in inside):
            return "NumPy arrays", _arrays
        if any(name.endswith("/constants.pkl") for name in inside):
            code = sum("/code/" in name and name.endswith(".py") for name in inside)
            lines = [f"{code} files of TorchScript, which run when it is used (here they were not)"]
            return "TorchScript archive", lambda path: lines
        return "torch file (zip)", lambda path: _network(read_state_dict(path))
    if start.startswith(b"PK"):
        return "zip archive", lambda path: ["REFUSED: it is cut short: get it again"]
    if start.startswith(OLD_TORCH):
        return "torch file (before 1.6)", lambda path: _network(read_state_dict(path))
    if start.startswith(b"\x80"):
        return "pickle", _pickle
    return "unknown format", lambda path: [f"REFUSED: it begins with {start!r}, as no file of weights or arrays does"]


def _network(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Count, types, first and last entries of a network's tensors, and which published network they fit."""
    shapes = [f"  {name} {list(value.shape)}" for name, value in tensors.items()]
    kinds = ", ".join(sorted({str(v.dtype).removeprefix("torch.") for v in tensors.values()}))
    lines = [f"{sum(v.numel() for v in tensors.values()):,} numbers in {len(tensors)} tensors, {kinds}"]
    lines += shapes if len(shapes) <= 6 else [*shapes[:3], "  ...", *shapes[-3:]]
    classes = tensors.get("label_emb.weight", tensors.get("model.map_label.weight"))
    lines += [f"class-conditional: labels {list(classes.shape)}"] if classes is not None else []
    lines += [f"structure of: {', '.join(fitting(tensors)) or 'no network of the registry'}"]
    return lines + ([f"REFUSED: {what}"] if (what := fault(tensors)) else [])


def _pickle(path):
    tensors, about = read_edm(path)
    return [f"entry ema: {about['network']}, use_fp16 {about['use_fp16']}",
            *(f"entry {name}: {kind}" for name, kind in about["other_entries"].items()),
            "config " + ", ".join(f"{k}={v}" for k, v in about["config"].items()), *_network(tensors)]  # fmt: skip


def _safetensors(path):
    tensors, metadata = read_tensors(path)
    return [f"{key}: {value}" for key, value in metadata.items()] + _network(tensors)


def _arrays(path):
    with np.load(path, allow_pickle=False) as arrays:
        return [f"  {name} {list(array.shape)} {array.dtype}" for name, array in arrays.items()]
