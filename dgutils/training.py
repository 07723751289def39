"""Training of discriminators, from the loop (`train_discriminators`, at the end) down to the loss of one head.

Several heads learn side by side on one frozen extractor. Ranks, progress and checkpoints come in as arguments.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dgutils.discriminator import CLOCKS, RESAMPLINGS, MemberConfig, perturb
from dgutils.errors import require
from dgutils.guidance import reconstruction_error
from dgutils.noise import TRAINING, VALIDATION, keyed_rng, sample_vp_time, vp_scale, vp_time_to_sigma
from dgutils.recording import Recorded
from dgutils.sampler import autocast


@dataclass(frozen=True)
class TrainingSettings:
    """How discriminators are trained, apart from the data and the networks.

    members: all train side by side, and each leaves when its epochs are done.
    seed: with the epoch it fixes the images' order and noise, and alone the noise of validation.
    precision: "float32" or "bfloat16". clock: a name of CLOCKS, how extractor and heads read the VP time.
    sequential: the study's fault, one network carried through all members' settings in turn (a fresh optimiser each).
    resampling: a name of RESAMPLINGS. kept: (member, epoch) pairs whose weights are kept.
    parts: a batch is divided into so many, which ranks share; on CPUs results depend on it, not on the number of ranks.
    """

    members: tuple[MemberConfig, ...]
    batch_size: int = 128
    seed: int = 0
    precision: str = "float32"
    clock: str = "linear"
    sequential: bool = False
    resampling: str = "none"
    kept: tuple[tuple[int, int], ...] = ()
    parts: int = 1


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, H, W, C] of one part of the data: real (label 1) and generated (label 0), as many of each."""

    images: np.ndarray
    labels: np.ndarray


# What a training asks of the ranks that share it, answered for one process: how many they are, this one's part of n
# things (the parts follow each other), and to replace each tensor by its sum over all ranks, the same bits on all.
ONE_PROCESS = SimpleNamespace(world=1, slice=slice, sum=lambda *tensors: None)


def _check(splits: list[Split], settings: TrainingSettings) -> None:
    for images, labels in ((split.images, split.labels) for split in splits):
        require(images.dtype == np.uint8 and images.ndim == 4 and len(images),
                f"{len(images)} images of {images.dtype} {images.shape[1:]}: give uint8 [N, H, W, C]")
        require(len(images) == len(labels) == 2 * np.sum(labels),
                f"{len(images)} images, {len(labels)} labels, {int(np.sum(labels))} real: "
                "give as many real as generated, or logits are not log-density-ratios")
    n, members, size, parts = len(splits[0].images), settings.members, settings.batch_size, settings.parts
    require(members, "no member to train: give at least one")
    require(1 <= size <= n, f"batch_size {size}: use at most the {n} training images")
    require(1 <= parts <= size, f"{parts} parts of a batch: at least 1, at most batch_size, {size}")
    for one in members:
        require(one.epochs >= 1 and 0 < one.min_time < 1,
                f"discriminator {one.name}: epochs must be >= 1 and 0 < min_time < 1")
        require(0 <= one.learning_rate < math.inf and 0 <= one.weight_decay < math.inf,
                f"discriminator {one.name}: learning_rate {one.learning_rate} and weight_decay {one.weight_decay} "
                "must be finite, not negative")
    for what, name, known in (("resampling", settings.resampling, RESAMPLINGS), ("clock", settings.clock, CLOCKS)):
        require(name in known, f"unknown {what} {name!r}: choose one of {', '.join(known)}")
    for m, epoch in settings.kept:
        require(0 <= m < len(members) and 1 <= epoch <= members[m].epochs,
                f"cannot keep epoch {epoch} of member {m}: it is not trained")


# ---- a member in training ----------------------------------------------------------------


class Trainee:
    """A member in training, and after it. Its tensors and history are all the state there is.

    times: int64 [N], how often it sees each training image in an epoch; keep: epochs whose weights it keeps.
    last_state, best_state, kept["epoch<number>"]: its weights now, at the lowest validation loss, after those epochs.
    history: a row an epoch of losses and accuracies.
    """

    def __init__(self, config, head, times, keep):
        self.config, self.head, self.times, self.history, self.best_state = config, head, times, [], {}
        self.kept = {f"epoch{epoch}": {} for epoch in keep}
        self.optimizer = torch.optim.Adam(head.parameters(), config.learning_rate, weight_decay=config.weight_decay,
                                          fused=True, capturable=next(head.parameters()).is_cuda)

    @property
    def last_state(self):
        """A copy of the head's weights on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.head.state_dict().items()}

    def tensors(self):
        """Everything as one flat dict: head.*, best.*, adam.<parameter>.* and epoch<number>.*, copies on the CPU."""
        adam = {f"{i}.{name}": value.detach().cpu().clone()
                for i, slots in self.optimizer.state_dict()["state"].items() for name, value in slots.items()}
        groups = {"head": self.last_state, "best": self.best_state, "adam": adam, **self.kept}
        return {f"{group}.{name}": v for group, values in groups.items() for name, v in values.items()}

    def load(self, tensors, history):
        """Become what `tensors` returned, with that history."""
        groups, slots = defaultdict(dict), defaultdict(dict)
        for key, value in tensors.items():
            group, name = key.split(".", 1)
            groups[group][name] = value.clone()
        for key, value in groups["adam"].items():
            index, name = key.split(".")
            slots[int(index)][name] = value
        self.head.load_state_dict(groups["head"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": dict(slots)})
        self.best_state, self.history = groups["best"], history
        self.kept = {which: groups[which] for which in self.kept}

    def record(self, epoch: int, train, validation) -> None:
        """Add a row to the history, of (loss, accuracy) pairs; keep weights that are the best yet, or asked for."""
        names = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
        row = dict(zip(names, (epoch, *train, *validation), strict=True))
        if row["val_loss"] < min((r["val_loss"] for r in self.history), default=math.inf):
            self.best_state = self.last_state
        if f"epoch{epoch}" in self.kept:
            self.kept[f"epoch{epoch}"] = self.last_state
        self.history.append(row)

    def step(self, batch: "Batch") -> None:
        """The optimiser's step on a batch, unless the member saw none of it."""
        if batch.seen_by(self).any():
            self.optimizer.step()


# ---- batches, their parts, and the loss on them ------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Noised images x_vp [B, C, H, W]. label, vp_time, time (as the networks read it), rows in the training data: [B].

    images: what was noised, uint8 [B, H, W, C]. rows is None for validation, whose images every member sees once.
    """

    images: np.ndarray
    x_vp: torch.Tensor
    label: torch.Tensor
    vp_time: torch.Tensor
    time: torch.Tensor
    rows: np.ndarray | None

    def seen_by(self, trainee: Trainee) -> torch.Tensor:
        """How often the member sees each image: int64 [B]. Never at times below its own least."""
        seen = (self.vp_time >= trainee.config.min_time).long()
        return seen if self.rows is None else seen * torch.from_numpy(trainee.times[self.rows])


def noised_batches(split: Split, order, trainees, rng, settings: TrainingSettings, device):
    """Batches of split.images, noised at times of the training density on [t_min, 1]. All ranks draw the same.

    t_min is the trainees' least min_time; the times above another's have exactly the density of its own interval.
    order: of the images, for training, without an incomplete last batch; None: validation, on all as they come.
    """
    learn, size = order is not None, settings.batch_size
    order = order if learn else np.arange(len(split.images))
    t_min = min(trainee.config.min_time for trainee in trainees)
    times = sample_vp_time(torch.from_numpy(rng.random(len(order))), t_min)
    for start in range(0, len(order) - (size - 1 if learn else 0), size):
        rows, vp_time = order[start : start + size], times[start : start + size]
        x_vp = perturb(split.images[rows], vp_time, rng)
        label = torch.from_numpy(split.labels[rows]).to(device, torch.float32)
        time = CLOCKS[settings.clock](vp_time).to(device, torch.float32)
        yield Batch(split.images[rows], x_vp, label, vp_time, time, rows if learn else None)


def _member_on_part(batch, part, features, precision, trainee, total):
    """One member on the places `part` [n] of a batch, with features [n, F, h, w]; else as `part_losses`.

    Binary cross-entropy in nats: Kim et al. 2023, eq. 6 (report, eq:loss), whose weight by noise level lies in the
    density of the times.
    """
    seen = batch.seen_by(trainee)
    which = torch.arange(len(part)).repeat_interleave(seen[part]).to(features.device)
    if len(which) == 0:
        return
    rows = features.permute(0, 2, 3, 1)[which].permute(0, 3, 1, 2)  # an index alone would forget the fast memory layout
    label = batch.label[part][which]
    with torch.set_grad_enabled(batch.rows is not None), autocast(features.device, precision):  # a thread has its own
        logit = trainee.head(rows, batch.time[part][which])[:, 0].float()
        loss = F.binary_cross_entropy_with_logits(logit, label, reduction="sum")
    if loss.requires_grad:
        (loss / seen.sum()).backward()
    hits = ((logit > 0) == (label > 0.5)).sum()
    total += torch.stack([loss.detach(), hits, hits.new_tensor(len(which))])


def _reconstruction_on_part(batch, part, extractor, denoise, trainee, total):
    """One member on the real images of a part, by `reconstruction_error`, which has no accuracy; in float32."""
    seen = batch.seen_by(trainee) * (batch.label.cpu() > 0.5)
    which, device = part.repeat_interleave(seen[part]), batch.label.device
    if len(which) == 0:
        return
    sigma, time = vp_time_to_sigma(batch.vp_time[which]).to(device), batch.time[which]
    clean = torch.from_numpy(batch.images[which]).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
    x = batch.x_vp[which].to(device) / vp_scale(sigma)[:, None, None, None].float()
    with torch.set_grad_enabled(batch.rows is not None):
        loss = reconstruction_error(lambda x_vp, _: trainee.head(extractor.features(x_vp, time), time)[:, 0],
                                    denoise(x.double(), sigma, 0, 1).float(), clean, x, sigma.float()).sum()
    if loss.requires_grad:
        (loss / seen.sum()).backward()
    total += torch.stack([loss.detach(), loss.new_tensor(math.nan), loss.new_tensor(len(which))])


def part_losses(extractor, settings: TrainingSettings, denoise, each, trainees, batch: Batch, totals,
                number: int) -> None:  # fmt: skip
    """All members on part `number` of a batch: the extractor once, then every head on its features.

    Adds loss, hits and count of every member to totals [parts, M, 3], and, in training, to its gradients.
    denoise: as of `train_discriminators`.
    """
    part, device = torch.arange(len(batch.label)).tensor_split(settings.parts)[number], batch.label.device
    if len(part) == 0:  # there are fewer images than parts
        return
    if denoise:
        each(partial(_reconstruction_on_part, batch, part, extractor, denoise), trainees, totals[number])
        return
    with torch.no_grad(), autocast(device, settings.precision):
        features = extractor.features(batch.x_vp[part].to(device), batch.time[part])
    each(partial(_member_on_part, batch, part, features, settings.precision), trainees, totals[number])


def sum_gradients(parameters, parts: int, backward: Callable[[int], None], ranks) -> None:
    """Leave in each parameter the gradient that backward(0) ... backward(parts - 1) add up to, dealt to the ranks.

    They are added in their order: the same bits come out however many ranks there are.
    """
    parameters = list(parameters)
    table = parameters[0].new_zeros(parts, sum(parameter.numel() for parameter in parameters))
    for part in range(parts)[ranks.slice(parts)]:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        backward(part)
        torch.cat([parameter.grad.reshape(-1) for parameter in parameters], out=table[part])
    ranks.sum(table)  # zeros of all ranks but one: nothing is rounded here
    total = reduce(torch.add, table)
    for parameter, gradient in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def mean_scores(totals, trainees, ranks) -> list:
    """(loss, accuracy) of each member over all images: totals [parts, M, 3], summed over ranks, then parts in order."""
    ranks.sum(totals)
    totals = totals.cumsum(0)[-1]
    for trainee, loss in zip(trainees, totals[:, 0].tolist(), strict=True):
        require(math.isfinite(loss), f"discriminator {trainee.config.name}: its loss is not finite in epoch "
                                     f"{len(trainee.history) + 1}: lower its learning rate")
    return (totals[:, :2] / totals[:, 2:]).tolist()


@contextmanager
def _side_by_side(device):
    """Yields each(function, *sequences), a `map` that is done when it returns.

    On a CPU the calls run side by side, each in one thread: the last bits of gradients depend on the number.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu":
        yield lambda function, *sequences: list(map(function, *sequences))
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield lambda function, *sequences: list(pool.map(function, *sequences))
    finally:
        torch.set_num_threads(threads)  # of threads to come: the setting above is theirs, too


def _for_device(settings: TrainingSettings, device, ranks) -> TrainingSettings:
    """On a GPU as many parts as ranks: it waits for launches, as many for a part as for a batch."""
    return settings if device.type == "cpu" else replace(settings, parts=min(settings.parts, ranks.world))


class RecordedStep:
    """A training step that is recorded, for members `trainees`; totals [1, M, 3] as of `part_losses`.

    Where `_member_on_part` repeats an image that a member sees often, and leaves out one that it does not see, this
    weights it: shapes stay the same.
    """

    def __init__(self, extractor, settings: TrainingSettings, trainees: list[Trainee], device):
        self.extractor, self.precision, self.trainees = extractor, settings.precision, trainees
        self.totals = torch.zeros(1, len(trainees), 3, dtype=torch.float64, device=device)
        self.recorded = Recorded(self._step, device)

    def __call__(self, batch: Batch) -> bool:
        """Do the step; False, and nothing done, for a batch of which a member sees nothing."""
        seen = torch.stack([batch.seen_by(trainee) for trainee in self.trainees])
        if complete := bool(seen.sum(1).all()):
            self.recorded(batch.x_vp, batch.label, batch.time, seen.float())
        return complete

    def _step(self, x_vp, label, time, seen) -> None:
        with torch.no_grad(), autocast(x_vp.device, self.precision):
            features = self.extractor.features(x_vp, time)
        self.recorded.beside([partial(self._member, m, features, label, time, seen[m]) for m in range(len(seen))])

    def _member(self, m: int, features, label, time, seen) -> None:
        trainee = self.trainees[m]
        trainee.optimizer.zero_grad()
        with autocast(features.device, self.precision):
            logit = trainee.head(features, time)[:, 0].float()
        losses = F.binary_cross_entropy_with_logits(logit, label, reduction="none")
        ((losses * seen).sum() / seen.sum()).backward()
        trainee.optimizer.step()
        hits = ((logit > 0) == (label > 0.5)).float()
        self.totals[0, m] += torch.stack([(one * seen).sum() for one in (losses.detach(), hits, torch.ones_like(hits))])


def _records(device, parts: int) -> bool:
    """Whether a training replays its steps: on one GPU, which otherwise waits for their launching."""
    return device.type == "cuda" and parts == 1


# ---- the loop ----------------------------------------------------------------------------


def _passes(settings: TrainingSettings) -> list[tuple[int, list[int]]]:
    """Passes over the data, (epoch, members): side by side an epoch of all that are unfinished, else of one."""
    epochs = [config.epochs for config in settings.members]
    if settings.sequential:
        return [(epoch, [m]) for m, count in enumerate(epochs) for epoch in range(count)]
    return [(epoch, [m for m, count in enumerate(epochs) if epoch < count]) for epoch in range(max(epochs))]


def _snapshot(trainees, passes_done: int) -> tuple[dict, dict]:
    """All that a training is, for its checkpoint."""
    tensors = {f"{m}.{key}": value for m, trainee in enumerate(trainees) for key, value in trainee.tensors().items()}
    return tensors, {"rounds_done": passes_done, "histories": [list(trainee.history) for trainee in trainees]}


def _restore(trainees, tensors, info) -> int:
    """Put the trainees where they were, and return how many passes are done."""
    for m, trainee in enumerate(trainees):
        own = {key.removeprefix(f"{m}."): value for key, value in tensors.items() if key.startswith(f"{m}.")}
        trainee.load(own, list(info["histories"][m]))
    return info["rounds_done"]


def train_discriminators(extractor, make_head: Callable[[int], nn.Module], learn: Split, validate: Split,
                         settings: TrainingSettings, progress: Callable[[str, dict], None] | None = None,
                         checkpoint: Callable[[dict, dict], None] | None = None,
                         resume: tuple[dict, dict] | None = None, ranks=ONE_PROCESS,
                         denoise: Callable | None = None) -> list[Trainee]:
    """Train independent heads on a frozen extractor's features of noised images, real against generated.

    denoise: the unguided denoiser, for the objective of Verine et al. (2025): its error on real images, when guided by
    the head, in the place of cross-entropy. The generated images are not used then.

    make_head(m): a fresh head of member m. progress(name, row) is told every new row of a member's history,
    checkpoint(tensors, info) after every pass all that the training is, as flat CPU tensors and a JSON-able dict; from
    such a pair as `resume` it goes on to the same bits. ranks: as `ONE_PROCESS`; all call this alike.
    Raises UserError for a loss that is not finite, unbalanced data, fewer images than a batch, unusable settings.
    """
    _check([learn, validate], settings)
    device = next(extractor.eval().requires_grad_(False).parameters()).device
    settings = _for_device(settings, device, ranks)
    parts = settings.parts
    times = RESAMPLINGS[settings.resampling](np.asarray(learn.labels), len(settings.members), settings.seed)
    trainees = [Trainee(config, make_head(m).to(device), times[m], [epoch for k, epoch in settings.kept if k == m])
                for m, config in enumerate(settings.members)]  # fmt: skip
    done, recorded = _restore(trainees, *resume) if resume else 0, None
    rng = keyed_rng(settings.seed, 0, 0, VALIDATION)  # the same images and noise every time
    held_out = list(noised_batches(validate, None, trainees, rng, settings, device))
    with _side_by_side(device) as each:
        losses = partial(part_losses, extractor, settings, denoise, each)
        for number, (epoch, active) in list(enumerate(_passes(settings)))[done:]:
            now = [trainees[m] for m in active]
            if settings.sequential and epoch == 0 and number > 0:  # the network is carried on
                now[0].head.load_state_dict(trainees[active[0] - 1].head.state_dict())

            rng = keyed_rng(settings.seed, number, 0, TRAINING)
            order = rng.permutation(len(learn.images))
            weights = [weight for trainee in now for weight in trainee.head.parameters()]
            totals = torch.zeros(parts, len(now), 3, dtype=torch.float64, device=device)
            if not denoise and _records(device, parts) and (recorded is None or recorded.trainees != now):
                recorded = RecordedStep(extractor, settings, now, device)
            for batch in noised_batches(learn, order, now, rng, settings, device):
                if recorded and recorded(batch):
                    continue
                sum_gradients(weights, parts, partial(losses, now, batch, totals), ranks)
                each(Trainee.step, now, [batch] * len(now))
            if recorded:
                totals += recorded.totals
                recorded.totals.zero_()
            train = mean_scores(totals, now, ranks)

            totals = torch.zeros_like(totals)
            for batch in held_out:
                for part in range(parts)[ranks.slice(parts)]:
                    losses(now, batch, totals, part)
            validation = mean_scores(totals, now, ranks)

            for trainee, *scores in zip(now, train, validation, strict=True):
                trainee.record(epoch + 1, *scores)
                if progress:
                    progress(trainee.config.name, trainee.history[-1])
            if checkpoint:
                checkpoint(*_snapshot(trainees, number + 1))
    return trainees
