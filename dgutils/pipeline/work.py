"""Filling a store with what the notebooks will ask for: their own cells declare it, one process or many make it."""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dgutils import datasets
from dgutils.pipeline import cells, jobs, parameters, ranks
from dgutils.pipeline.experiment import Experiment, Score
from dgutils.pipeline.jobs import Trained

SCORED_AT_ONCE = 8  # scores that ranks work on together: enough for all to have something to do


class Declared:
    """What all notebooks declare at a profile: `scored`, each once, and `made`, which is not scored (or is trained)."""

    def __init__(self, profile: str, overrides: Mapping[str, Any] | None = None):
        self.parameters = parameters.load(profile, overrides)
        values = {"profile": profile} | dict(overrides or {})
        notebooks = cells.sources(tuple(self.parameters.notebooks))
        self.experiments: list[Experiment] = [cells.experiment_of(path, values) for path in notebooks]
        scored: dict[str, Score] = {}
        for score in (score for experiment in self.experiments for score in experiment.scored):
            scored.setdefault(score.artifact.digest, score)
        self.scored = list(scored.values())
        self.made = [item for experiment in self.experiments for item in experiment.made]


def needed(items: Iterable, lacks: Callable[[Any], bool] = lambda item: item.lacks) -> list:
    """Of image sets and discriminators, and of all that they are made from, what is lacking; what others use first."""
    found: dict[str, Any] = {}  # digest -> what lacks something, else None

    def visit(item):
        if item.digest not in found and lacks(item):
            for source in item.sources:
                visit(source)
            found[item.digest] = item
        found.setdefault(item.digest, None)

    for item in items:
        visit(item)
    return [item for item in found.values() if item is not None]


def work(profile: str, overrides: Mapping[str, Any] | None = None, minutes: float | None = None) -> None:
    """Fill the store of a profile with what its notebooks will ask for, in one process or as one of many ranks.

    minutes: after which it ends between two shards, epochs or scores, and says what is left.
    """
    with ranks.reporting(), ranks.join(minutes) as group:
        declared = Declared(profile, overrides)
        with group.first():  # who comes first may have to download
            for split in ("train", "test"):
                datasets.load_dataset(declared.parameters.dataset, split)
        try:
            _fill(group, declared)
        except ranks.TimeUp:
            left = sum(group.agree(score.lacks) for score in declared.scored)
            if group.main:
                print(f"dgutils: the time is up: {left} of {len(declared.scored)} scores are left; the same command "
                      "goes on", file=sys.stderr, flush=True)  # fmt: skip


def _fill(group: ranks.Group, declared: Declared) -> None:
    """In order: the images that discriminators learn from, the trainings, and, a few at a time, arms to their scores.

    Images and features are dealt in shards; scores, and trainings that are not divided into parts, as wholes.
    """
    scores = [score for score in declared.scored if group.agree(score.lacks)]
    todo = needed([score.images for score in scores] + declared.made, lambda item: group.agree(item.lacks))
    trainings = [item for item in todo if isinstance(item, Trained)]
    for images in (source for trained in trainings for source in trained.sources):
        images.ensure()
    if declared.parameters.training_parts == 1:  # else each is all ranks' work, below
        for wait in (False, True):  # first what is free, then what another run is computing
            for _, trained in group.deal(trainings):
                try:
                    if not group.late:
                        with ranks.alone():
                            trained.ensure(wait)
                except ranks.TimeUp:
                    break
            group.stop_if_late()
    for item in needed(declared.made, lambda item: group.agree(item.lacks)):
        item.ensure()
    for some in (scores[i : i + SCORED_AT_ONCE] for i in range(0, len(scores), SCORED_AT_ONCE)):
        for score in some:
            score.images.ensure()
        for score in some:
            jobs.features(score.store, score.images, score.space)
        for reference, space in dict.fromkeys((score.reference, score.space) for score in some):
            jobs.features(score.store, reference, space)
        for _, score in group.deal(some):
            if not group.late:
                with ranks.alone():
                    score.ensure()
        group.stop_if_late()
