import dataclasses
import hashlib
import os
import pickle
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from nkat_ray.data import DataError, Missing, parquet, spec
from nkat_ray.data.cache import Memory
from nkat_ray.data.digests import content_sha256, dataset_digest
from nkat_ray.data.folder import open_folder
from nkat_ray.data.parquet import open_shards


def decoded_file(path):
    layout = open_shards({"train": (path,)})
    return layout.load("train", layout.shape())


@pytest.fixture
def memory(own_cache):
    return Memory(own_cache)


def sums(place, *names):
    lines = [f"{hashlib.sha256((place / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (place / "SHA256SUMS").write_text("".join(lines))


def known_release(monkeypatch, place, name, source):
    """Make the pair in `place` the known release of `name`."""
    contents, sizes = {}, {}
    for split in ("train", "test"):
        decoded = decoded_file(place / f"{name}-{split}.parquet")
        contents[split], sizes[split] = content_sha256(decoded), len(decoded)
    release = spec.Release(sources=(source,), sizes=sizes, files={}, contents=contents)
    monkeypatch.setitem(spec.KNOWN, name, dataclasses.replace(spec.KNOWN[name], release=release))


def rewrite(path, change):
    """Write a file again with some columns or rows changed, its metadata kept."""
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)


def test_own_data_is_used_and_unverified(tmp_path, write_pair, memory):
    place = write_pair(tmp_path / "own", "pets")
    found = open_folder("pets", place, memory)
    assert (found.classes, found.class_names, found.grey, found.flip) == (2, ("cat", "dog"), False, True)
    assert (found.verified, found.sizes) == (False, {"train": 20, "test": 10})
    assert found.source.endswith("(a test), unverified")
    assert len(found.load("train")) == 20
    np.testing.assert_array_equal(found.labels("test"), found.load("test").labels)
    assert pickle.loads(pickle.dumps(found)) == found  # it travels to other processes
    expected = [content_sha256(found.load(split)) for split in ("train", "test")]
    assert found.digest == dataset_digest(*expected)


def test_absent(tmp_path, write_pair, memory):
    missing = open_folder("pets", write_pair(tmp_path / "own", "plants"), memory)
    assert "holds no pets; expected: pets-{train,test}.parquet, pets/train-00000-of-00001.parquet" in missing.reason
    (tmp_path / "empty").mkdir()
    assert "cifar-10-batches-py" in open_folder("cifar10", tmp_path / "empty", memory).reason


def test_no_folder(tmp_path, memory):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(DataError, match="does not exist or is no folder"):
            open_folder("cifar10", place, memory)


@pytest.mark.parametrize("gone", ["train", "test"])
def test_half_a_pair(tmp_path, write_pair, memory, gone):
    place = write_pair(tmp_path / "own", "pets")
    (place / f"pets-{gone}.parquet").unlink()
    with pytest.raises(DataError, match=f"split but none called {gone}"):
        open_folder("pets", place, memory)


def test_train_and_test_must_agree(tmp_path, write_pair, write_file, memory):
    place = write_pair(tmp_path / "own", "pets")
    write_file(place / "pets-test.parquet", metadata={"classes": "dog,cat"})
    with pytest.raises(DataError, match="differ in class_names"):
        open_folder("pets", place, memory)


def test_test_images_as_training_images(tmp_path, write_pair, memory):
    place = write_pair(tmp_path / "own", "pets")
    shutil.copy(place / "pets-test.parquet", place / "pets-train.parquet")
    with pytest.raises(DataError, match="train and test hold the same images"):
        open_folder("pets", place, memory)


def test_a_known_name_has_its_own_colour_and_flip_rule(tmp_path, write_pair, memory):
    with pytest.raises(DataError, match="has 3 channels; mnist has 1"):
        open_folder("mnist", write_pair(tmp_path / "own", "mnist"), memory)
    digits = write_pair(tmp_path / "digits", "mnist", shape="8,8", metadata={"flip": "true"})
    assert not open_folder("mnist", digits, memory).flip


def test_sums(tmp_path, write_pair, memory):
    place = write_pair(tmp_path / "own", "pets")
    sums(place, "pets-train.parquet")
    assert not open_folder("pets", place, memory).verified  # only one of the two is listed
    sums(place, "pets-train.parquet", "pets-test.parquet")
    found = open_folder("pets", place, memory)
    assert found.verified
    assert "unverified" not in found.source
    listed = (place / "SHA256SUMS").read_text()
    (place / "SHA256SUMS").write_text(listed[:-70] + "0" * 8 + listed[-62:])
    with pytest.raises(DataError, match=r"has SHA-256 \w{64}; SHA256SUMS expects"):
        open_folder("pets", place, memory)
    (place / "SHA256SUMS").write_text("nonsense\n")
    with pytest.raises(DataError, match="SHA256SUMS cannot be read"):
        open_folder("pets", place, memory)


def test_known_content_is_verified_in_any_encoding(tmp_path, write_pair, memory, monkeypatch):
    place = write_pair(tmp_path / "own", "cifar10", metadata={"source": "the release"})
    known_release(monkeypatch, place, "cifar10", "the release")
    found = open_folder("cifar10", place, memory)
    assert found.verified
    assert "unverified" not in found.source


def test_a_false_claim_is_a_wrong_digest(tmp_path, write_pair, memory, monkeypatch):
    place = write_pair(tmp_path / "own", "cifar10", metadata={"source": "the release"})
    known_release(monkeypatch, place, "cifar10", "the release")
    path = place / "cifar10-train.parquet"
    rewrite(path, lambda table: table.set_column(1, "label", table["label"].take(list(range(19, -1, -1)))))
    with pytest.raises(DataError) as caught:
        open_folder("cifar10", place, memory)
    found = content_sha256(decoded_file(path))
    assert f"sha256:{found}" in str(caught.value)
    assert f"expected sha256:{spec.KNOWN['cifar10'].release.contents['train']}" in str(caught.value)


def test_a_subset_of_a_release_and_an_own_source_are_unverified(tmp_path, write_pair, memory, monkeypatch):
    place = write_pair(tmp_path / "own", "cifar10", metadata={"source": "the release"})
    known_release(monkeypatch, place, "cifar10", "the release")
    rewrite(place / "cifar10-train.parquet", lambda table: table.slice(0, 15))
    found = open_folder("cifar10", place, memory)
    assert (found.verified, found.sizes["train"]) == (False, 15)
    other = write_pair(tmp_path / "other", "cifar10", seed=9, metadata={"source": "my own conversion"})
    rewrite(other / "cifar10-test.parquet", lambda table: table.slice(0, 5))
    assert not open_folder("cifar10", other, memory).verified


def test_known_content_in_the_wrong_place(tmp_path, write_pair, memory, monkeypatch):
    place = write_pair(tmp_path / "own", "mnist", shape="8,8", metadata={"source": "the release"})
    known_release(monkeypatch, place, "mnist", "the release")
    swapped = write_pair(tmp_path / "swapped", "mnist", shape="8,8")
    shutil.copy(place / "mnist-test.parquet", swapped / "mnist-train.parquet")
    with pytest.raises(DataError, match="the train split holds mnist's test images; put mnist's train images there"):
        open_folder("mnist", swapped, memory)
    renamed = write_pair(tmp_path / "renamed", "fashion_mnist", shape="8,8")
    shutil.copy(place / "mnist-train.parquet", renamed / "fashion_mnist-train.parquet")
    with pytest.raises(DataError, match="the train split holds mnist's train images"):
        open_folder("fashion_mnist", renamed, memory)
    for split in ("train", "test"):
        shutil.copy(place / f"mnist-{split}.parquet", renamed / f"mine-{split}.parquet")
    assert open_folder("mine", renamed, memory).verified  # under a name of one's own it may be anything


def test_checks_are_remembered_until_the_file_changes(tmp_path, write_pair, write_file, memory, monkeypatch):
    place = write_pair(tmp_path / "own", "pets")
    first = open_folder("pets", place, memory)
    decoded = []
    real = parquet.ParquetFiles.load
    monkeypatch.setattr(parquet.ParquetFiles, "load", lambda *words: decoded.append(words[1]) or real(*words))
    assert open_folder("pets", place, memory) == first
    assert decoded == []
    path = write_file(place / "pets-test.parquet", n=10, seed=5)
    os.utime(path, ns=(1, 1))
    assert open_folder("pets", place, memory) != first
    assert decoded == ["train", "test"]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "emnist_letters", "cifar10"])
def test_the_real_files_are_known_without_decoding(real_dir, memory, monkeypatch, name):
    monkeypatch.setattr(parquet.ParquetFiles, "load", None)
    found = open_folder(name, real_dir, memory)
    assert found.verified
    assert found.sizes == dict(spec.KNOWN[name].release.sizes)
    assert found.flip == (name in ("cifar10", "fashion_mnist"))
    assert found.classes == (12 if name == "emnist_letters" else 10)


def test_a_real_file_with_one_label_changed(real_dir, tmp_path, memory):
    for split in ("train", "test"):
        shutil.copy(real_dir / f"emnist_letters-{split}.parquet", tmp_path)

    def change(table):
        labels = table["label"].to_numpy().copy()
        labels[100] = (labels[100] + 1) % 12
        return table.set_column(1, "label", [labels])

    rewrite(tmp_path / "emnist_letters-train.parquet", change)
    with pytest.raises(DataError, match=r"claims to be emnist_letters .* expected sha256:c7588b5c"):
        open_folder("emnist_letters", tmp_path, memory)


def test_a_real_file_cut_short(real_dir, tmp_path, memory):
    for split in ("train", "test"):
        data = (real_dir / f"mnist-{split}.parquet").read_bytes()
        (tmp_path / f"mnist-{split}.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="cut short"):
        open_folder("mnist", tmp_path, memory)


def test_a_real_file_with_bytes_overwritten(real_dir, tmp_path, memory):
    for split in ("train", "test"):
        data = bytearray((real_dir / f"emnist_letters-{split}.parquet").read_bytes())
        data[50_000:50_100] = bytes(100)
        (tmp_path / f"emnist_letters-{split}.parquet").write_bytes(data)
    with pytest.raises(DataError):
        open_folder("emnist_letters", tmp_path, memory)


# --- folders of other people: Hugging Face's files and class folders --------------------------------------------------


def test_numbered_classes_of_a_known_dataset_have_names(tmp_path, write_shards, memory):
    write_shards(tmp_path / "cifar10", "train", n=20, classes=10, seed=1)
    write_shards(tmp_path / "cifar10", "test", n=10, classes=10, seed=2)
    assert open_folder("cifar10", tmp_path, memory).class_names == spec.KNOWN["cifar10"].class_names


@pytest.mark.parametrize(
    "home", ["cifar10", "CIFAR-10", "cifar10/data", "cifar10/plain_text", "", "data", "plain_text"]
)
def test_places_of_shards(tmp_path, write_shards, memory, home):
    names = spec.KNOWN["cifar10"].class_names
    for seed, split in enumerate(("train", "test")):
        write_shards(tmp_path / "own" / home, split, n=20, names=names, seed=seed)
    found = open_folder("cifar10", tmp_path / "own", memory)
    assert (found.class_names, found.sizes, found.grey) == (names, {"train": 20, "test": 20}, False)
    assert "train-00000-of-00001.parquet and test-00000-of-00001.parquet (Hugging Face's layout)" in found.source
    assert found.source.endswith(", unverified")
    assert isinstance(open_folder("mnist", tmp_path / "own", memory), Missing)
    assert isinstance(open_folder("pets", tmp_path / "own", memory), Missing)


def test_a_folder_that_is_one_own_dataset_answers_to_any_own_name(tmp_path, write_shards, memory):
    for seed, split in enumerate(("train", "test")):
        write_shards(tmp_path / "leaves", split, n=20, names=("oak", "maple"), seed=seed)
    for name in ("leaves", "trees"):
        assert open_folder(name, tmp_path / "leaves", memory).class_names == ("oak", "maple")
    missing = open_folder("cifar10", tmp_path / "leaves", memory)
    assert "is one dataset (2 classes: oak, maple), not cifar10" in missing.reason


def test_house_numbers_are_not_mnist(tmp_path, write_shards, memory):
    for seed, split in enumerate(("train", "test")):
        write_shards(tmp_path / "own", split, n=20, names=tuple("0123456789"), seed=seed)
    assert isinstance(open_folder("mnist", tmp_path / "own", memory), Missing)
    assert open_folder("svhn", tmp_path / "own", memory).classes == 10


def test_known_content_in_another_layout_is_verified(tmp_path, write_pair, write_shards, memory, monkeypatch):
    place = write_pair(tmp_path / "own", "cifar10", metadata={"source": "the release"})
    known_release(monkeypatch, place, "cifar10", "the release")
    for split in ("train", "test"):
        write_shards(tmp_path / "hub", split, split=decoded_file(place / f"cifar10-{split}.parquet"))
    found = open_folder("cifar10", tmp_path / "hub", memory)
    assert found.verified
    assert found.digest == open_folder("cifar10", place, memory).digest
    missing = open_folder("own", tmp_path / "hub", memory)
    assert "is one dataset (cifar10, 2 classes: 0, 1), not own" in missing.reason


def test_class_folders(tmp_path, paint, memory):
    for split, n in (("train", 3), ("test", 2)):
        for number in range(n):
            paint(tmp_path / "pets" / split / "cat" / f"{number}.png", (250, number, 0), size=(32, 20))
            paint(tmp_path / "pets" / split / "dog" / f"{number}.png", (0, number, 250), size=(64, 64))
    (tmp_path / "pets" / "train" / "dog" / "x.heic").write_bytes(b"")
    found = open_folder("pets", tmp_path, memory)
    assert (found.class_names, found.sizes, found.flip) == (("cat", "dog"), {"train": 6, "test": 4}, True)
    assert "1 left out: 1 .heic" in found.source
    split = found.load("train", np.array([5, 0]))
    assert split.images.shape == (2, 3, 32, 32)
    assert split.labels.tolist() == [1, 0]
    assert split.images[0, 2, 16, 16] > 240
    assert open_folder("pets", tmp_path / "pets", memory).digest == found.digest
    assert pickle.loads(pickle.dumps(found)).load("test").images.shape == (4, 3, 32, 32)


def test_a_known_dataset_as_class_folders(tmp_path, paint, memory):
    for split in ("train", "test"):
        for label, name in enumerate(spec.KNOWN["cifar10"].class_names):
            paint(tmp_path / "CIFAR10" / split / name / f"{split}.png", (label, len(split), 0), size=(32, 32))
    found = open_folder("cifar10", tmp_path, memory)
    assert (found.class_names, found.sizes) == (spec.KNOWN["cifar10"].class_names, {"train": 10, "test": 10})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["pets/cat/1.png", "pets/dog/1.png"],
            "pets holds no dataset; expected: .*`nkat data import`",
        ),
        (
            ["pets/train/cat/1.png", "pets/train/dog/1.png"],
            "a train split but none called test; `nkat data",
        ),
        (["pets/train/1.png", "pets/test/2.png"], "without class folders; expected: train/<class>/<image>"),
        (["pets/train/cat/1.png", "pets/test/cat/1.png"], "has 1 sub-folders; needed: one for each of at least two"),
        (
            ["pets/train/cat/1.png", "pets/train/dog/1.png", "pets/test/cow/1.png"],
            "has the classes cow, which .*train lacks",
        ),
        (
            ["pets/train/cat/1.png", "pets/train/dog/1.HEIC", "pets/test/cat/1.png"],
            r"no images in dog; 1 left out: 1 \.heic; can be read: .*\.jpg",
        ),
        (["pets/notes.txt"], "holds no dataset"),
        (["pets/data-00000-of-00001.arrow"], "holds no dataset; expected"),
    ],
)
def test_folders_that_cannot_be_used_are_refused_in_one_line(tmp_path, paint, memory, files, message):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(DataError, match=message) as caught:
        open_folder("pets", tmp_path, memory)
    assert "\n" not in str(caught.value)
