"""Networks from files: the shipped ones with their model cards, the published ones in their authors' formats.

Nothing of a file is run: EDM's pickles go through `unpickle`, state dicts through torch's `weights_only` reader.
What does not fit is named, with the likely cause.
"""

import functools
import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dgutils.errors import UserError
from dgutils.networks import weights
from dgutils.networks.adm import EncoderUNet
from dgutils.networks.edm import Denoiser
from dgutils.networks.unpickle import Saved, load_weights_only, read_pickle, state_dict
from dgutils.networks.weights import sha256_of, write_whole
from dgutils.paths import weights_dir

ASSETS = Path(__file__).resolve().parent.parent / "assets"
PART_BYTES = 15 * 2**20  # of a file that must pass where only small ones may

_ARCHITECTURES = {"denoiser": Denoiser, "extractor": EncoderUNet, "discriminator": EncoderUNet}
# The published SongUNet's own defaults: the value of an option that a file leaves out.
_SONG_UNET = dict(
    augment_dim=0, model_channels=128, channel_mult=[1, 2, 2, 2], channel_mult_emb=4, num_blocks=4,
    attn_resolutions=[16], dropout=0.10, label_dropout=0, embedding_type="positional", channel_mult_noise=1,
    encoder_type="standard", decoder_type="standard", resample_filter=[1, 1],
)  # fmt: skip
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # in tensors' names
_CONVERTER = 1  # raised when converted files of earlier versions must be made anew


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors atomically: a reader sees the old file or the whole new one."""
    write_whole(path, save({k: v.contiguous() for k, v in tensors.items()}, metadata))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises UserError if it is not one, or is cut short."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}): restore or delete it") from error


def write_parts(path: Path, folder: Path) -> list[Path]:
    """Copy a file into `folder` as NAME.part0, NAME.part1, ... of at most `PART_BYTES` each; returns their paths.

    Parts of an earlier, longer file are removed. `join_parts` puts them together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = path.read_bytes()
    pieces = [data[start : start + PART_BYTES] for start in range(0, max(1, len(data)), PART_BYTES)]
    parts = [folder / f"{path.name}.part{number}" for number in range(len(pieces))]
    for part, piece in zip(parts, pieces, strict=True):
        write_whole(part, piece)
    for stale in set(folder.glob(f"{path.name}.part*")) - set(parts):
        stale.unlink()
    return parts


def join_parts(path: Path, target: Path, sha256: str) -> Path:
    """Join PATH.part0, PATH.part1, ... into `target`. Raises UserError unless its checksum is the one given."""
    parts = sorted(path.parent.glob(f"{path.name}.part*"), key=lambda part: int(part.name.rpartition("part")[2]))
    data = b"".join(part.read_bytes() for part in parts)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path}.part*: the {len(parts)} parts are not the file with checksum {sha256[:12]}: is one "
                        "missing, or of another file?")
    write_whole(target, data)
    return target


def _is_shipped(name: str) -> bool:
    return (ASSETS / f"{name}.json").is_file()


def _shipped_names() -> str:
    return ", ".join(sorted(p.stem for p in ASSETS.glob("*.safetensors"))) or "none"


def model_card(name: str) -> dict:
    """The model card `assets/<name>.json` of a shipped network."""
    if not _is_shipped(name):
        raise UserError(f"no shipped network '{name}'; there are: {_shipped_names()}")
    return json.loads((ASSETS / f"{name}.json").read_text())


def _shipped(name: str, kind: str) -> tuple[dict, dict[str, torch.Tensor]]:
    card, architecture, path = model_card(name), _ARCHITECTURES[kind].__name__, ASSETS / f"{name}.safetensors"
    if card["recipe"]["architecture"] != architecture:
        raise UserError(f"'{name}' is a {card['recipe']['architecture']}, not a {architecture}")
    if not path.is_file() or sha256_of(path) != card["sha256"]:
        raise UserError(f"{path} is absent or does not match its model card (sha256 {card['sha256'][:12]}): "
                        f"restore it with `git checkout -- dgutils/assets/{path.name}`")
    return card["recipe"]["config"], read_tensors(path)[0]


def read_edm(path: Path) -> tuple[dict, dict[str, torch.Tensor], dict]:
    """An EDM pickle's `ema` network: config of our Denoiser, tensors as they are, and what else the file says.

    Raises UserError for a file that is refused, or holds another kind of network.
    """
    holds = read_pickle(path)
    ema = holds.get("ema") if type(holds) is dict else None
    modules = ema.state.get("_modules") if type(ema) is Saved else None
    unet = modules.get("model") if type(modules) is dict else None
    if type(unet) is not Saved:
        raise UserError(f"{path} has no network under 'ema': it is not one of EDM's snapshots")
    if (ema.class_name, unet.class_name) != ("EDMPrecond", "SongUNet"):
        raise UserError(f"{path} holds {ema.class_name} around {unet.class_name}; supported is EDMPrecond around "
                        "SongUNet: choose one of the edm-* files of the registry")
    shape = ("img_resolution", "in_channels", "out_channels", "label_dim")  # known from the network around it
    options = {k: v for k, v in unet.kwargs.items() if k not in shape}
    if unknown := sorted(set(options) - set(_SONG_UNET)) or unet.args:
        raise UserError(f"{path}: its SongUNet has arguments that are unknown here: {list(unknown)}")
    precond = ("img_resolution", "img_channels", "label_dim", "sigma_data", "sigma_min", "sigma_max")
    config = {k: ema.state.get(k) for k in precond} | _SONG_UNET | options
    about = {"network": f"{ema.class_name} around {unet.class_name}", "use_fp16": ema.state.get("use_fp16"),
             "other_entries": {k: getattr(v, "class_name", type(v).__name__) for k, v in holds.items() if k != "ema"}}
    try:
        json.dumps([config, about])
    except (TypeError, ValueError, RecursionError) as error:  # of lists that hold themselves, too
        raise UserError(f"{path}: its network's arguments are not plain numbers and text ({error})") from error
    try:
        return config, state_dict(ema), about
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _converted(entry: weights.Published, path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Config and float32 tensors of an EDM pickle; converted once, and again when the pickle has changed."""
    cached, manifest = weights_dir() / "converted" / f"{entry.name}.safetensors", {}
    source = {"source": path.name, "sha256": sha256_of(path), "converter": _CONVERTER}
    if cached.is_file():
        tensors, metadata = read_tensors(cached)
        manifest = json.loads(metadata.get("manifest", "{}"))
    if {key: manifest.get(key) for key in source} != source:
        config, tensors, about = read_edm(path)
        _sound(path, tensors)
        tensors, manifest = {k: v.float() for k, v in tensors.items()}, source | {"config": config} | about
        with weights.writing(cached):
            cached.parent.mkdir(exist_ok=True)
            write_tensors(cached, tensors, {"manifest": json.dumps(manifest)})
    config = manifest["config"]
    if differing := [f"{k} is {config.get(k)}, not {v}" for k, v in entry.config.items() if config.get(k) != v]:
        raise UserError(f"{path} is not the {entry.what}: {'; '.join(differing)}{_likely(tensors)}")
    return config, tensors


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pt file. Raises UserError if it is refused, unreadable or more than a state dict."""
    try:
        found = load_weights_only(path)
    except UserError as error:
        raise UserError(f"{path} refused: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        holds = f"a dict of {', '.join(map(str, list(found)[:5]))}" if isinstance(found, dict) else type(found).__name__
        raise UserError(f"{path} is not a state dict but {holds}: a training checkpoint? save its network's "
                        "state_dict() alone")
    return _unwrapped(found)


def _unwrapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by the names that they had before DataParallel, torch.compile and the like wrapped the network."""
    plain = {_WRAPPERS.sub("", str(key)): value for key, value in tensors.items()}
    while plain and all(key.startswith("module.") for key in plain):
        plain = {key.removeprefix("module."): value for key, value in plain.items()}
    return plain if len(plain) == len(tensors) else tensors


def fault(tensors: dict[str, torch.Tensor]) -> str | None:
    """What no trained network's tensors are, with the name of the first; None if they are in order."""
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            return f"{name} is a sparse, quantised or empty tensor"
        if not value.is_floating_point():
            return f"{name} holds {str(value.dtype).removeprefix('torch.')} numbers, not real ones"
        if infinite := value.numel() - int(value.float().isfinite().sum()):
            return f"{name} holds {infinite:,} numbers that are NaN or infinite"
        if value.ndim > 1 and not value.float().any():
            return f"{name} is zero throughout, as if it had not been trained"
    return None


def _sound(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    if what := fault(tensors):
        raise UserError(f"{path} refused: {what}: get the file again")


def _shapes(kind: str, config: dict) -> dict[str, tuple]:
    """Names and shapes of a network's tensors, found without allocating it."""
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in _ARCHITECTURES[kind](**config).state_dict().items()}


def fitting(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The published networks that have tensors of just these names and shapes, for any number of classes."""

    def compared(shapes):
        return {k: shape[1:] if k == "label_emb.weight" else tuple(shape) for k, shape in shapes.items()}

    found = compared({k: v.shape for k, v in tensors.items()})
    return [e.name for e in weights.registry().values() if e.config and compared(_shapes(e.kind, e.config)) == found]


def _likely(tensors: dict[str, torch.Tensor]) -> str:
    """The likely cause of a misfit, to end its message with."""
    if names := fitting(tensors):
        return (f"; it has the structure of {' or '.join(names)} ({weights.published(names[0]).what}): "
                "was one file put in the other's place?")
    return "; it fits no network of the registry: get the file again"


def _check(entry: weights.Published, path: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Raise UserError naming the first keys that are missing, superfluous, of another shape or no trained weights."""
    expected = _shapes(entry.kind, config)
    wrong = [f"{k} is {list(v.shape)}, not {list(expected[k])}" for k, v in tensors.items()
             if tuple(v.shape) != expected.get(k, tuple(v.shape))]  # fmt: skip
    faults = [("lacks", sorted(expected.keys() - tensors)), ("has", sorted(tensors.keys() - expected)), ("its", wrong)]
    if found := [f"{verb} {keys[0]}" + (f" and {len(keys) - 1} more" if keys[1:] else "")
                 for verb, keys in faults if keys]:  # fmt: skip
        raise UserError(f"{path} is not the {entry.what}: it {', '.join(found)}{_likely(tensors)}")
    _sound(path, tensors)


def _published(name: str, kind: str) -> tuple[dict, dict[str, torch.Tensor]]:
    entry = _entry(name)
    if entry.kind != kind:
        raise UserError(f"'{name}' is no {kind} but: {entry.what}")
    path = weights.find(name)
    if kind == "denoiser":
        config, tensors = _converted(entry, path)
    else:
        config, tensors = entry.config, read_state_dict(path)
        if config.get("num_classes") and "label_emb.weight" in tensors:  # of how many classes, the file says
            config = config | {"num_classes": len(tensors["label_emb.weight"])}
    _check(entry, path, config, tensors)
    weights.record(name)
    return config, tensors


def _entry(name: str) -> weights.Published:
    """The registry's entry of a network that is not shipped. Raises UserError, naming all networks there are."""
    networks = {e.name: e for e in weights.registry().values() if e.config}
    if name not in networks:
        raise UserError(f"no network '{name}'; shipped: {_shipped_names()}; published: {', '.join(networks)}")
    return networks[name]


@functools.cache
def _load(name: str, kind: str):
    config, tensors = (_shipped if _is_shipped(name) else _published)(name, kind)
    network = _ARCHITECTURES[kind](**config)
    network.load_state_dict({key: value.float() for key, value in tensors.items()})
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def load_denoiser(name: str) -> Denoiser:
    """The score network `name`, shipped or published, frozen, float32.

    Raises UserError if it is absent, altered, refused or another network.
    """
    return _load(name, "denoiser")


def load_feature_extractor(name: str) -> EncoderUNet:
    """The noise-conditional feature extractor `name`, frozen, float32. Raises UserError likewise."""
    return _load(name, "extractor")


def load_discriminator(name: str) -> EncoderUNet:
    """The published discriminator `name`: its head (class-conditional: `label_emb`), frozen, float32. Likewise."""
    return _load(name, "discriminator")


def clock(name: str) -> str:
    """By which schedule the extractor `name` reads VP time: "linear" or "cosine" (noise.vp_to_cosine_time)."""
    return "linear" if _is_shipped(name) else _entry(name).clock


def network_config(name: str) -> dict:
    """The options of the network `name`, without its file. Raises UserError for an unknown name."""
    return model_card(name)["recipe"]["config"] if _is_shipped(name) else _entry(name).config


def image_shape(name: str) -> tuple[int, int, int]:
    """Channels, height and width of the images of the score network `name`, without its file."""
    config = network_config(name)
    return config["img_channels"], config["img_resolution"], config["img_resolution"]


def weights_digest(name: str) -> str:
    """sha256 of the file that the network `name` comes from (Inception too), its identity in the store.

    "absent" without the file: nothing can be made from it, so no artifact has that identity, but it can be planned.
    """
    if _is_shipped(name):
        return model_card(name)["sha256"]
    entry = weights.registry().get(name) or _entry(name)
    return sha256_of(weights.find(name)) if entry.path.is_file() else "absent"


def head_config(feature_extractor: str, width: int, num_res_blocks: int, num_head_channels: int) -> dict:
    """Arguments of the shallow head on an extractor's features: one level, attention, one output (DG).

    Raises UserError for those that make no network.
    """
    with torch.device("meta"):  # their shapes, without a file
        channels, size, _ = EncoderUNet(**network_config(feature_extractor)).feature_shape
        head = dict(
            image_size=size, in_channels=channels, model_channels=width, out_channels=1,
            num_res_blocks=num_res_blocks, attention_resolutions=[1], channel_mult=[1],
            num_head_channels=num_head_channels,
        )  # fmt: skip
        if width < 128 or width % 32:  # too narrow for the published 32 groups
            head["num_group_channels"] = 4
        EncoderUNet(**head)  # says what does not fit
    return head
