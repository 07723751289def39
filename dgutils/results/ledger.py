"""A notebook's ledger: scores become recorded levels and changes, tables, sentences, and claims that test themselves.

An arm's scores come by feature space, {"first": Scores, "second": Scores}; a list in the place of a Scores is an arm
over independent trainings. Records are named <key>.<space>.<score> and <key>.<space>.<score>_change.
"""

import math
import re
from dataclasses import replace

import numpy as np
from IPython.display import Markdown
from scipy import stats

from dgutils.metrics import Interval, Resampled
from dgutils.networks.features import metric_name
from dgutils.pipeline.jobs import Scores
from dgutils.results.records import Recorder, format_value, published
from dgutils.results.statements import direction, summary, two_digits, verdict

SCORES = {"fd": ("FD", 1), "kid": ("KID x 1000", 1000)}  # name in print, and factor
COLUMNS = {"fd": "FD", "kid": "KID x 1000", "fd_change": "FD change", "kid_change": "KID change",
           "precision": "Precision", "recall": "Recall", "density": "Density", "coverage": "Coverage"}  # fmt: skip
COURSE = {"Epochs": "epochs", "Best epoch": "best_epoch", "Held-out loss, best": "best_loss",
          "Held-out loss, last": "last_loss", "Training loss, last": "last_train_loss"}  # fmt: skip
BySpace = dict[str, Scores | list[Scores]]


# --- scores of scores


def scaled(interval: Interval, factor: float) -> Interval:
    """The interval in another unit."""
    return replace(interval, value=factor * interval.value, low=factor * interval.low, high=factor * interval.high)


def combined(arms: list[Scores], label: str, combine) -> Scores:
    """Scores of several arms made into one's: combine is applied to values, draws and manifold scores alike."""
    fd, kid = (Resampled(float(combine([getattr(arm, score).value for arm in arms])),
                         combine([getattr(arm, score).draws for arm in arms])) for score in SCORES)  # fmt: skip
    manifold = {name: float(combine([arm.manifold[name] for arm in arms])) for name in arms[0].manifold}
    digest = "+".join(arm.digest for arm in arms)
    return Scores(replace(arms[0].arm, label=label), arms[0].space, digest, fd, kid, manifold)


def mean_of(arms: list[BySpace], label: str) -> BySpace:
    """The mean of several arms' scores, as one arm: what a member reaches on average."""
    return {slot: combined([arm[slot] for arm in arms], label, lambda values: np.mean(values, axis=0))
            for slot in arms[0]}  # fmt: skip


def excess(arm: BySpace, unguided: BySpace) -> BySpace:
    """What guidance does to an arm: its scores less those of as many steps without it, as scores of their own.

    More steps make better images without any guidance. To compare the *guidance* of arms of different numbers of steps
    is to compare these, a difference of differences; of equal numbers it is the plain difference.
    """
    def less(one, other):
        one.minus(other)  # raises unless the two are of the same seeds
        return combined([one, other], f"effect of {one.arm.label}", lambda pair: pair[0] - pair[1])

    return {slot: [less(*pair) for pair in zip(scores, unguided[slot], strict=True)] if isinstance(scores, list)
            else less(scores, unguided[slot]) for slot, scores in arm.items()}  # fmt: skip


def paired(arm: Scores | list[Scores], baseline: Scores | list[Scores]) -> list[tuple[Scores, Scores]]:
    """(arm, baseline) of each training."""
    arms, baselines = (scores if isinstance(scores, list) else [scores] for scores in (arm, baseline))
    return list(zip(arms, baselines, strict=True))


def over_trainings(values, level: float = 0.95) -> Interval:
    """Mean of a value over independent trainings, with Student's interval; of one training, the value alone."""
    values, half = np.asarray(values, np.float64), 0.0
    mean = values.mean()
    if len(values) > 1:
        half = stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Interval(float(mean), float(mean - half), float(mean + half), level, 0)


def changes(arm: Scores | list[Scores], baseline: Scores | list[Scores], score: str) -> tuple[Interval, list[float]]:
    """Change from baseline to arm in the unit of print, and its value in each training.

    Of one training the interval is the paired bootstrap's; of several it is Student's, over trainings.
    """
    each = [scaled(one.minus(other, score), SCORES[score][1]) for one, other in paired(arm, baseline)]
    values = [interval.value for interval in each]
    return each[0] if len(each) == 1 else over_trainings(values), values


# --- the ledger


class Ledger(Recorder):
    """The records, tables and claims of one notebook.

    experiment: what holds the parameters and gives `scores(arm, space, reference)`.
    """

    def __init__(self, experiment, notebook: str | None = None, root=None):
        self.experiment, self.parameters = experiment, getattr(experiment, "parameters", experiment)
        super().__init__(self.parameters.profile, notebook or experiment.notebook, root)
        self.spaces = dict(zip(("first", "second"), self.parameters.feature_spaces, strict=False))
        self.compared: dict[str, tuple[str, str]] = {}  # key of a change -> labels of the arm and its baseline
        self.claims: dict[str, dict] = {}

    def scores(self, arms: dict, spaces=("first", "second"), reference=None) -> dict[str, BySpace]:
        """Scores of arms, computed or found: name -> space -> Scores, or their list where the arm is one."""
        def of(arm, space):
            if isinstance(arm, list):
                return [of(one, space) for one in arm]
            return self.experiment.scores(arm, space, reference)

        return {name: {slot: of(arm, space) for slot, space in self.spaces.items() if slot in spaces}
                for name, arm in arms.items()}  # fmt: skip

    # --- numbers

    def value(self, key: str, value: float | str | Interval, label: str, section: str, **about) -> None:
        """Record a number, a word, or a value with its interval; `about` as in Recorder.record."""
        if isinstance(value, Interval):
            about |= {"interval": (value.low, value.high), "level": value.level}
            value = value.value
        self.record(key, value, label=label, cell=section, **about)

    def level(self, key: str, arm: BySpace, section: str) -> None:
        """Record an arm's scores in each feature space: FD, KID, precision, recall, density, coverage."""
        for slot, scores in arm.items():
            where = f"of {scores.arm.label}, {scores.space}"
            about = dict(section=section, n=scores.arm.n, seeds=scores.arm.seeds or None,
                         artifacts=scores.digest.split("+"))  # fmt: skip
            for score, (title, factor) in SCORES.items():
                interval = scaled(getattr(scores, score).interval(), factor)
                self.value(f"{key}.{slot}.{score}", interval, f"{title} {where}", **about)
            for name, value in scores.manifold.items():
                self.value(f"{key}.{slot}.{name}", value, f"{name} {where}", digits=3, **about)

    def change(self, key: str, arm: BySpace, baseline: BySpace, section: str, only=tuple(SCORES),
               words: tuple[str, str] | None = None, spread: bool = False) -> None:  # fmt: skip
        """Record arm less baseline in each feature space, paired: <key>.<space>.kid_change and .fd_change.

        only: the scores of interest. words: what sentences call the two (default: their labels). spread: of several
        trainings, each one's change of KID, and standard deviations.
        """
        for slot in arm:
            pairs = paired(arm[slot], baseline[slot])
            names = tuple(scores.arm.label.partition(", training")[0] for scores in pairs[0])
            digests = [digest for pair in pairs for scores in pair for digest in scores.digest.split("+")]
            one, self.compared[key] = pairs[0][0], words or names
            about = dict(section=section, n=one.arm.n, seeds=one.arm.seeds, artifacts=list(dict.fromkeys(digests)))
            for score in only:
                interval, values = changes(arm[slot], baseline[slot], score)
                about["digits"] = two_digits(interval.low, interval.high)
                label = f"{SCORES[score][0]} of {' minus '.join(names)}, {one.space}"
                label += f", over {len(values)} trainings" if len(values) > 1 else ""
                name = f"{key}.{slot}.{score}"
                self.value(f"{name}_change", interval, label, **about)
                if spread and len(values) > 1:
                    self.value(f"{name}_sd", float(np.std(values, ddof=1)), f"SD of {label}", **about)
                    for number, value in enumerate(values if score == "kid" else (), 1):
                        self.value(f"{name}_change.training{number}", value, f"training {number}: {label}", **about)

    def course(self, key: str, label: str, history: list[dict], section: str, artifacts=()) -> tuple[str, ...]:
        """Record how a member's training went, by held-out loss; returns its row of a table, COURSE its columns."""
        best = min(history, key=lambda row: row["val_loss"])
        values = (history[-1]["epoch"], best["epoch"], best["val_loss"], history[-1]["val_loss"],
                  history[-1]["train_loss"])  # fmt: skip
        for fact, value in zip(COURSE.values(), values, strict=True):
            self.value(f"{key}.{fact}", value, f"{label}: {fact.replace('_', ' ')}", section,
                       digits=None if "epoch" in fact else 3, artifacts=list(artifacts))  # fmt: skip
        return label, *(f"{key}.{fact}" for fact in COURSE.values())

    # --- tables

    def show(self, name: str, columns: list[str], rows: list[tuple], caption: str = "") -> Markdown:
        """Record a table and show it; a cell whose key nobody recorded is empty."""
        known = self.records.keys() | published().keys()
        self.table(name, columns, [(label, *(key if key in known else None for key in keys)) for label, *keys in rows],
                   caption)  # fmt: skip
        return Markdown(f"{caption}\n\n{self.results.markdown(name)}")

    def show_by_space(self, name: str, head: str, rows: dict[str, str], columns: dict[str, str], caption: str):
        """Record and show a table with the same columns for each feature space.

        rows: key -> label. columns: head -> what follows the key, with a * for the space, as in "*.kid_change".
        """
        heads = [f"{column} ({space})" for space in self.spaces.values() for column in columns]
        cells = [(label, *(f"{key}.{end.replace('*', slot)}" for slot in self.spaces for end in columns.values()))
                 for key, label in rows.items()]  # fmt: skip
        return self.show(name, [head, *heads], cells, caption)

    def show_blocks(self, key: str, blocks: dict[str, BySpace], section: str) -> Markdown:
        """Record FD in each block of seeds, its mean, standard deviation (of more than one) and minimum; show them."""
        p, rows = self.parameters, []
        for name, arm in blocks.items():
            values = {f"block{number}": scores.fd.value for number, scores in enumerate(arm["first"], 1)}
            fd, first = np.array(list(values.values())), arm["first"][0].arm
            values |= {"mean": fd.mean(), "sd": fd.std(ddof=1) if len(fd) > 1 else None, "min": fd.min()}
            rows.append((name, *(f"{key}.{name}.{field}" for field in values)))
            for field, value in values.items():
                if value is not None:
                    self.value(f"{key}.{name}.{field}", value, f"FD of {name}: {field}", section, n=first.n, digits=2,
                               seeds=range(first.seeds[0], first.seeds[0] + len(fd) * first.n),
                               artifacts=[scores.digest for scores in arm["first"]])  # fmt: skip
        columns = ["Arm", *(f"Block {number}" for number in range(1, len(fd) + 1)), "Mean", "SD", "Minimum"]
        caption = (f"{metric_name(self.spaces['first'])} in blocks of {first.n} seeds from {p.eval_seed} on, against "
                   f"{p.num_reference} real {p.reference_split} images.")
        return self.show(key, columns, rows, caption)

    def compare(self, scores: dict[str, BySpace], to, key: str, section: str, tables=(), labels=None, above=None,
                caption: str = "", reference: str = "") -> Markdown:  # fmt: skip
        """Record each arm's scores, where a table shows them, and their paired changes; show the tables.

        scores: name -> scores by space. to: the name of the baseline, or its scores, or for each name its baseline's
        scores; real images, which have no seeds, and the baseline itself have none. tables: names of those in the
        first and second feature space. labels: of rows, by name (default: the arms' own). above: rows of other keys,
        above these. caption: begins the captions. reference: the real images, in words (default: the profile's).
        """
        p, rows, tables = self.parameters, dict(above or {}), dict(zip(self.spaces, tables, strict=False))
        for name, arm in scores.items():
            one = next(iter(arm.values()))
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
            for slot, space in self.spaces.items() for score in only}  # fmt: skip

    def interval(self, key: str) -> Interval:
        """The interval of a record."""
        record = self.results[key]
        return Interval(record["value"], *record["interval"], record["level"], 0)

    # --- words

    def text(self, key: str) -> str:
        """A record in print."""
        return self.results.text(key)

    def sentences(self, *keys: str) -> list[str]:
        """Recorded changes in words, KID first: for each feature space a line for each key that was recorded."""
        lines = []
        for slot, space in self.spaces.items():
            for key in (key for key in keys if f"{key}.{slot}.kid_change" in self.records):
                subject, baseline = self.compared[key]
                parts = [f"{title} is **{direction(*by['interval'])}** that of {baseline} (change {format_value(by)})"
                         for score, title in (("kid", f"KID x 1000 of {subject}"), ("fd", "FD"))
                         if (by := self.records.get(f"{key}.{slot}.{score}_change"))]  # fmt: skip
                lines.append(f"**{space}**: {'; '.join(parts)}.")
        return lines

    def told(self, sentence: str) -> list[str]:
        """A sentence whose {keys} are records; if they have a * for the feature space, a line for each space."""
        spaces = self.spaces if ".*." in sentence else {None: ""}
        return [(f"**{space}**: " if space else "") + re.sub(
            r"\{([^}]+)\}", lambda match, slot=slot: self.text(match[1].replace("*", slot or "*")), sentence)
            for slot, space in spaces.items()]  # fmt: skip

    def agreement(self, key: str, only=("kid",)) -> str:
        """Whether all feature spaces, and all these scores, say the same of a recorded change, as a sentence."""
        words = {self.text(f"{key}.{slot}.{score}_direction") for slot in self.spaces for score in only}
        arm, baseline = self.compared[key]
        what = f"{' and '.join(score.upper() for score in only)} of {arm} against {baseline}"
        return (f"{what}: all feature spaces agree, **{words.pop()}**." if len(words) == 1 else
                f"{what}: feature spaces or scores **do not agree**; the effect depends on what is looked at.")

    # --- claims

    def claim(self, key: str, text: str, arm: BySpace | None, baseline: BySpace | None, section: str,
              sign: float | None = None, published_as: tuple[str, str] | None = None) -> None:  # fmt: skip
        """State a claim and test it: in each feature space by the sign of arm less baseline in KID, then in one word.

        It asserts either a sign, or that of the change between two published numbers, keys of published.csv. Without
        an arm it is not testable at this scale. Records claim.<key>.<space>.kid_change, .n, .trainings and .summary.
        """
        if published_as:
            before, after = (published()[name]["value"] for name in published_as)
            sign = after - before
        verdicts = {}
        if arm is not None:
            self.change(f"claim.{key}", arm, baseline, section, only=["kid"])
            for slot in arm:
                verdicts[slot] = verdict(sign, *self.records[f"claim.{key}.{slot}.kid_change"]["interval"])
            trainings = paired(arm["first"], baseline["first"])
            self.value(f"claim.{key}.n", trainings[0][0].arm.n, f"{text}: n", section)
            self.value(f"claim.{key}.trainings", len(trainings), f"{text}: trainings", section)
        word = summary(list(verdicts.values()))
        word = word if published_as else word.replace("reproduced", "supported")  # nobody published it before
        self.value(f"claim.{key}.summary", word, f"{text}: summary", section)
        self.claims[key] = {"text": text, "published": published_as or (None, None), "verdicts": verdicts}

    def claims_table(self, name: str, caption: str) -> Markdown:
        """Record and show the table of all claims so far."""
        spaces = [f"Our change ({space})" for space in self.spaces.values()]
        rows = [(claim["text"], *claim["published"], *(f"claim.{key}.{slot}.kid_change" for slot in self.spaces),
                 *(f"claim.{key}.{what}" for what in ("n", "trainings", "summary")))
                for key, claim in self.claims.items()]  # fmt: skip
        columns = ["Claim", "Published before", "Published after", *spaces, "n", "Trainings", "Verdict"]
        return self.show(name, columns, rows, caption)

    def claim_sentences(self) -> list[str]:
        """The claims in words, a line each that was tested, and one for the others."""
        lines, untested = [], []
        for key, claim in self.claims.items():
            before, after = claim["published"]
            told = f" (published {self.text(before)} to {self.text(after)})" if before else " (our own)"
            each = [f"{self.spaces[slot]}: {word}, KID x 1000 changes by {self.text(f'claim.{key}.{slot}.kid_change')}"
                    for slot, word in claim["verdicts"].items()]  # fmt: skip
            if each:
                lines.append(f"{claim['text']}{told}: **{self.text(f'claim.{key}.summary')}**; {'; '.join(each)}.")
            else:
                untested.append(claim["text"])
        return lines + [f"{len(untested)} claims are not testable at this scale: {'; '.join(untested)}."]


def bullets(lines: list[str]) -> Markdown:
    """Sentences as a list."""
    return Markdown("\n".join(f"- {line}" for line in lines))
