"""What a study has scored so far, as a Markdown table: before all of its arms are there, its notebooks cannot run.

    python tests/study_so_far.py [--profile second] [--images 500]

Rows are the arms of notebook 06's families that are scored at so many images in at least two trainings, in EfficientNet
features: the mean level, the mean paired change against unguided sampling from the same seeds with its 95 % interval
over trainings and images (`ledger.over_trainings`), and the share of the gap to real images that it closes. Nothing is
drawn. A row in the middle is a change between arms: `--between "faulty - correct" ...`.
"""

import argparse
from collections import defaultdict

import numpy as np

from dgutils.pipeline.work import Declared
from dgutils.results.ledger import over_trainings

BETWEEN = ("one - shuffled.equal", "silence - correct", "six table.equal - one", "six papers.equal - one")


def rows(profile: str, n: int, between) -> list[str]:
    declared = Declared(profile, {"num_key": n, "num_sweep": n, "families": ["strength", "fault", "controls"]})
    space, arms, plain = declared.parameters.feature_spaces[0], defaultdict(dict), None
    for score in declared.scored:
        if score.space == space and score.images.n == n and not score.lacks:
            name, _, training = score.images.label.partition(", training ")
            if training:
                arms[name][training] = score.ensure().kid
            elif name == "unguided sampling":
                plain = score.ensure().kid

    def cell(changes):
        found, p = over_trainings(changes)
        text = f"{1000 * found.value:.1f} [{1000 * found.low:.1f}, {1000 * found.high:.1f}]"
        return f"{text} | {-found.value / plain.value:.0%} | {p:.1g}"

    heads = ("arm", "trainings", "KID x 1000", "change against unguided", "share of the gap", "p")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|",
             f"| unguided | | {1000 * plain.value:.1f} | | | |"]  # fmt: skip
    for name, found in arms.items():
        if len(found) > 1:
            level = 1000 * np.mean([kid.value for kid in found.values()])
            lines.append(f"| {name} | {len(found)} | {level:.1f} | {cell([kid - plain for kid in found.values()])} |")
    for pair in between:
        first, second = (arms.get(name.strip(), {}) for name in pair.split(" - "))
        if len(both := sorted(first.keys() & second.keys())) > 1:
            lines.append(f"| {pair} | {len(both)} | | {cell([first[t] - second[t] for t in both])} |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="second")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--between", nargs="*", default=BETWEEN)
    given = parser.parse_args()
    print("\n".join(rows(given.profile, given.images, given.between)))
