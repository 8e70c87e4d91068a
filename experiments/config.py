"""The settings of a run: the glossary of the project.

Hydra composes `configs/` into these dataclasses; a key that is not here is a typo. Durations carry their unit: `"6ep"`
is six passes over the training images, `"500it"` is five hundred steps, and a warm-up of `"23%"` is that share of the
training that it opens; the time between evaluations may be a share, too. This module imports nothing heavy, so that a
wrong command line fails before torch is loaded.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .arms import ARMS

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TEACHER = "teacher"  # the network that arms start from
DECAYS = ("linear", "constant")
SPLITS = ("equal", "uneven", "paired", "fresh")
STATES = ("dropped", "carried", "fresh_new")
LOGGERS = ("wandb", "none")
PRECISIONS = ("float32", "tf32", "bfloat16")
LAYOUTS = ("channels_last", "contiguous")


class ExperimentError(Exception):
    """Something that the user can put right. The message names it and says how; no traceback is shown."""

    shared = False  # whether every process of torchrun raises it, so that one of them reports it


class DivergedError(ExperimentError):
    """A loss or a weight is no longer finite. The other arms may still succeed."""


@dataclass
class Data:
    """The images. Choices are made on the holdout part of the training images; the test images are only reported."""

    name: str = "cifar10"  # digits, cifar10, image_folder, imagenet, or a class of torchvision.datasets, as SVHN
    root: str | None = None  # folder of the data; None: the cache
    cache: str = "${oc.env:NET2NET_CACHE,${oc.env:HOME}/.cache/net2net}"
    size: int = 32  # side of the square images, in pixels
    holdout: float = 0.1  # share of the training images that is held out of training
    pad: int = 4  # random crop: zero padding on each side, in pixels
    flip: bool = True  # mirror every other time that an image is seen; the first time is drawn
    workers: int = 0  # processes that decode images, for sets that do not fit in memory
    download: bool = False  # whether torchvision may download what is missing; CIFAR-10 is downloaded anyway
    options: dict[str, Any] = field(default_factory=dict)  # more arguments of torchvision's class


@dataclass
class Schedule:
    """How a network is trained. All arms of a seed share everything but the learning rate."""

    epochs: str = "6ep"  # length of each student's training
    teacher_epochs: str | None = None  # length of the teacher's training; None: as the students'
    batch_size: int = 128
    optimizer: str = "rmsprop"  # rmsprop (the paper's), sgd, or a class of torch.optim, as AdamW
    lr: float = 0.001  # initial learning rate of a network that is trained from scratch
    momentum: float = 0.9
    bias_rate: float = 1.0  # the learning rate of biases, as a multiple of that of the weights
    weight_decay: float = 0.0
    label_smoothing: float = 0.0  # share of each label that is spread over all classes in the training loss
    warmup: str = "0it"  # the learning rate rises linearly from zero
    # linear: the rate falls to zero from the warm-up on; constant; or how long it falls at the end, as in 30% or 3ep.
    decay: str = "linear"
    teacher_decay: str | None = None  # decay of the teacher's learning rate; None: as the students'
    teacher_augment: bool = True  # whether the teacher also sees cropped and mirrored images
    evaluate: str = "0.5ep"  # time between evaluations on the holdout and test images


@dataclass
class Growth:
    """How a student is filled from the teacher."""

    noise: float = 0.0  # noise on the incoming weights of copies, in standard deviations of each weight tensor
    split: str = "uneven"  # equal, uneven, paired: how the copies of a unit share its outgoing weights
    shrink: float = 0.5  # share of the weights that shrink_pad_perturb keeps; the rest is fresh
    guide_share: float = 0.5  # share of the teacher's outputs in the loss of distilled; the labels have the rest
    guide_temperature: float = 2.0  # divides the logits that distilled compares
    calibrate: int = 1024  # number of training images that measure the statistics of new batch norms
    # The teacher's state, for net2net and teacher_continued: dropped, carried, or carried with fresh_new copies.
    optimizer_state: str = "dropped"
    warmup: str | None = None  # warm-up of the arms that start from the teacher; None: schedule.warmup


@dataclass
class Config:
    """One run of one experiment: a teacher, its students, the arms that fill them, one seed."""

    experiment: str = "???"
    claim: str = "???"  # one line: what the paper says, and where
    cases: dict[str, Any] = field(default_factory=dict)  # name -> the settings it changes; each runs as an experiment
    case: str | None = None  # the case to run; None: all, one after another
    tag: str | None = None  # ends the name of the experiment's folder, so that other settings do not meet its runs
    seed: int = 0
    limit: int | None = None  # a trial on so many images, 100 or more: two epochs, in a folder of its own
    # A list of names, or one name (from a sweep).
    arms: Any = field(default_factory=lambda: [name for name, arm in ARMS.items() if arm.is_default])
    model: dict[str, Any] = field(default_factory=dict)  # the network that teacher and students have in common
    inception: dict[str, Any] = field(default_factory=dict)  # the size of the paper's network at this scale
    speedrun: dict[str, Any] = field(default_factory=dict)  # the size of the speed-run network at this scale
    teacher: dict[str, Any] = field(default_factory=dict)  # how the teacher differs from `model`
    students: dict[str, Any] = field(default_factory=dict)  # name of each student -> how it differs from `model`
    # Initial learning rate of each arm, as a multiple of schedule.lr.
    rates: dict[str, float] = field(default_factory=lambda: {name: arm.rate for name, arm in ARMS.items()})
    target: str = "random_init"  # steps are counted until an arm reaches the final holdout accuracy of this one
    data: Data = field(default_factory=Data)
    schedule: Schedule = field(default_factory=Schedule)
    growth: Growth = field(default_factory=Growth)
    scale: str = "???"
    device: str = "auto"  # auto, cpu, cuda
    precision: str = "auto"  # of a training step: float32, tf32, bfloat16; auto: bfloat16 if the hardware multiplies it
    layout: str = "auto"  # channels_last, contiguous; auto: contiguous with float32, else channels_last
    threads: int | None = None  # of the CPU; None: as many as torch takes. Small networks are fastest on one.
    compile: bool = False  # whether torch.compile makes the training step; takes minutes at the start
    logger: str = "wandb"  # wandb, none
    runs: str = "runs"  # folder in which runs are written
    checkpoint_seconds: float = 60.0  # a run that is killed loses at most this much training

    def __post_init__(self) -> None:
        self.arms = [str(arm) for arm in (self.arms if isinstance(self.arms, list) else [self.arms])]

    @property
    def name(self) -> str:
        """The experiment, with its case if it has one: the path of its seeds under `runs` and `results/curves`."""
        return place_of(self)


def place_of(config: Any) -> str:
    """Return where an experiment's runs are under `runs`: its name, its tag and its case."""
    name = config.experiment if config.tag is None else f"{config.experiment}-{config.tag}"
    return name if config.case is None else f"{name}/{config.case}"


def runs_of(config: Any) -> str:
    """Return the folder of the runs of a configuration that `shorten` has not seen yet: a trial has its own."""
    return config.runs if config.limit is None else f"{config.runs.rstrip('/')}-limit{config.limit}"


def shorten(config: Config) -> Config:
    """Return the configuration of a trial if `limit` is set: short stages, small batches, a folder of its own."""
    if config.limit is None:
        return config
    schedule = replace(config.schedule, evaluate="100%", batch_size=min(config.schedule.batch_size, config.limit // 10))
    for key in ("epochs", "teacher_epochs"):
        if getattr(schedule, key) is not None:
            schedule = replace(schedule, **{key: "2ep"})
    growth = replace(config.growth, calibrate=min(config.growth.calibrate, config.limit))
    return replace(config, schedule=schedule, growth=growth, runs=runs_of(config))


LENGTHS = ("epochs", "teacher_epochs", "evaluate")  # schedule durations of at least one step
FOLDER = re.compile(r"(?!seed\d)\w[\w.+-]*")  # valid names of folders beside those of the seeds
_DURATION = re.compile(r"^(\d+(?:\.\d*)?)(ep|it|%)$")


def steps(duration: str, steps_per_epoch: int, total: int | None = None) -> int:
    """Return the number of steps in a duration: a number followed by ep (epochs), it (steps) or % (of `total`)."""
    match = _DURATION.match(str(duration).strip())
    if match is None:
        raise ExperimentError(f"{duration!r} is no duration: write epochs as 5ep, steps as 500it.")
    number, unit = match.groups()
    if unit == "%" and total is None:
        raise ExperimentError(f"The duration {duration!r} is a share: write 5ep or 500it.")
    return round(float(number) * {"ep": steps_per_epoch, "it": 1, "%": (total or 0) / 100}[unit])


def check(config: Config) -> None:
    """Raise ExperimentError for a value that no run can have, before torch and the images are loaded."""
    if not config.arms:
        raise ExperimentError("arms is empty: name at least one, as in arms=[net2net].")
    if not config.students:
        raise ExperimentError(f"The experiment {config.experiment} names no students.")
    if config.tag is not None and not FOLDER.fullmatch(config.tag):
        raise ExperimentError(f"tag={config.tag} cannot end a folder's name: use letters, digits, dots and dashes.")
    for name, spec in config.students.items():
        if not isinstance(spec, Mapping):
            raise ExperimentError(f"students.{name}={spec} is no network: write what it changes, as in {{width: 1.0}}.")
        if not FOLDER.fullmatch(name) or name == TEACHER:
            raise ExperimentError(f"The student {name!r} cannot name a folder of its own: give it another name.")
    _check_words(config)
    _check_numbers(config)
    durations = {f"schedule.{key}": getattr(config.schedule, key) for key in LENGTHS}
    for key in ("decay", "teacher_decay"):
        if getattr(config.schedule, key) not in (None, *DECAYS):
            durations[f"schedule.{key}"] = getattr(config.schedule, key)
    durations |= {"schedule.warmup": config.schedule.warmup, "growth.warmup": config.growth.warmup}
    for key, duration in durations.items():
        try:
            whole = 10**9 if key.endswith(("warmup", "evaluate", "decay")) else None
            length = 1 if duration is None else steps(duration, 10**9, whole)
            if length < (not key.endswith("warmup")):
                raise ExperimentError("it has to be at least one step.")
            if str(duration).endswith("%") and length > 10**9:
                raise ExperimentError("a share of the training is at most 100%.")
        except ExperimentError as error:
            raise ExperimentError(f"{key} is {duration}: {error}") from error


def _check_words(config: Config) -> None:
    """Refuse words that are not among the choices of their setting."""
    words = [
        *(("arms", arm, ARMS) for arm in config.arms),
        *(("rates", arm, ARMS) for arm in config.rates),
        ("target", config.target, ARMS),
        ("growth.split", config.growth.split, SPLITS),
        ("growth.optimizer_state", config.growth.optimizer_state, STATES),
        ("logger", config.logger, LOGGERS),
        ("precision", config.precision, ("auto", *PRECISIONS)),
        ("layout", config.layout, ("auto", *LAYOUTS)),
    ]
    for key, word, choices in words:
        if word not in choices:
            raise ExperimentError(
                f"{key}: there is no {word!r}{nearest(word, choices)}. There are {', '.join(choices)}."
            )
    for arm in config.arms:
        if arm not in config.rates:
            raise ExperimentError(f"The arm {arm} has no rate: set rates.{arm}, a multiple of schedule.lr.")


def _check_numbers(config: Config) -> None:
    """Refuse numbers that are out of range."""
    schedule, data, growth = config.schedule, config.data, config.growth
    positive = {"schedule.lr": schedule.lr} | {f"rates.{arm}": rate for arm, rate in config.rates.items()}
    for key, number in positive.items():
        if not 0 < number < math.inf:
            raise ExperimentError(f"{key} is {number}: it has to be above 0.")
    smallest = {
        "seed": (config.seed, 0),
        "limit": (100 if config.limit is None else config.limit, 100),
        "threads": (1 if config.threads is None else config.threads, 1),
        "checkpoint_seconds": (config.checkpoint_seconds, 0),
        "schedule.batch_size": (schedule.batch_size, 2),  # batch norm needs two
        "schedule.momentum": (schedule.momentum, 0),
        "schedule.weight_decay": (schedule.weight_decay, 0),
        "schedule.bias_rate": (schedule.bias_rate, 0),
        "data.size": (data.size, 1),
        "data.pad": (data.pad, 0),
        "data.workers": (data.workers, 0),
        "growth.noise": (growth.noise, 0),
        "growth.calibrate": (growth.calibrate, 0),
        "growth.guide_temperature": (growth.guide_temperature, 0.01),
    }
    for key, (number, least) in smallest.items():
        if not least <= number < math.inf:
            limit = "finite" if number == math.inf else f"{least} or more"
            raise ExperimentError(f"{key} is {number}: it has to be {limit}.")
    if schedule.momentum >= 1:
        raise ExperimentError(f"schedule.momentum is {schedule.momentum}: it has to be below 1.")
    shares = {"schedule.label_smoothing": schedule.label_smoothing}
    shares |= {"growth.shrink": growth.shrink, "growth.guide_share": growth.guide_share}
    for key, share in shares.items():
        if not 0 <= share <= 1:
            raise ExperimentError(f"{key} is {share}: choose a share from 0 to 1.")
    if not 0 < data.holdout < 1:
        raise ExperimentError(f"data.holdout is {data.holdout}: choose a share between 0 and 1, for instance 0.1.")


def arm_folders(students: Iterable[str], arms: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """Return the folder of each arm to run, with the arm and its student's name (None for teacher_continued)."""
    names, result = list(students), {}
    for student in names:
        for arm in arms:
            if not ARMS[arm].has_student:
                result.setdefault(arm, (arm, None))
            else:
                result[arm if len(names) == 1 else f"{student}_{arm}"] = (arm, student)
    return result


def split_arm(label: str) -> tuple[str | None, str]:
    """Return (student, arm) of an arm's folder: `wider_net2net` is ("wider", "net2net"); `net2net` has no student."""
    for arm in (TEACHER, *ARMS):
        if label == arm:
            return None, arm
        if label.endswith(f"_{arm}"):
            return label.removesuffix(f"_{arm}"), arm
    return None, label


def ordered(labels: Iterable[str]) -> list[str]:
    """Return the labels in reading order: teacher, the arms of each student together, arms without a student."""
    return sorted(labels, key=_reading_order)


def _reading_order(label: str) -> tuple[bool, bool, str, int, str]:
    student, arm = split_arm(label)
    place = ARMS[arm].place if arm in ARMS else len(ARMS)
    return arm != TEACHER, student is None, student or "", place, label


def nearest(word: str, words: Iterable[str]) -> str:
    """Return a hint at the `words` that the word resembles, or an empty string; large and small letters are the same.

    It is the word itself, or else those that contain it, or else the most similar one.
    """
    small, known = word.casefold(), {one.casefold(): one for one in words}
    close = [known[small]] if small in known else [known[one] for one in known if small in one][: 3 * (len(small) > 2)]
    close = close or [known[one] for one in get_close_matches(small, known, n=1, cutoff=0.5)]
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as one with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        result |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return result
