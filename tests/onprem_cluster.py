"""Two machines for tests/test_ray_up_onprem.py, on one: each a set of namespaces with a real sshd. Run by the test.

All of it runs inside one outer `unshare --mount --net --pid --fork --kill-child`: its network is a bridge that leads
nowhere, its mounts are its own, and when its first process ends, so do all others. Inside, each machine has its own
network, mounts, host name and processes; what the machines share is the file system below them, as by NFS.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = "10.77.0.254"
ADDRESSES = {"n1": "10.77.0.1", "n2": "10.77.0.2"}  # the head, and the worker
HOME = Path("/run/home")  # of the user, here and on the machines: below a mount of their own, so each has another
SHARED = "/run/shared"
JOIN_S = 300.0  # until a machine's Ray is up, or a command of Ray's has ended
RUN_S = 900.0  # until a run has ended
END_S = 60.0  # until the last process has ended that was told to
USER = "ubuntu"  # the document's; it is another name of root here, which spares the permissions
RAY = re.compile(r"\bray::|/ray/|\braylet\b|gcs_server|tune_round2")
FLAGS = (  # few images, no trial with 256 tokens, and a gate that two epochs reach (an accuracy of 0.2)
    "--preset quick --num_samples 4 --epochs 2 --gate 0.15 --patch_size 4 --train_images 2000 "
    "--transfer_epochs 1 --transfer_images 500 --test_images 500"
)


def document() -> tuple[str, list[str]]:
    """What docs/cluster.md shows under "Machines of your own": the YAML, and the commands after it."""
    text = (ROOT / "docs/cluster.md").read_text()
    section = text[text.index("## Machines of your own") :]
    yaml, commands = re.findall(r"^```(?:yaml|bash)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[:2]
    return yaml, commands.splitlines()


def cluster_yaml(yaml: str) -> str:
    """The document's file with what a user edits; and one core a machine, since two of them share this one's."""
    edits = {
        "10.0.0.1 ": f"{ADDRESSES['n1']} ",
        "[10.0.0.2, 10.0.0.3]": f"[{ADDRESSES['n2']}]",
        "/mnt/shared/runs": SHARED,
        "ray start --head": "ray start --head --num-cpus=1",
        "ray start --address=$RAY_HEAD_IP:6379": "ray start --address=$RAY_HEAD_IP:6379 --num-cpus=1",
    }
    for old, new in edits.items():
        assert yaml.count(old) == 1, f"{old!r} is not once in the document"
        yaml = yaml.replace(old, new)
    return yaml


# --- a machine --------------------------------------------------------------------------------------------------------


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def own_folders(needed: Iterable[Path]) -> None:
    """A new /run and a new /tmp, into which what is needed of the old one is brought along."""
    mount("-t", "tmpfs", "tmpfs", "/run")
    kept = {Path(f"/run/kept/{n}"): path for n, path in enumerate(needed) if path.is_relative_to("/tmp")}
    for aside, path in kept.items():
        aside.mkdir(parents=True)
        mount("--bind", path, aside)
    mount("-t", "tmpfs", "tmpfs", "/tmp")
    for aside, path in kept.items():
        path.mkdir(parents=True, exist_ok=True)
        mount("--bind", aside, path)


def needed(folder: Path) -> list[Path]:
    """What every machine has at the same place: project, environment, its Python, the images, this test's files."""
    return [ROOT, Path(sys.prefix), Path(sys.base_prefix), Path(os.environ["NKAT_DATA_DIR"]).absolute(), folder]


@dataclass
class Machine:
    """One that runs: its first process, as seen from outside."""

    name: str
    init: int

    @classmethod
    def boot(cls, name: str, folder: Path) -> "Machine":
        """Start one and plug it into the bridge."""
        unshare = "unshare --mount --net --uts --pid --fork --kill-child --mount-proc".split()
        with (folder / f"{name}.log").open("a") as log:
            outer = subprocess.Popen(
                [*unshare, sys.executable, __file__, "machine", folder, name], stdout=log, stderr=log
            )
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        wait_for(lambda: bool(children.read_text()), 10)
        machine = cls(name, int(children.read_text()))
        wait_for(lambda: namespace(machine.init, "net") != namespace("self", "net"), 10)
        ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", machine.init)
        ip("link", "set", f"v{name}", "master", "br0", "up")
        return machine

    def commands(self) -> list[str]:
        """The command lines of its processes."""
        mine, found = namespace(self.init, "pid"), []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if namespace(process.name, "pid") == mine:
                    found.append((process / "cmdline").read_text().replace("\0", " ").strip())
            except OSError:
                continue  # it has ended
        return found

    def ray(self) -> list[str]:
        """Those of Ray, and of what runs on it."""
        return [command for command in self.commands() if RAY.search(command)]

    def joined(self) -> bool:
        """Whether Ray has been started there."""
        return any("raylet" in command for command in self.ray())

    def kill(self) -> None:
        """As if its plug were pulled: the kernel kills every process of the namespace with the first."""
        os.kill(self.init, signal.SIGKILL)


def namespace(process: int | str, kind: str) -> str:
    """Which namespace of a kind a process is in."""
    return str(Path(f"/proc/{process}/ns/{kind}").readlink())


def ip(*arguments: object) -> None:
    subprocess.run(["ip", *map(str, arguments)], check=True)


def run_machine(folder: Path, name: str) -> None:
    """Inside its namespaces: folders, network, then sshd, which is this process from then on."""
    own_folders(needed(folder))
    mount("-t", "tmpfs", "tmpfs", "/dev/shm")
    disk = folder / name  # it outlives a crash: what `ray up` has set up there is set up
    if not disk.exists():
        furnish(disk)
    for path in (HOME, Path(SHARED), Path("/run/sshd")):
        path.mkdir()
    mount("--bind", disk, HOME)
    mount("--bind", folder / "shared", SHARED)
    subprocess.run(["hostname", name], check=True)
    ip("link", "set", "lo", "up")
    wait_for(lambda: any(name == "eth0" for _, name in socket.if_nameindex()), 10)
    ip("addr", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
    ip("link", "set", "eth0", "up")
    ip("route", "add", "default", "via", LAUNCHER)
    options = {
        "HostKey": folder / "host_key", "AuthorizedKeysFile": folder / "key.pub",
        "PermitRootLogin": "yes", "StrictModes": "no", "UsePAM": "no", "PidFile": "none",
    }  # fmt: skip
    given = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    os.execv("/usr/sbin/sshd", ["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", *given])


def furnish(home: Path) -> None:
    """What the user has on a machine before `ray up`: the project with its environment, and settings of his own."""
    (home / "nkat-ray").mkdir(parents=True)
    for inside, target in (("tune_round2.py", ROOT / "tune_round2.py"), (".venv", sys.prefix)):
        (home / "nkat-ray" / inside).symlink_to(target)
    (home / ".bashrc").write_text(  # Ray's workers would starve beside other work
        f"export NKAT_DATA_DIR={os.environ['NKAT_DATA_DIR']} OMP_NUM_THREADS=1 RAY_worker_niceness=0\n"
    )


# --- the launcher -----------------------------------------------------------------------------------------------------


class Launcher:
    """The machine that `ray up` is typed on; its commands' outputs are files of the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seconds = folder, dict[str, float]()
        self.environment = {
            "HOME": str(HOME), "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0", "NKAT_DATA_DIR": os.environ["NKAT_DATA_DIR"], "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def start(self, name: str, command: str, **environment: str) -> subprocess.Popen[str]:
        """A line of the document or of our own, in a shell."""
        with (self.folder / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                ["bash", "-c", command], cwd=self.folder, env={**self.environment, **environment}, text=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def run(self, name: str, command: str, limit_s: float, **environment: str) -> int:
        """The same, to its end: the exit code."""
        with self.timed(name):
            return self.start(name, command, **environment).wait(timeout=limit_s)

    def timed(self, name: str) -> "Timed":
        return Timed(self.seconds, name)


class Timed:
    """How long a `with` block took, under a name."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name, self._start = seconds, name, time.monotonic()

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = round(time.monotonic() - self._start, 1)
        print(f"{self._name}: {self._seconds[self._name]} s", flush=True)


def wait_for(condition: Callable[[], bool], limit_s: float, process: subprocess.Popen[str] | None = None) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s:g} s"
        assert process is None or process.poll() is None, "the command has ended before"
        time.sleep(0.1)


def network() -> None:
    """The bridge, names without a name server, and a user; all for this namespace alone."""
    ip("link", "set", "lo", "up")
    ip("link", "add", "br0", "type", "bridge")
    ip("addr", "add", f"{LAUNCHER}/24", "dev", "br0")
    ip("link", "set", "br0", "up")
    names = [f"{address} {name}" for name, address in ADDRESSES.items()]
    replace("/etc/hosts", ["127.0.0.1 localhost", *names])
    if Path("/etc/resolv.conf").exists():
        replace("/etc/resolv.conf", [])
    users = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith(("root:", USER))]
    same = [f"{name}:x:0:0::{HOME}:/bin/bash" for name in ("root", USER)]  # ssh finds ~ here, and not by $HOME
    replace("/etc/passwd", [*same, *users])
    replace("/etc/shadow", [f"{USER}:*:20000::::::"])  # no password, but not locked, which sshd would refuse


def replace(path: str, lines: list[str]) -> None:
    """A file as these namespaces see it."""
    own = Path("/run/etc", path.lstrip("/"))
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("".join(f"{line}\n" for line in lines))
    mount("--bind", own, path)


def keys(folder: Path) -> None:
    """The user's key, the machines' host key; and two who are not of the cluster, one with a token of his own."""
    (HOME / ".ssh").mkdir(parents=True)
    for path in (HOME / ".ssh/id_ed25519", folder / "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    (folder / "key.pub").write_bytes((HOME / ".ssh/id_ed25519.pub").read_bytes())
    known = [f"{address} {(folder / 'host_key.pub').read_text()}" for address in ADDRESSES.values()]
    (HOME / ".ssh/known_hosts").write_text("".join(known))
    (folder / "stranger").mkdir()
    (folder / "forger/.ray").mkdir(parents=True)
    (folder / "forger/.ray/auth_token").write_text("1" * 64)


def events(folder: Path, run: str) -> list[dict[str, Any]]:
    """What a run's journal tells so far."""
    path = folder / "shared" / run / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def begun_on(folder: Path, run: str, node: str) -> int | None:
    """A trial that has reported from that node and has not ended."""
    found = events(folder, run)
    ended = {event["trial"] for event in found if event["event"] == "end"}
    reported = [event["trial"] for event in found if event["event"] == "result" and event["row"]["node"] == node]
    return next((trial for trial in reported if trial not in ended), None)


def scenario(folder: Path) -> None:
    """Everything from `ray up` to `ray down`; what was found goes into found.json."""
    yaml, commands = document()
    token, up, doctor, tune, down, stop = (line.replace("uv run ", "") for line in commands)
    own_folders(needed(folder))
    network()
    keys(folder)
    (folder / "shared").mkdir()
    (folder / "cluster-local.yaml").write_text(cluster_yaml(yaml))
    launcher = Launcher(folder)
    machines = {name: Machine.boot(name, folder) for name in ADDRESSES}
    found: dict[str, Any] = {"seconds": launcher.seconds}
    found["token"] = launcher.run("token", token, JOIN_S)
    found["up"] = launcher.run("up", f"{up} -y --no-config-cache", JOIN_S)
    found["interfaces"] = sorted(name for _, name in socket.if_nameindex())
    clients = strangers(launcher)
    with launcher.timed("join"):
        wait_for(machines["n2"].joined, JOIN_S)
    found["doctor"] = launcher.run("doctor", doctor, JOIN_S)
    found |= {name: client.wait(timeout=JOIN_S) for name, client in clients.items()}
    tune = tune.replace("--tmux ", "")  # so that the command ends with the run
    with launcher.timed("killed"):
        process = launcher.start("killed", with_flags(tune, f"{FLAGS} --name killed"))
        wait_for(lambda: begun_on(folder, "killed", "n2") is not None, RUN_S, process)
        found["orphan"] = begun_on(folder, "killed", "n2")
        machines["n2"].kill()
        wait_for(lambda: any(event["event"] == "stage1_done" for event in events(folder, "killed")), RUN_S, process)
        machines["n2"] = Machine.boot("n2", folder)
        found["killed"] = process.wait(timeout=RUN_S)
    with launcher.timed("rejoin"):  # nobody calls it: the head's autoscaler starts Ray there again
        wait_for(machines["n2"].joined, JOIN_S)
    found["whole"] = launcher.run("whole", with_flags(tune, f"{FLAGS} --name whole"), RUN_S)
    found["before"] = {name: machine.ray() for name, machine in machines.items()}
    found["down"] = launcher.run("down", f"{down} -y", JOIN_S)
    found["stop"] = launcher.run("stop", stop.replace("10.0.0.2 10.0.0.3", ADDRESSES["n2"]), JOIN_S)
    with contextlib.suppress(AssertionError), launcher.timed("end"):  # Ray waits 16 s for its processes, and no longer
        wait_for(lambda: not any(machine.ray() for machine in machines.values()), END_S)
    found["after"] = {name: machine.ray() for name, machine in machines.items()}
    (folder / "found.json").write_text(json.dumps(found))


def with_flags(command: str, flags: str) -> str:
    """The document's command with more flags for the program."""
    return command.replace("tune_round2.py", f"tune_round2.py {flags}")


def strangers(launcher: Launcher) -> dict[str, subprocess.Popen[str]]:
    """The program from outside the cluster, without a token and with a wrong one. Ray tries for a while."""
    python = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'tune_round2.py'))}"
    command = f"{python} --address {ADDRESSES['n1']}:6379 --preset quick --storage_path ~/runs"
    return {
        name: launcher.start(name, command, HOME=str(launcher.folder / name), RAY_AUTH_MODE=mode)
        for name, mode in (("stranger", "disabled"), ("forger", "token"))
    }


if __name__ == "__main__":
    if sys.argv[1] == "machine":
        run_machine(Path(sys.argv[2]), sys.argv[3])
    else:
        scenario(Path(sys.argv[1]))
