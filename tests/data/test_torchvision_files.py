import gzip
import hashlib
import pickle
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from nkat_ray.data import DataError, Split, spec, torchvision_files
from nkat_ray.data.cache import Memory
from nkat_ray.data.dataset import Unavailable
from nkat_ray.data.folder import open_folder
from nkat_ray.data.parquet import open_shards
from nkat_ray.data.torchvision_files import file_names, open_torchvision, place


def decoded_file(path):
    layout = open_shards({"train": (path,)})
    return layout.load("train", layout.shape())


def random_split(n, channels=1, size=28, classes=10, seed=0):
    generator = np.random.default_rng(seed)
    images = generator.integers(256, size=(n, channels, size, size), dtype=np.uint8)
    return Split(images, generator.integers(classes, size=n))


def write_idx(root, name, split, data, *, packed=False):
    """As torchvision stores them: EMNIST letters transposed, with labels from 1."""
    letters = name == "emnist_letters"
    images = data.images[:, 0].transpose(0, 2, 1) if letters else data.images[:, 0]
    arrays = np.ascontiguousarray(images), (data.labels + letters).astype(np.uint8)
    folder = root / place(name)
    folder.mkdir(parents=True, exist_ok=True)
    names = file_names(name)[:2] if split == "train" else file_names(name)[2:]
    for file, array in zip(names, arrays, strict=True):
        content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
        (folder / (f"{file}.gz" if packed else file)).write_bytes(gzip.compress(content) if packed else content)


def write_both(root, name, *, packed=False):
    pairs = {"train": random_split(12), "test": random_split(7, seed=1)}
    for split, data in pairs.items():
        write_idx(root, name, split, data, packed=packed)
    return pairs


@pytest.fixture
def memory(own_cache):
    return Memory(own_cache)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "emnist_letters"])
def test_idx_files(tmp_path, memory, name, packed):
    pairs = write_both(tmp_path, name, packed=packed)
    found = open_folder(name, tmp_path, memory)
    assert (found.sizes, found.verified, found.grey) == ({"train": 12, "test": 7}, False, True)
    assert found.classes == (26 if name == "emnist_letters" else 10)
    assert found.source.endswith("(torchvision's layout), unverified")
    for split, data in pairs.items():
        np.testing.assert_array_equal(found.load(split).images, data.images)
        np.testing.assert_array_equal(found.load(split).labels, data.labels)
        np.testing.assert_array_equal(found.labels(split), data.labels)
    np.testing.assert_array_equal(found.load("train", np.array([4, 2])).images, pairs["train"].images[[4, 2]])


def test_real_letters_come_out_upright(real_dir, tmp_path):
    whole = decoded_file(real_dir / "emnist_letters-test.parquet")
    write_idx(tmp_path, "emnist_letters", "test", whole)
    write_idx(tmp_path, "emnist_letters", "train", whole)
    read = open_torchvision("emnist_letters", tmp_path).load("test", (1, 28, 28))
    np.testing.assert_array_equal(read.images, whole.images)
    np.testing.assert_array_equal(read.labels, whole.labels)


def test_real_mnist_is_verified(real_dir, tmp_path, memory):
    for split in ("train", "test"):
        write_idx(tmp_path, "mnist", split, decoded_file(real_dir / f"mnist-{split}.parquet"))
    found = open_folder("mnist", tmp_path, memory)
    assert found.verified
    assert found.digest == open_folder("mnist", real_dir, memory).digest
    path = tmp_path / "MNIST/raw/t10k-images-idx3-ubyte"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"its test split claims to be mnist \(10000 .*, but its digest is .* expected"):
        open_folder("mnist", tmp_path, memory)


def test_one_file_of_four_missing(tmp_path, memory):
    write_both(tmp_path, "mnist")
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="lacks t10k-labels-idx1-ubyte; download the dataset again"):
        open_folder("mnist", tmp_path, memory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-5], "is damaged"),
        (lambda data: data[:6], "is damaged"),
        (lambda data: b"", "is damaged"),
        (lambda data: b"\0\0\x0d" + data[3:], "is damaged"),
        (lambda data: b"\0\0\x0a" + data[3:], "is damaged"),
    ],
)
def test_damaged_idx(tmp_path, memory, change, message):
    write_both(tmp_path, "mnist")
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        open_folder("mnist", tmp_path, memory)


def test_damaged_gzip(tmp_path, memory):
    write_both(tmp_path, "mnist", packed=True)
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="MNIST/raw is damaged"):
        open_folder("mnist", tmp_path, memory)


def test_gzip_bomb(tmp_path, memory, monkeypatch):
    write_both(tmp_path, "mnist", packed=True)
    monkeypatch.setattr(torchvision_files, "_MAX_BYTES", 1000)
    with pytest.raises(DataError, match="unpacks to more than 1000"):
        open_folder("mnist", tmp_path, memory)


def test_a_checked_folder_is_opened_again_without_torch(tmp_path, memory, monkeypatch):
    write_both(tmp_path, "mnist")
    found = open_folder("mnist", tmp_path, memory)
    monkeypatch.setattr(torchvision_files, "_open", None)
    assert open_folder("mnist", tmp_path, memory) == found


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Split(np.zeros((3, 1, 28, 28), np.uint8), np.array([0, 1, 10])), r"train labels 0\.\.10; allowed: 0\.\.9"),
        (Split(np.zeros((3, 1, 28, 28), np.uint8), np.array([0, 1])), "need as many, at least one"),
        (Split(np.zeros((2, 1, 20, 28), np.uint8), np.array([0, 1])), r"\(2, 1, 20, 28\)"),
    ],
)
def test_inconsistent_idx(tmp_path, memory, data, message):
    write_both(tmp_path, "mnist")
    write_idx(tmp_path, "mnist", "train", data)
    with pytest.raises(DataError, match=message):
        open_folder("mnist", tmp_path, memory)


def test_letters_labelled_from_zero_are_refused(tmp_path, memory):
    write_both(tmp_path, "emnist_letters")
    write_idx(tmp_path, "emnist_letters", "train", Split(np.zeros((2, 1, 28, 28), np.uint8), np.array([-1, 3])))
    with pytest.raises(DataError, match=r"train labels -1\.\.3"):
        open_folder("emnist_letters", tmp_path, memory)


def cifar_batches(root, monkeypatch):
    """Six small batches as the originals are pickled, which torchvision takes for the official ones."""
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    expected, known = {"train": [], "test": []}, {"train": [], "test": []}
    for number, file in enumerate(file_names("cifar10")):
        data = random_split(4, channels=3, size=32, seed=number)
        batch = {"data": data.images.reshape(4, -1), "labels": data.labels.tolist(), "label_names": ["a", "b"]}
        (folder / file).write_bytes(pickle.dumps(batch, protocol=2))
        split = "train" if file.startswith("data") else "test"
        if file != "batches.meta":
            known[split].append([file, md5(folder / file)])
            expected[split].append(data)
    monkeypatch.setattr(CIFAR10, "train_list", known["train"])
    monkeypatch.setattr(CIFAR10, "test_list", known["test"])
    monkeypatch.setitem(CIFAR10.meta, "md5", md5(folder / "batches.meta"))
    return expected


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_cifar10(tmp_path, memory, monkeypatch):
    expected = cifar_batches(tmp_path, monkeypatch)
    found = open_folder("cifar10", tmp_path, memory)
    assert (found.sizes, found.flip, found.grey) == ({"train": 20, "test": 4}, True, False)
    for split, batches in expected.items():
        np.testing.assert_array_equal(found.load(split).images, np.concatenate([batch.images for batch in batches]))
        np.testing.assert_array_equal(found.labels(split), np.concatenate([batch.labels for batch in batches]))


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_an_unknown_pickle_is_never_opened(tmp_path, memory, monkeypatch):
    cifar_batches(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps(Trap(str(tmp_path / "opened"))))
    with pytest.raises(DataError, match=r"cifar-10-batches-py is damaged; torchvision says: .*: data_batch_3"):
        open_folder("cifar10", tmp_path, memory)
    assert not (tmp_path / "opened").exists()


def test_places_are_torchvisions():
    from torchvision import datasets

    assert datasets.CIFAR10.base_folder == place("cifar10")
    names = [name for name, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list]
    assert file_names("cifar10") == [*names, datasets.CIFAR10.meta["filename"]]
    for name in ("mnist", "fashion_mnist"):
        kind = getattr(datasets, torchvision_files.CLASSES[name])
        assert [f"{file}.gz" for file in file_names(name)] == [file for file, _ in kind.resources]
    assert set(torchvision_files.CLASSES) == set(spec.KNOWN)


# --- download --------------------------------------------------------------------------------------------------------


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
    assert torchvision_files.answers(server + "200")
    assert torchvision_files.answers(server + "404")  # the host is there
    assert not torchvision_files.answers(server + "403")
    assert not torchvision_files.answers(server + "502")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert not torchvision_files.answers(f"http://127.0.0.1:{free.getsockname()[1]}/")


def test_a_host_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(torchvision_files, "PROBE_S", 0.2)
    monkeypatch.setattr(torchvision_files, "answers", lambda url: time.sleep(3) or True)
    start = time.monotonic()
    with pytest.raises(Unavailable, match="cannot be reached"):
        torchvision_files.fetch("emnist_letters", scratch=None, notice=quiet)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("name", spec.KNOWN)
def test_addresses_are_those_of_torchvision(name):
    urls = torchvision_files._urls(name)
    assert urls
    assert all(url.startswith("http") for url in urls)


def test_download(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    seen = []

    def download(self):
        seen.append((type(self).__name__, self.mirrors, socket.getdefaulttimeout()))
        print("a progress bar", file=sys.stderr)
        write_both(Path(self.root), "mnist")

    monkeypatch.setattr(MNIST, "download", download)
    monkeypatch.setattr(torchvision_files, "_urls", lambda name: ["a", "b"])
    monkeypatch.setattr(torchvision_files, "answers", lambda url: url == "b")
    pair = torchvision_files.fetch("mnist", scratch=tmp_path, notice=quiet)
    assert seen == [("MNIST", ["b"], torchvision_files.STALL_S)]
    assert (pair.source, len(pair.splits["train"]), len(pair.splits["test"])) == (spec.TORCHVISION, 12, 7)
    assert socket.getdefaulttimeout() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("Dataset not found or corrupted."), OSError("timed out")])
def test_a_download_that_fails(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torchvision_files, "_open", fail)
    monkeypatch.setattr(torchvision_files, "answers", lambda url: True)
    with pytest.raises(Unavailable, match=str(error)):
        torchvision_files.fetch("mnist", scratch=tmp_path, notice=quiet)
