"""Weights on disk: the shipped ones with their model cards, read without ever running what a file says."""

import functools
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .adm import EncoderUNet
from .edm import Denoiser
from .errors import UserError

ASSETS = Path(__file__).parent / "assets"


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors atomically: a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises UserError if it is not one, or is cut short."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}): restore or delete it") from error


def model_card(name: str) -> dict:
    """The model card `assets/<name>.json` of a shipped network."""
    path = ASSETS / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in ASSETS.glob("*.safetensors")))
        raise UserError(f"no shipped network '{name}'; there are: {known or 'none'}")
    return json.loads(path.read_text())


def weights_digest(name: str) -> str:
    """sha256 of a shipped network's weights: its identity in the store."""
    return model_card(name)["sha256"]


@functools.cache
def _load(name: str, architecture: str):
    card = model_card(name)
    if card["recipe"]["architecture"] != architecture:
        raise UserError(f"'{name}' is a {card['recipe']['architecture']}, not a {architecture}")
    path = ASSETS / f"{name}.safetensors"
    if not path.is_file() or sha256_of(path) != card["sha256"]:
        raise UserError(
            f"{path} is absent or does not match its model card (sha256 {card['sha256'][:12]}): "
            f"restore it with `git checkout -- dgutils/assets/{path.name}`"
        )
    network = {"Denoiser": Denoiser, "EncoderUNet": EncoderUNet}[architecture](**card["recipe"]["config"])
    tensors, _ = read_tensors(path)
    network.load_state_dict({key: value.float() for key, value in tensors.items()})
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def load_denoiser(name: str) -> Denoiser:
    """The shipped score network `name`, frozen, float32. Raises UserError if absent or altered."""
    return _load(name, "Denoiser")


def load_feature_extractor(name: str) -> EncoderUNet:
    """The shipped noise-conditional feature extractor `name`, frozen, float32. Raises UserError likewise."""
    return _load(name, "EncoderUNet")
