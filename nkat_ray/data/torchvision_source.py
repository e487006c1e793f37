"""Torchvision's own download, into a temporary folder.

Importing torchvision loads torch, which takes many seconds; so the addresses are first read from its source text, and
it is imported only when a host has answered.
"""

import ast
import contextlib
import importlib.util
import io
import socket
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from nkat_ray.data.dataset import DataError, Pair, Unavailable, first_line
from nkat_ray.data.spec import KNOWN, TORCHVISION
from nkat_ray.data.torchvision_layout import TorchvisionReader

PROBE_S: Final = 6.0  # for a host's first answer, name look-up included
STALL_S: Final = 30.0  # without a byte, during a download
_CLASSES: Final = {"cifar10": "CIFAR10", "mnist": "MNIST", "fashion_mnist": "FashionMNIST", "emnist_letters": "EMNIST"}


def fetch(name: str, *, scratch: Path, notice: Callable[[str], None]) -> Pair:
    """Both splits of a known dataset by torchvision's download; torchvision checks the archives' MD5.

    Raises:
        Unavailable: torchvision is not installed, no host answers, or the download failed.
    """
    url = _reachable(_urls(name))
    notice(f"{name}: downloading with torchvision")
    with tempfile.TemporaryDirectory(dir=scratch, prefix=f".{name}-") as folder:
        try:
            with contextlib.redirect_stderr(io.StringIO()), _socket_timeout(STALL_S):  # the progress bar is not ours
                _download(_CLASSES[name], folder, url)
            reader = TorchvisionReader(Path(folder), name)
            return Pair(reader.load("train"), reader.load("test"), KNOWN[name].class_names, TORCHVISION)
        except (OSError, RuntimeError, DataError) as error:
            raise Unavailable(f"torchvision's download failed ({first_line(error)})") from error


def _urls(name: str) -> list[str]:
    """Where torchvision would download from: the `mirrors` or the `url` of its class, read without importing it.

    Raises:
        Unavailable: torchvision is not installed, or its source is not as expected.
    """
    package = importlib.util.find_spec("torchvision")  # finds, does not import
    if package is None or package.origin is None:
        raise Unavailable("torchvision is not installed")
    source = Path(package.origin).parent / "datasets" / ("cifar.py" if name == "cifar10" else "mnist.py")
    try:
        classes = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)]
        body = next(node.body for node in classes if node.name == _CLASSES[name])
        fields = {
            target.id: node.value
            for node in body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        value = ast.literal_eval(fields["mirrors"] if "mirrors" in fields else fields["url"])
    except (OSError, SyntaxError, ValueError, StopIteration, KeyError) as error:
        raise Unavailable(f"torchvision's addresses were not found in {source}") from error
    return [value] if isinstance(value, str) else list(value)


def _download(kind: str, folder: str, url: str) -> None:
    from torchvision import datasets  # late: it loads torch

    dataset: Any = getattr(datasets, kind)
    if "mirrors" in vars(dataset):  # only the one that answered, as another could hang; the name becomes the folder's
        dataset = type(kind, (dataset,), {"mirrors": [url]})
    dataset(folder, download=True, **({"split": "letters"} if kind == "EMNIST" else {}))


def _reachable(urls: list[str]) -> str:
    """The first URL whose host answers at all within PROBE_S, all asked at once.

    Raises:
        Unavailable: none does.
    """
    answered: dict[str, bool] = {}

    def ask(url: str) -> None:
        answered[url] = answers(url)

    threads = [threading.Thread(target=ask, args=(url,), daemon=True) for url in urls]  # daemons: never waited for
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PROBE_S)
    for url in urls:
        if answered.get(url):
            return url
    raise Unavailable("torchvision's hosts cannot be reached from here")


def answers(url: str) -> bool:
    """Whether the host (or a proxy on the way) answers; threads bound the name look-up too."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_S).close()
    except urllib.error.HTTPError as error:
        return error.code < 500 and error.code != 403 and error.code != 407  # a refusal by a proxy is no answer
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Torchvision opens its connections without a timeout; this bounds a stall."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
