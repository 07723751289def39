"""`make doctor`: is everything here that a profile needs? A line for each thing, and what to do about it.

Needs nothing but Python's own library, changes nothing and touches no network.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from dgutils.errors import UserError
from dgutils.paths import repo_root

PACKAGE = Path(__file__).resolve().parents[1]
GB = 1e9
PACKAGES_GB = 6  # with the CUDA libraries that torch brings along on Linux
MEMORY_GB = 4  # of one process, with the published networks
ARMS = 40  # image sets of num_eval images that the six notebooks compare, rounded up
DOWNLOADS = {"fashion_mnist": "sudo apt-get install dataset-fashion-mnist, or nothing: 30 MB are downloaded",
             "cifar10": "nothing: 170 MB are downloaded"}


class Absent(Exception):
    """Something is missing; its arguments: what, and what to do."""


def need(there, found, advice):
    """What every check does: returns what it found, or raises Absent."""
    if not there:
        raise Absent(found, advice)
    return found


def check_python():
    return need(sys.version_info >= (3, 11), f"{platform.python_version()}, {sys.executable}",
                "install Python 3.11 or newer; then: make test PYTHON=/path/to/it")


def check_packages():
    """The packages that every platform wants are here, in the versions of requirements.txt."""
    found = {re.sub(r"[-_.]+", "-", d.name).lower(): d.version for d in metadata.distributions() if d.name}
    listed = (repo_root() / "requirements.txt").read_text(encoding="utf-8")
    pinned = re.findall(r"^([\w.-]+)==([\w.]+) \\$", listed, re.MULTILINE)  # others have a marker: " ; python ..."
    wrong = [f"{name} {found.get(name, 'absent')} instead of {pin}" for name, pin in pinned if found.get(name) != pin]
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return need(not wrong, ", ".join(wrong[:3]) + more or f"{len(pinned)}, as pinned in requirements.txt",
                "`make test` or `make reproduce` install them in .venv; by hand: "
                "pip install --require-hashes -r requirements.txt")


def check_disk(values):
    images = values.get("num_fake", 0) + ARMS * values.get("num_eval", 0)  # with features in two spaces of 2048 float32
    wanted = 1 + images * (3 * 32 * 32 + 2 * 2048 * 4) / GB + (0 if values else PACKAGES_GB)
    free = shutil.disk_usage(repo_root()).free / GB
    return need(free >= wanted, f"{free:.0f} GB free under {repo_root()}, about {wanted:.0f} GB needed",
                "free some, or clone to a larger disk")


def check_memory():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return need(total / GB >= MEMORY_GB, f"{total / GB:.1f} GB, {MEMORY_GB} GB needed",
                "use a larger machine; a smaller batch_size may do")


def check_tex():
    absent = [program for program in ("pdflatex", "latexmk", "kpsewhich") if not shutil.which(program)]
    lacks = absent or subprocess.run(["sh", PACKAGE / "setup.sh", "have-tex"], capture_output=True).returncode
    found = "some LaTeX packages" if lacks else "pdflatex, latexmk and what report/main.tex loads"
    return need(not lacks, ", ".join(absent) or found,
                "only `make report` needs TeX, and installs it if it may; by hand: sudo apt-get install "
                "texlive-latex-recommended texlive-fonts-recommended latexmk (macOS: MacTeX)")


def check_device():
    import torch

    from dgutils.machine import provenance, resolve_precision

    gpus = f"{torch.cuda.device_count()} x " if torch.cuda.is_available() else "no GPU that CUDA knows; "
    return f"{gpus}{provenance()['device']}; precision auto is {resolve_precision('auto')}"


def check_data(dataset):
    from dgutils.datasets import load_dataset
    from dgutils.sources import places

    need(any(place.exists() for place in places(dataset)),  # to load it would be to download it
         f"{dataset}, looked for in {', '.join(map(str, places(dataset)))}", f"{DOWNLOADS[dataset]} when first needed")
    train, test = (len(load_dataset(dataset, split)[0]) for split in ("train", "test"))
    return f"{dataset}: {train:,} and {test:,} images, checksums right"


def check_networks(profile, values):
    """The networks and published files that a profile names are here, and nobody altered them."""
    from dgutils.networks import checkpoints, weights

    loaders = {"score_network": checkpoints.load_denoiser, "feature_extractor": checkpoints.load_feature_extractor}
    found = [values[key] for key in loaders if values[key] not in weights.registry() and loaders[key](values[key])]
    published = [weights.published(name) for name in weights.mentioned(values)]
    absent = [entry for entry in published if not entry.path.is_file()]
    need(not absent, f"{', '.join(entry.name for entry in absent)}: not in {weights.weights_dir()}",
         f"make fetch PROFILE={profile} ({sum(entry.megabytes for entry in absent):,.0f} MB); "
         "`make rehearse` runs without them, on random ones")
    found += [weights.find(entry.name).name for entry in published]  # refuses one that was altered
    standins = ": RANDOM stand-ins, for a rehearsal only" if published and weights.is_rehearsal() else ""
    return f"{', '.join(found)}{standins or ': here, checksums right'}"


def run(profile="quick"):
    """Print the list for a profile. Returns 1 if something is missing, else 0. UserError for an unknown profile."""
    missing, values = [], {}

    def check(name, function, *arguments):
        try:
            print(f"  OK       {name:<18} {function(*arguments)}", flush=True)
        except (Absent, UserError) as absent:
            print(f"  MISSING  {name:<18} " + f"\n{'':>11}{'to do':<18} ".join(absent.args), flush=True)
            missing.append(name)

    print(f"What profile {profile} needs:\n")
    check("Python", check_python)
    check("packages", check_packages)
    if installed := "packages" not in missing:
        from dgutils.pipeline.parameters import load

        values = load(profile).model_dump()
    check("disk", check_disk, values)
    check("memory", check_memory)
    check("TeX", check_tex)
    if installed:
        check("device", check_device)
        check("data", check_data, values["dataset"])
        check("networks", check_networks, profile, values)
    else:
        print("\nDevice, data and networks are checked once the packages are there.")
    print(f"\nMissing: {', '.join(missing)}." if missing else "\nNothing is missing.")
    return int(bool(missing))
