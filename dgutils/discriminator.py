"""Discriminators and their ensembles: the log-density-ratio log p_data / p_model at every noise level.

A discriminator is a frozen ADM extractor and a shallow head on its features, trained to tell real from
generated images after both were noised.  For balanced classes the head's logit is the log-density-ratio
(Kim et al. 2023, section 3).  Members of an ensemble share the extractor: one pass of it serves them all.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dgutils.errors import UserError
from dgutils.networks.adm import EncoderUNet
from dgutils.noise import keyed_rng, sample_vp_time, vp_scale, vp_time_to_sigma, vp_to_cosine_time
from dgutils.pipeline import ranks as distributed
from dgutils.sampler import autocast

# Third word of the random key: which use a stream serves (0 is the sampler's, see noise.PerSampleNoise).
TRAINING, INITIALISATION, VALIDATION, EVALUATION, RESAMPLING = 1, 2, 3, 4, 5


# --- Combination rules: logits [M, N] of M members -> log-density-ratio [N] --------------------------------


def mean_probability(logits):
    """log(p / (1 - p)) of the mean p of the members' probabilities, for any finite logits (eq:mean-probability)."""
    # The factor 1/M of both means cancels in the ratio.
    return F.logsigmoid(logits).logsumexp(dim=0) - F.logsigmoid(-logits).logsumexp(dim=0)


def mean_logit(logits):
    """Mean of the log-density-ratios: the geometric mean of the members' density ratios (eq:mean-logit)."""
    return logits.mean(dim=0)


def median_logit(logits):
    """Median of the log-density-ratios; of an even number, the mean of the middle two, gradient shared."""
    ordered = logits.sort(dim=0).values
    return (ordered[(len(logits) - 1) // 2] + ordered[len(logits) // 2]) / 2


def raw_logits_as_probabilities(logits):
    """The study's fault, kept to be measured: the clipped mean *logit* is taken for a probability (eq:fault).

    Zero gradient unless the mean logit lies in (0, 1), and 1 / (m (1 - m)) >= 4 times too large inside.
    """
    m = logits.mean(dim=0).clamp(1e-5, 1 - 1e-5)
    return torch.log(m / (1 - m))


RULES = {
    "mean_probability": mean_probability,
    "mean_logit": mean_logit,
    "median_logit": median_logit,
    "raw_logits_as_probabilities": raw_logits_as_probabilities,
}


# --- Discriminators ----------------------------------------------------------------------------------------


# How networks that were trained on another noise schedule read the VP time.
CLOCKS = {"linear": lambda vp_time: vp_time, "cosine": vp_to_cosine_time}


class Ensemble(nn.Module):
    """Heads over one shared extractor, combined by a rule of RULES. Freezes the networks it is given.

    clock: a name of CLOCKS, how extractor and heads read the VP time.
    """

    def __init__(self, extractor, heads, rule, clock="linear"):
        super().__init__()
        if rule not in RULES:
            raise UserError(f"unknown combination rule {rule!r}: choose one of {', '.join(RULES)}")
        if not heads:
            raise UserError("an ensemble needs at least one discriminator head")
        if clock not in CLOCKS:
            raise UserError(f"unknown clock {clock!r}: choose one of {', '.join(CLOCKS)}")
        self.extractor, self.heads, self.rule, self.clock = extractor, nn.ModuleList(heads), rule, CLOCKS[clock]
        self.eval().requires_grad_(False)

    @property
    def conditional(self) -> bool:
        """Whether the heads ask for class labels."""
        return hasattr(self.heads[0], "label_emb")

    def logits(self, x_vp, vp_time, class_labels=None):
        """Members' logits [M, N] at VP-scaled images x_vp [N, C, H, W] and VP time (scalar or [N]).

        class_labels: int64 [N], for class-conditional heads; the extractor knows no classes.
        """
        time = self.clock(torch.as_tensor(vp_time))
        features = self.extractor.features(x_vp, time)  # [N,F,h,w]
        logits = torch.stack([head(features, time, class_labels)[:, 0] for head in self.heads])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast leaves bfloat16

    def log_density_ratio(self, x_vp, vp_time, class_labels=None):
        """Combined log p_data / p_model [N], in nats; arguments as in `logits`."""
        return RULES[self.rule](self.logits(x_vp, vp_time, class_labels))


class Discriminator(Ensemble):
    """A single discriminator: the ensemble of one."""

    def __init__(self, extractor, head):
        super().__init__(extractor, [head], "mean_logit")

    def logit(self, x_vp, vp_time):
        """Logit [N], which is the log-density-ratio; arguments as in `Ensemble.logits`."""
        return self.log_density_ratio(x_vp, vp_time)


# --- Training ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemberConfig:
    """How one discriminator is trained; min_time is the smallest VP time that it sees."""

    name: str
    learning_rate: float
    weight_decay: float
    epochs: int
    min_time: float = 1e-5


# The six discriminators of the study's table 1.
TABLE_1 = (
    MemberConfig("Paper", learning_rate=3e-4, weight_decay=1e-7, epochs=60, min_time=1e-5),
    MemberConfig("D1", learning_rate=1e-3, weight_decay=1e-7, epochs=40, min_time=1e-5),
    MemberConfig("D2", learning_rate=1e-4, weight_decay=0.0, epochs=40, min_time=1e-2),
    MemberConfig("D3", learning_rate=1e-4, weight_decay=1e-3, epochs=40, min_time=1e-3),
    MemberConfig("D4", learning_rate=5e-5, weight_decay=1e-9, epochs=40, min_time=1e-3),
    MemberConfig("D5", learning_rate=1e-5, weight_decay=1e-11, epochs=200, min_time=1e-5),
)


@dataclass(frozen=True)
class TrainedMember:
    """A trained head: its last weights, those of lowest validation loss, and one row an epoch of losses.

    kept: "epoch<number>" -> the weights after that epoch, for those that were asked for.
    """

    config: MemberConfig
    last_state: dict[str, torch.Tensor]
    best_state: dict[str, torch.Tensor]
    kept: dict[str, dict[str, torch.Tensor]]
    history: list[dict]


def perturb(images, vp_time, rng):
    """VP forward process, x_vp = x / sqrt(1 + sigma^2) + sigma / sqrt(1 + sigma^2) z at sigma(vp_time).

    images: uint8 [N, H, W, C]; vp_time: float64 [N]; rng: NumPy generator of z.
    Returns float32 [N, C, H, W]; clean pixels lie in [-1, 1].
    """
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    z = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
    sigma = vp_time_to_sigma(vp_time)
    mean, std = vp_scale(sigma), sigma * vp_scale(sigma)
    return mean[:, None, None, None].float() * x + std[:, None, None, None].float() * z


def init_head(head_config, seed, member):
    """A fresh head whose weights depend on (seed, member) only; torch's global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(keyed_rng(seed, member, 0, INITIALISATION).integers(2**63)))
        return EncoderUNet(**head_config)


def _bootstrap(labels, members, seed):
    """Each member has drawn as many images as there are, with replacement."""
    draws = [keyed_rng(seed, m, 0, RESAMPLING).integers(len(labels), size=len(labels)) for m in range(members)]
    return np.stack([np.bincount(drawn, minlength=len(labels)) for drawn in draws])


def _disjoint(labels, members, seed):
    """Each image is one member's, and every member has as many of each label, up to one."""
    rng, times = keyed_rng(seed, 0, 0, RESAMPLING), np.zeros((members, len(labels)), np.int64)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        times[np.arange(len(rows)) % members, rows] = 1
    return times


# How often each member sees each training image in an epoch: (labels [N], members M, seed) -> int64 [M, N].
RESAMPLINGS = {
    "none": lambda labels, members, seed: np.ones((members, len(labels)), np.int64),
    "bootstrap": _bootstrap,
    "disjoint": _disjoint,
}


class _Trainee:
    """A member in training. Its tensors and history are all the state there is.

    times: int64 [N], how often it sees each training image in an epoch; kept: epochs whose states it keeps.
    """

    def __init__(self, config, head, times, kept):
        self.config, self.head, self.history, self.best_state = config, head, [], {}
        self.times, self.kept = times, {f"epoch{epoch}": {} for epoch in kept}
        self.optimizer = torch.optim.Adam(
            head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)

    def state(self):
        """A copy of the head's weights on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.head.state_dict().items()}

    def tensors(self):
        """Everything as one flat dict: head.*, best.* and adam.<parameter>.*, copies on the CPU."""
        adam = {f"{i}.{name}": value.detach().cpu().clone()
                for i, slots in self.optimizer.state_dict()["state"].items() for name, value in slots.items()}
        groups = {"head": self.state(), "best": self.best_state, "adam": adam, **self.kept}
        return {f"{group}.{name}": v for group, values in groups.items() for name, v in values.items()}

    def load(self, tensors, history):
        groups = {"head": {}, "best": {}, "adam": {}, **{which: {} for which in self.kept}}
        for key, value in tensors.items():
            group, name = key.split(".", 1)
            groups[group][name] = value.clone()
        self.head.load_state_dict(groups["head"])
        self.best_state, self.history = groups["best"], history
        self.kept = {which: groups[which] for which in self.kept}
        slots = {}
        for key, value in groups["adam"].items():
            index, name = key.split(".")
            slots.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})

    def record(self, row):
        if row["val_loss"] < min((r["val_loss"] for r in self.history), default=math.inf):
            self.best_state = self.state()
        if f"epoch{row['epoch']}" in self.kept:
            self.kept[f"epoch{row['epoch']}"] = self.state()
        self.history.append(row)


@contextmanager
def _side_by_side(device):
    """Yields each(function, *sequences), which calls the function with the first of all, the second of all, and so on.

    On a CPU each call has one thread, and as many run at once as there are threads: heads are too small for more,
    and their gradients' last bits would depend on the number.
    """
    if device.type != "cpu":
        yield lambda function, *sequences: list(map(function, *sequences))
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield lambda function, *sequences: list(pool.map(function, *sequences))
    finally:
        torch.set_num_threads(threads)  # of threads to come: the setting above is theirs, too


def _take_turn(features, label, time, precision, learn, trainee, see, count, total):
    """A trainee's loss on part of a batch, added to `total` with what it got right and saw; its gradient with learn.

    features [n, F, h, w], label [n] and time [n] of all; it sees row i see[i] times. count: what it sees of the batch.
    """
    seen = torch.arange(len(see)).repeat_interleave(see)
    if len(seen) == 0:
        return
    seen = seen.to(features.device)
    target = label[seen]
    rows = features.permute(0, 2, 3, 1)[seen].permute(0, 3, 1, 2)  # an index alone would forget the fast memory layout
    with torch.set_grad_enabled(learn), autocast(features.device, precision):
        logit = trainee.head(rows, time[seen])[:, 0].float()
        loss = F.binary_cross_entropy_with_logits(logit, target, reduction="sum")
    if learn:
        (loss / count).backward()
    correct = ((logit > 0) == (target > 0.5)).sum()
    total += torch.stack([loss.detach(), correct, correct.new_tensor(len(logit))])


def _step(trainee, see):
    """A trainee's optimiser step on a batch, unless it saw none of it."""
    if see.any():
        trainee.optimizer.step()


def _run_batches(extractor, trainees, images, labels, order, t_min, rng, batch_size, precision, clock, parts, learn,
                 each):  # fmt: skip
    """One pass over images[order]: losses and accuracies [len(trainees), 2], in nats and as fractions.

    Every batch goes through the extractor once and then through each trainee's head.  Times have the training
    density on [t_min, 1]; a trainee with a larger min_time uses only those at or above it, which have exactly
    the training density of its own interval.  With learn, each trainee steps on each full batch.
    each: of `_side_by_side`, by which the trainees' turns on a batch are taken.
    parts: each batch falls into so many, dealt to the ranks of the group and added up in their order: the same
    bits for any number of ranks, as all draw the whole batch's noise.
    """
    device, ranks = next(extractor.parameters()).device, distributed.group()
    times = sample_vp_time(torch.from_numpy(rng.random(len(order))), t_min)  # float64 [n]
    totals = torch.zeros(parts, len(trainees), 3, dtype=torch.float64, device=device)  # loss, correct, count
    weights = [parameter for trainee in trainees for parameter in trainee.head.parameters()]
    for start in range(0, len(order) - (batch_size - 1 if learn else 0), batch_size):
        rows = order[start : start + batch_size]
        vp_time = times[start : start + batch_size]
        x_vp = perturb(images[rows], vp_time, rng)
        label = torch.from_numpy(labels[rows]).to(device, torch.float32)
        time = CLOCKS[clock](vp_time).to(device, torch.float32)
        sees = [(vp_time >= trainee.config.min_time).long() for trainee in trainees]  # how often, [B] each
        if learn:
            sees = [see * torch.from_numpy(trainee.times[rows]) for see, trainee in zip(sees, trainees, strict=True)]

        def one_part(part, x_vp=x_vp, label=label, time=time, sees=sees):
            mine = torch.arange(len(label)).tensor_split(parts)[part]
            if len(mine) == 0:
                return
            with torch.no_grad(), autocast(device, precision):
                features = extractor.features(x_vp[mine].to(device), time[mine])

            turn = partial(_take_turn, features, label[mine], time[mine], precision, learn)
            each(turn, trainees, [see[mine] for see in sees], [see.sum() for see in sees], totals[part])

        if learn:
            ranks.sum_gradients(weights, parts, one_part)
            each(_step, trainees, sees)
        else:
            for part in range(parts)[ranks.slice(parts)]:
                one_part(part)
    ranks.sum(totals)
    totals = totals.cumsum(0)[-1]  # of the parts in their order
    for trainee, loss in zip(trainees, totals[:, 0].tolist(), strict=True):
        if not math.isfinite(loss):
            raise UserError(f"discriminator {trainee.config.name}: its loss is not finite in epoch "
                            f"{len(trainee.history) + 1}: lower its learning rate")
    return (totals[:, :2] / totals[:, 2:]).cpu().numpy()


def train_discriminators(
    extractor, head_config: dict, images_train, labels_train, images_val, labels_val, members,
    batch_size: int, seed: int, precision: str = "float32", sequential: bool = False,
    progress: Callable[[str, dict], None] | None = None,
    checkpoint: Callable[[dict, dict], None] | None = None,
    resume: tuple[dict, dict] | None = None, kept=(), resampling: str = "none", clock: str = "linear",
    parts: int = 1,
) -> list[TrainedMember]:  # fmt: skip
    """Train independent heads by binary cross-entropy on noised images (Kim et al. 2023, eq. 6; report, eq:loss).

    images_*: uint8 [N, H, W, C]; labels_*: [N], 1 real and 0 generated, as many of each.
    members: MemberConfigs; all train side by side, and each leaves when its epochs are done.
    seed: with a member's index it fixes the initial weights, with the epoch the order of the images and their
    noise, and alone the noise of validation.
    sequential: the study's fault, one network carried through all settings in turn (a fresh optimiser each).
    progress(name, row) is called with every new row of history: epoch, train_* and val_* loss and accuracy.
    checkpoint(tensors, info) is called after every pass with flat CPU tensors and a JSON-able dict; `resume`
    is such a pair, and going on from it gives the same bits as never having stopped.
    kept: (member, epoch) pairs whose weights are kept. resampling: a name of RESAMPLINGS, which images members see.
    clock: a name of CLOCKS, how the extractor, and hence the heads, read the VP time.
    parts: that batches are divided into among ranks, which all call this; results depend on it, not on the ranks.
    Raises UserError for a loss that is not finite, unbalanced data, fewer images than a batch, an unusable member,
    unknown names.
    """
    for images, labels in ((images_train, labels_train), (images_val, labels_val)):
        if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
            raise UserError(f"{len(images)} images of {images.dtype} {images.shape[1:]}: give uint8 [N, H, W, C]")
        if len(images) != len(labels) or 2 * np.sum(labels) != len(labels):
            raise UserError(f"{len(images)} images, {len(labels)} labels, {int(np.sum(labels))} real: "
                            "give as many real as generated, or logits are not log-density-ratios")
    if not 1 <= batch_size <= len(images_train):
        raise UserError(f"batch_size {batch_size}: use at most the {len(images_train)} training images")
    if not 1 <= parts <= batch_size:
        raise UserError(f"{parts} parts of a batch: at least 1, at most batch_size, {batch_size}")
    if not members:
        raise UserError("no member to train: give at least one")
    for member in members:
        if member.epochs < 1 or not 0 < member.min_time < 1:
            raise UserError(f"discriminator {member.name}: epochs must be >= 1 and 0 < min_time < 1")
        if not (0 <= member.learning_rate < math.inf and 0 <= member.weight_decay < math.inf):
            raise UserError(f"discriminator {member.name}: learning_rate {member.learning_rate} and weight_decay "
                            f"{member.weight_decay} must be finite, not negative")
    if resampling not in RESAMPLINGS:
        raise UserError(f"unknown resampling {resampling!r}: choose one of {', '.join(RESAMPLINGS)}")
    for m, epoch in kept:
        if not (0 <= m < len(members) and 1 <= epoch <= members[m].epochs):
            raise UserError(f"cannot keep epoch {epoch} of member {m}: it is not trained")

    device = next(extractor.parameters()).device
    extractor.eval().requires_grad_(False)
    times = RESAMPLINGS[resampling](np.asarray(labels_train), len(members), seed)
    trainees = [_Trainee(c, init_head(head_config, seed, m).to(device), times[m], [e for k, e in kept if k == m])
                for m, c in enumerate(members)]
    # A round is one pass over the data: side by side it is an epoch of all unfinished members, else of one.
    if sequential:
        rounds = [(epoch, [m]) for m, c in enumerate(members) for epoch in range(c.epochs)]
    else:
        rounds = [(epoch, [m for m, c in enumerate(members) if epoch < c.epochs])
                  for epoch in range(max(c.epochs for c in members))]
    rounds_done = 0
    if resume is not None:
        tensors, info = resume
        rounds_done = info["rounds_done"]
        for m, trainee in enumerate(trainees):
            own = {k.removeprefix(f"{m}."): v for k, v in tensors.items() if k.startswith(f"{m}.")}
            trainee.load(own, list(info["histories"][m]))

    with _side_by_side(device) as each:
        for number, (epoch, active) in list(enumerate(rounds))[rounds_done:]:
            if sequential and epoch == 0 and number > 0:
                trainees[active[0]].head.load_state_dict(trainees[active[0] - 1].head.state_dict())
            now = [trainees[m] for m in active]
            rng = keyed_rng(seed, number, 0, TRAINING)
            train = _run_batches(
                extractor, now, images_train, labels_train, rng.permutation(len(images_train)),
                min(trainee.config.min_time for trainee in now), rng, batch_size, precision, clock,
                parts, True, each)
            val = _run_batches(
                extractor, now, images_val, labels_val, np.arange(len(images_val)),
                min(config.min_time for config in members), keyed_rng(seed, 0, 0, VALIDATION),
                batch_size, precision, clock, parts, False, each)
            for trainee, train_scores, val_scores in zip(now, train.tolist(), val.tolist(), strict=True):
                row = {"epoch": epoch + 1, "train_loss": train_scores[0], "train_accuracy": train_scores[1],
                       "val_loss": val_scores[0], "val_accuracy": val_scores[1]}
                trainee.record(row)
                if progress:
                    progress(trainee.config.name, row)
            if checkpoint:
                tensors = {f"{m}.{k}": v for m, t in enumerate(trainees) for k, v in t.tensors().items()}
                checkpoint(tensors, {"rounds_done": number + 1, "histories": [list(t.history) for t in trainees]})

    return [TrainedMember(t.config, t.state(), t.best_state, t.kept, t.history) for t in trainees]


@torch.no_grad()
def evaluate_logits(ensemble, images, vp_times, seed: int, batch_size: int, precision: str = "float32"):
    """Logits of held-out images at each noise level, for calibration by level: float32 [M, levels, N].

    images: uint8 [N, H, W, C]; vp_times: [levels]; the noise of a level is a function of (seed, its index).
    """
    device = next(ensemble.parameters()).device
    logits = np.empty((len(ensemble.heads), len(vp_times), len(images)), np.float32)
    for level, vp_time in enumerate(vp_times):
        rng = keyed_rng(seed, level, 0, EVALUATION)
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            time = torch.full((len(images[rows]),), float(vp_time), dtype=torch.float64)
            x_vp = perturb(images[rows], time, rng).to(device)
            with autocast(device, precision):
                logits[:, level, rows] = ensemble.logits(x_vp, time).cpu().numpy()
    return logits
