"""One local Ray instance for the whole session, real data where there are some, and a run small enough for seconds."""

import contextlib
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings

sys.path.insert(0, str(Path(__file__).parent))
pytest_plugins = ["fake_runs"]  # made-up run folders and a browser, for every room that reads a record

# Tiny networks gain nothing from a second thread, and on a busy machine OpenMP's threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 starves trials beside other work
REAL_DATA = os.environ.get("NKAT_DATA_DIR")  # read here: some tests take it out of the environment
settings.register_profile("nkat", deadline=None)  # a busy machine is no reason to fail
# One failure is enough to kill a mutant (benchmarks/mutation.md): nothing is shrunk, and every run draws the same.
settings.register_profile(
    "mutation", deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("nkat")


@pytest.fixture
def data_dir() -> Path:
    """Folder of the real Parquet files."""
    if not REAL_DATA:
        pytest.skip("NKAT_DATA_DIR is unset: no real data")
    return Path(REAL_DATA)


@pytest.fixture
def no_compiler() -> Iterator[None]:
    """Lets PyTorch find no C++ compiler."""
    import torch._inductor.config

    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}):
        yield


@pytest.fixture(scope="session")
def ray_settings() -> Iterator[None]:
    """What a run sets before Ray is imported; and no cluster that somebody else has named."""
    from nkat_ray.cluster import SETTINGS

    with pytest.MonkeyPatch.context() as patch:
        for key, value in SETTINGS.items():
            patch.setenv(key, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="session")
def ray_local(ray_settings: None) -> Iterator[Any]:
    """The session's only Ray instance: two CPUs, quiet, with the settings that a run has. Yields the module."""
    import ray

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=150 * 2**20,
    )  # fmt: skip
    try:
        yield ray
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def vault(ray_local: Any) -> Iterator[Any]:
    """A vault of the module's own."""
    from nkat_ray.search.vault import open_vault

    handle = open_vault(f"test-{uuid.uuid4().hex}")
    yield handle
    ray_local.kill(handle)


@pytest.fixture(scope="session")
def own_processes() -> Callable[[str], list[int]]:
    """Finds Ray's processes by the beginning of their title: those that this process's own Ray instance has started,
    since others may run Ray on this machine too."""

    def is_ours(process: int) -> bool:
        while process > 1 and process != os.getpid():  # a worker's parent is its node's raylet, whose parent is ours
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        return process == os.getpid()

    def find(title: str) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has just ended
                if path.read_bytes().startswith(title.encode()) and is_ours(int(path.parent.name)):
                    found.append(int(path.parent.name))
        return found

    return find


@pytest.fixture(scope="session")
def tiny_run() -> Callable[..., Any]:
    """Makes a RunConfig whose trials take seconds: one block of width 16, two epochs, no augmentation."""
    from nkat_ray.config import RunConfig

    def make(**changes: Any) -> RunConfig:
        fields: dict[str, Any] = dict(
            preset="quick", name="tiny", space="quick", num_samples=3, max_concurrent=1, gate=0.01, embed_dim=16,
            num_heads=2, depth=1, batch_size=32, epochs=2, warmup=1, grace=1, lr=2e-3, ema=0.9, mixup=0.0, cutmix=0.0,
            randaugment=None, cutout=None, val_images=40, max_failures=0,
        )  # fmt: skip
        return RunConfig(**{**fields, **changes})

    return make


@pytest.fixture(scope="session")
def tiny_fixed() -> tuple[str, ...]:
    """The parameters of the space `quick` that a tiny run keeps at its own values, as if the user had typed them."""
    return ("embed_dim", "depth", "patch_size")


@pytest.fixture(scope="session")
def tinted() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Makes images and labels; see `tinted_images`."""
    return tinted_images


@pytest.fixture(scope="session")
def tiny_data() -> Any:
    """200 tinted images as Stage 1 sees CIFAR-10: 160 to train on, 40 to validate."""
    from nkat_ray.data.selection import Selection
    from nkat_ray.search.trainable import Stage1Data

    images, labels = tinted_images(200)
    selection = Selection(images, labels, np.arange(160), np.arange(160, 200))
    return Stage1Data(name="cifar10", selection=selection, num_classes=10, grey=False, flip=True)


def tinted_images(n: int, *, channels: int = 3, size: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise in ten tints, a class each (learnable whatever is cropped or flipped), uint8 (n, channels, size, size)."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 120, size=(n, channels, size, size), dtype=np.uint8)
    labels = (np.arange(n) % 10).astype(np.int64)
    tints = labels[:, None] // 3 ** np.arange(channels) % 3  # three levels a channel, as the digits of the class
    return images + (45 * tints).astype(np.uint8)[:, :, None, None], labels
