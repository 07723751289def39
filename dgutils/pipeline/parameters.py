"""Every parameter of the study, once: its name, type, bounds, meaning, and its default, which is the quick profile's.

A profile, notebooks/profiles/NAME.yaml, holds what differs from the defaults, or from another profile that it names as
its `base`. `load` puts defaults, profile and --set together, and says in one line what no run can mean.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dgutils.errors import UserError, require
from dgutils.networks import checkpoints
from dgutils.networks.features import published
from dgutils.paths import repo_root

# Without leading zeros: 010 is eight in one language, ten in another, and an error in Python, hence here.
NUMBER = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


def _number(value: Any) -> Any:
    """The number that a text writes in plain decimals, such as "1e-4"; anything else as it is."""
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


Real = Annotated[float, BeforeValidator(_number), Field(ge=-1e9, le=1e9)]
Positive = Annotated[Real, Field(gt=0)]
Weight = Annotated[Real, Field(ge=0)]
Time = Annotated[Real, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**7)]
Seed = Annotated[int, Field(ge=0, lt=2**40)]
Boosting = Literal["none", "released", "paper"]
Family = Literal["strength", "fault", "controls", "quality", "world", "overfitting"]
Fault = Literal["steps", "raw_logits", "sequential", "wrong_file", "last_epoch", "boosting", "batch_size"]
NETWORKS = {"score_network": "denoiser", "conditional_network": "denoiser", "feature_extractor": "extractor",
            "published_discriminator": "discriminator", "conditional_discriminator": "discriminator",
            "worse_network": "denoiser"}  # fmt: skip
Variant = Literal["bootstrap", "disjoint", "best", "long", "overfitted", "overfitted_best", "full", "full_best",
                  "full_raw", "worse", "tasks"]  # fmt: skip
Later = Literal["reconstruction", "diffrs", "sims", "neon", "autoguidance"]


class AsRun(BaseModel):
    """The student study's own settings, which faults of the ladder stand for."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    num_steps: Annotated[Count, Field(ge=2)] = 23
    boosting: Boosting = "released"
    discriminator_batch_size: Count = 64


class Parameters(BaseModel):
    """All parameters of the six notebooks."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    profile: str = Field("quick", description="names the folders of results, figures and artifacts")
    dataset: Literal["fashion_mnist", "cifar10"] = Field("fashion_mnist", description="real images")
    score_network: str = Field("fashion-mnist-edm", description="the EDM denoiser that draws images")
    feature_extractor: str = Field("fashion-mnist-adm", description="the frozen encoder below every discriminator")
    feature_spaces: list[str] = Field(["fashion-mnist-adm", "efficientnet-lite0@128"], min_length=1, max_length=2,
                                      description="where scores are taken; the first leads")  # fmt: skip
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: as the hardware multiplies")
    # table 2: sampling and guidance
    num_steps: int = Field(8, ge=2, le=10_000, description="Heun steps")
    sigma_min: Positive = Field(0.2, description="lowest noise level before 0")
    sigma_max: Positive = Field(80.0, description="highest noise level")
    rho: Positive = Field(7.0, description="curvature of the schedule")
    dg_weight_1st_order: Real = Field(3.0, ge=0, description="guidance weight on the Euler predictor")
    dg_weight_2nd_order: Real = Field(3.0, ge=0, description="guidance weight on the Heun corrector")
    time_min: Time = Field(0.01, description="VP times between which guidance acts")
    time_max: Time = Field(1.0, description="upper end of that window")
    boosting: Boosting = Field("none", description="released: the authors' code, paper: its text")
    log_ratio: Literal["logit", "clipped"] = Field("logit", description="whose gradient guides: the logit's; clipped: "
                                                   "that of the reference's clipped probability")  # fmt: skip
    batch_size: Count = Field(160, description="images sampled at once")
    shard_size: Count = Field(160, description="images a file of the store holds; a multiple of batch_size")
    num_fake: int = Field(2000, ge=10, le=10**7, description="generated images that train discriminators; as many real")
    fake_seed: Seed = Field(100_000, description="their first seed")
    num_eval: Count = Field(320, description="images of every compared arm")
    eval_seed: Seed = Field(1_000_000, description="their first seed, apart from the fake set's")
    seed_blocks: Annotated[Count, Field(le=100)] = Field(1, description="blocks of num_eval seeds in EDM's protocol")
    reference_split: Literal["train", "test"] = Field("test", description="whose real images arms are scored against")
    num_reference: Count = Field(2000, description="how many of them")
    num_resamples: Annotated[Count, Field(le=100_000)] = Field(100, description="bootstrap resamples of every score")
    linear_from: Positive = Field(20, description="images a dimension from which on an FD's resamples are linear")
    # table 1: the six discriminators
    member_names: list[str] = Field(["Paper", "D1", "D2", "D3", "D4", "D5"], min_length=1, description="one a member")
    learning_rates: list[Positive] = Field([3e-4, 1e-3, 1e-4, 1e-4, 5e-5, 1e-5], description="of Adam")
    weight_decays: list[Weight] = Field([1e-7, 1e-7, 0.0, 1e-3, 1e-9, 1e-11], description="of Adam")
    epochs: list[Count] = Field([60, 40, 40, 40, 40, 200], description="before epoch_scale")
    min_times: list[Time] = Field([1e-5, 1e-5, 0.01, 1e-3, 1e-3, 1e-5], description="least VP time a member sees")
    epoch_scale: Positive = Field(0.08, le=1000, description="multiplies every member's epochs")
    discriminator_batch_size: Count = Field(128, description="real and generated images together")
    training_seed: Seed = Field(0, description="initial weights, order, noise and splits")
    training_parts: Annotated[Count, Field(le=4096)] = Field(1, description="of a batch, for as many ranks at most")
    held_out_every: int = Field(10, ge=3, le=10**6, description="of so many images, one validates and one tests")
    sequential: bool = Field(False, description="the study's fault: one network carried through all six settings")
    head_width: Count = Field(32, description="channels of a discriminator's head")
    head_blocks: int = Field(1, ge=0, le=100, description="residual blocks of a head beside those of its middle")
    head_channels: Count = Field(16, description="channels of an attention head")
    head_start: str = Field("fashion-mnist-head", description="a shipped head that training goes on from; '' for none")
    own_discriminators: bool = Field(True, description="table 1's are trained; else only published weights guide")
    # other samplers, published weights (notebook 04)
    published_discriminator: str = Field("", description="a published head on the same extractor, an arm of its own")
    conditional_network: str = Field("", description="a class-conditional denoiser, for arms of its own")
    conditional_discriminator: str = Field("", description="the published head that guides it")
    stronger_networks: list[str] = Field([], description="other denoisers of the same images, an unguided arm each")
    cfg_weights: list[Real] = Field([], description="of classifier-free guidance by both networks, an arm each")
    ancestral_steps: int = Field(23, ge=0, le=10_000, description="of DDPM's sampler, an arm of its own; 0 for none")
    num_tested: int = Field(320, ge=0, le=10**7, description="images of every arm that are tested, sought in training")
    num_likelihood: int = Field(0, ge=0, le=10_000, description="test images whose likelihood is computed; 0 for none")
    # why the ensemble failed (notebook 06)
    ladder: list[Fault] = Field([], description="faults of the study's ensemble, in the order in which they are mended")
    as_run: AsRun = Field(AsRun(), description="the study's settings that faults stand for")
    repeats: Annotated[Count, Field(le=1000)] = Field(1, description="independent trainings behind the key arms")
    num_key: Count = Field(400, description="images of each key arm and training")
    variants: list[Variant] = Field([], description="ensembles beyond the study's")
    families: list[Family] = Field([], description="arms of the second study (docs/preregistration.md)")
    strengths: list[Weight] = Field([2.0, 1.0, 4.0, 8.0], description="guidance weights of its ensembles")
    overfit_images: int = Field(2000, ge=10, le=10**7, description="real, and generated, of its overfitted member")
    worse_steps: int = Field(6, ge=2, le=10_000, description="Heun steps of the worse sampler of two variants")
    # what came after (notebook 05)
    later_methods: list[Later] = Field([], description="later methods, over `repeats` trainings, beside guidance")
    copy_steps: Count = Field(300, description="of training a copy of the score network, for sims and neon")
    worse_network: str = Field("", description="from which autoguidance leads away: an earlier score network")
    # sensitivity (notebook 05)
    num_sweep: Count = Field(160, description="images of every arm of the sensitivity study")
    sweep_weights: list[Weight] = Field([1.0, 4.0], description="of the predictor, beside 0 and the default")
    sweep_time_mins: list[Time] = Field([], description="lower ends of the window beside the default")
    sweep_time_maxs: list[Time] = Field([0.5], description="upper ends of the window beside the default")
    sweep_epoch_scales: list[Positive] = Field([0.0333], description="lengths of the first member's training")
    # the 2-D world, and images followed closely (notebook 03)
    toy_samples: Count = Field(1000, description="points an arm in the 2-D world")
    toy_steps: int = Field(18, ge=2, le=10_000, description="Heun steps there")
    num_watched: Annotated[Count, Field(le=10_000)] = Field(16, description="images followed along their trajectory")
    notebooks: list[str] = Field([""], min_length=1, description="those that a run has, by how their names begin")
    watermark: str = Field("quick", description="across the pages of a report made from these results; '' for none")

    @model_validator(mode="after")
    def _possible(self):
        """Refuse what no run can mean although each value alone is possible."""
        columns = ("member_names", "learning_rates", "weight_decays", "epochs", "min_times")
        lengths = {name: len(getattr(self, name)) for name in columns}
        require(len(set(lengths.values())) == 1, "table 1 needs one value a member in every column, not "
                + ", ".join(f"{name} {length}" for name, length in lengths.items()))  # fmt: skip
        for low, high in (("sigma_min", "sigma_max"), ("time_min", "time_max")):
            a, b = getattr(self, low), getattr(self, high)
            require(a < b, f"{low} {a:g} is not below {high} {b:g}")
        require(self.shard_size % self.batch_size == 0,
                f"shard_size {self.shard_size} is not a multiple of batch_size {self.batch_size}")
        require("wrong_file" not in self.ladder or len(self.member_names) >= 4,
                "the fault wrong_file needs at least 4 members: it lay in slot 3, counted from 0")
        for name in ("member_names", "feature_spaces", "stronger_networks", "ladder", "variants", "families",
                     "later_methods"):  # fmt: skip
            values = getattr(self, name)
            require(len(set(values)) == len(values), f"{name} has {max(values, key=values.count, default='')} twice")
        channels, there_are = {"fashion_mnist": (1, 60_000), "cifar10": (3, 50_000)}[self.dataset]
        real = {"num_fake": self.own_discriminators, "num_reference": self.reference_split == "train"}
        for name in (name for name, trained in real.items() if trained and getattr(self, name) > there_are):
            raise UserError(f"{name} is {getattr(self, name)}: {self.dataset} has {there_are} training images")
        used = [(name, getattr(self, name), kind) for name, kind in NETWORKS.items()]
        used += [("stronger_networks", network, "denoiser") for network in self.stronger_networks]
        used += [("feature_spaces", space, "extractor") for space in self.feature_spaces if not published(space)]
        for name, network, kind in used:
            if not network and not Parameters.model_fields[name].default:  # may be left out
                continue
            config = checkpoints.network_config(network, kind)
            its = config.get("img_channels", config.get("in_channels"))
            require(kind == "discriminator" or its == channels, f"{name} {network} is of images with {its} channels, "
                    f"those of {self.dataset} have {channels}: choose a network of that dataset")
        return self


# --- reading


class _Loader(yaml.SafeLoader):
    """YAML whose plain words are decimal numbers, true, false, null, or text; keys are not repeated."""

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]} is there twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|None|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^([Tt]rue|[Ff]alse)$"), list("TtFf"))
_Loader.add_implicit_resolver("dgutils:number", re.compile(f"^({NUMBER.pattern})$"), list("-+.0123456789"))
_Loader.add_constructor("dgutils:number", lambda loader, node: int(node.value) if re.fullmatch(
    r"[-+]?[0-9]{1,4000}", node.value) else float(node.value))  # fmt: skip


def _yaml(text: str | bytes, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source} is not YAML: {' '.join(str(error).split())}") from error


def load_profile(profile: str, _above: tuple[str, ...] = ()) -> dict[str, Any]:
    """What notebooks/profiles/<profile>.yaml, and the profiles that it is based on, say; its `profile` is its name."""
    folder = repo_root() / "notebooks" / "profiles"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    require(profile in known, f"unknown profile {profile}: there are {', '.join(known) or 'none'} in {folder}")
    path = folder / f"{profile}.yaml"
    require(profile not in _above,
            f"{path}: profiles are based on each other in a circle: {' on '.join((*_above, profile))}")
    values = _yaml(path.read_bytes(), str(path))
    require(isinstance(values := {} if values is None else values, dict), f"{path} must hold lines `name: value`")
    base, its = values.pop("base", None), values.get("profile", profile)
    require(its == profile, f"{path}: profile is {its!r}, but the file is named {profile}")
    return (load_profile(base, (*_above, profile)) if base else {}) | values | {"profile": profile}


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """['name=value', ...] as --set has them -> {name: value}; values are written as in a profile."""
    found: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        require(separator and name.isidentifier(), f"--set {text}: write name=value")
        require(name not in found, f"--set {text}: {name} is set twice")
        found[name] = _yaml(value, f"--set {text}:")
    return found


def _check(values: Mapping[str, Any], source: str) -> "Parameters":
    if unknown := [str(name) for name in values if name not in Parameters.model_fields]:
        close = difflib.get_close_matches(unknown[0], Parameters.model_fields, n=1)
        raise UserError(f"unknown parameter {unknown[0]} in {source}"
                        + (f"; did you mean {close[0]}?" if close else ": dgutils/pipeline/parameters.py has them all"))
    try:
        return Parameters(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where, value, message = ".".join(map(str, first["loc"])), repr(first["input"]), first["msg"]
        if where and first["type"] != "value_error":
            value = value if len(value) < 60 else value[:57] + "..."
            message = f"{where} is {value}: {message[0].lower()}{message[1:]}"
            message += ", without leading zeros" * bool(re.match("'[-+]?0[0-9]", value))
        raise UserError(f"{source}: {message.removeprefix('Value error, ')}") from None


def load(profile: str, overrides: Mapping[str, Any] | None = None, source: str = "--set") -> Parameters:
    """The parameters of a profile, with some of them changed. source: who changed them, for messages."""
    values, overrides = load_profile(profile), dict(overrides or {})
    its = overrides.get("profile", profile)
    require(its == profile, f"{source}: profile is set to {its!r}: choose it with --profile only")
    found = _check(values, f"profile {profile}")
    return _check(values | overrides, source) if overrides else found
