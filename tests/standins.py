"""Random stand-ins for published weights, in the published formats and sizes: what a rehearsal runs on.

    DGUTILS_WEIGHTS=FOLDER python tests/standins.py [PROFILE]

They let everything but the numbers be tried without the network: EDM's pickles with their persistent objects,
state dicts of torch.save, and the TorchScript Inception that clean-fid loads. A folder of them is marked, and
`weights.fetch` keeps out of it.
"""

import hashlib
import os
import pickle
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dgutils.errors import UserError
from dgutils.networks import weights
from dgutils.networks.adm import EncoderUNet
from dgutils.networks.edm import Denoiser
from dgutils.networks.unpickle import Saved

# What the persistent objects of a real file carry as source is the whole module; the stand-ins only name it.
_SOURCE = "from training.networks import *\n"


class Global(NamedTuple):
    """A name, which is pickled as one."""

    module: str
    name: str


class _PersistencePickler(pickle._Pickler):
    """Pickles `Saved` objects as torch_utils.persistence does, and `Global`s as names, without having either."""

    def save(self, obj, save_persistent_id=True):
        if type(obj) is Global:
            self.save(obj.module)
            self.save(obj.name)
            self.write(pickle.STACK_GLOBAL)
        elif type(obj) is Saved and obj.class_name == "ModuleDict":  # a plain torch class: made empty, then filled
            self.save(Global("torch.nn.modules.container", "ModuleDict"))
            self.save(())
            self.write(pickle.NEWOBJ)
            self.save(obj.state)
            self.write(pickle.BUILD)
        elif type(obj) is Saved:
            self.save(Global("torch_utils.persistence", "_reconstruct_persistent_obj"))
            state = obj.state | {"_init_args": obj.args, "_init_kwargs": obj.kwargs}
            meta = dict(type="class", version=6, module_src=_SOURCE, class_name=obj.class_name, state=state)
            self.save((meta,))
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def _saved(module: nn.Module, kwargs: dict, **attributes) -> Saved:
    """A module of ours as the published one of the same name and tensors."""
    state = nn.Module().__dict__ | attributes | {
        "training": False, "_parameters": module._parameters, "_buffers": module._buffers,
        "_modules": {name: _saved(child, {}) for name, child in module._modules.items() if child is not None},
    }  # fmt: skip
    return Saved(type(module).__name__, kwargs=kwargs, state=state)


def write_edm(path: Path, denoiser: Denoiser, config: dict) -> None:
    """Write a Denoiser of patch_size 1 as EDM publishes networks; config: its arguments, all of them."""
    precond = {k: config[k] for k in ("img_resolution", "img_channels", "label_dim", "sigma_data")}
    unet = {k: v for k, v in config.items() if k not in precond}
    inner = {"img_resolution": config["img_resolution"], "in_channels": config["img_channels"],
             "out_channels": config["img_channels"], "label_dim": config["label_dim"]}  # fmt: skip
    ema = _saved(denoiser, config | {"model_type": "SongUNet"}, **precond, use_fp16=False, sigma_min=0,
                 sigma_max=float("inf"))  # fmt: skip
    ema.class_name, ema.state["_modules"]["model"] = "EDMPrecond", _saved(denoiser.model, inner | unet)
    with open(path, "wb") as file:
        _PersistencePickler(file, protocol=4).dump({"ema": ema})


class _Inception(nn.Module):
    """The interface of FID's Inception file: pixels 0..255 of any size -> 2048 features, or 1008 probabilities."""

    def __init__(self):
        super().__init__()
        from torchvision.models import inception_v3

        blocks = dict(inception_v3(weights=None, aux_logits=False, init_weights=False).named_children())
        self.layers = nn.Sequential(OrderedDict(blocks | {"dropout": nn.Identity(), "fc": nn.Flatten()}))
        for module in self.layers.modules():  # He's, so that features neither vanish nor explode
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self.output = nn.Linear(2048, 1008)

    def forward(self, img, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False):
        x = nn.functional.interpolate(img.float(), (299, 299), mode="bilinear", align_corners=False)
        features = self.layers((x - 128) / 128)
        if return_features:
            return features
        logits = nn.functional.linear(features, self.output.weight)
        return torch.softmax(logits if no_output_bias else logits + self.output.bias, dim=1)


def _write(entry: weights.Published, path: Path) -> None:
    if entry.kind == "denoiser":
        denoiser = Denoiser(**entry.config).eval().requires_grad_(False)
        for name, value in denoiser.named_parameters():
            if name.endswith("aux_conv.weight"):  # drawn 1e-5 small for training; full size makes varied images
                value *= 1e5
        write_edm(path, denoiser, entry.config)
    elif entry.kind == "inception":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, but what the real file is
            torch.jit.script(_Inception().eval().requires_grad_(False)).save(str(path))
    elif entry.kind in ("extractor", "discriminator"):
        encoder = EncoderUNet(**entry.config).requires_grad_(False)
        for value in encoder.parameters():
            if value.ndim > 1 and not value.any():  # residual branches, which start at zero
                nn.init.kaiming_normal_(value, nonlinearity="linear")
        torch.save(encoder.state_dict(), path)
    else:
        raise UserError(f"'{entry.name}' holds data, not weights: there is no stand-in for it")


def write_stand_ins(folder: Path | str, names, seed: int = 0) -> None:
    """Write random stand-ins of the named published files into a folder of their own; those there are kept.

    Raises UserError for a folder with other files of weights, or with the stand-ins of another seed.
    """
    folder = Path(folder)
    marker, text = folder / weights.REHEARSAL, f"Random stand-ins for published weights, seed {seed}.\n"
    if folder.is_dir() and any(folder.iterdir()) and not (marker.is_file() and marker.read_text() == text):
        raise UserError(f"{folder} holds something other than stand-ins of seed {seed}: give an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(text)
    for entry in map(weights.published, names):
        path = folder / entry.file
        if path.is_file():
            continue
        key = hashlib.sha256(f"{seed} {entry.name}".encode()).digest()
        temporary = path.with_name(f".{path.name}.tmp")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(key[:8]) >> 1)
            _write(entry, temporary)
        os.replace(temporary, path)


if __name__ == "__main__":
    from dgutils.pipeline.parameters import load

    try:
        write_stand_ins(weights.weights_dir(), weights.mentioned(load(*sys.argv[1:] or ["rehearsal"]).model_dump()))
    except UserError as error:
        print(f"standins: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{weights.weights_dir()}: random stand-ins for the published weights")
