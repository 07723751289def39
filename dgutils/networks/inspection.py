"""What a file of weights or arrays holds, found out without running anything of it."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from dgutils.errors import UserError
from dgutils.networks.checkpoints import fault, fitting, read_edm, read_state_dict, read_tensors
from dgutils.networks.weights import packed, sha256_of


def inspect(path: Path) -> list[str]:
    """What a file of weights or arrays holds, in lines of text. Runs nothing of it and builds no network.

    A file that no network would be made from is described as far as that is safe, and its last line begins with
    REFUSED. Raises UserError if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        form, describe = _format(path)
    except zipfile.BadZipFile as error:
        form, describe = "broken zip archive", [f"REFUSED: {error}"]
    lines = [f"{path}: {form}", f"{path.stat().st_size:,} bytes, sha256 {sha256_of(path)}"]
    try:
        return lines + (describe(path) if callable(describe) else describe)
    except UserError as error:
        return lines + [f"REFUSED: {error}"]


def _format(path):
    """A file's format by its content, and its lines or the function that finds them."""
    with open(path, "rb") as file:
        start = file.read(16)
    if archive := packed(path):
        return "packed file", [f"REFUSED: it {archive}: unpack it"]
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return "safetensors", _inspect_safetensors
    if start.startswith(b"PK") and zipfile.is_zipfile(path):
        inside = zipfile.ZipFile(path).infolist()
        if all(item.filename.endswith(".npy") for item in inside):
            return "NumPy arrays", _inspect_npz
        if any(item.filename.endswith("/constants.pkl") for item in inside):
            code = sum("/code/" in item.filename and item.filename.endswith(".py") for item in inside)
            data = [item.file_size for item in inside if "/data/" in item.filename or "/constants/" in item.filename]
            lines = [f"{code} files of TorchScript, which run when it is used (here they were not)"]
            return "TorchScript archive", [*lines, f"{sum(data):,} bytes of numbers in {len(data)} records"]
        return "torch file (zip)", lambda path: _describe(read_state_dict(path))
    if start.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."):  # the number that older torch files begin with
        return "torch file (before 1.6)", lambda path: _describe(read_state_dict(path))
    if start.startswith(b"\x80"):
        return "pickle", _inspect_pickle
    return "unknown format", [f"REFUSED: it begins with {start!r}, as no file of weights or arrays does"]


def _describe(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Count, types, first and last entries of a network's tensors, and which published network they fit."""
    shapes = [f"  {name} {list(value.shape)}" for name, value in tensors.items()]
    kinds = ", ".join(sorted({str(v.dtype).removeprefix("torch.") for v in tensors.values()}))
    lines = [f"{sum(v.numel() for v in tensors.values()):,} numbers in {len(tensors)} tensors, {kinds}"]
    lines += shapes if len(shapes) <= 6 else [*shapes[:3], "  ...", *shapes[-3:]]
    classes = tensors.get("label_emb.weight", tensors.get("model.map_label.weight"))
    lines += [f"class-conditional: labels {list(classes.shape)}"] if classes is not None else []
    lines += [f"structure of: {', '.join(fitting(tensors)) or 'no network of the registry'}"]
    return lines + ([f"REFUSED: {what}"] if (what := fault(tensors)) else [])


def _inspect_pickle(path):
    config, tensors, about = read_edm(path)
    return [f"entry ema: {about['network']}, use_fp16 {about['use_fp16']}",
            *(f"entry {name}: {kind}" for name, kind in about["other_entries"].items()),
            "config " + ", ".join(f"{k}={v}" for k, v in config.items()), *_describe(tensors)]  # fmt: skip


def _inspect_safetensors(path):
    tensors, metadata = read_tensors(path)
    return [f"{key}: {value}" for key, value in metadata.items()] + _describe(tensors)


def _inspect_npz(path):
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [f"  {name} {list(array.shape)} {array.dtype}" for name, array in arrays.items()]
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{error}; nothing of it was run") from error
