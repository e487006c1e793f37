import gzip
import hashlib
import pickle

import numpy as np
import pytest

from nkat_ray.data import DataError, Split, spec, torchvision_layout
from nkat_ray.data.cache import Memory
from nkat_ray.data.digests import idx_bytes
from nkat_ray.data.folder import open_folder
from nkat_ray.data.parquet import read_header, read_split
from nkat_ray.data.torchvision_layout import TorchvisionReader, idx_names, place


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
    for file, array in zip(idx_names(name, split), arrays, strict=True):
        content = idx_bytes(array)
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


@pytest.mark.slow
def test_the_idx_files_are_what_torchvision_reads(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    pairs = write_both(tmp_path, "mnist")
    theirs = torchvision.datasets.MNIST(tmp_path, train=False)
    np.testing.assert_array_equal(theirs.data.numpy(), pairs["test"].images[:, 0])


def test_real_letters_come_out_upright(real_dir, tmp_path):
    whole = read_split(read_header(real_dir / "emnist_letters-test.parquet"))
    write_idx(tmp_path, "emnist_letters", "test", whole)
    read = TorchvisionReader(tmp_path, "emnist_letters").load("test")
    np.testing.assert_array_equal(read.images, whole.images)
    np.testing.assert_array_equal(read.labels, whole.labels)


def test_real_mnist_is_verified(real_dir, tmp_path, memory):
    for split in ("train", "test"):
        write_idx(tmp_path, "mnist", split, read_split(read_header(real_dir / f"mnist-{split}.parquet")))
    found = open_folder("mnist", tmp_path, memory)
    assert found.verified
    assert found.digest == open_folder("mnist", real_dir, memory).digest
    path = tmp_path / "MNIST/raw/t10k-images-idx3-ubyte"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"is mnist by its size, but its test images have the digest .* expected"):
        open_folder("mnist", tmp_path, memory)


def test_one_file_of_four_missing(tmp_path, memory):
    write_both(tmp_path, "mnist")
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte is missing"):
        open_folder("mnist", tmp_path, memory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-5], "holds 9403 values, its header says 9408"),
        (lambda data: data[:6], "is no idx file"),
        (lambda data: b"", "is no idx file"),
        (lambda data: b"\0\0\x0d" + data[3:], "is no idx file"),
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
    with pytest.raises(DataError, match="cannot be read"):
        open_folder("mnist", tmp_path, memory)


def test_gzip_bomb(monkeypatch):
    monkeypatch.setattr(torchvision_layout, "_MAX_IDX_BYTES", 1000)
    with pytest.raises(OSError, match="more than 1000"):
        torchvision_layout.gunzip(gzip.compress(bytes(5000)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Split(np.zeros((3, 1, 28, 28), np.uint8), np.array([0, 1, 10])), r"labels 0\.\.10; allowed: 0\.\.9"),
        (Split(np.zeros((3, 1, 28, 28), np.uint8), np.array([0, 1])), "need as many"),
        (Split(np.zeros((2, 1, 20, 28), np.uint8), np.array([0, 1])), "20x28"),
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
    with pytest.raises(DataError, match=r"labels -1\.\.3"):
        open_folder("emnist_letters", tmp_path, memory)


def cifar_batches(root, monkeypatch):
    """Six small batches as the originals are pickled, taken for official."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    expected, known = {"train": [], "test": []}, {"train": {}, "test": {}}
    for split, files in torchvision_layout.CIFAR_MD5.items():
        for number, file in enumerate(files):
            data = random_split(4, channels=3, size=32, seed=number + 10 * (split == "test"))
            batch = {"data": data.images.reshape(4, -1), "labels": data.labels.tolist()}
            (folder / file).write_bytes(pickle.dumps(batch, protocol=2))
            known[split][file] = hashlib.md5((folder / file).read_bytes()).hexdigest()
            expected[split].append(data)
    monkeypatch.setattr(torchvision_layout, "CIFAR_MD5", known)
    return expected


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
    with pytest.raises(DataError, match=r"data_batch_3 has MD5 .* expected"):
        open_folder("cifar10", tmp_path, memory)
    assert not (tmp_path / "opened").exists()


@pytest.mark.slow
def test_cifar_digests_are_torchvisions():
    torchvision = pytest.importorskip("torchvision")
    assert dict(torchvision.datasets.CIFAR10.train_list) == torchvision_layout.CIFAR_MD5["train"]
    assert dict(torchvision.datasets.CIFAR10.test_list) == torchvision_layout.CIFAR_MD5["test"]
    assert torchvision.datasets.CIFAR10.base_folder == torchvision_layout.place("cifar10")
    assert set(spec.KNOWN) == {"cifar10", *torchvision_layout._IDX_FOLDER}
