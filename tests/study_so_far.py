"""What a study has scored so far, as a Markdown table: before all of its arms are there, its notebooks cannot run.

    python -m tests.study_so_far [--profile second] [--images 500]

Rows are the arms of notebook 06's families that are scored at so many images in at least two trainings, in EfficientNet
features: the mean level, the mean paired change against unguided sampling from the same seeds with its 95 % interval
over trainings and images (`ledger.over_trainings`), and the share of the gap to real images that it closes. Nothing is
drawn. Below stand the claims of docs/preregistration.md whose arms are scored, with Holm's p over those.
"""

import argparse
from collections import defaultdict

import numpy as np

from dgutils.pipeline.work import Declared
from dgutils.results.ledger import holm, over_trainings

CLAIMS = {"C1": ("one", None), "C2": ("one", "shuffled.equal"), "C3": ("faulty", None), "C4": ("silence", "correct"),
          "C5": ("gain", None), "C6": ("six table.equal", "one"), "C7": ("six papers.equal", "one")}  # fmt: skip


def rows(profile: str, n: int) -> list[str]:
    declared = Declared(profile, {"num_key": n, "num_sweep": n, "families": ["strength", "fault", "controls"]})
    space, arms, plain = declared.parameters.feature_spaces[0], defaultdict(dict), None
    for score in declared.scored:
        if score.space == space and score.images.n == n and not score.lacks:
            name, _, training = score.images.label.partition(", training ")
            if training:
                arms[name][training] = score.ensure().kid
            elif name == "unguided sampling":
                plain = score.ensure().kid

    def text(interval):
        return f"{1000 * interval.value:.1f} [{1000 * interval.low:.1f}, {1000 * interval.high:.1f}]"

    heads = ("arm", "trainings", "KID x 1000", "its range", "change against unguided", "share of the gap")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", f"| unguided | | {1000 * plain.value:.1f} | | | |"]
    for name, found in arms.items():
        if len(found) > 1:
            levels, (change, _) = [1000 * kid.value for kid in found.values()], over_trainings(
                [kid - plain for kid in found.values()])
            lines.append(f"| {name} | {len(found)} | {np.mean(levels):.1f} | {min(levels):.1f} to {max(levels):.1f} | "
                         f"{text(change)} | {-change.value / plain.value:.0%} |")  # fmt: skip
    tested = {}
    for claim, (arm, to) in CLAIMS.items():
        both = [t for t in arms[arm] if to is None or t in arms[to]]
        if len(both) > 1:
            tested[claim] = over_trainings([arms[arm][t] - (arms[to][t] if to else plain) for t in both])
    adjusted = holm({claim: p for claim, (_, p) in tested.items()})
    lines += ["", "| claim | arm against | change | p | Holm's p |", "|---|---|---|---|---|"]
    return lines + [f"| {claim} | {CLAIMS[claim][0]}, {CLAIMS[claim][1] or 'unguided'} | {text(change)} | {p:.2g} | "
                    f"{adjusted[claim]:.2g} |" for claim, (change, p) in tested.items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="second")
    parser.add_argument("--images", type=int, default=500)
    given = parser.parse_args()
    print("\n".join(rows(given.profile, given.images)))
