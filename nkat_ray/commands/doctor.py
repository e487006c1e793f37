"""`nkat doctor`: checks of a machine or a cluster before time and money are spent; exit code 0, or 5 for a fault."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nkat_ray.config import STAGE1_DATASET, DataConfig, default_storage_path
from nkat_ray.data import DataError
from nkat_ray.data.catalogue import dataset_table
from nkat_ray.exit_codes import DONE, UNHEALTHY
from nkat_ray.metrics import STAGE2_DATASETS

if TYPE_CHECKING:
    from nkat_ray.search.nodes import NodeFacts  # loads Ray; a wrong flag is refused without it

LEAST_DISK_BYTES = 5 * 10**9  # Ray begins to refuse work at 95 % full; checkpoints and spilled objects need room
LEAST_STORE_BYTES = 2**28  # Stage 1's images (150 MB for CIFAR-10) must fit, or they are spilled and read back
MOST_SKEW_S = 1.0  # TLS and S3 tolerate minutes, but curves of different nodes are laid over each other
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(DataConfig):
    """Check Python, packages, GPUs, storage, data, disks, clocks and access on every node; exit code 0 or 5."""

    address: str | None = None
    """Ray: an address, `auto` or `local`. Default: as a run would choose it."""
    storage_path: str = dataclasses.field(default_factory=default_storage_path)
    """Folder, or bucket URI, that every node must write. Default: $NKAT_STORAGE_PATH, else ./runs."""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    ok: bool
    detail: str
    """What was found; where it is a fault, on which node and what to do."""


def doctor(config: DoctorConfig, console: Console) -> int:
    """Check and print the table; returns the exit code.

    Raises:
        ConnectionError: there is no cluster at the address.
    """
    from nkat_ray.search.cluster import choose_address, connected
    from nkat_ray.search.nodes import node_facts

    with connected(config.address) as where:
        facts = node_facts(config.storage_path)
    cluster = choose_address(config.address)[0] != "local" or len(facts) > 1
    checks = [*check_nodes(facts, config.storage_path, cluster=cluster), check_data(config)]
    console.print(f"{where}: {len(facts)} node{'s' if len(facts) > 1 else ''}", markup=False, highlight=False)
    console.print(_table(checks))
    faults = sum(not check.ok for check in checks)
    if cluster:
        console.print("nodes that start on demand were not checked: repeat it while some are there", style="yellow")
    console.print(f"{faults} of {len(checks)} checks failed" if faults else "no fault found", highlight=False)
    return UNHEALTHY if faults else DONE


def check_nodes(facts: Sequence["NodeFacts"], storage_path: str, *, cluster: bool) -> list[Check]:
    """All checks of nodes; only those that answered are compared with each other."""
    heard = [node for node in facts if node.error is None]
    checks = [check_answers(facts)]
    if heard:
        checks += [
            check_python(heard), check_packages(heard), check_gpus(heard), check_storage(heard, storage_path),
            check_disk(heard), check_store(heard), check_clocks(heard), check_token(heard, cluster=cluster),
            check_dashboard(heard),
        ]  # fmt: skip
    return checks


def check_answers(facts: Sequence["NodeFacts"]) -> Check:
    """Every node runs this package."""
    return _each(
        "nodes", facts, lambda node: node.error and f"{node.error}; install the project there",
        f"{len(facts)} answered",
    )  # fmt: skip


def check_python(facts: Sequence["NodeFacts"]) -> Check:
    """One Python everywhere, to the last digit: Ray refuses others."""
    return _same("Python", {node.name: node.python for node in facts})


def check_packages(facts: Sequence["NodeFacts"]) -> Check:
    """The same packages everywhere, and this package's own code."""
    differing = []
    for package, version in facts[0].versions:
        check = _same(package, {node.name: dict(node.versions).get(package, "-") for node in facts})
        missing = version == "-" and check.ok
        differing += [f"{package}: {'missing' if missing else check.detail}"] if missing or not check.ok else []
    shown = ", ".join(f"{package} {version}" for package, version in facts[0].versions)
    return Check("packages", not differing, "; ".join(differing) or shown)


def check_gpus(facts: Sequence["NodeFacts"]) -> Check:
    """What Ray hands out exists, and torch can use it."""

    def fault(node: "NodeFacts") -> str | None:
        if node.ray_gpus > len(node.gpu_bytes):
            return f"Ray hands out {node.ray_gpus:g} GPU, the NVIDIA driver shows {len(node.gpu_bytes)}"
        if node.gpu_bytes and not node.cuda:
            return "has a GPU, but torch without CUDA; install the CUDA build"
        return None

    sizes = [f"{size / GIB:.0f} GiB" for node in facts for size in node.gpu_bytes]
    counted = ", ".join(f"{sizes.count(size)} x {size}" for size in dict.fromkeys(sizes))
    return _each("GPUs", facts, fault, counted or "none: trials run on CPU cores")


def check_storage(facts: Sequence["NodeFacts"], storage_path: str) -> Check:
    """Every node can write the storage path, and it is the same place for all."""
    advice = "with several nodes give a shared folder or a bucket URI that all may write"
    name = f"storage {storage_path}"
    return _each(name, facts, lambda node: node.storage_error and f"{node.storage_error}; {advice}", "read and written")


def check_disk(facts: Sequence["NodeFacts"]) -> Check:
    """Room for checkpoints and spilled objects."""
    least = min(node.disk_bytes for node in facts)

    def fault(node: "NodeFacts") -> str | None:
        free = node.disk_bytes
        return f"{free / 1e9:.1f} GB free, {LEAST_DISK_BYTES / 1e9:.0f} GB needed" if free < LEAST_DISK_BYTES else None

    return _each("free disk", facts, fault, f"{least / 1e9:.0f} GB or more")


def check_store(facts: Sequence["NodeFacts"]) -> Check:
    """Room for the images and the survivors' weights in memory."""
    least = min(node.store_bytes for node in facts)

    def fault(node: "NodeFacts") -> str | None:
        size = node.store_bytes
        needed = f"{LEAST_STORE_BYTES / GIB:.2f} GiB needed; see `ray start --object-store-memory`"
        return f"{size / GIB:.2f} GiB, {needed}" if size < LEAST_STORE_BYTES else None

    return _each("object store", facts, fault, f"{least / GIB:.1f} GiB or more")


def check_clocks(facts: Sequence["NodeFacts"]) -> Check:
    """Clocks that agree."""

    def fault(node: "NodeFacts") -> str | None:
        return f"off by {node.skew_s:.1f} s or more; start chrony or ntpd there" if node.skew_s > MOST_SKEW_S else None

    return _each("clocks", facts, fault, f"within {MOST_SKEW_S:g} s")


def check_token(facts: Sequence["NodeFacts"], *, cluster: bool) -> Check:
    """A cluster asks for its token: whoever reaches Ray's ports runs what he likes."""
    if not cluster:
        return Check("token", True, "a local instance: not needed")
    advice = "asks for no token; set RAY_AUTH_MODE=token before `ray start` (docs/cluster.md)"
    return _each("token", facts, lambda node: None if node.token else advice, "asked for on every node")


def check_dashboard(facts: Sequence["NodeFacts"]) -> Check:
    """The dashboard, which starts jobs, listens on the loopback only."""

    def fault(node: "NodeFacts") -> str | None:
        addresses = ", ".join(node.dashboard)
        return f"is open on {addresses}; start Ray with --dashboard-host=127.0.0.1" if addresses else None

    return _each("dashboard", facts, fault, "not public")


def check_data(config: DataConfig) -> Check:
    """The datasets are there: Stage 1's must be, another one that is missing lowers Robustness."""
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
    """A check of every node by itself; the detail names the nodes at fault."""
    faults = [f"{node.name}: {said}" for node in facts if (said := fault(node))]
    return Check(name, not faults, "; ".join(faults) or otherwise)


def _same(name: str, values: dict[str, str]) -> Check:
    """A check that a value is the same on all nodes; the detail says who has which."""
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
