"""Which recipe of the CIFAR-10 score network learns most in equal CPU time? Writes docs/recipes.md.

    python tests/recipe_trials.py --minutes 6 --at-once 2

Every trial changes one thing of `cifar10-edm` and trains for as many minutes of one thread, by what trains the shipped
networks (`pretrain.train_network`), the last 40 % of its images with a falling learning rate. Those of another
architecture begin from nothing, as does one of the shipped architecture beside them; the others go on from the shipped
network. The loss is that of 2,000 test images with the same noise for all. What a trial came to lies in runs/recipes/:
started again, the command goes on with those that are missing.
"""

import argparse
import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import yaml  # noqa: E402

from dgutils.files import write_file  # noqa: E402
from dgutils.machine import provenance  # noqa: E402
from dgutils.networks import checkpoints, pretrain  # noqa: E402

SHIPPED = "cifar10-edm"
AFRESH = {
    "as shipped": {},
    "narrower: width 48": {"model_channels": 48},
    "wider: width 96": {"model_channels": 96},
    "wider and flatter: width 96, [1, 2]": {"model_channels": 96, "channel_mult": [1, 2]},
    "deeper: 3 blocks": {"num_blocks": 3},
    "attention at 16, too": {"attn_resolutions": [16, 8]},
}
ONWARD = {
    "as shipped": {},
    "learning rate 1e-3": {"learning_rate": 1.0e-3},
    "learning rate 2.5e-4": {"learning_rate": 2.5e-4},
    "batches of 32": {"batch_size": 32},
    "batches of 128": {"batch_size": 128},
    "no flips": {"horizontal_flip": False},
    "EMA half-life 6,000 images": {"ema_half_life": 6000},
}


def trials():
    """(start, label, recipe without its number of images), each."""
    shipped = pretrain.load_recipe(SHIPPED)
    for start, part, changes in (("nothing", "config", AFRESH), (SHIPPED, "training", ONWARD)):
        for label, change in changes.items():
            recipe = copy.deepcopy(shipped)
            recipe[part] |= change
            recipe["training"]["warmup_steps"] = 100
            if start == SHIPPED:
                recipe["start"] = SHIPPED
            yield start, label, recipe


def done(minutes: float, start: str, label: str, recipe: dict) -> Path:
    """Where the result of a trial lies, found or not."""
    what = json.dumps([minutes, start, recipe], sort_keys=True).encode()
    return ROOT / "runs" / "recipes" / f"{hashlib.sha256(what).hexdigest()[:16]}.json"


def train(folder: str, seconds: float, number: int) -> dict:
    """The model card of one trial, trained for about `seconds` of one thread; in a process of its own."""
    start, _, recipe = list(trials())[number]
    folder, training = Path(folder), recipe["training"]
    seen = 0 if start == "nothing" else checkpoints.model_card(start)["images_seen"] // training["batch_size"]
    pretrain.ASSETS = checkpoints.ASSETS = folder

    def run(name, steps):
        training["images"] = (seen + steps) * training["batch_size"]
        training["decay_images"] = int(0.4 * steps) * training["batch_size"]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        begun = time.process_time()
        pretrain.train_network(name, folder / "out")
        return time.process_time() - begun

    step = (run(f"more{number}", 40) - run(f"few{number}", 10)) / 30  # seconds; evaluation is in both
    run(f"trial{number}", int(seconds / step))
    card = json.loads((folder / "out" / f"trial{number}.json").read_text())
    return {"parameters": card["parameters"], "images": card["images_seen"] - seen * training["batch_size"],
            "loss": card["evaluation"]["test_loss"]}  # fmt: skip


def page(found, results, minutes: float) -> str:
    """The page: a table for each start, least loss first."""
    where = f"torch {torch.__version__}, {provenance()['device']}"
    lines = ["# Recipes of the CIFAR-10 score network, by what they learn in equal CPU time", "",
             f"Written by `python tests/recipe_trials.py`: {minutes:g} minutes of one thread each, {where}. Each "
             f"changes one thing of `{SHIPPED}`; the learning rate falls over the last 40 % of a trial's images. Loss: "
             "EDM's, of 2,000 test images with the same noise for all. So short a training favours what learns fast "
             "over what is better in the end. How many images fit into the time is set by 30 timed steps before each "
             "trial, which other work on the machine disturbs: see the images seen.", ""]  # fmt: skip
    for start in ("nothing", SHIPPED):
        lines += [f"## Trained on from {start}" if start != "nothing" else "## From initial weights", "",
                  "| recipe | parameters | images seen | held-out loss | against as shipped |", "|---|---|---|---|---|"]
        of_start = [(label, result) for (begun, label, _), result in zip(found, results, strict=True) if begun == start]
        of_start.sort(key=lambda pair: pair[1]["loss"])
        shipped = dict(of_start)["as shipped"]["loss"]
        lines += [f"| {label} | {r['parameters'] / 1e6:.1f} M | {r['images']:,} | {r['loss']:.5f} | "
                  f"{100 * (r['loss'] / shipped - 1):+.2f} % |" for label, r in of_start]
        lines.append("")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6, help="of one thread, for each trial [6]")
    parser.add_argument("--at-once", type=int, default=2, help="trials side by side, a thread each [2]")
    parser.add_argument("--trial", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trial is not None:
        card = train(options.folder, 60 * options.minutes, options.trial)
        print(json.dumps(card))
        return
    found = list(trials())
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.at_once) as pool:
        for suffix in ("safetensors", "json"):
            shutil.copy(checkpoints.ASSETS / f"{SHIPPED}.{suffix}", folder)

        def one(number):
            path = done(options.minutes, *found[number])
            if not path.exists():
                asked = "--minutes", options.minutes, "--trial", number, "--folder", folder
                said = subprocess.run([sys.executable, __file__, *map(str, asked)], stdout=subprocess.PIPE, check=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, said.stdout.splitlines()[-1])
            return json.loads(path.read_text())

        cards = list(pool.map(one, range(len(found))))
    (ROOT / "docs" / "recipes.md").write_text(page(found, cards, options.minutes))


if __name__ == "__main__":
    main()
