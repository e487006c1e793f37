import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from nkat_ray.data import spec
from nkat_ray.data.digests import content_sha256, file_sha256
from nkat_ray.data.parquet import open_shards, pair_path

# Official digests of the original releases, in the order of their files.
CIFAR_SHA1 = {  # of each binary batch: a label byte and 3,072 planar bytes per image, 10,000 images per batch
    "train": [
        "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
        "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
        "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
        "aab85764eb3584312d3c7f65fd2fd016e36a258e",
        "26e2849e66a845b7f1e4614ae70f4889ae604628",
    ],
    "test": ["67eb016db431130d61cd03c7ad570b013799c88c"],
}
IDX_MD5 = {  # of the idx files, unpacked: images, labels
    ("mnist", "train"): ["6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624"],
    ("mnist", "test"): ["2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"],
    ("fashion_mnist", "train"): ["f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9"],
    ("fashion_mnist", "test"): ["8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965"],
}


def decoded_file(path):
    layout = open_shards({"train": (path,)})
    return layout.load("train", layout.shape())


def decoded(folder: Path, name, split):
    return decoded_file(pair_path(folder, name, split))


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
    layout = open_shards({"train": (pair_path(real_dir, name, split),)})
    assert layout.source in spec.KNOWN[name].release.sources
    assert layout.size("train") == spec.KNOWN[name].release.sizes[split]
    assert layout.class_names == spec.KNOWN[name].class_names[: len(layout.class_names)]


@pytest.mark.parametrize(("name", "split"), IDX_MD5)
def test_known_content_has_the_official_digests(real_dir, name, split):
    images = decoded(real_dir, name, split)
    assert content_sha256(images) == spec.KNOWN[name].release.contents[split]
    found = []
    for array in (images.images[:, 0], images.labels.astype(np.uint8)):
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        found.append(hashlib.md5(header + array.tobytes()).hexdigest())
    assert found == IDX_MD5[name, split]


@pytest.mark.parametrize("split", ["test", pytest.param("train", marks=pytest.mark.slow)])
def test_known_cifar10_has_the_official_digests(real_dir, split):
    images = decoded(real_dir, "cifar10", split)
    assert content_sha256(images) == spec.KNOWN["cifar10"].release.contents[split]
    records = np.concatenate([images.labels.astype(np.uint8)[:, None], images.images.reshape(len(images), -1)], axis=1)
    batches = np.split(records, len(CIFAR_SHA1[split]))
    assert [hashlib.sha1(batch.tobytes()).hexdigest() for batch in batches] == CIFAR_SHA1[split]


@pytest.mark.parametrize("split", ["train", "test"])
def test_known_letters(real_dir, split):
    known = spec.KNOWN["emnist_letters"].release.contents[split]
    assert content_sha256(decoded(real_dir, "emnist_letters", split)) == known
    assert spec.identify_content(known) == ("emnist_letters", split)


def test_claims():
    source = spec.KNOWN["mnist"].release.sources[0]
    assert spec.claimed_release("mnist", source, 60_000, "train") == "mnist"
    assert spec.claimed_release("mine", source, 10_000, "test") == "mnist"
    assert spec.claimed_release("mnist", source, 10_000, "train") is None
    assert spec.claimed_release("mnist", spec.TORCHVISION, 60_000, "train") == "mnist"
    assert spec.claimed_release("mine", spec.TORCHVISION, 60_000, "train") is None
    assert spec.claimed_release("mnist", "mine", 60_000, "train") is None


@pytest.mark.parametrize(
    ("class_names", "classes", "channels", "expected"),
    [
        (spec.KNOWN["cifar10"].class_names, 10, 3, ["cifar10"]),
        ([name.upper() for name in spec.KNOWN["cifar10"].class_names], 10, None, ["cifar10"]),
        (spec.KNOWN["cifar10"].class_names, 10, 1, []),
        (["T - shirt / top", *spec.KNOWN["fashion_mnist"].class_names[1:9], "Ankle boot"], 10, 1, ["fashion_mnist"]),
        (list("ABCDEFGHIJKL"), 12, 1, ["emnist_letters"]),
        (["a", "b"], 2, 1, []),
        (list("0123456789"), 10, 3, []),  # house numbers, say
        (None, 10, 1, ["mnist", "fashion_mnist", "emnist_letters"]),
        (None, 10, 3, ["cifar10"]),
        (None, 47, 1, []),
    ],
)
def test_what_a_dataset_resembles(class_names, classes, channels, expected):
    assert spec.resembles(class_names, classes, channels) == expected
