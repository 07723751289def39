"""Copies of a shipped score network that went on, on its own images: what SIMS and Neon lead away from."""

import copy
import io
import json
import shutil
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dgutils.networks import checkpoints, pretrain
from dgutils.pipeline import ranks
from dgutils.pipeline.jobs import ImageSet
from dgutils.pipeline.store import Store

VERSION = 1  # as of jobs.VERSIONS
BATCH, RATE = 128, 0.1  # images a step at most, and what multiplies the recipe's learning rate


@dataclass(eq=False)
class Copy:
    """A copy of a shipped score network, trained for some steps more on generated `images`: its `network`.

    The learning rate falls to zero; the weights' average, of a tenth of the steps, forgets what was before.
    seed: of order and noise. Raises UserError, when it is trained, for a network that does not ship with its recipe.
    """

    store: Store
    score_network: str
    images: ImageSet
    steps: int
    seed: int = 0
    label: str = "copy"

    def __post_init__(self):
        config = {"score_network": self.score_network, "steps": self.steps, "seed": self.seed}
        inputs = {"images": self.images.digest, "score_network": checkpoints.weights_digest(self.score_network)}
        self.artifact = self.store.artifact("copy", VERSION, config, inputs, self.label)
        self.digest, self.sources = self.artifact.digest, (self.images,)

    @property
    def lacks(self) -> bool:
        """Whether it is still to be trained."""
        return bool(self.artifact.lacks())

    def ensure(self) -> "Copy":
        """Have it trained, and before that its images; the ranks of a group call it together."""
        if ranks.group().agree(self.lacks):
            self.images.ensure()
        with ranks.alone():
            self.artifact.ensure(self._train)
        return self

    def _train(self, folder: Path) -> None:
        """Train it by the loop that trained the network; a training that was cut off goes on where it was."""
        card, batch = checkpoints.model_card(self.score_network), min(BATCH, self.images.n)
        seen, images, usual = card["images_seen"] // batch * batch, self.steps * batch, card["recipe"]["training"]
        training = usual | {"images": seen + images, "decay_images": images, "batch_size": batch, "seed": self.seed,
                            "learning_rate": RATE * usual["learning_rate"], "ema_half_life": images / 10,
                            "warmup_steps": max(1, self.steps // 10)}  # fmt: skip
        place = self.store.root / "partial" / f"{self.artifact.name}.training"
        place.mkdir(parents=True, exist_ok=True)
        with redirect_stderr(io.StringIO()):  # its bar
            path = pretrain.train_network("copy", place, images=self.images.images, recipe=card["recipe"] | {
                "start": self.score_network, "training": training})  # fmt: skip
        if not json.loads(path.with_suffix(".json").read_text())["finished"]:
            raise KeyboardInterrupt  # it was asked to stop
        shutil.copy(path, folder / "network.safetensors")
        shutil.rmtree(place)

    @cached_property
    def network(self):
        """The network, frozen, float32."""
        with ranks.alone():
            self.ensure()
        found = copy.deepcopy(checkpoints.load_denoiser(self.score_network))
        tensors = checkpoints.read_tensors(self.artifact.path / "network.safetensors")[0]
        found.load_state_dict({name: value.float() for name, value in tensors.items()})
        return found
