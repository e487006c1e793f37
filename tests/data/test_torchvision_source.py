import socket
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from nkat_ray.data import spec, torchvision_source
from nkat_ray.data.dataset import Unavailable


def quiet(_):
    pass


@pytest.fixture
def server():
    """A local web server that answers HEAD with the status in its path."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(int(self.path.strip("/") or 200))
            self.end_headers()

        def log_message(self, *_):
            pass

    made = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}/"
    made.shutdown()
    made.server_close()


def test_answers(server, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert torchvision_source.answers(server + "200")
    assert torchvision_source.answers(server + "404")  # the host is there
    assert not torchvision_source.answers(server + "403")
    assert not torchvision_source.answers(server + "502")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert not torchvision_source.answers(f"http://127.0.0.1:{free.getsockname()[1]}/")


def test_a_host_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(torchvision_source, "PROBE_S", 0.2)
    monkeypatch.setattr(torchvision_source, "answers", lambda url: time.sleep(3) or True)
    start = time.monotonic()
    with pytest.raises(Unavailable, match="cannot be reached"):
        torchvision_source.fetch("emnist_letters", scratch=None, notice=quiet)
    assert time.monotonic() - start < 2


@pytest.mark.slow
@pytest.mark.parametrize("name", spec.KNOWN)
def test_addresses_are_those_of_torchvision(name):
    datasets = pytest.importorskip("torchvision.datasets")
    kind = getattr(datasets, torchvision_source._CLASSES[name])
    own = vars(kind)
    assert torchvision_source._urls(name) == (own["mirrors"] if "mirrors" in own else [own["url"]])


def test_an_unreachable_host_costs_no_import_of_torch(tmp_path):
    code = """if True:
        import sys
        from nkat_ray.data import torchvision_source as source
        source.answers = lambda url: False
        try:
            source.fetch("cifar10", scratch=None, notice=print)
        except source.Unavailable as error:
            print(error, "torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "torchvision's hosts cannot be reached from here False\n"


def idx_layout(root, folder, n=6):
    """The four files of the MNIST family, by hand."""
    place = root / folder
    place.mkdir(parents=True)
    for stem in ("train", "t10k"):
        images = bytes([0, 0, 8, 3]) + np.array([n, 28, 28], ">u4").tobytes() + bytes(range(n)) * (28 * 28)
        labels = bytes([0, 0, 8, 1]) + np.array([n], ">u4").tobytes() + bytes(range(n))
        (place / f"{stem}-images-idx3-ubyte").write_bytes(images)
        (place / f"{stem}-labels-idx1-ubyte").write_bytes(labels)


def test_download(tmp_path, monkeypatch):
    seen = []

    class MNIST:
        mirrors = ("a", "b")

        def __init__(self, root, download):
            seen.append((type(self).__name__, self.mirrors, download, socket.getdefaulttimeout()))
            print("a progress bar", file=sys.stderr)
            idx_layout(Path(root), "MNIST/raw")

    fake = types.SimpleNamespace(datasets=types.SimpleNamespace(MNIST=MNIST))
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    monkeypatch.setattr(torchvision_source, "_urls", lambda name: ["a", "b"])
    monkeypatch.setattr(torchvision_source, "answers", lambda url: url == "b")
    pair = torchvision_source.fetch("mnist", scratch=tmp_path, notice=quiet)
    assert seen == [("MNIST", ["b"], True, torchvision_source.STALL_S)]
    assert (pair.source, pair.train.labels.tolist()) == (spec.TORCHVISION, list(range(6)))
    assert socket.getdefaulttimeout() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("Dataset not found or corrupted."), OSError("timed out")])
def test_a_download_that_fails(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(torchvision_source, "_download", fail)
    monkeypatch.setattr(torchvision_source, "answers", lambda url: True)
    with pytest.raises(Unavailable, match=str(error)):
        torchvision_source.fetch("mnist", scratch=tmp_path, notice=quiet)


def test_no_torchvision(monkeypatch):
    monkeypatch.setattr(torchvision_source.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="not installed"):
        torchvision_source.fetch("mnist", scratch=None, notice=quiet)
