"""Training of the two networks that discriminator guidance takes as given: score network and feature extractor.

`train_network` is the loop. A recipe is data: `assets/<name>.yaml` holds the architecture and every number of the
training. Every draw is a function of (seed, step), so that a training goes on to the same bits after whatever
interrupts it. It ends in `<name>.safetensors` (the EMA weights in bfloat16) with its model card `<name>.json`.
"""

import hashlib
import io
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from dgutils import datasets, noise
from dgutils.errors import UserError, require
from dgutils.files import lock, write_file
from dgutils.machine import device as default_device
from dgutils.machine import log_line
from dgutils.networks import adm, edm
from dgutils.networks.checkpoints import ASSETS, model_card, read_tensors, write_tensors
from dgutils.networks.unpickle import load_weights_only
from dgutils.networks.weights import sha256_of

PART_BYTES = 15 * 2**20  # of weights that must pass where only small files may
# The numbers of a recipe's training, and the least of each; where that is whole, so is the number.
TRAINING = {"images": 1, "decay_images": 1, "batch_size": 1, "learning_rate": 0.0, "warmup_steps": 1,
            "weight_decay": 0.0, "ema_half_life": 0.0, "seed": 0, "log_every": 1}  # fmt: skip
ARCHITECTURES = {"Denoiser": edm.Denoiser, "EncoderUNet": adm.EncoderUNet}


def load_recipe(name: str) -> dict:
    """The recipe `assets/<name>.yaml`. Raises UserError, naming those that exist, if there is none, or it is wrong."""
    path = ASSETS / f"{name}.yaml"
    known = sorted(p.stem for p in ASSETS.glob("*.yaml") if p.stem != "registry")
    require(path.is_file(), f"no recipe '{name}' in {ASSETS.name}; there are: {', '.join(known)}")
    try:
        recipe = yaml.safe_load(path.read_bytes())
        numbers = {key: recipe["training"][key] for key in TRAINING}
        with torch.device("meta"):  # its shapes alone
            ARCHITECTURES[recipe["architecture"]](**recipe["config"])
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no recipe ({type(error).__name__}: {error}): compare it with another") from error
    for key, value in numbers.items():
        require(type(value) in (int, type(TRAINING[key])) and TRAINING[key] <= value < math.inf, f"{path}: {key} is "
                f"{value!r}: give a number, at least {TRAINING[key]}, written as 1.0e-4 is")
    return recipe


def build(recipe: dict) -> nn.Module:
    """The recipe's network with its initial weights, drawn from the recipe's seed."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe["training"]["seed"])
        network = ARCHITECTURES[recipe["architecture"]](**recipe["config"])
    return network.to(memory_format=torch.channels_last)


class Draws:
    """Random numbers for one step, a function of (seed, *key): the device's own, or NumPy's on a CPU or if asked."""

    def __init__(self, device: torch.device, seed: int, *key: int, by_numpy: bool = False):
        self.device, self.rng, self.generator = device, noise.keyed_rng(seed, *key), None
        if device.type != "cpu" and not by_numpy:
            self.generator = torch.Generator(device).manual_seed(int(self.rng.integers(2**63)))

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal, float32."""
        if self.generator:
            return torch.randn(shape, device=self.device, generator=self.generator)
        return torch.from_numpy(self.rng.standard_normal(shape, dtype=np.float32)).to(self.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform in [0, 1), float64."""
        if self.generator:
            return torch.rand(shape, device=self.device, generator=self.generator, dtype=torch.float64)
        return torch.from_numpy(self.rng.random(shape)).to(self.device)


class Batches:
    """The training images on the device; batch number `step` is a function of (seed, step).

    images: uint8 [N, H, W, C], in the place of the dataset's, without classes.
    """

    def __init__(self, dataset: str, training: dict, device: torch.device, images: np.ndarray | None = None):
        images, labels = datasets.load_dataset(dataset, "train") if images is None else (images, [0] * len(images))
        self.images, self.labels = torch.tensor(images, device=device), torch.tensor(labels, device=device)
        self.size, self.seed, self.flips = (training[key] for key in ("batch_size", "seed", "horizontal_flip"))
        self.epoch = self.order = None

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [B, C, H, W] in [-1, 1] and their labels [B]."""
        epoch, position = divmod(step, len(self.images) // self.size)
        if epoch != self.epoch:
            order = noise.keyed_rng(self.seed, 1, epoch).permutation(len(self.images))
            self.epoch, self.order = epoch, torch.from_numpy(order).to(self.images.device)
        index = self.order[position * self.size : (position + 1) * self.size].sort().values
        x = self.images[index].permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
        if self.flips:
            flip = Draws(x.device, self.seed, 2, step).uniform(self.size) < 0.5
            x = torch.where(flip[:, None, None, None], x.flip(3), x)
        return x, self.labels[index]


def classifier_loss(model, x, labels, draws):
    """Cross-entropy of a noise-conditional classifier (Dhariwal & Nichol 2021, section 4).

    At times drawn as discriminator training draws them (DG, appendix).
    """
    vp_time = noise.sample_vp_time(draws.uniform(len(x))).float()
    sigma = noise.vp_time_to_sigma(vp_time)[:, None, None, None]
    x_vp = noise.vp_scale(sigma) * (x + sigma * draws.normal(*x.shape))
    return F.cross_entropy(model(x_vp, vp_time).float(), labels)


LOSSES = {"Denoiser": lambda model, x, labels, draws: edm.edm_loss(model, x, draws.normal(len(x)),
                                                                   draws.normal(*x.shape)),
          "EncoderUNet": classifier_loss}  # fmt: skip


def learning_rate(training: dict, steps: int, passed: float, length: float, decay: float) -> float:
    """Linear warm-up over the first steps, a plateau, and half a cosine to zero over the last `decay` of `length`."""
    warm_up = min(1.0, (steps + 1) / training["warmup_steps"])
    decayed = min(1.0, max(0.0, (passed - length + decay) / decay))
    return training["learning_rate"] * warm_up * 0.5 * (1 + math.cos(math.pi * decayed))


def ema_decay(training: dict, step: int) -> float:
    """EDM's EMA: a half-life in images, shorter while few images have been seen (ramp-up 5 %)."""
    seen = (step + 1) * training["batch_size"]
    return 0.5 ** (training["batch_size"] / max(min(training["ema_half_life"], 0.05 * seen), 1e-8))


def _begin(name, recipe, checkpoint, model, ema, optimizer, timed) -> dict:
    """Fill network, EMA and optimiser from the checkpoint or from a start's weights; returns the progress."""
    progress = {"recipe": recipe, "step": 0, "first_step": 0, "seconds": 0.0, "log": []}
    if checkpoint.is_file():
        try:
            saved = load_weights_only(checkpoint)
        except UserError as error:
            raise UserError(f"{checkpoint}: {error}: restore or delete it") from error
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["optimizer"]})
        require(saved["progress"]["recipe"] == recipe,
                f"{checkpoint} was made with another recipe of '{name}': move it away or restore it")
        return saved["progress"]
    unfinished = (ASSETS / f"{name}.safetensors").is_file() and not model_card(name)["finished"]
    if start := name if unfinished else recipe.get("start"):
        card, images = model_card(start), recipe["training"]["images"]
        require(all(card["recipe"][part] == recipe[part] for part in ("architecture", "config")),
                f"recipe '{name}' cannot go on from '{start}': give both the same architecture and config")
        require(timed or card["images_seen"] < images, f"recipe '{name}' goes on from '{start}', which has seen "
                f"{card['images_seen']:,} images: give it more than its {images:,}")  # fmt: skip
        weights = {key: value.float() for key, value in read_tensors(ASSETS / f"{start}.safetensors")[0].items()}
        model.load_state_dict(weights)
        ema.load_state_dict(weights)
        step = card["images_seen"] // recipe["training"]["batch_size"]
        progress |= {"step": step, "first_step": step, "seconds": card["train_seconds"], "log": card["loss_curve"]}
    return progress


@contextmanager
def _signals():
    """Yields a list that has something in it once SIGINT or SIGTERM asked to stop; a second one ends the process."""
    asked = []

    def ask(number, frame):
        asked.append(number)
        signal.signal(number, usual[number])

    usual = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _finite(name: str, losses: list[torch.Tensor], step: int) -> float:
    """The mean of the last losses before `step`, which waits for the device. Raises UserError if one is not finite."""
    values = torch.stack(losses).tolist() if losses else [0.0]
    for at, value in enumerate(values, step - len(values)):
        require(math.isfinite(value), f"{name}: loss is {value} at step {at}: lower learning_rate in its recipe")
    return float(np.mean(values))


def train_network(name: str, out_dir: Path, save_minutes: float = 5.0, minutes: float | None = None,
                  device: torch.device | None = None, saved: Callable[[Path], None] = lambda weights: None,
                  recipe: dict | None = None, images: np.ndarray | None = None) -> Path:  # fmt: skip
    """Train the network of recipe `name`, or of the recipe given; returns the path of the weights.

    Goes on from the checkpoint in `out_dir`, on a CPU to the same bits. Without one it goes on from the weights of the
    recipe's `start`, or from its own if they are shipped but not finished (with a fresh optimiser and warm-up, which
    the card says), else from the beginning.
    Ends after the recipe's images; or, given `minutes`, when these are over, the learning rate falling to zero over the
    recipe's share of them; or at SIGINT or SIGTERM, after the step it is at. Whichever it is, checkpoint, weights and
    card are left, as they are every `save_minutes`; saved(weights) is called after each time. Without the test images
    the card says null where the held-out loss would be, as it does while the training lasts.
    images: as of `Batches`. device: `default_device()` unless given; flips and noise are drawn there, and only what is
    written waits for it.
    Raises UserError when the loss is not finite, naming the step, for a `start` of another architecture or one that has
    seen all the recipe's images, and if another process trains on the same checkpoint.
    """
    began = last_save = time.monotonic()
    require(minutes is None or 0 < minutes < math.inf, f"{minutes} minutes: give a number above 0")
    recipe, device = recipe or load_recipe(name), device or default_device()
    training, loss_of, on_gpu = recipe["training"], LOSSES[recipe["architecture"]], device.type == "cuda"
    torch.backends.cudnn.benchmark |= on_gpu  # the fastest convolutions, found by trying
    batches, size, seed = Batches(recipe["dataset"], training, device, images), training["batch_size"], training["seed"]
    model, ema = build(recipe).to(device), build(recipe).to(device).eval()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=training["weight_decay"], fused=on_gpu or None)
    # Its length, and that of the decay at its end: in steps, or in seconds.
    length, decay = training["images"] // size, training["decay_images"] // size
    if minutes is not None:
        length, decay = 60 * minutes, 60 * minutes * training["decay_images"] / training["images"]

    def passed():
        return step if minutes is None else time.monotonic() - began

    def save(evaluate: bool) -> None:
        _finite(name, recent, step)  # what is not finite is not saved
        progress.update(step=step, seconds=before + time.monotonic() - began)
        parts = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()["state"]}
        torch.save(parts | {"progress": progress}, buffer := io.BytesIO())
        write_file(checkpoint, buffer.getvalue())
        # In bfloat16: in mixed precision sampling then computes with these very weights, not with others it rounded.
        weights = {key: value.bfloat16().cpu() for key, value in parts["ema"].items()}
        write_tensors(path, weights, {"recipe": json.dumps(recipe)})
        _write_card(path, {
            "name": name, "what": recipe["what"], "licence": recipe["licence"],
            "parameters": sum(v.numel() for v in weights.values()), "images_seen": step * size,
            "finished": passed() >= length, "optimizer_restarted_at_images": first * size,
            "train_seconds": round(progress["seconds"]), "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if on_gpu else "CPU", "sha256": sha256_of(path),
            "recipe": recipe, "evaluation": _evaluate(weights, recipe, device) if evaluate else None,
            "loss_curve": progress["log"],
        })  # fmt: skip
        saved(path)

    checkpoint, path = out_dir / f"{name}.checkpoint.pt", out_dir / f"{name}.safetensors"
    with lock(checkpoint.with_suffix(".lock"), False, log_line) as ours, _signals() as asked_to_stop:
        require(ours, f"{checkpoint}: another process trains it: wait, or give another folder with --out")
        progress = _begin(name, recipe, checkpoint, model, ema, optimizer, minutes is not None)
        step, first, before, recent = progress["step"], progress["first_step"], progress["seconds"], []
        unit = " steps" if minutes is None else "s"
        bar = tqdm(total=round(length), initial=int(passed()), desc=name, unit=unit, mininterval=10)
        while passed() < length and not asked_to_stop:
            optimizer.param_groups[0]["lr"] = learning_rate(training, step - first, passed(), length, decay)
            x, labels = batches(step)
            with torch.autocast(device.type, torch.bfloat16, enabled=training["precision"] == "bfloat16"):
                loss = loss_of(model, x, labels, Draws(device, seed, 3, step))
            recent.append(loss.detach())
            step += 1
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_([*ema.parameters()], [*model.parameters()], 1 - ema_decay(training, step - 1))
            if step % training["log_every"] == 0:
                progress["log"].append({"images": step * size, "loss": _finite(name, recent, step)})
                recent.clear()
                bar.set_postfix_str(f"{step * size:,} images, loss {progress['log'][-1]['loss']:.4f}")
            bar.update(int(min(passed(), length)) - bar.n)
            if time.monotonic() - last_save > 60 * save_minutes and passed() < length:
                save(evaluate=False)
                last_save = time.monotonic()
        bar.close()
        save(evaluate=True)
    return path


def _write_card(weights: Path, card: dict) -> None:
    write_file(weights.with_suffix(".json"), (json.dumps(card, indent=1) + "\n").encode())


def write_parts(path: Path, folder: Path) -> None:
    """Copy a file into `folder` as NAME.part0, NAME.part1, ... of at most `PART_BYTES` each, for `join`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = path.read_bytes()
    for number, start in enumerate(range(0, len(data), PART_BYTES)):
        write_file(folder / f"{path.name}.part{number}", data[start : start + PART_BYTES])


def join(name: str, folder: Path, out_dir: Path) -> Path:
    """Put weights that came in parts together in `out_dir`, beside their card; evaluates them if nobody has yet.

    Raises UserError if a part is missing or the checksum is not the card's.
    """
    card_path, path = folder / f"{name}.json", out_dir / f"{name}.safetensors"
    require(card_path.is_file(), f"{card_path} is absent: it belongs to the weights, and holds their checksum")
    card = json.loads(card_path.read_text())
    parts = sorted(folder.glob(f"{path.name}.part*"), key=lambda part: int(part.suffix.removeprefix(".part")))
    data = b"".join(part.read_bytes() for part in parts)
    require(hashlib.sha256(data).hexdigest() == card["sha256"], f"{folder / path.name}.part*: the {len(parts)} parts "
            f"are not the file with checksum {card['sha256'][:12]}: is one missing, or of another file?")
    out_dir.mkdir(parents=True, exist_ok=True)
    write_file(path, data)
    card["evaluation"] = card["evaluation"] or _evaluate(read_tensors(path)[0], card["recipe"], default_device())
    _write_card(path, card)
    return path


@torch.inference_mode()
def _evaluate(weights, recipe, device, n=2000) -> dict | None:
    """Held-out loss, on the first `n` test images with fixed draws; for a classifier also its accuracy.

    None where the test images are not to be had, as on a machine that was lent for the training alone.
    """
    try:
        images, labels = datasets.load_dataset(recipe["dataset"], "test")
    except UserError as error:
        tqdm.write(f"held-out loss not measured: {error}", file=sys.stderr)
        return None
    model = build(recipe).eval()
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    model.to(device)
    x, y = datasets.to_network(images[:n]).to(device), torch.tensor(labels[:n]).to(device)
    chunks, loss_of = list(zip(x.split(250), y.split(250), strict=True)), LOSSES[recipe["architecture"]]
    draws = Draws(device, 0, 4, by_numpy=True)  # the same noise for every network, whatever the device
    result = {"n": n, "test_loss": float(np.mean([loss_of(model, a, b, draws).item() for a, b in chunks]))}
    if recipe["architecture"] == "EncoderUNet":
        for key, sigma in (("accuracy_clean", 0.0), ("accuracy_sigma_0.2", 0.2), ("accuracy_sigma_1", 1.0)):
            level, hits = torch.tensor(sigma), 0
            for a, b in chunks:
                vp_time = noise.sigma_to_vp_time(level).to(device)
                x_vp = noise.vp_scale(level) * (a + level * draws.normal(*a.shape))
                hits += (model(x_vp, vp_time).argmax(1) == b).sum().item()
            result[key] = hits / n
    return result
