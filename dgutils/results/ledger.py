"""A notebook's ledger: what it records, its tables and sentences, and claims that test themselves.

An arm's scores come by feature space, {"first": [Scores], "second": [Scores]}, of one or more independent trainings.
Records are named <key>.<space>.<score> and <key>.<space>.<score>_change.
"""

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from IPython.display import Markdown
from scipy import stats

from dgutils.errors import require
from dgutils.files import digest_of_file
from dgutils.machine import now, provenance
from dgutils.metrics import Interval, Resampled
from dgutils.networks.features import metric_name
from dgutils.paths import figures_dir, results_dir
from dgutils.pipeline.jobs import Likelihood, Scores
from dgutils.results import records as kept
from dgutils.results.provenance import fingerprint, lineage, section_of, sections
from dgutils.results.records import Results, format_value, published
from dgutils.results.statements import direction, summary, two_digits, verdict, with_words

SCORES = {"fd": ("FD", 1), "kid": ("KID x 1000", 1000)}  # name in print, and factor
COLUMNS = {"fd": "FD", "kid": "KID x 1000", "fd_change": "FD change", "kid_change": "KID change",
           "precision": "Precision", "recall": "Recall", "density": "Density", "coverage": "Coverage"}
BySpace = dict[str, list[Scores]]


# --- scores of scores


def scaled(interval: Interval, factor: float) -> Interval:
    """The interval in another unit."""
    return replace(interval, value=factor * interval.value, low=factor * interval.low, high=factor * interval.high)


def combined(arms: list[BySpace], label: str, combine) -> BySpace:
    """Scores of several arms made into one's, training by training, by values, draws and manifold scores alike.

    label: of the one, where {} stands for that of the first arm.
    """
    def one(*scores: Scores) -> Scores:
        first, digest = scores[0], "+".join(each.digest for each in scores)
        fd, kid = (Resampled(float(combine([getattr(each, score).value for each in scores])),
                             combine([getattr(each, score).draws for each in scores])) for score in SCORES)
        manifold = {name: float(combine([each.manifold[name] for each in scores])) for name in first.manifold}
        return Scores(replace(first.arm, label=label.format(first.arm.label)), first.space, digest, fd, kid, manifold)

    return {slot: [one(*each) for each in zip(*(arm[slot] for arm in arms), strict=True)] for slot in arms[0]}


def mean_of(arms: list[BySpace], label: str) -> BySpace:
    """The mean of several arms' scores, as one arm: what a member reaches on average."""
    return combined(arms, label, partial(np.mean, axis=0))


def excess(arm: BySpace, unguided: BySpace) -> BySpace:
    """What guidance does to an arm: its scores less those of as many steps without it, as scores of their own.

    More steps make better images without any guidance. To compare the *guidance* of arms of different numbers of steps
    is to compare these, a difference of differences; of equal numbers it is the plain difference.
    """
    for slot, scores in arm.items():
        for one, other in zip(scores, unguided[slot], strict=True):
            one.change(other)  # raises unless the two are of the same seeds
    return combined([arm, unguided], "effect of {}", lambda pair: pair[0] - pair[1])


def over_trainings(changes: list[Resampled], level: float = 0.95) -> tuple[Interval, float]:
    """The mean of paired changes over independent trainings: its interval, and p of there being none, two-sided.

    Two errors add, as variances. That of the trainings is s^2 / k over k trainings; that of the images, the same in all
    trainings, is the bootstrap's of the mean. Student's degrees of freedom are Welch and Satterthwaite's, where the
    bootstrap's are many. Of one training only the images' error is known, and the interval is the bootstrap's.
    """
    k, values = len(changes), [change.value for change in changes]
    mean = Resampled(float(np.mean(values)), np.mean([change.draws for change in changes], axis=0))
    images, trainings = np.var(mean.draws), np.var(values, ddof=1) / k if k > 1 else 0.0
    error, df = math.sqrt(images + trainings), math.inf
    if trainings:
        df = (k - 1) * ((images + trainings) / trainings) ** 2
    p = float(2 * stats.t.sf(abs(mean.value) / error, df)) if error else float(mean.value == 0)
    if k == 1:
        return mean.interval(level), p
    half = float(stats.t.ppf((1 + level) / 2, df)) * error
    return Interval(mean.value, mean.value - half, mean.value + half, level, len(mean.draws)), p


def holm(p: dict[str, float]) -> dict[str, float]:
    """Holm's adjusted p of a family of tests: below alpha where a test is significant with the whole family in mind."""
    adjusted, largest = {}, 0.0
    for rank, key in enumerate(sorted(p, key=p.get)):
        largest = adjusted[key] = max(largest, min(1.0, (len(p) - rank) * p[key]))
    return adjusted


# --- the ledger


class Ledger:
    """The records, tables and claims of one notebook in one profile; `write` makes them a file.

    experiment: what holds the notebook's name and parameters, and gives `scores(arm, space, reference)`.
    """

    def __init__(self, experiment):
        self.experiment, self.parameters, self.notebook = experiment, experiment.parameters, experiment.notebook
        self.profile = self.parameters.profile
        self.path = results_dir(self.profile) / f"{self.notebook.split('_')[0]}.json"
        self.spaces = dict(zip(("first", "second"), self.parameters.feature_spaces, strict=False))
        self.records: dict[str, dict] = {}
        self.tables: dict[str, dict] = {}
        self.compared: dict[str, tuple[str, str]] = {}  # key of a change -> labels of the arm and its baseline
        self.claims: dict[str, dict] = {}
        self.p: dict[str, float] = {}  # of changes, by key

    def scores(self, arms: dict, spaces=("first", "second"), reference=None) -> dict[str, BySpace]:
        """Scores of arms, computed or found; an arm is images, or a list of them from as many trainings."""
        arms = {name: arm if isinstance(arm, list) else [arm] for name, arm in arms.items()}
        return {name: {slot: [self.experiment.scores(one, space, reference) for one in arm]
                       for slot, space in self.spaces.items() if slot in spaces} for name, arm in arms.items()}

    # --- numbers

    def value(self, key: str, value: float | str | Interval, label: str, section: str, *, unit: str = "",
              n: int | None = None, seeds: range | list[int] | None = None, artifacts=(),
              digits: int | None = None) -> None:
        """Record a number, alone or with its interval, or a word that the prose takes from the data ('lower').

        label: what it is, in words. section: the notebook section that made it. n: images behind it. artifacts: digests
        it was made from. digits: decimals in print; without it, what the interval justifies, or 3 significant digits.
        Raises UserError for a bad key, and for what is not finite.
        """
        require(kept.KEY.fullmatch(key), f"result key {key!r}: use lower-case words and digits, joined by . _ or -")
        interval = value if isinstance(value, Interval) else None
        value, *bounds = [number(one, key) for one in
                          ([interval.value, interval.low, interval.high] if interval else [value])]
        require(bounds == sorted(bounds), f"result {key}: the interval {bounds} is not [low, high]")
        if isinstance(seeds, range):
            seeds = {"first": seeds[0], "count": len(seeds)}
        self.records[key] = {
            "value": value, "label": label, "cell": section, "unit": unit, "interval": bounds or None,
            "level": interval and interval.level, "n": n, "seeds": seeds, "artifacts": list(artifacts),
            "digits": digits}

    def settings(self, parameters) -> None:
        """Record the parameters of a run under settings.<name>, lists as their items."""
        for name, value in dict(parameters).items():
            if isinstance(value, int | float | str | list):
                value = value if type(value) is int else kept.setting_text(value)
                self.value(f"settings.{name}", value, f"parameter {name}", "parameters")

    def level(self, key: str, arm: BySpace, section: str) -> None:
        """Record an arm's scores in each feature space, of its first training: FD, KID and manifold scores."""
        for slot, (scores, *_) in arm.items():
            found = {score: (title, scaled(getattr(scores, score).interval(), factor), None)
                     for score, (title, factor) in SCORES.items()}
            found |= {name: (name, value, 3) for name, value in scores.manifold.items()}
            for name, (title, value, digits) in found.items():
                self.value(f"{key}.{slot}.{name}", value, f"{title} of {scores.arm.label}, {scores.space}", section,
                           n=scores.arm.n, seeds=scores.arm.seeds or None, artifacts=scores.digest.split("+"),
                           digits=digits)

    def change(self, key: str, arm: BySpace, baseline: BySpace, section: str, only=tuple(SCORES),
               words: tuple[str, str] | None = None, spread: bool = False) -> None:
        """Record arm less baseline in each feature space, paired: <key>.<space>.kid_change and .fd_change.

        The interval is that of `over_trainings`. only: the scores of interest. words: what sentences call the two
        (default: their labels). spread: of several trainings, each one's change of KID, and standard deviations.
        """
        for slot in arm:
            pairs = list(zip(arm[slot], baseline[slot], strict=True))
            one, several = pairs[0][0], f", over {len(pairs)} trainings" if len(pairs) > 1 else ""
            names = tuple(scores.arm.label.partition(", training")[0] for scores in pairs[0])
            self.compared[key] = words or names
            digests = [digest for pair in pairs for scores in pair for digest in scores.digest.split("+")]
            about = dict(section=section, n=one.arm.n, seeds=one.arm.seeds, artifacts=dict.fromkeys(digests))
            for score in only:
                title, factor = SCORES[score]
                interval, self.p[f"{key}.{slot}.{score}"] = over_trainings([a.change(b, score) for a, b in pairs])
                interval = scaled(interval, factor)
                values = [factor * a.change(b, score).value for a, b in pairs]
                about["digits"] = two_digits(interval.low, interval.high)
                label = f"{title} of {' minus '.join(names)}, {one.space}{several}"
                name = f"{key}.{slot}.{score}"
                self.value(f"{name}_change", interval, label, **about)
                if spread and several:
                    self.value(f"{name}_sd", float(np.std(values, ddof=1)), f"SD of {label}", **about)
                    for i, value in enumerate(values if score == "kid" else (), 1):
                        self.value(f"{name}_change.training{i}", value, f"training {i}: {label}", **about)

    # --- tables

    def show(self, name: str, columns: list[str], rows: list[tuple], caption: str = "") -> Markdown:
        """Record a table and show it: heads, and rows of a label followed by result keys.

        A cell without a key, or whose key nobody recorded, is empty.
        """
        require(re.fullmatch(r"[a-z0-9_]+", name), f"table name {name!r}: use lower-case letters, digits and _")
        require(all(len(row) == len(columns) for row in rows),
                f"table {name}: every row needs {len(columns)} cells, like the columns")
        known = self.records.keys() | published().keys()
        rows = [(label, *(key if key in known else None for key in keys)) for label, *keys in rows]
        self.tables[name] = {"columns": columns, "rows": rows, "caption": caption}
        return Markdown(f"{caption}\n\n{self.results.markdown(name)}")

    def show_by_space(self, name: str, head: str, rows: dict[str, str], columns: dict[str, str], caption: str):
        """Record and show a table with the same columns for each feature space.

        rows: key -> label. columns: head -> what follows the key, with a * for the space, as in "*.kid_change".
        """
        heads = [f"{column} ({space})" for space in self.spaces.values() for column in columns]
        cells = [(label, *(f"{key}.{end.replace('*', slot)}" for slot in self.spaces for end in columns.values()))
                 for key, label in rows.items()]
        return self.show(name, [head, *heads], cells, caption)

    def compare(self, scores: dict[str, BySpace], to, key: str, section: str, tables=(), labels=None, above=None,
                caption: str = "", reference: str = "") -> Markdown:
        """Record each arm's scores, where a table shows them, and their paired changes; show the tables.

        scores: name -> scores by space. to: the name of the baseline, or its scores, or for each name its baseline's
        scores; real images, which have no seeds, and the baseline itself have none. tables: names of those in the
        first and second feature space. labels: of rows, by name (default: the arms' own). above: rows of other keys,
        above these. caption: begins the captions. reference: the real images, in words (default: the profile's).
        """
        p, rows, tables = self.parameters, dict(above or {}), dict(zip(self.spaces, tables, strict=False))
        for name, arm in scores.items():
            one = next(iter(arm.values()))[0]
            base = scores[to] if isinstance(to, str) else to if to and to.keys() <= self.spaces.keys() else to.get(name)
            rows[f"{key}.{name}"] = (labels or {}).get(name, one.arm.label[:1].upper() + one.arm.label[1:])
            self.level(f"{key}.{name}", {slot: arm[slot] for slot in tables}, section)
            if base is not None and base is not arm and one.arm.seeds:
                self.change(f"{key}.{name}", arm, base, section)
        texts, real = [], reference or f"{p.num_reference} real {p.reference_split} images"
        for slot, table in tables.items():
            words = (f"{caption} {metric_name(self.spaces[slot])}, and KID in the same features; {one.arm.n} images an "
                     f"arm from equal seeds, against {real}; changes are against unguided; 95 % intervals.").strip()
            cells = [(label, *(f"{row}.{slot}.{column}" for column in COLUMNS)) for row, label in rows.items()]
            texts.append(self.show(table, ["Arm", *COLUMNS.values()], cells, words).data)
        return Markdown("\n\n".join(texts))

    def intervals(self, rows: dict[str, str], only=tuple(SCORES)) -> dict[str, dict[str, Interval]]:
        """Recorded changes for `plots.differences`: a panel for each score and space; rows: key -> label."""
        return {f"change of {SCORES[score][0]}\n({space})": {
            label: self.interval(f"{key}.{slot}.{score}_change") for key, label in rows.items()}
            for slot, space in self.spaces.items() for score in only}

    def interval(self, key: str) -> Interval:
        """The interval of a record."""
        record = self.records[key]
        return Interval(record["value"], *record["interval"], record["level"], 0)

    # --- words

    def text(self, key: str) -> str:
        """A record in print."""
        return self.results.text(key)

    def told(self, sentence: str) -> list[str]:
        """A sentence whose {keys} are records; if they have a * for the feature space, a line for each space."""
        spaces = self.spaces if ".*." in sentence else {"*": ""}
        return [(f"**{space}**: " if space else "") + re.sub(
            r"\{([^}]+)\}", lambda match, slot=slot: self.text(match[1].replace("*", slot)), sentence)
            for slot, space in spaces.items()]

    def sentences(self, *keys: str) -> list[str]:
        """Recorded changes in words, KID first: for each feature space a line for each key that was recorded."""
        lines = []
        for slot, space in self.spaces.items():
            for key in (key for key in keys if f"{key}.{slot}.kid_change" in self.records):
                subject, baseline = self.compared[key]
                parts = [f"{title} is **{direction(*by['interval'])}** that of {baseline} (change {format_value(by)})"
                         for score, title in (("kid", f"KID x 1000 of {subject}"), ("fd", "FD"))
                         if (by := self.records.get(f"{key}.{slot}.{score}_change"))]
                lines.append(f"**{space}**: {'; '.join(parts)}.")
        return lines

    def agreement(self, key: str, only=("kid",)) -> str:
        """Whether all feature spaces, and all these scores, say the same of a recorded change, as a sentence."""
        words = {self.text(f"{key}.{slot}.{score}_direction") for slot in self.spaces for score in only}
        arm, baseline = self.compared[key]
        found = (f"all feature spaces agree, **{words.pop()}**" if len(words) == 1 else
                 "feature spaces or scores **do not agree**; the effect depends on what is looked at")
        return f"{' and '.join(score.upper() for score in only)} of {arm} against {baseline}: {found}."

    # --- claims

    def claim(self, key: str, text: str, arm: BySpace | Likelihood | None, baseline, section: str,
              sign: float | None = None, published_as: tuple[str, str] | None = None) -> None:
        """State a claim and test it: in each feature space by the sign of arm less baseline in KID, then in one word.

        It asserts either a sign, or that of the change between two published numbers, keys of published.csv. Without
        an arm it is not testable at this scale. Records claim.<key>.<space>.kid_change, .n, .trainings and .summary;
        of two likelihoods claim.<key>.nll_change, which decides.
        """
        if published_as:
            before, after = (published()[name]["value"] for name in published_as)
            sign = after - before
        name, tested = f"claim.{key}", {}  # slot -> where, what and the key of its change
        if isinstance(arm, Likelihood):
            n, trainings, tested = arm.n, 1, {"first": ("test images", "NLL", f"{name}.nll_change")}
            self.value(f"{name}.nll_change", arm.ensure().minus(baseline.ensure()), f"NLL of {arm.label} minus "
                       f"{baseline.label}", section, unit="bits/dim", n=n, artifacts=[arm.digest, baseline.digest])
        elif arm is not None:
            n, trainings = arm["first"][0].arm.n, len(arm["first"])
            self.change(name, arm, baseline, section, only=["kid"])
            tested = {slot: (self.spaces[slot], "KID x 1000", f"{name}.{slot}.kid_change") for slot in arm}
        verdicts = {slot: verdict(sign, *self.records[of]["interval"]) for slot, (_, _, of) in tested.items()}
        if tested:
            self.value(f"{name}.n", n, f"{text}: n", section)
            self.value(f"{name}.trainings", trainings, f"{text}: trainings", section)
        word = summary(list(verdicts.values()))
        word = word if published_as else word.replace("reproduced", "supported")  # nobody published it before
        self.value(f"{name}.summary", word, f"{text}: summary", section)
        self.claims[key] = dict(text=text, published=published_as or (None, None), verdicts=verdicts, tested=tested)

    def family(self, name: str, caption: str, section: str, alpha: float = 0.05) -> Markdown:
        """Test all claims so far as one family, in the first feature space; record and show their table.

        A claim is supported, or the opposite is, if its interval says so and Holm's adjusted p, claim.<key>.holm, is
        below alpha.
        """
        tested = {key: self.p[f"claim.{key}.first.kid"] for key, claim in self.claims.items() if claim["verdicts"]}
        for key, p in holm(tested).items():
            claim = self.claims[key]
            word = claim["verdicts"]["first"] if p < alpha else "not distinguishable"
            word = word.replace("same sign", "supported")
            self.value(f"claim.{key}.holm", p, f"{claim['text']}: Holm's p", section, digits=4 if p < 0.01 else 2)
            self.value(f"claim.{key}.summary", word, f"{claim['text']}: verdict", section)
        return self.claims_table(name, caption)

    def claims_table(self, name: str, caption: str) -> Markdown:
        """Record and show the table of all claims so far."""
        spaces = [f"Our change ({space})" for space in self.spaces.values()]
        held = {"Holm's p": "holm"} if any(f"claim.{key}.holm" in self.records for key in self.claims) else {}
        ours = {"n": "n", "Trainings": "trainings"} | held | {"Verdict": "summary"}
        rows = [(claim["text"], *claim["published"], *(claim["tested"].get(slot, ("",) * 3)[2] for slot in self.spaces),
                 *(f"claim.{key}.{what}" for what in ours.values())) for key, claim in self.claims.items()]
        return self.show(name, ["Claim", "Published before", "Published after", *spaces, *ours], rows, caption)

    def claim_sentences(self) -> list[str]:
        """The claims in words, a line each that was tested, and one for the others."""
        lines, untested = [], [claim["text"] for claim in self.claims.values() if not claim["verdicts"]]
        for key, claim in self.claims.items():
            before, after = claim["published"]
            told = f" (published {self.text(before)} to {self.text(after)})" if before else " (our own)"
            each = [f"{where}: {claim['verdicts'][slot]}, {what} changes by {self.text(of)}"
                    for slot, (where, what, of) in claim["tested"].items()]
            if each:
                lines.append(f"{claim['text']}{told}: **{self.text(f'claim.{key}.summary')}**; {'; '.join(each)}.")
        return lines + [f"{len(untested)} claims are not testable at this scale: {'; '.join(untested)}."]

    # --- the file

    @property
    def results(self) -> Results:
        """What is recorded so far, and the published numbers, to be printed in the notebook itself."""
        return Results(self.profile, with_words(published() | self.records), self.tables)

    def write(self) -> Path:
        """Write the file, with the code and the artifacts behind its records, and the digests of its figures.

        If it holds these results already it stays: dates change only with results or code.
        """
        cells = sections(self.notebook)
        figures = sorted(figures_dir(self.profile).glob(f"{self.notebook[:2]}_*.pdf"))
        content = {
            "profile": self.profile, "notebook": self.notebook, "records": self.records,
            "tables": {name: table | {"cell": section_of(name, cells)} for name, table in self.tables.items()},
            "figures": {path.stem: {"cell": cell, "sha256": digest_of_file(path)} for path in figures
                        if (cell := section_of(path.stem, cells))},
            "code": fingerprint(self.notebook),
        }
        content = json.loads(json.dumps(content, allow_nan=False))
        try:
            old = kept.read_results(self.path)
        except (FileNotFoundError, NotADirectoryError):  # not looked for before: it may be removed in between
            old = {}
        if any(old.get(part) != content[part] for part in content):
            digests = {digest for record in self.records.values() for digest in record["artifacts"]}
            content |= {"provenance": {"date": now()} | provenance(), "lineage": lineage(self.profile, digests)}
            kept.write_if_changed(self.path, json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False) + "\n")
        return self.path


def bullets(lines: list[str]) -> Markdown:
    """Sentences as a list."""
    return Markdown("\n".join(f"- {line}" for line in lines))


def number(value, key: str) -> float | int | str:
    """A plain finite number, or text. Raises UserError for anything else."""
    value = value.item() if isinstance(value, np.generic) else value
    require(isinstance(value, int | float | str) and not isinstance(value, bool),
            f"result {key}: {value!r} is neither a number nor text")
    require(isinstance(value, str) or math.isfinite(value),
            f"result {key} is {value}: a number went wrong where it was computed")
    return value
