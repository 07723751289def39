"""`make doctor`: is everything here that a profile needs? A line for each thing, and what to do about it.

Begins with nothing but Python's own library, so that it also works where nothing is installed yet. It changes
nothing and touches no network.
"""

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from dgutils.errors import UserError
from dgutils.paths import repo_root, runs_dir

PACKAGE = Path(__file__).resolve().parents[1]
GB = 1e9
PACKAGES_GB = 6  # with the CUDA libraries that torch brings along on Linux
MEMORY_GB = 4  # of one process, with the published networks
ARMS = 40  # image sets of num_eval images that the six notebooks compare, rounded up
DATA = {  # dataset -> folder in $DGUTILS_DATA, Debian's folder, folder in torchvision's cache, MB to download
    "fashion_mnist": ("fashion-mnist", "/usr/share/datasets/fashion-mnist", "FashionMNIST/raw", 30),
    "cifar10": ("cifar10", None, "cifar-10-batches-py", 170),
}


class Absent(Exception):
    """Something is missing; its arguments: what, and what to do."""


# --- checks: each returns what it found, or raises Absent


def check_python():
    if sys.version_info < (3, 11):  # noqa: UP036 (pip has not seen the Python that starts this)
        raise Absent(platform.python_version(), "install Python 3.11 or newer; then: make test PYTHON=/path/to/it")
    return f"{platform.python_version()}, {sys.executable}"


def pins(text):
    """(name, version, marker) of every package in the text of requirements.txt."""
    return re.findall(r"^([\w.-]+)==([\w.]+)(?: ; (.*?))? \\$", text, re.MULTILINE)


def applies(marker):
    """Whether a pin is meant for this Python and platform."""
    try:
        from packaging.markers import Marker
    except ImportError:
        return not marker  # hardly anything is installed; the others will do to say so
    return not marker or Marker(marker).evaluate()


def check_packages():
    found = {re.sub(r"[-_.]+", "-", d.name).lower(): d.version for d in metadata.distributions() if d.name}
    pinned = [pin for pin in pins((repo_root() / "requirements.txt").read_text()) if applies(pin[2])]
    wrong = [f"{name} {found.get(name, 'absent')} instead of {version}" for name, version, _ in pinned
             if found.get(name) != version]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise Absent(", ".join(wrong[:3]) + more, "`make test` or `make reproduce` install them in .venv; by hand: "
                                                  "pip install --require-hashes -r requirements.txt")
    return f"{len(pinned)}, as pinned in requirements.txt"


def check_disk(values, installed):
    """Rough: images, their features in two spaces of 2048 float32, packages, and 1 GB to breathe."""
    images = values.get("num_fake", 0) + ARMS * values.get("num_eval", 0)
    need = 1 + images * (3 * 32 * 32 + 2 * 2048 * 4) / GB + (0 if installed else PACKAGES_GB)
    free = shutil.disk_usage(repo_root()).free / GB
    text = f"{free:.0f} GB free under {repo_root()}, about {need:.0f} GB needed"
    if free < need:
        raise Absent(text, "free some, or clone to a larger disk")
    return text


def check_folder(profile):
    runs = runs_dir(profile)
    place = next(path for path in (runs, *runs.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise Absent(f"{place} ({os.strerror(error.errno).lower()})",
                     "make it a folder where you can write and lock files, or clone elsewhere") from error
    return f"{runs} can be written and locked"


def check_memory():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    if total / GB < MEMORY_GB:
        raise Absent(f"{total / GB:.1f} GB, {MEMORY_GB} GB needed", "use a larger machine; a smaller batch_size may do")
    return f"{total / GB:.0f} GB"


def check_tex():
    absent = [program for program in ("pdflatex", "latexmk", "kpsewhich") if not shutil.which(program)]
    if absent or subprocess.run(["sh", PACKAGE / "setup.sh", "have-tex"], capture_output=True).returncode:
        raise Absent(", ".join(absent) or "some LaTeX packages",
                     "only `make report` needs TeX, and installs it if it may; by hand: sudo apt-get install "
                     "texlive-latex-recommended texlive-fonts-recommended latexmk (macOS: MacTeX)")
    return "pdflatex, latexmk and what report/main.tex loads"


def check_device():
    import torch

    from dgutils.pipeline.jobs import device, resolve_precision

    precision = f"precision auto is {resolve_precision('auto')}"
    if device().type == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / GB
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {memory:.0f} GB; {precision}"
    mps = "; Apple's GPU is not used" if torch.backends.mps.is_available() else ""
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {precision}{mps}"


def check_data(dataset):
    from dgutils.datasets import load_dataset

    if dataset not in DATA:
        raise Absent(f"unknown dataset {dataset}", f"choose one of {', '.join(DATA)}")
    own, debian, cached, megabytes = DATA[dataset]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dgutils" / "data"
    root = os.environ.get("DGUTILS_DATA")
    places = [root and Path(root, own), debian and Path(debian), cache / cached]
    place = next((place for place in places if place and place.is_dir()), None)
    if place is None:  # to load it would be to download it
        package = "sudo apt-get install dataset-fashion-mnist, or " if debian else ""
        raise Absent(f"{dataset}, looked for in {', '.join(str(place) for place in places if place)}",
                     f"{package}nothing: {megabytes} MB are downloaded when first needed")
    try:
        train, test = (len(load_dataset(dataset, split)[0]) for split in ("train", "test"))
    except UserError as error:
        raise Absent(str(error), "as it says") from error
    return f"{dataset}: {train:,} and {test:,} images in {place}, checksums right"


def check_shipped(values):
    """The profile's networks of dgutils/assets, against their model cards."""
    from dgutils.networks.checkpoints import model_card, sha256_of
    from dgutils.networks.weights import registry

    names = [name for name in dict.fromkeys([values["score_network"], values["feature_extractor"]])
             if name not in registry()]
    for name in names:
        path = PACKAGE / "assets" / f"{name}.safetensors"
        if not path.with_suffix(".yaml").exists():
            raise Absent(f"unknown network {name}", "choose one of dgutils/assets or of its registry.yaml")
        if not path.exists() or not path.with_suffix(".json").exists():
            raise Absent(f"{path.name} or its model card", "git checkout -- dgutils/assets; if it does not ship yet: "
                                                           f"python -m dgutils train-score {name} (or train-extractor)")
        if sha256_of(path) != model_card(name)["sha256"]:
            raise Absent(f"{path.name} is not what its model card says", f"git checkout -- dgutils/assets/{path.name}")
    return ", ".join(names) + ": here, checksums right" if names else "the profile uses none"


def check_published(profile, values):
    """The files of the registry that a profile names, against the checksums of their first use."""
    from dgutils.networks.weights import is_rehearsal, mentioned, status, weights_dir

    found = status(mentioned(values))
    altered, absent = ([entry for entry in found if entry.state == state] for state in ("altered", "absent"))
    if altered:
        raise Absent(f"{', '.join(entry.published.name for entry in altered)}: altered since the first use",
                     f"move them out of {weights_dir()}; then: make fetch PROFILE={profile}")
    if absent:
        raise Absent(f"{', '.join(entry.published.name for entry in absent)}: not in {weights_dir()}",
                     f"make fetch PROFILE={profile} ({sum(entry.bytes for entry in absent) / 1e6:,.0f} MB); "
                     "`make rehearse` runs without them, on random ones")
    standins = ": RANDOM stand-ins, for a rehearsal only" if found and is_rehearsal() else ""
    names = ", ".join(f"{entry.published.name} ({entry.state})" for entry in found)
    return names + standins or "the profile uses none"


# --- the list


def run(profile="quick"):
    """Print the list for a profile. Returns the exit status: 0, or 1 if something is missing.

    Raises UserError for an unknown profile.
    """
    colours = {"OK": "\033[32m", "MISSING": "\033[31m"} if sys.stdout.isatty() else {}
    missing, end = [], "\033[0m" if colours else ""

    def check(name, function, *arguments):
        try:
            text, state = function(*arguments), "OK"
        except Absent as absent:
            text, state = f"{absent.args[0]}\n{'':>11}{'to do':<18} {absent.args[1]}", "MISSING"
            missing.append(name)
        print(f"  {colours.get(state, '')}{state:<7}{end}  {name:<18} {text}", flush=True)
        return state == "OK"

    print(f"What profile {profile} needs:\n")
    check("Python", check_python)
    installed, values = check("packages", check_packages), {}
    if installed:
        from dgutils.pipeline.parameters import load

        values = load(profile).model_dump()
    check("disk", check_disk, values, installed)
    check("folder", check_folder, profile)
    check("memory", check_memory)
    check("TeX", check_tex)
    if installed:
        check("device", check_device)
        downloads = [] if check("data", check_data, values["dataset"]) else ["the data"]
        check("shipped weights", check_shipped, values)
        downloads += [] if check("published weights", check_published, profile, values) else ["the published weights"]
        check("network", lambda: f"needed once, for {' and '.join(downloads)}" if downloads else "not needed")
    else:
        print("\nDevice, data, weights and network are checked once the packages are there.")
    print(f"\nMissing: {', '.join(missing)}." if missing else "\nNothing is missing.")
    return int(bool(missing))
