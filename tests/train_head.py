"""Train the discriminator's head that the quick profile's six go on from, and write it beside its recipe.

    .venv/bin/python -m tests.train_head [fashion-mnist-head]

The recipe is dgutils/assets/NAME.yaml; images and training lie in the profile's store, so that it can be interrupted.
It learns from images and real images that the quick profile does not use. What is shipped is its least held-out loss.
"""

import json
import sys

import numpy as np
import torch

from dgutils import metrics
from dgutils.discriminator import MemberConfig
from dgutils.networks.checkpoints import ASSETS, write_tensors
from dgutils.networks.pretrain import load_recipe
from dgutils.networks.weights import sha256_of
from dgutils.pipeline import jobs
from dgutils.pipeline.experiment import Experiment, fake_set
from dgutils.pipeline.store import read_manifest


def train(name: str) -> None:
    """Draw the images, train the head, and write weights and card."""
    recipe = load_recipe(name)
    plan = recipe["training"]
    experiment = Experiment({"profile": "quick", **plan["parameters"]})
    settings = experiment.training(members=(MemberConfig("start", **plan["member"]),), first_real=plan["first_real"])
    assert settings.head == recipe["config"], settings.head
    trained = experiment.discriminators("start", settings, fake_set(experiment))
    history, head = trained.history[0], trained.head(0, "best")
    seconds = read_manifest(trained.artifact.path)["seconds"]
    logits, labels = jobs.held_out_logits(experiment.store, trained, [0.0155, 0.1, 0.3, 0.6])
    scores = metrics.binary_scores(logits[0].ravel(), np.tile(labels, len(logits[0])))
    path = ASSETS / f"{name}.safetensors"
    write_tensors(path, {k: v.bfloat16() for k, v in head.state_dict().items()}, {"recipe": json.dumps(recipe)})
    images = 2 * int(settings.num_real * (1 - 2 / settings.held_out_every))
    card = {
        "name": name, "what": recipe["what"], "licence": recipe["licence"],
        "parameters": sum(p.numel() for p in head.parameters()), "images_seen": images * len(history), "finished": True,
        "optimizer_restarted_at_images": 0, "train_seconds": round(seconds), "device": "CPU",
        "torch": torch.__version__, "sha256": sha256_of(path), "recipe": recipe,
        "evaluation": {"n": len(labels), "test_loss": scores["bce"], "accuracy": scores["accuracy"]},
        "loss_curve": [{"images": images * row["epoch"], "loss": row["train_loss"], "held_out": row["val_loss"]}
                       for row in history],
    }  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
    print(f"wrote {path}: held-out loss {min(row['val_loss'] for row in history):.4f}, {scores}")


if __name__ == "__main__":
    train(*sys.argv[1:] or ["fashion-mnist-head"])
