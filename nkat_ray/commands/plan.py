"""What a run would do and cost, without doing it: `--dry_run`."""

import dataclasses
import os
import time
from collections.abc import Collection
from typing import Any

from rich.table import Table

from nkat_ray.config import Choice, Domain, RunConfig
from nkat_ray.earlier import read_earlier
from nkat_ray.exit_codes import DONE
from nkat_ray.report.results import duration
from nkat_ray.report.terminal import Screen
from nkat_ray.search.resources import Cluster, cluster_of, epoch_flops, peak_bytes, slots, trial_share
from nkat_ray.search.space import baseline_point, corner_configs, domains, refuse_impossible, round1_point

CIFAR10_TRAINING_IMAGES = 50_000
PROBE_SIZE = 1024  # side of the matrices whose product tells how fast this machine is
PROBE_S = 0.5


def print_plan(run: RunConfig, fixed: Collection[str], screen: Screen) -> int:
    """Print the resolved configuration, what the trials will ask of the cluster and the estimated cost; exit code 0.

    Raises:
        ValueError: an impossible combination of typed and searched values.
    """
    refuse_impossible(run, fixed)
    space = domains(run, fixed)
    earlier = read_earlier(run, space)
    cluster = this_machine()
    shown = {name: value for name, value in dataclasses.asdict(run).items() if name != "own_space"}  # stands below
    first = {"trial 0 (baseline)": baseline_point(run, space), "trial 1 (Round-1's best)": round1_point(run, space)[0]}
    plan = {
        "configuration": shown,
        "searched": {name: describe_domain(domain) for name, domain in space.items()},
        "first trials": {name: _assignments(point) for name, point in first.items()},
        "cost": cost(run, fixed, cluster),
    }
    for title, rows in plan.items():
        screen.print(_table(title, rows))
    if earlier.notice:
        screen.print(earlier.notice, markup=False, highlight=False)
    screen.conclude(plan, [f"{name}: {text}" for name, text in plan["cost"].items()])
    return DONE


def cost(run: RunConfig, fixed: Collection[str], cluster: Cluster) -> dict[str, str]:
    """What a run would ask for and cost at most, line by line for people."""
    configs = corner_configs(run, fixed)
    images = run.train_images or CIFAR10_TRAINING_IMAGES - run.val_images
    flops = [epoch_flops(config, images) * run.epochs for config in configs]
    mean = sum(flops) / len(flops)
    shares = [trial_share(config, run, cluster) for config in configs]
    asked = sorted({f"{share.cpus} CPU + {share.gpus:g} GPU" for share in shares})
    memory = [peak_bytes(config) / 2**30 for config in configs]
    rate, at_a_time = measured_flops_per_s(), slots(run, cluster)
    return {
        "a trial asks for": " or ".join(asked),
        "trials at a time": f"{at_a_time} on this machine ({cluster.cpus} CPU, {cluster.gpus:g} GPU)",
        "memory a trial": f"about {min(memory):.1f} to {max(memory):.1f} GiB (a batch is split where it does not fit)",
        "a whole trial": f"{min(flops) / 1e15:.3g} to {max(flops) / 1e15:.3g} PFLOP",
        "Stage 1 at most": (
            f"{run.num_samples} trials x {run.epochs} epochs, about {run.num_samples * mean / 1e15:.3g} PFLOP: "
            f"{duration(run.num_samples * mean / rate)} at the {rate / 1e9:.0f} GFLOP/s measured here; ASHA and the "
            "gate stop most trials earlier"
        ),
        "limit on Stage 1": "none" if run.stage1_hours is None else f"it ends after {run.stage1_hours:g} hours",
    }


def this_machine() -> Cluster:
    """This machine as a cluster of one, without starting Ray."""
    import torch

    gpus = torch.cuda.device_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    node = {"Alive": True, "Resources": {"CPU": os.cpu_count() or 1, "GPU": gpus, "memory": memory}}
    return cluster_of([node], gpu_bytes=torch.cuda.mem_get_info()[1] if gpus else None)


def measured_flops_per_s() -> float:
    """Floating-point operations a second of this machine in matrix products, float32: an upper bound for a training."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrix = torch.randn(PROBE_SIZE, PROBE_SIZE, device=device)
    products, clock = 0, time.perf_counter()
    while time.perf_counter() - clock < PROBE_S:
        float((matrix @ matrix)[0, 0])  # waits for the device
        products += 1
    return 2 * PROBE_SIZE**3 * products / (time.perf_counter() - clock)


def describe_domain(domain: Domain) -> str:
    """A search domain for people."""
    if isinstance(domain, Choice):
        return ", ".join("off" if value is None else str(value) for value in domain.values)
    step = "" if domain.step is None else f", step {domain.step}"
    return f"{domain.low:g} to {domain.high:g}{step}{', log' if domain.log else ''}"


def _assignments(point: dict[str, Any]) -> str:
    return ", ".join(f"{name} {'off' if value is None else value}" for name, value in point.items())


def _table(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, "off" if value is None else str(value))
    return table
