"""Networks from files: the shipped ones with their model cards, the published ones in their authors' formats.

Nothing of a file is run: EDM's pickles go through `unpickle`, state dicts through torch's `weights_only` reader.
What does not fit is named.
"""

import functools
import inspect
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dgutils.errors import UserError, require
from dgutils.files import write_file
from dgutils.networks import weights
from dgutils.networks.adm import EncoderUNet
from dgutils.networks.edm import Denoiser, SongUNet
from dgutils.networks.unpickle import Saved, load_weights_only, read_pickle, state_dict
from dgutils.networks.weights import Published, sha256_of

ASSETS = Path(__file__).resolve().parent.parent / "assets"

_ARCHITECTURES = {"denoiser": Denoiser, "extractor": EncoderUNet, "discriminator": EncoderUNet}
# Arguments of the published SongUNet that ours lacks: those that are of no account here, and those that make it DDPM++.
_NO_ACCOUNT = {"in_channels", "out_channels", "label_dropout"}
_DDPMPP = {"embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard",
           "decoder_type": "standard", "resample_filter": [1, 1]}  # fmt: skip


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors atomically: a reader sees the old file or the whole new one."""
    write_file(path, save({k: v.contiguous() for k, v in tensors.items()}, metadata))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises UserError if it is not one, or is cut short."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}): restore or delete it") from error


def read_edm(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """An EDM pickle's `ema` network: its tensors as they are, and its options as `Denoiser` takes them.

    Raises UserError for a file that is refused, or holds another kind of network.
    """
    holds = read_pickle(path)
    ema = holds.get("ema") if type(holds) is dict else None
    modules = ema.state.get("_modules") if type(ema) is Saved else None
    unet = modules.get("model") if type(modules) is dict else None
    require(type(unet) is Saved, f"{path} has no network under 'ema': it is not one of EDM's snapshots")
    require((ema.class_name, unet.class_name) == ("EDMPrecond", "SongUNet"),
            f"{path} holds {ema.class_name} around {unet.class_name}; supported is EDMPrecond around SongUNet: "
            "choose one of the edm-* files of the registry")  # fmt: skip
    try:
        options = json.loads(json.dumps(unet.kwargs))
        config = {key: json.loads(json.dumps(ema.state.get(key)))
                  for key in ("img_resolution", "img_channels", "label_dim", "sigma_data")}
        tensors = state_dict(ema)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (TypeError, ValueError, RecursionError) as error:  # lists and modules may hold themselves
        raise UserError(f"{path}: its network's arguments are not plain numbers and text ({error})") from error
    for key, value in _DDPMPP.items():
        require((found := options.pop(key, value)) == value, f"{path}: its {key} is {found}; supported is {value}, as "
                "in the files of the registry")  # fmt: skip
    unknown = sorted(options.keys() - _NO_ACCOUNT - inspect.signature(SongUNet).parameters.keys()) or list(unet.args)
    require(not unknown, f"{path}: its SongUNet has arguments that are unknown here: {unknown}")
    return tensors, {key: value for key, value in options.items() if key not in _NO_ACCOUNT} | config


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
    return found


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


def _shapes(kind: str, config: dict) -> dict[str, list[int]]:
    """Names and shapes of a network's tensors, found without allocating it."""
    with torch.device("meta"):
        return {k: list(v.shape) for k, v in _ARCHITECTURES[kind](**config).state_dict().items()}


def _difference(found: dict, expected: dict) -> str:
    """Where two dictionaries differ first, and in how many places more; "" if they are equal."""
    keys = [key for key in expected | found if found.get(key) != expected.get(key)]
    more = f", and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"{keys[0]} is {found.get(keys[0], 'absent')}, not {expected.get(keys[0], 'absent')}{more}" if keys else ""


def _check(entry: Published, config: dict, tensors: dict[str, torch.Tensor], options: dict) -> None:
    """Raise UserError for options and tensors that differ from the entry's, or that no training leaves."""
    difference = _difference({key: options.get(key, value) for key, value in config.items()}, config) or \
        _difference({key: list(value.shape) for key, value in tensors.items()}, _shapes(entry.kind, config))
    require(not difference, f"{entry.path} is not the {entry.what}: {difference}: get the file again")
    require(not (what := fault(tensors)), f"{entry.path} refused: {what}: get the file again")


def model_card(name: str) -> dict:
    """The model card `assets/<name>.json` of a shipped network."""
    path = ASSETS / f"{name}.json"
    require(path.is_file(), f"no shipped network '{name}'; there are: {_shipped()}")
    return json.loads(path.read_text())


def _shipped() -> str:
    return ", ".join(sorted(p.stem for p in ASSETS.glob("*.safetensors"))) or "none"


def _entry(name: str, kind: str | None = None) -> Published:
    """What is known of a network without its file; one that is shipped has no address.

    Raises UserError for another name, with all networks there are, or, if a kind is asked for, of another kind.
    """
    if (ASSETS / f"{name}.json").is_file():
        card = model_card(name)
        head = card["recipe"]["config"].get("out_channels") == 1
        its = "denoiser" if card["recipe"]["architecture"] == "Denoiser" else "discriminator" if head else "extractor"
        entry = Published(name, its, card["what"], f"{ASSETS / name}.safetensors", "", card["licence"], 0,
                          card["recipe"]["config"], sha256=card["sha256"])  # fmt: skip
    else:
        networks = {e.name: e for e in weights.registry().values() if e.config}
        require(name in networks, f"no network '{name}'; shipped: {_shipped()}; published: {', '.join(networks)}")
        entry = networks[name]
    require(kind in (None, entry.kind), f"'{name}' is no {kind} but: {entry.what}")
    return entry


def _read(entry: Published) -> tuple[dict, dict[str, torch.Tensor]]:
    """Config and tensors of a network, all checked. Raises UserError."""
    if not entry.url:
        require(entry.path.is_file() and sha256_of(entry.path) == entry.sha256,
                f"{entry.path} is absent or does not match its model card (sha256 {entry.sha256[:12]}): restore it "
                f"with `git checkout -- dgutils/assets/{entry.path.name}`")  # fmt: skip
        return entry.config, read_tensors(entry.path)[0]
    path, config, options = weights.find(entry.name), entry.config, {}
    if entry.kind == "denoiser":
        tensors, options = read_edm(path)
    else:
        tensors = read_state_dict(path)
        if config.get("num_classes") and "label_emb.weight" in tensors:  # of how many classes, the file says
            config = config | {"num_classes": len(tensors["label_emb.weight"])}
    _check(entry, config, tensors, options)
    weights.record(entry.name)
    return config, tensors


@functools.cache
def _load(name: str, kind: str):
    """The network `name`, shipped or published, frozen, float32.

    Raises UserError if it is absent, altered, refused or another network.
    """
    entry = _entry(name, kind)
    config, tensors = _read(entry)
    network = _ARCHITECTURES[kind](**config)
    network.load_state_dict({key: value.float() for key, value in tensors.items()})
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


load_denoiser = functools.partial(_load, kind="denoiser")
load_feature_extractor = functools.partial(_load, kind="extractor")
load_discriminator = functools.partial(_load, kind="discriminator")  # its head; class-conditional with `label_emb`


def clock(name: str) -> str:
    """By which schedule the extractor `name` reads VP time: "linear" or "cosine" (noise.vp_to_cosine_time)."""
    return _entry(name).clock


def network_config(name: str, kind: str | None = None) -> dict:
    """The options of the network `name`, without its file. Raises UserError for an unknown name or another kind."""
    return _entry(name, kind).config


def image_shape(name: str) -> tuple[int, int, int]:
    """Channels, height and width of the images of the score network `name`, without its file."""
    config = network_config(name)
    return config["img_channels"], config["img_resolution"], config["img_resolution"]


def weights_digest(name: str) -> str:
    """sha256 of the file that the network `name` comes from (Inception too), its identity in the store.

    "absent" without the file: nothing can be made from it, so no artifact has that identity, but it can be planned.
    """
    entry = weights.registry().get(name) or _entry(name)
    if not entry.url:
        return entry.sha256
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


def look_into(path: Path) -> list[str]:
    """What a file of weights holds, in lines of text. Runs nothing of it and builds no network.

    Of a file that no network would be made from, the last line begins with REFUSED. Raises UserError without a file.
    """
    require(path.is_file(), f"no file {path}")
    lines, options = [f"{path}: {path.stat().st_size:,} bytes, sha256 {sha256_of(path)}"], {}
    try:
        if path.suffix in (".safetensors", ".pkl"):
            tensors, options = (read_edm if path.suffix == ".pkl" else read_tensors)(path)
        else:
            tensors = read_state_dict(path)
    except UserError as error:
        return [*lines, f"REFUSED: {error}"]
    shapes = [f"  {name} {list(value.shape)}" for name, value in tensors.items()]
    kinds = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()}))
    lines += [*(f"{key}: {value}" for key, value in options.items()),
              f"{sum(v.numel() for v in tensors.values()):,} numbers in {len(tensors)} tensors, {kinds}",
              *(shapes if len(shapes) <= 6 else [*shapes[:3], "  ...", *shapes[-3:]])]
    return lines + ([f"REFUSED: {what}"] if (what := fault(tensors)) else [])
