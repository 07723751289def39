"""Training of the two networks that discriminator guidance takes as given: score network and feature extractor.

A recipe is data: `assets/<name>.yaml` holds the architecture and every number of the training. Training is
resumable to the same bits, since every draw is a function of (seed, step), and ends in `<name>.safetensors`
(the EMA weights in bfloat16) with its model card `<name>.json`.
"""

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from . import adm, datasets, edm, noise
from .checkpoints import ASSETS, model_card, read_tensors, sha256_of, write_tensors
from .errors import UserError

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


def _score_loss(model, x, labels, draws):
    """EDM's denoising loss (edm.edm_loss)."""
    log_sigma = torch.from_numpy(draws.standard_normal(len(x), dtype=np.float32))
    normal = torch.from_numpy(draws.standard_normal(tuple(x.shape), dtype=np.float32))
    return edm.edm_loss(model, x, log_sigma, normal)


def _perturb(x, draws):
    """VP-perturbed images and their times, drawn as discriminator training draws them (FACTS section 1)."""
    vp_time = noise.sample_vp_time(torch.from_numpy(draws.random(len(x)))).float()
    sigma = noise.vp_time_to_sigma(vp_time)[:, None, None, None]
    normal = torch.from_numpy(draws.standard_normal(tuple(x.shape), dtype=np.float32))
    return noise.vp_scale(sigma) * (x + sigma * normal), vp_time


def _classifier_loss(model, x, labels, draws):
    """Cross-entropy of a noise-conditional classifier (Dhariwal & Nichol 2021, section 4)."""
    return F.cross_entropy(model(*_perturb(x, draws)).float(), labels)


LOSSES = {"Denoiser": _score_loss, "EncoderUNet": _classifier_loss}


def _batch(images, labels, step, recipe):
    """Batch number `step`: images [B, C, H, W] in [-1, 1] and labels; a function of (seed, step)."""
    size, seed = recipe["batch_size"], recipe["seed"]
    per_epoch = len(images) // size
    epoch, position = divmod(step, per_epoch)
    order = noise.keyed_rng(seed, 1, epoch).permutation(len(images))
    index = np.sort(order[position * size : (position + 1) * size])
    x = datasets.to_network(images[index])
    if recipe["horizontal_flip"]:
        flip = torch.from_numpy(noise.keyed_rng(seed, 2, step).random(size) < 0.5)
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
    return x, torch.from_numpy(labels[index])


def _learning_rate(step, total, recipe, first_step=0):
    """Linear warm-up from `first_step`, a plateau, and half a cosine to zero over the last `decay_images`."""
    warm_up = min(1.0, (step - first_step + 1) / recipe["warmup_steps"])
    decay_steps = recipe["decay_images"] // recipe["batch_size"]
    decayed = max(0.0, (step - (total - decay_steps)) / decay_steps)
    return recipe["learning_rate"] * warm_up * 0.5 * (1 + math.cos(math.pi * decayed))


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


def train_network(name: str, out_dir: Path, threads: int | None = None, save_minutes: float = 5.0) -> Path:
    """Train the network of recipe `name`; returns the path of the final weights.

    Goes on from the checkpoint in `out_dir`, to the same bits. Without one it goes on from the weights of the network
    that the recipe names as its `start`, or from its own if they are shipped but not finished (with a fresh optimiser
    and warm-up, which the model card says), else from the beginning.
    Raises UserError when the loss is not finite, naming the step, and for a `start` of another architecture or one that
    has seen all the recipe's images.
    """
    recipe = load_recipe(name)
    training = recipe["training"]
    if threads is not None:
        if threads < 1:
            raise UserError(f"{threads} threads: give at least 1")
        torch.set_num_threads(threads)
    images, labels = datasets.load_dataset(recipe["dataset"], "train")
    model, ema = build(recipe), build(recipe).eval()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=training["weight_decay"])
    total = training["images"] // training["batch_size"]
    out_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = out_dir / f"{name}.checkpoint.safetensors"
    progress = {"step": 0, "first_step": 0, "seconds": 0.0, "recipe": recipe, "log": []}
    if checkpoint.is_file():
        progress = _restore(checkpoint, model, ema, optimizer)
        if not _same_course(progress["recipe"], recipe, progress["step"]):
            raise UserError(f"{checkpoint} was made with another recipe of '{name}': move it away or restore it")
        progress["recipe"] = recipe
    elif start := _start(name, recipe):
        card = model_card(start)
        if any(card["recipe"][part] != recipe[part] for part in ("architecture", "config")):
            raise UserError(f"recipe '{name}' cannot go on from '{start}': give both the same architecture and config")
        if card["images_seen"] >= training["images"]:
            raise UserError(f"recipe '{name}' goes on from '{start}', which has seen {card['images_seen']:,} images: "
                            f"give it more than its {training['images']:,}")
        weights = {key: value.float() for key, value in read_tensors(ASSETS / f"{start}.safetensors")[0].items()}
        model.load_state_dict(weights)
        ema.load_state_dict(weights)
        step = card["images_seen"] // training["batch_size"]
        progress |= {"step": step, "first_step": step, "seconds": card["train_seconds"], "log": card["loss_curve"]}
    loss_function, recent = LOSSES[recipe["architecture"]], []
    started = saved = time.monotonic()
    before = progress["seconds"]
    bar = tqdm(range(progress["step"], total), initial=progress["step"], total=total, desc=name, mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, total, training, progress["first_step"])
        x, y = _batch(images, labels, step, training)
        with torch.autocast("cpu", torch.bfloat16, enabled=training["precision"] == "bfloat16"):
            loss = loss_function(model, x, y, noise.keyed_rng(training["seed"], 3, step))
        if not torch.isfinite(loss):
            raise UserError(f"{name}: loss is {loss.item()} at step {step}: lower learning_rate in its recipe")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - _ema_decay(step, training))
        recent.append(loss.item())
        progress["step"] = step + 1
        if (step + 1) % training["log_every"] == 0:
            row = {"images": (step + 1) * training["batch_size"], "loss": float(np.mean(recent))}
            progress["log"].append(row)
            bar.set_postfix(loss=f"{row['loss']:.4f}")
            recent.clear()
        if time.monotonic() - saved > 60 * save_minutes or step + 1 == total:
            saved = time.monotonic()
            progress["seconds"] = before + saved - started
            _save(checkpoint, model, ema, optimizer, progress)
    return export(name, out_dir)


def export(name: str, out_dir: Path) -> Path:
    """Write the EMA weights of a checkpoint as `<name>.safetensors`, with its model card.

    In bfloat16: in mixed precision sampling then computes with these very weights, not with others that it rounded.
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
        "finished": progress["step"] == recipe["training"]["images"] // recipe["training"]["batch_size"],
        "optimizer_restarted_at_images": progress["first_step"] * recipe["training"]["batch_size"],
        "train_seconds": round(progress["seconds"]),
        "torch": torch.__version__,
        "sha256": sha256_of(path),
        "recipe": recipe,
        "evaluation": _evaluate(weights, recipe),
        "loss_curve": progress["log"],
    }
    path.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
    return path


@torch.inference_mode()
def _evaluate(weights, recipe, n=2000):
    """Held-out loss, on the first `n` test images with fixed draws; for a classifier also its accuracy."""
    model = build(recipe).eval()
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    images, labels = datasets.load_dataset(recipe["dataset"], "test")
    x, y = datasets.to_network(images[:n]), torch.from_numpy(labels[:n].copy())  # the data set cannot be written
    draws = noise.keyed_rng(0, 4)
    chunks = list(zip(x.split(250), y.split(250), strict=True))
    loss_function = LOSSES[recipe["architecture"]]
    result = {"n": n, "test_loss": float(np.mean([loss_function(model, a, b, draws).item() for a, b in chunks]))}
    if recipe["architecture"] == "EncoderUNet":
        for key, sigma in (("accuracy_clean", 0.0), ("accuracy_sigma_0.2", 0.2), ("accuracy_sigma_1", 1.0)):
            level = torch.tensor(sigma)
            vp_time, hits = noise.sigma_to_vp_time(level), 0
            for a, b in chunks:
                normal = torch.from_numpy(draws.standard_normal(tuple(a.shape), dtype=np.float32))
                x_vp = noise.vp_scale(level) * (a + level * normal)
                hits += (model(x_vp, vp_time.expand(len(a))).argmax(1) == b).sum().item()
            result[key] = hits / n
    return result
