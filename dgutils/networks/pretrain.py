"""Training of the two networks that discriminator guidance takes as given: score network and feature extractor.

A recipe is data: `assets/<name>.yaml` holds the architecture and every number of the training. Training is
resumable to the same bits, since every draw is a function of (seed, step), and ends in `<name>.safetensors`
(the EMA weights in bfloat16) with its model card `<name>.json`.

On a GPU the same loop draws flips and noise there, and waits for the device only where it writes something down.
A training that is given minutes lays its learning-rate decay over them instead of over a number of images.
"""

import json
import math
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from dgutils import datasets, noise
from dgutils.errors import UserError
from dgutils.networks import adm, edm
from dgutils.networks.checkpoints import ASSETS, join_parts, model_card, read_tensors, sha256_of, write_tensors

ARCHITECTURES = {"Denoiser": edm.Denoiser, "EncoderUNet": adm.EncoderUNet}


def load_recipe(name: str) -> dict:
    """The recipe `assets/<name>.yaml`. Raises UserError, naming those that exist, if there is none."""
    path = ASSETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in ASSETS.glob("*.yaml") if p.stem != "registry"))
        raise UserError(f"no recipe '{name}' in {ASSETS.name}; there are: {known}")
    return yaml.safe_load(path.read_text())


def build(recipe: dict) -> nn.Module:
    """The recipe's network with its initial weights, drawn from the recipe's seed."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe["training"]["seed"])
        network = ARCHITECTURES[recipe["architecture"]](**recipe["config"])
    return network.to(memory_format=torch.channels_last)


class _Draws:
    """Random numbers for one step, a function of (seed, *key): NumPy's on a CPU, the device's own elsewhere."""

    def __init__(self, device: torch.device, seed: int, *key: int):
        self.device, self.rng = device, noise.keyed_rng(seed, *key)
        if device.type != "cpu":
            self.generator = torch.Generator(device).manual_seed(int(self.rng.integers(2**63)))

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers, float32."""
        if self.device.type == "cpu":
            return torch.from_numpy(self.rng.standard_normal(shape, dtype=np.float32))
        return torch.randn(shape, device=self.device, generator=self.generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Numbers in [0, 1), float64."""
        if self.device.type == "cpu":
            return torch.from_numpy(self.rng.random(shape))
        return torch.rand(shape, device=self.device, generator=self.generator, dtype=torch.float64)


def _noise_levels(x, draws):
    """What EDM's loss draws for images x [N, C, H, W]: log sigma, standardised, [N]; the noise, like x."""
    return draws.normal(len(x)), draws.normal(*x.shape)


def _score_loss(model, x, labels, log_sigma, normal):
    """EDM's denoising loss (edm.edm_loss)."""
    return edm.edm_loss(model, x, log_sigma, normal)


def _perturbed(x, draws):
    """VP-perturbed images and their times, drawn as discriminator training draws them (DG, appendix)."""
    vp_time = noise.sample_vp_time(draws.uniform(len(x))).float()
    sigma = noise.vp_time_to_sigma(vp_time)[:, None, None, None]
    return noise.vp_scale(sigma) * (x + sigma * draws.normal(*x.shape)), vp_time


def _classifier_loss(model, x, labels, x_vp, vp_time):
    """Cross-entropy of a noise-conditional classifier (Dhariwal & Nichol 2021, section 4)."""
    return F.cross_entropy(model(x_vp, vp_time).float(), labels)


# Of each architecture: what a step draws for its images, and the loss of a network on images, labels and draws.
LOSSES = {"Denoiser": (_noise_levels, _score_loss), "EncoderUNet": (_perturbed, _classifier_loss)}


class _Batches:
    """The training images on the device; batch number `step` is a function of (seed, step)."""

    def __init__(self, dataset: str, training: dict, device: torch.device):
        images, labels = datasets.load_dataset(dataset, "train")
        self.images, self.labels = torch.tensor(images, device=device), torch.tensor(labels, device=device)
        self.size, self.seed, self.flips = training["batch_size"], training["seed"], training["horizontal_flip"]
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
            flip = _Draws(x.device, self.seed, 2, step).uniform(self.size) < 0.5
            x = torch.where(flip[:, None, None, None], x.flip(3), x)
        return x, self.labels[index]


def _learning_rate(steps, decayed, training):
    """Linear warm-up over the first steps, a plateau, and half a cosine to zero as `decayed` goes from 0 to 1."""
    warm_up = min(1.0, (steps + 1) / training["warmup_steps"])
    return training["learning_rate"] * warm_up * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, decayed))))


class _ByImages:
    """A training that ends after the recipe's images; the decay takes the last `decay_images` of them."""

    def __init__(self, training):
        self.size, self.total = training["batch_size"], training["images"] // training["batch_size"]
        self.decay_steps = training["decay_images"] // self.size

    def over(self, step):
        return step >= self.total

    def decayed(self, step):
        return (step - self.total + self.decay_steps) / self.decay_steps

    def bar(self, step, name):
        return tqdm(initial=step * self.size, total=self.total * self.size, desc=name, unit=" images",
                    unit_scale=True, mininterval=10)  # fmt: skip

    def advance(self, bar, step):
        bar.update(self.size)


class _ByTime:
    """A training that ends when its minutes are over; the decay takes the recipe's share of them."""

    def __init__(self, training, minutes):
        if not 0 < minutes < math.inf:
            raise UserError(f"{minutes} minutes: give a number above 0")
        self.began, self.seconds = time.monotonic(), 60 * minutes
        self.size, self.share = training["batch_size"], training["decay_images"] / training["images"]

    def _passed(self):
        return time.monotonic() - self.began

    def over(self, step):
        return self._passed() >= self.seconds

    def decayed(self, step):
        return (self._passed() / self.seconds - 1 + self.share) / self.share

    def bar(self, step, name):
        self.first = step
        return tqdm(total=self.seconds, desc=name, unit="s", mininterval=10,
                    bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s{postfix}")  # fmt: skip

    def advance(self, bar, step):
        bar.update(min(self._passed(), self.seconds) - bar.n)


def _decay_begins(recipe):
    """The step at which the learning rate begins to fall."""
    return (recipe["images"] - recipe["decay_images"]) // recipe["batch_size"]


def _same_course(old, new, step):
    """Do two recipes mean the same first `step` steps? The plateau leaves open how long it will last."""
    def rest(recipe):
        training = {k: v for k, v in recipe["training"].items() if k not in ("images", "decay_images")}
        return recipe | {"training": training}

    begins = min(_decay_begins(recipe["training"]) for recipe in (old, new))
    return old == new or (rest(old) == rest(new) and step <= begins)


def _ema_decay(step, recipe):
    """EDM's EMA: a half-life in images, shorter while few images have been seen (ramp-up 5 %)."""
    seen = (step + 1) * recipe["batch_size"]
    return 0.5 ** (recipe["batch_size"] / max(min(recipe["ema_half_life"], 0.05 * seen), 1e-8))


def _save(path, model, ema, optimizer, progress):
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    write_tensors(path, tensors, {"progress": json.dumps(progress)})


def _restore(path, model, ema, optimizer):
    tensors, metadata = read_tensors(path)

    def pick(prefix):
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    model.load_state_dict(pick("model."))
    ema.load_state_dict(pick("ema."))
    state = {}
    for key, value in pick("optimizer.").items():
        index, field = key.split(".")
        state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads(metadata["progress"])


def _start(name, recipe):
    """The shipped network whose weights a training without a checkpoint goes on from, or None."""
    unfinished = (ASSETS / f"{name}.safetensors").is_file() and not model_card(name)["finished"]
    return name if unfinished else recipe.get("start")


@contextmanager
def _signals():
    """Yields a function: has SIGINT or SIGTERM asked to stop? A second one ends the process as usual."""
    asked = []

    def ask(number, frame):
        asked.append(number)
        for each, usual in previous.items():
            signal.signal(each, usual)

    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield lambda: False
        return
    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, usual in previous.items():
            signal.signal(number, usual)


def _seconds_a_step(gradients: Callable[[], None], device: torch.device) -> float:
    """Median over five groups of three calls, after a warm-up."""
    taken = []
    for _ in range(6):
        started = time.perf_counter()
        for _ in range(3):
            gradients()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - started) / 3)
    return statistics.median(taken[1:])


def _faster(loss: Callable, model: nn.Module, batch: tuple, mixed: Callable, device: torch.device) -> Callable:
    """`loss` as it is or compiled, whichever takes less time on one batch; a line says which, and how fast it is.

    batch: what `loss` takes after the model. mixed(): the precision's context. Leaves no gradients behind.
    """
    def gradients(function):
        with mixed():
            value = function(model, *batch)
        value.backward()
        model.zero_grad(set_to_none=True)

    size, eager = len(batch[0]), _seconds_a_step(lambda: gradients(loss), device)
    try:
        compiled, started = torch.compile(loss, dynamic=False), time.perf_counter()
        gradients(compiled)
        spent = time.perf_counter() - started
        faster = _seconds_a_step(lambda: gradients(compiled), device)
    except Exception as error:  # whatever the compiler lacks here, training goes on without it
        model.zero_grad(set_to_none=True)
        why = str(error).strip().partition("\n")[0][:100]
        tqdm.write(f"not compiled ({type(error).__name__}: {why}): {size / eager:,.0f} images/s", file=sys.stderr)
        return loss
    tqdm.write(f"images/s: {size / eager:,.0f}, compiled {size / faster:,.0f} ({spent:.0f} s to compile)",
               file=sys.stderr)  # fmt: skip
    return compiled if faster < eager else loss


def _begin(name, recipe, checkpoint, model, ema, optimizer, timed):
    """Fill network, EMA and optimiser from the checkpoint or from a start's weights; returns the progress."""
    training = recipe["training"]
    progress = {"step": 0, "first_step": 0, "seconds": 0.0, "recipe": recipe, "log": []}
    if checkpoint.is_file():
        progress = _restore(checkpoint, model, ema, optimizer)
        if not _same_course(progress["recipe"], recipe, progress["step"]):
            raise UserError(f"{checkpoint} was made with another recipe of '{name}': move it away or restore it")
        return progress | {"recipe": recipe}
    if not (start := _start(name, recipe)):
        return progress
    card = model_card(start)
    if any(card["recipe"][part] != recipe[part] for part in ("architecture", "config")):
        raise UserError(f"recipe '{name}' cannot go on from '{start}': give both the same architecture and config")
    if card["images_seen"] >= training["images"] and not timed:
        raise UserError(f"recipe '{name}' goes on from '{start}', which has seen {card['images_seen']:,} images: "
                        f"give it more than its {training['images']:,}")
    weights = {key: value.float() for key, value in read_tensors(ASSETS / f"{start}.safetensors")[0].items()}
    model.load_state_dict(weights)
    ema.load_state_dict(weights)
    step = card["images_seen"] // training["batch_size"]
    return progress | {"step": step, "first_step": step, "seconds": card["train_seconds"], "log": card["loss_curve"]}


def default_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_network(name: str, out_dir: Path, threads: int | None = None, save_minutes: float = 5.0,
                  minutes: float | None = None, device: torch.device | None = None,
                  saved: Callable[[Path], None] = lambda weights: None) -> Path:  # fmt: skip
    """Train the network of recipe `name`; returns the path of the weights.

    Goes on from the checkpoint in `out_dir`, on a CPU to the same bits. Without one it goes on from the weights of the
    network that the recipe names as its `start`, or from its own if they are shipped but not finished (with a fresh
    optimiser and warm-up, which the model card says), else from the beginning.
    Ends after the recipe's images; or, given `minutes`, when these are over, the learning rate falling to zero over the
    recipe's share of them; or at SIGINT or SIGTERM, after the step it is at. Whichever it is, checkpoint, weights and
    card are left, as they are every `save_minutes`; saved(weights) is called after each time.
    device: `default_device()` unless given.
    Raises UserError when the loss is not finite, naming the step, and for a `start` of another architecture or one that
    has seen all the recipe's images.
    """
    recipe = load_recipe(name)
    training, device = recipe["training"], device or default_device()
    course = _ByImages(training) if minutes is None else _ByTime(training, minutes)
    if threads is not None:
        if threads < 1:
            raise UserError(f"{threads} threads: give at least 1")
        torch.set_num_threads(threads)
    began = last_save = time.monotonic()
    batches = _Batches(recipe["dataset"], training, device)
    model, ema = build(recipe).to(device), build(recipe).to(device).eval()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=training["weight_decay"],
                                  fused=True if device.type == "cuda" else None)  # fmt: skip
    out_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = out_dir / f"{name}.checkpoint.safetensors"
    progress = _begin(name, recipe, checkpoint, model, ema, optimizer, minutes is not None)
    step, before, recent = progress["step"], progress["seconds"], []
    draw, loss_function = LOSSES[recipe["architecture"]]
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=training["precision"] == "bfloat16")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # the fastest convolutions, found by trying
        x, y = batches(step)
        batch = (x, y, *draw(x, _Draws(device, training["seed"], 5)))
        loss_function = _faster(loss_function, model, batch, autocast, device)

    def save(evaluate: bool) -> Path:
        _finite(name, recent, step)  # what is not finite is not saved
        progress.update(step=step, seconds=before + time.monotonic() - began, finished=course.over(step),
                        device=_device_name(device))  # fmt: skip
        _save(checkpoint, model, ema, optimizer, progress)
        weights = export(name, out_dir, device, evaluate)
        saved(weights)
        return weights

    with _signals() as asked_to_stop, course.bar(step, name) as bar:
        while not course.over(step) and not asked_to_stop():
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step - progress["first_step"], course.decayed(step), training)
            x, y = batches(step)
            with autocast():
                loss = loss_function(model, x, y, *draw(x, _Draws(device, training["seed"], 3, step)))
            if device.type == "cpu":  # where looking at it waits for nothing
                _finite(name, [loss], step + 1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - _ema_decay(step, training))
            recent.append(loss.detach())
            step += 1
            course.advance(bar, step)
            if step % training["log_every"] == 0:
                row = {"images": step * training["batch_size"], "loss": _finite(name, recent, step)}
                progress["log"].append(row)
                recent.clear()
                bar.set_postfix_str(f"{row['images']:,} images, loss {row['loss']:.4f}")
            if time.monotonic() - last_save > 60 * save_minutes and not course.over(step):
                save(evaluate=False)
                last_save = time.monotonic()
    return save(evaluate=True)


def _finite(name: str, losses: list[torch.Tensor], step: int) -> float:
    """The mean of the last losses before `step`, which waits for the device. Raises UserError if one is not finite."""
    values = torch.stack(losses).tolist() if losses else [0.0]
    for i, value in enumerate(values):
        if not math.isfinite(value):
            at = step - len(values) + i
            raise UserError(f"{name}: loss is {value} at step {at}: lower learning_rate in its recipe")
    return float(np.mean(values))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def export(name: str, out_dir: Path, device: torch.device | None = None, evaluate: bool = True) -> Path:
    """Write the EMA weights of a checkpoint as `<name>.safetensors`, with its model card.

    In bfloat16: in mixed precision sampling then computes with these very weights, not with others that it rounded.
    Without `evaluate`, or without the test images, the card says null where the held-out loss would be.
    """
    checkpoint = out_dir / f"{name}.checkpoint.safetensors"
    if not checkpoint.is_file():
        raise UserError(f"nothing to export: {checkpoint} is absent; "
                        f"train it first: `python -m dgutils train-score {name}`, or train-extractor")
    tensors, metadata = read_tensors(checkpoint)
    progress = json.loads(metadata["progress"])
    recipe = progress["recipe"]
    weights = {k.removeprefix("ema."): v.bfloat16() for k, v in tensors.items() if k.startswith("ema.")}
    path = out_dir / f"{name}.safetensors"
    write_tensors(path, weights, {"recipe": json.dumps(recipe)})
    card = {
        "name": name,
        "what": recipe["what"],
        "licence": recipe["licence"],
        "parameters": sum(v.numel() for v in weights.values()),
        "images_seen": progress["step"] * recipe["training"]["batch_size"],
        "finished": progress["finished"],
        "optimizer_restarted_at_images": progress["first_step"] * recipe["training"]["batch_size"],
        "train_seconds": round(progress["seconds"]),
        "device": progress["device"],
        "torch": torch.__version__,
        "sha256": sha256_of(path),
        "recipe": recipe,
        "evaluation": _evaluate(weights, recipe, device or default_device()) if evaluate else None,
        "loss_curve": progress["log"],
    }
    _write_card(path.with_suffix(".json"), card)
    return path


def _write_card(path: Path, card: dict) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(card, indent=1) + "\n")
    temporary.replace(path)


def join(name: str, folder: Path, out_dir: Path) -> Path:
    """Put weights that came in parts together in `out_dir`, beside their card; evaluates them if nobody has yet.

    Raises UserError if a part is missing or the checksum is not the card's.
    """
    card_path = folder / f"{name}.json"
    if not card_path.is_file():
        raise UserError(f"{card_path} is absent: it belongs to the weights, and holds their checksum")
    card = json.loads(card_path.read_text())
    out_dir.mkdir(parents=True, exist_ok=True)
    path = join_parts(folder / f"{name}.safetensors", out_dir / f"{name}.safetensors", card["sha256"])
    card["evaluation"] = card["evaluation"] or _evaluate(read_tensors(path)[0], card["recipe"], default_device())
    _write_card(path.with_suffix(".json"), card)
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
    x, y = datasets.to_network(images[:n]), torch.from_numpy(labels[:n].copy())  # the data set cannot be written
    draws = _Draws(torch.device("cpu"), 0, 4)  # the same noise for every network, whatever the device
    chunks = list(zip(x.split(250), y.split(250), strict=True))
    draw, loss_function = LOSSES[recipe["architecture"]]

    def loss(*batch):
        return loss_function(model, *(part.to(device) for part in batch)).item()

    result = {"n": n, "test_loss": float(np.mean([loss(a, b, *draw(a, draws)) for a, b in chunks]))}
    if recipe["architecture"] == "EncoderUNet":
        for key, sigma in (("accuracy_clean", 0.0), ("accuracy_sigma_0.2", 0.2), ("accuracy_sigma_1", 1.0)):
            level = torch.tensor(sigma)
            vp_time, hits = noise.sigma_to_vp_time(level), 0
            for a, b in chunks:
                x_vp = noise.vp_scale(level) * (a + level * draws.normal(*a.shape))
                answer = model(x_vp.to(device), vp_time.expand(len(a)).to(device)).argmax(1)
                hits += (answer.cpu() == b).sum().item()
            result[key] = hits / n
    return result
