"""Model cards in Markdown, with the Hugging Face hub's metadata, from the JSON cards of the shipped networks.

`python -m report.cards` writes docs/models/NAME.md, which uploaded as README.md beside NAME.safetensors is the hub's.
"""

import json

import yaml

from dgutils.errors import UserError
from dgutils.networks.checkpoints import ASSETS
from dgutils.paths import repo_root

# Data set -> its name, and its place on the hub.
DATA = {
    "fashion_mnist": ("Fashion-MNIST", "zalando-datasets/fashion_mnist"),
    "cifar10": ("CIFAR-10", "uoft-cs/cifar10"),
}

# Architecture -> the hub's task and tags, how it is loaded, what it is for.
KINDS = {
    "Denoiser": (
        "unconditional-image-generation", ["diffusion", "edm"],
        "load_denoiser", "network(x, sigma): the clean image of x [N, C, H, W] with noise sigma [N]",
        "Studying samplers and their guidance where a laptop suffices. Its images are visibly worse than those of the "
        "published networks, so that there is something to correct. It knows the data set's images and nothing else."),
    "EncoderUNet": (
        "image-classification", ["feature-extraction", "noise-conditional", "adm"],
        "load_feature_extractor", "network.features(x_vp, vp_time); logits of classes: network(x_vp, vp_time)",
        "The frozen features below discriminators of noised images. As a classifier it is what its accuracy says."),
    "head": (
        "image-classification", ["discriminator", "noise-conditional", "adm"],
        "load_discriminator", "network(features, vp_time): log-density-ratios [N, 1] of an extractor's features",
        "What the quick profile's discriminators set out from. It knows the images of its score network alone."),
}  # fmt: skip


def kind(card: dict) -> str:
    """The key of KINDS: the architecture, or "head" for an encoder with one output."""
    recipe = card["recipe"]
    return "head" if recipe["config"].get("out_channels") == 1 else recipe["architecture"]


def metadata(card: dict) -> dict:
    """The front matter: what the hub filters and shows."""
    recipe, evaluation = card["recipe"], card["evaluation"]
    task, tags, *_ = KINDS[kind(card)]
    dataset, place = DATA[recipe["dataset"]]
    scores = [{"type": "accuracy" if "accuracy" in key else "loss", "name": key.replace("_", " "), "value": value}
              for key, value in evaluation.items() if key != "n"]  # fmt: skip
    result = {"task": {"type": task}, "dataset": {"name": dataset, "type": place, "split": "test"}, "metrics": scores}
    return {
        "license": "mit", "library_name": "dgutils", "pipeline_tag": task, "tags": [*tags, "discriminator-guidance"],
        "datasets": [place], "model-index": [{"name": card["name"], "results": [result]}],
    }  # fmt: skip


def markdown(card: dict) -> str:
    """The whole card: metadata, what it is, how to load it, how it was trained, what it scores, its licence."""
    recipe, curve = card["recipe"], card["loss_curve"]
    *_, load, call, use = KINDS[kind(card)]
    front = yaml.safe_dump(metadata(card), sort_keys=False, allow_unicode=True, width=1000)
    minutes, first, last = round(card["train_seconds"] / 60), curve[0], curve[-1]
    place = f"in all, at last on {card['device']}" if "device" in card else "on a CPU"
    facts = {
        "parameters": f"{card['parameters']:,}", "trained on": DATA[recipe["dataset"]][0],
        "images seen": f"{card['images_seen']:,}",
        "time": f"{minutes // 60} h {minutes % 60} min {place}",
        "file": f"`{card['name']}.safetensors`, bfloat16", "sha256": f"`{card['sha256']}`", "torch": card["torch"],
    }  # fmt: skip
    scores = {key.replace("_", " "): f"{value:.4g}" for key, value in card["evaluation"].items() if key != "n"}

    def table(rows):
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])

    return f"""---
{front}---

# {card["name"]}

{card["what"]}.

{table(facts)}

## Use

```python
from dgutils.networks.checkpoints import {load}

network = {load}("{card["name"]}")  # {call}
```

{use}

## Training

The loss fell from {first["loss"]:.3g}, over the first {first["images"]:,} images, to {last["loss"]:.3g}.{restart(card)}
The recipe:

```yaml
{yaml.safe_dump({k: v for k, v in recipe.items() if k not in ("what", "licence")}, sort_keys=False).strip()}
```

## Evaluation

On {card["evaluation"]["n"]:,} test images:

{table(scores)}

## Licence

{card["licence"]}.
"""


def restart(card: dict) -> str:
    """Whence a training that went on from another's weights set out."""
    images = card["optimizer_restarted_at_images"]
    return f" At {images:,} images it set out from the weights of another recipe." if images else ""


def pages() -> dict[str, str]:
    """Path below the clone -> text, of every shipped network."""
    cards = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(ASSETS.glob("*.json"))]
    if odd := [card["name"] for card in cards if kind(card) not in KINDS]:
        raise UserError(f"no kind of card for the network {odd[0]}: add its architecture to report/cards.py")
    return {f"docs/models/{card['name']}.md": markdown(card) for card in cards}


if __name__ == "__main__":
    for path, text in pages().items():
        (repo_root() / path).parent.mkdir(exist_ok=True)
        (repo_root() / path).write_text(text, encoding="utf-8")
        print(f"wrote {path}")
