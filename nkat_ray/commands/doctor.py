"""`nkat doctor`: checks of a machine or a cluster before time and money are spent; exit code 0, or 5 for a fault."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

from rich.markup import escape
from rich.table import Table

from nkat_ray.config import STAGE1_DATASET, AutoFloat, DataConfig, ScreenConfig, default_storage_path
from nkat_ray.cost import GIB
from nkat_ray.data import DataError
from nkat_ray.data.catalogue import dataset_table
from nkat_ray.errors import DONE, UNHEALTHY, UserError, one_line
from nkat_ray.fields import Place, Range
from nkat_ray.flags import Program
from nkat_ray.metrics import STAGE2_DATASETS
from nkat_ray.record.storage import check_writable, is_uri, run_storage
from nkat_ray.report.terminal import Screen, screen_of

if TYPE_CHECKING:
    from nkat_ray.cluster.nodes import Disk, NodeFacts  # loads Ray; a wrong flag is refused without it

LEAST_DISK_BYTES: Final = 5 * 10**9  # for a run's files, and for what Ray spills
LEAST_SCRATCH_BYTES: Final = 10**9  # for checkpoints on their way to the storage path
RAYS_LEAST_FRACTION: Final = 0.05  # Ray refuses work where less than that is free
LEAST_STORE_BYTES: Final = 2**28  # Stage 1's images (150 MB for CIFAR-10) must fit, or they are spilled and read back
MOST_SKEW_S: Final = 1.0  # TLS and S3 tolerate minutes, but curves of different nodes are laid over each other


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(DataConfig, ScreenConfig):
    """Check Python, packages, GPUs, storage, data, disks, clocks and access on every node; exit code 0 or 5."""

    address: str | None = None
    """Ray cluster: HOST:PORT, auto or local. Default: as a run would choose it."""
    storage_path: Annotated[str, Place()] = dataclasses.field(default_factory=default_storage_path)
    """Folder, or bucket URI, that every node must write. Default: $NKAT_STORAGE_PATH, else ./runs."""
    gpus_per_trial: Annotated[AutoFloat, Range(ge=0, le=1)] = None
    """Share of a GPU per trial, as for a run. With 0 no GPU is tried."""


PROGRAM = Program(
    name="nkat doctor",
    config=DoctorConfig,
    summary="Check a machine or a cluster before a run: versions, GPUs, storage, data, disks, clocks, access.",
    examples=("nkat doctor", "nkat doctor --address auto --storage_path /mnt/shared/runs"),
)


def main(argv: Sequence[str]) -> int:
    """Check the machine or the cluster that the command line names."""
    config = PROGRAM.configured(argv)
    with screen_of(config) as screen:
        return doctor(config, screen)


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    ok: bool
    detail: str  # what was found; for a fault also the node and what to do


def doctor(config: DoctorConfig, screen: Screen) -> int:
    """Check what a run with these flags would use, print the table, and return the exit code.

    Raises:
        UserError: the address is of no allowed form.
    """
    from nkat_ray.cluster.address import choose_address
    from nkat_ray.cluster.connect import connected
    from nkat_ray.cluster.nodes import node_facts

    cluster = choose_address(config.address).value != "local"
    try:
        with connected(config.address) as where:
            facts = node_facts(config.storage_path, with_gpus=config.gpus_per_trial != 0)
    except (UserError, RuntimeError, OSError) as error:
        where, checks = "no Ray", [Check("Ray", False, one_line(error)), check_driver(config.storage_path)]
    else:
        where, cluster = f"{where}: {len(facts)} node{'s' if len(facts) > 1 else ''}", cluster or len(facts) > 1
        checks = check_nodes(facts, config.storage_path, cluster=cluster)
        checks += [check_driver(config.storage_path)] if is_uri(config.storage_path) else []
    checks.append(check_data(config))
    screen.print(where, markup=False, highlight=False)
    screen.print(_table(checks))
    faults = [check for check in checks if not check.ok]
    if cluster:
        screen.print("nodes that start on demand were not checked: repeat it while some are there", style="yellow")
    verdict = f"{len(faults)} of {len(checks)} checks failed" if faults else "no fault found"
    screen.print(verdict, highlight=False)
    document = {"ray": where, "faults": len(faults), "checks": [dataclasses.asdict(check) for check in checks]}
    screen.conclude(document, [*(f"{check.name}: {check.detail}" for check in faults), verdict])
    return UNHEALTHY if faults else DONE


def check_nodes(facts: Sequence["NodeFacts"], storage_path: str, *, cluster: bool) -> list[Check]:
    """Check all nodes; only those that answered are compared with each other."""
    heard = [node for node in facts if node.error is None]
    checks = [check_answers(facts)]
    if heard:
        checks += [
            check_python(heard), check_packages(heard), check_gpus(heard), check_storage(heard, storage_path),
            check_disk(heard), check_store(heard), check_clocks(heard), check_token(heard, cluster=cluster),
            check_dashboard(heard),
        ]  # fmt: skip
        checks += [check_mps(heard)] if any(node.gpus for node in heard) else []
    return checks


def check_answers(facts: Sequence["NodeFacts"]) -> Check:
    """Check that every node runs this package."""
    return _each(
        "nodes", facts, lambda node: node.error and f"{node.error}; install the project there",
        f"{len(facts)} answered",
    )  # fmt: skip


def check_python(facts: Sequence["NodeFacts"]) -> Check:
    """Check that Python is the same everywhere, to the last digit: Ray refuses others."""
    return _same("Python", {node.name: node.python for node in facts})


def check_packages(facts: Sequence["NodeFacts"]) -> Check:
    """Check that packages, and this package's own code, are the same everywhere."""
    differing = []
    for package, version in facts[0].versions:
        check = _same(package, {node.name: dict(node.versions).get(package, "-") for node in facts})
        missing = version == "-" and check.ok
        differing += [f"{package}: {'missing' if missing else check.detail}"] if missing or not check.ok else []
    shown = ", ".join(f"{package} {version}" for package, version in facts[0].versions)
    return Check("packages", not differing, "; ".join(differing) or shown)


def check_gpus(facts: Sequence["NodeFacts"]) -> Check:
    """Check that torch computes on every GPU that Ray offers."""

    def fault(node: "NodeFacts") -> str | None:
        faults = Counter(gpu.fault for gpu in node.gpus if gpu.fault)
        return "; ".join(f"{count} GPU: {text}" for text, count in faults.items()) or None

    kinds = Counter(
        f"{gpu.name or 'GPU'}, {gpu.memory_bytes / GIB:.0f} GiB{', busy' if gpu.busy else ''}"
        for node in facts
        for gpu in node.gpus
    )
    counted = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    hidden = [node.name for node in facts if node.driver_gpus and not node.ray_gpus]
    unused = f" (Ray offers none of the driver's on {', '.join(hidden)}; see CUDA_VISIBLE_DEVICES)" if hidden else ""
    untried = any(node.ray_gpus for node in facts)
    otherwise = counted or ("not tried" if untried else f"none: trials run on CPU cores{unused}")
    return _each("GPUs", facts, fault, otherwise)


def check_mps(facts: Sequence["NodeFacts"]) -> Check:
    """Say whether kernels of different trials on one GPU run side by side; either is fine."""
    off = [node.name for node in facts if node.gpus and not node.mps]
    advice = (
        "trials that share a GPU take turns; with NVIDIA's multi-process service (nvidia-cuda-mps-control -d, before "
        "`ray start`) their kernels run side by side"
    )
    return Check("MPS", True, f"off on {', '.join(off)}: {advice}" if off else "on")


def check_storage(facts: Sequence["NodeFacts"], storage_path: str) -> Check:
    """Check that every node can write the storage path, and that it is the same place for all."""
    advice = "with several nodes give a shared folder or a bucket URI that all may write"
    name = f"storage {storage_path}"
    return _each(name, facts, lambda node: node.storage_error and f"{node.storage_error}; {advice}", "read and written")


def check_disk(facts: Sequence["NodeFacts"]) -> Check:
    """Check for room where a run writes: its files, what Ray spills, checkpoints on their way."""

    def fault(node: "NodeFacts") -> str | None:
        said = [
            f"{disk.path} ({disk.purpose}) has {disk.free_bytes / 1e9:.1f} GB free, {needed / 1e9:.0f} GB needed"
            for disk in node.disks
            if disk.free_bytes < (needed := _needed(disk))
        ]
        return "; ".join(said) or None

    least = min(disk.free_bytes for node in facts for disk in node.disks)
    return _each("free disk", facts, fault, f"{least / 1e9:.0f} GB or more")


def _needed(disk: "Disk") -> float:
    if disk.purpose == "checkpoints":
        return LEAST_SCRATCH_BYTES
    return max(LEAST_DISK_BYTES, RAYS_LEAST_FRACTION * disk.total_bytes if disk.purpose.startswith("Ray") else 0)


def check_store(facts: Sequence["NodeFacts"]) -> Check:
    """Check for room in memory for the images and the survivors' weights."""
    least = min(node.store_bytes for node in facts)

    def fault(node: "NodeFacts") -> str | None:
        size = node.store_bytes
        needed = f"{LEAST_STORE_BYTES / GIB:.2f} GiB needed; see `ray start --object-store-memory`"
        return f"{size / GIB:.2f} GiB, {needed}" if size < LEAST_STORE_BYTES else None

    small = [
        f"{node.name}: /dev/shm has {node.shared_memory_bytes / GIB:.2g} GiB, so Ray keeps objects in files, which is "
        "slower; in a container give --shm-size"
        for node in facts
        if node.shared_memory_bytes is not None and node.shared_memory_bytes < node.store_bytes
    ]
    return _each("object store", facts, fault, "; ".join([f"{least / GIB:.1f} GiB or more", *small]))


def check_clocks(facts: Sequence["NodeFacts"]) -> Check:
    """Check that clocks agree."""

    def fault(node: "NodeFacts") -> str | None:
        return f"off by {node.skew_s:.1f} s or more; start chrony or ntpd there" if node.skew_s > MOST_SKEW_S else None

    return _each("clocks", facts, fault, f"within {MOST_SKEW_S:g} s")


def check_token(facts: Sequence["NodeFacts"], *, cluster: bool) -> Check:
    """Check that a cluster demands its token: without one, whoever reaches Ray's ports may run anything."""
    if not cluster:
        return Check("token", True, "a local instance: not needed")
    advice = "demands no token; set RAY_AUTH_MODE=token before `ray start` (docs/cluster.md)"
    return _each("token", facts, lambda node: None if node.token else advice, "demanded on every node")


def check_dashboard(facts: Sequence["NodeFacts"]) -> Check:
    """Check that the dashboard, which starts jobs, listens on the loopback only."""

    def fault(node: "NodeFacts") -> str | None:
        addresses = ", ".join(node.dashboard or ())
        return f"is open on {addresses}; start Ray with --dashboard-host=127.0.0.1" if addresses else None

    known = all(node.dashboard is not None for node in facts)
    return _each(
        "dashboard", facts, fault, "not public" if known else "not checked: this system does not list open ports"
    )


def check_driver(storage_path: str) -> Check:
    """Check that this machine can write a run's files, which are in the cache if the storage path is a bucket."""
    local = run_storage(storage_path, "run").local.parent
    try:
        check_writable(storage_path)
        check_writable(str(local))
    except UserError as error:
        return Check("driver", False, str(error))
    return Check("driver", True, f"{local} can be written")


def check_data(config: DataConfig) -> Check:
    """Check for the datasets: Stage 1's must be there, another one that is missing lowers Robustness."""
    if config.data == "synthetic":
        return Check("data", True, "generated")
    try:
        states = {row.name: row for row in dataset_table(config) if row.name in STAGE2_DATASETS}
    except DataError as error:
        return Check("data", False, str(error))
    damaged = [f"{name}: {row.where}" for name, row in states.items() if row.state == "damaged"]
    missing = [name for name in STAGE2_DATASETS if name not in states or states[name].state == "missing"]
    advice = "give --data_dir" if config.data_dir else "`nkat data fetch`, or give --data_dir"
    found = [f"missing: {', '.join(missing)}; {advice}"] if missing else []
    ok = not damaged and STAGE1_DATASET not in missing
    return Check("data", ok, "; ".join(damaged + found) or "all four datasets are there")


def _each(
    name: str, facts: Iterable["NodeFacts"], fault: Callable[["NodeFacts"], str | None], otherwise: str
) -> Check:  # fmt: skip
    """Check every node separately; the detail names the nodes with a fault."""
    faults = [f"{node.name}: {said}" for node in facts if (said := fault(node))]
    return Check(name, not faults, "; ".join(faults) or otherwise)


def _same(name: str, values: dict[str, str]) -> Check:
    """Check that a value is the same on all nodes; the detail says which node has which."""
    holders = defaultdict(list)
    for node, value in values.items():
        holders[value].append(node)
    if len(holders) == 1:
        return Check(name, True, next(iter(holders)))
    return Check(name, False, ", ".join(f"{value} on {' and '.join(nodes)}" for value, nodes in holders.items()))


def _table(checks: Sequence[Check]) -> Table:
    table = Table("check", "", "found")
    for check in checks:
        mark = "[green]ok[/]" if check.ok else "[bold red]fault[/]"
        table.add_row(escape(check.name), mark, escape(check.detail), style=None if check.ok else "bold")
    return table
