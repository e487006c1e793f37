from pathlib import Path

import pytest

from nkat_ray.data import spec
from nkat_ray.data.digests import cifar_sha1, content_sha256, file_sha256, idx_md5
from nkat_ray.data.parquet import pair_path, read_header, read_split

FAMILY = ["mnist", "fashion_mnist"]


def decoded(folder: Path, name, split):
    return read_split(read_header(pair_path(folder, name, split)))


def test_flip_rule():
    assert {name: known.flip for name, known in spec.KNOWN.items()} == {
        "mnist": False,
        "fashion_mnist": True,
        "emnist_letters": False,
        "cifar10": True,
    }


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", spec.KNOWN)
def test_files_are_the_known_ones(real_dir, name, split):
    assert file_sha256(pair_path(real_dir, name, split)) == spec.KNOWN[name].release.files[split]
    header = read_header(pair_path(real_dir, name, split))
    assert header.source in spec.KNOWN[name].release.sources
    assert header.rows == spec.KNOWN[name].release.sizes[split]
    assert header.class_names == spec.KNOWN[name].class_names[: len(header.class_names)]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", FAMILY)
def test_known_content_has_the_official_digests(real_dir, name, split):
    images = decoded(real_dir, name, split)
    assert content_sha256(images) == spec.KNOWN[name].release.contents[split]
    assert idx_md5(images) == spec.OFFICIAL_IDX_MD5[name][split]


@pytest.mark.parametrize("split", ["test", pytest.param("train", marks=pytest.mark.slow)])
def test_known_cifar10_has_the_official_digests(real_dir, split):
    images = decoded(real_dir, "cifar10", split)
    assert content_sha256(images) == spec.KNOWN["cifar10"].release.contents[split]
    assert cifar_sha1(images) == spec.OFFICIAL_CIFAR_SHA1[split]


@pytest.mark.parametrize("split", ["train", "test"])
def test_known_letters(real_dir, split):
    known = spec.KNOWN["emnist_letters"].release.contents[split]
    assert content_sha256(decoded(real_dir, "emnist_letters", split)) == known
    assert spec.identify_content(known) == ("emnist_letters", split)


def test_claims():
    source = spec.KNOWN["mnist"].release.sources[0]
    assert spec.claimed_release(source, 60_000, "train") == "mnist"
    assert spec.claimed_release(source, 10_000, "test") == "mnist"
    assert spec.claimed_release(source, 10_000, "train") is None
    assert spec.claimed_release(spec.TORCHVISION, 60_000, "train") is None
    assert spec.claimed_release("mine", 60_000, "train") is None
