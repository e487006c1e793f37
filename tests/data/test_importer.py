import re

import numpy as np
import pytest
from PIL import Image

from nkat_ray.config import DataConfig
from nkat_ray.data import DataError, import_folder, open_dataset
from nkat_ray.data.spec import KNOWN


def quiet(_):
    pass


@pytest.fixture
def pets(tmp_path, paint):
    folder = tmp_path / "pets"
    for number in range(10):
        paint(folder / "cat" / f"{number}.png", (250, number, 0))
        paint(folder / "dog" / f"{number}.jpg", (0, number, 250), quality=95)
    (folder / "dog" / "notes.txt").write_text("not an image")
    (folder / ".hidden").mkdir()
    return folder


def opened(folder, name="pets"):
    return open_dataset(name, DataConfig(data_dir=folder), notice=quiet)


def test_an_imported_folder_is_a_dataset(pets, tmp_path):
    made = import_folder(pets, tmp_path / "out", "pets")
    assert (made.class_names, made.shape, made.sizes) == (("cat", "dog"), (3, 32, 32), {"train": 16, "test": 4})
    assert made.notes[0] == "2 left out: 1 .txt, 1 hidden"
    assert any("4 test images were drawn, 20% of each class" in note for note in made.notes)
    found = open_dataset("pets", DataConfig(data_dir=tmp_path / "out"), notice=quiet)
    assert (found.class_names, found.sizes, found.flip) == (("cat", "dog"), {"train": 16, "test": 4}, True)
    for split, each in (("train", 8), ("test", 2)):
        images = found.load(split)
        assert np.bincount(images.labels).tolist() == [each, each]
        middle = images.images[:, :, 16, 16]
        np.testing.assert_array_equal(middle[:, 0] > 200, images.labels == 0)
        np.testing.assert_array_equal(middle[:, 2] > 200, images.labels == 1)


def test_aspect_is_kept_and_the_rest_is_black(pets, tmp_path):
    import_folder(pets, tmp_path / "out", "pets")
    images = open_dataset("pets", DataConfig(data_dir=tmp_path / "out"), notice=quiet).load("train").images
    bright = images.max(axis=1) > 200
    assert bright[:, 8:24].all()  # 40x20 becomes 32x16
    assert not bright[:, :8].any()
    assert not bright[:, 24:].any()


def test_images_of_one_small_size_are_kept_as_they_are(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(6, 28, 28), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = tmp_path / "in" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    made = import_folder(tmp_path / "in", tmp_path / "out", "mine", test_fraction=0.4)
    assert (made.shape, made.sizes) == ((1, 28, 28), {"train": 4, "test": 2})
    found = open_dataset("mine", DataConfig(data_dir=tmp_path / "out"), notice=quiet)
    assert found.flip is False
    both = np.concatenate([found.load("train").images, found.load("test").images])[:, 0]
    assert {image.tobytes() for image in both} == {image.tobytes() for image in pixels}


def test_flip_can_be_said(pets, tmp_path):
    import_folder(pets, tmp_path / "out", "pets", flip=False)
    assert not open_dataset("pets", DataConfig(data_dir=tmp_path / "out"), notice=quiet).flip


def test_the_split_is_seeded_and_independent_of_the_writer(pets, tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        import_folder(pets, tmp_path / out, "pets", seed=seed)
    digests = [open_dataset("pets", DataConfig(data_dir=tmp_path / out), notice=quiet).digest for out in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_kinds_of_images(tmp_path):
    folder = tmp_path / "in"
    turned = Image.Exif()
    turned[0x0112] = 6  # stored lying, shown upright
    Image.new("RGB", (20, 10), (255, 255, 255)).save(folder_of(folder / "a") / "turned.jpg", exif=turned)
    Image.new("RGBA", (10, 10), (255, 255, 255, 0)).save(folder_of(folder / "a") / "clear.png")
    Image.fromarray(np.full((10, 10), 65535, np.uint16)).save(folder_of(folder / "b") / "deep.png")
    Image.new("P", (10, 10)).save(folder_of(folder / "b") / "palette.gif")
    import_folder(folder, tmp_path / "out", "kinds", test_fraction=0.5)
    found = open_dataset("kinds", DataConfig(data_dir=tmp_path / "out"), notice=quiet)
    images = np.concatenate([found.load("train").images, found.load("test").images])
    bright = sorted((image.max(axis=0) > 200).sum() for image in images)
    assert bright == [0, 0, 16 * 32, 32 * 32]  # clear and palette: black; turned: half as wide as high; deep: full
    tall = next(image for image in images if (image.max(axis=0) > 200).sum() == 16 * 32)
    assert (tall.max(axis=0) > 200)[:, 16].all()


def folder_of(path):
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_bad_input(pets, tmp_path):
    out = tmp_path / "out"
    cases = [
        (dict(name="../x"), "dataset name is"),
        (dict(name="cifar10"), r"the system knows; these are other images \(2 colour classes: cat, dog\)"),
        (dict(folder=tmp_path / "none"), "does not exist"),
        (dict(folder=pets / "cat"), "has 0 sub-folders"),
    ]
    for options, message in cases:
        with pytest.raises(DataError, match=message):
            import_folder(**{"folder": pets, "out_dir": out, "name": "pets", **options})
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pets: (pets / "cat" / "3.png").write_bytes(b"junk"), r"3\.png is no readable image"),
        (lambda pets: (pets / "cat" / "3.png").write_bytes((pets / "cat" / "4.png").read_bytes()[:60]), "no readable"),
        (
            lambda pets: [path.unlink() for path in sorted((pets / "cat").iterdir())[1:]],
            r"fewer than 2 images: cat \(1\); needed",
        ),
    ],
)
def test_bad_folders(pets, tmp_path, change, message):
    change(pets)
    with pytest.raises(DataError, match=message):
        import_folder(pets, tmp_path / "out", "pets")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(pets, tmp_path):
    import_folder(pets, tmp_path / "out", "pets")
    with pytest.raises(DataError, match=r"pets-train\.parquet exists"):
        import_folder(pets, tmp_path / "out", "pets")


def test_commas_in_class_names(pets, tmp_path):
    (pets / "cat").rename(pets / "cat, big")
    assert import_folder(pets, tmp_path / "out", "pets").class_names == ("cat; big", "dog")
    assert opened(tmp_path / "out").class_names == ("cat; big", "dog")


# --- splits that are there --------------------------------------------------------------------------------------------


# Reported in fastai/fastai#1552, huggingface/datasets#7880
@pytest.mark.parametrize(
    ("train", "test"), [("train", "test"), ("Train", "Test"), ("training", "validation"), ("train", "val")]
)
def test_the_splits_that_are_there_are_used(tmp_path, paint, train, test):
    for split, n in ((train, 5), (test, 3)):
        for number in range(n):
            paint(tmp_path / "in" / split / "cat" / f"{number}.png", (250, number, len(split)))
            paint(tmp_path / "in" / split / "dog" / f"{number}.png", (len(split), number, 250))
    made = import_folder(tmp_path / "in", tmp_path / "out", "pets", test_fraction=0.9)
    assert (made.class_names, made.sizes) == (("cat", "dog"), {"train": 10, "test": 6})
    assert not any("drawn" in note for note in made.notes)
    assert str(tmp_path / "in" / test) in made.source
    assert opened(tmp_path / "out").labels("test").tolist() == [0, 0, 0, 1, 1, 1]


def test_classes_without_test_images_are_reported(pets, tmp_path, paint):
    (tmp_path / "in").mkdir()
    pets.rename(tmp_path / "in" / "train")
    paint(tmp_path / "in" / "test" / "dog" / "0.png", (9, 9, 99))
    made = import_folder(tmp_path / "in", tmp_path / "out", "pets")
    assert made.sizes == {"train": 20, "test": 1}
    assert "no test images of cat" in made.notes


def test_a_test_folder_without_classes_is_not_used(pets, tmp_path):
    """As competitions hand them out: the labels of the test images are secret."""
    (tmp_path / "in").mkdir()
    pets.rename(tmp_path / "in" / "train")
    (tmp_path / "in" / "test").mkdir()
    made = import_folder(tmp_path / "in", tmp_path / "out", "pets")
    assert (made.class_names, made.sizes) == (("cat", "dog"), {"train": 16, "test": 4})


def test_classes_called_like_a_split(tmp_path, paint):
    for name in ("train", "bus", "plane"):
        for number in range(3):
            paint(tmp_path / "in" / name / f"{number}.png", (number, len(name), 99))
    assert import_folder(tmp_path / "in", tmp_path / "out", "x").class_names == ("bus", "plane", "train")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train", "test"], r"test, train without class folders; expected: train/<class>/<image>"),
        (["pets/cat", "pets/dog"], r"has 1 sub-folders; .*; do you mean .*in/pets\?"),
        (["train/cat", "train/dog", "test/cow"], "has the classes cow"),
        ([], "has 0 sub-folders"),
    ],
)
def test_folders_without_classes(tmp_path, paint, folders, message):
    (tmp_path / "in").mkdir()
    for name in folders:
        paint(tmp_path / "in" / name / "0.png", (1, 2, 3))
    with pytest.raises(DataError, match=message):
        import_folder(tmp_path / "in", tmp_path / "out", "x")
    assert not (tmp_path / "out").exists()


# Reported in photoprism/photoprism#3705, biolab/orange3-imageanalytics#51, KatherLab/MediSwarm#496
def test_what_is_left_out_is_counted(pets, tmp_path):
    (pets / "cat" / "IMG_1.HEIC").write_bytes(b"x")
    (pets / "cat" / "IMG_2.heic").write_bytes(b"x")
    (pets / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (pets / "cat" / "more").symlink_to(pets / "dog")
    (pets / "cat" / "._0.png").write_bytes(b"x")
    (pets / "dog" / "deeper").mkdir()
    (pets / "dog" / "0.jpg").rename(pets / "dog" / "deeper" / "0.jpg")
    (pets / "cover.png").write_bytes(b"x")
    made = import_folder(pets, tmp_path / "out", "pets")
    left_out = next(note for note in made.notes if "left out" in note)
    assert left_out == (
        "8 left out: 2 .heic, 1 .txt, 1 dead link, 2 hidden, 1 linked folder, 1 outside the class folders"
    )
    assert made.sizes == {"train": 16, "test": 4}  # deeper folders belong to their class


def test_all_unreadable_images_are_named_at_once(pets, tmp_path):
    for number in (3, 5):
        (pets / "cat" / f"{number}.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"3\.png is no readable image .*; the same is true of 1 more: .*5\.png"):
        import_folder(pets, tmp_path / "out", "pets")


# --- images that cannot be meant --------------------------------------------------------------------------------------


def noise(path, size, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(256, size=size, dtype=np.uint8)).save(path, **options)


# Reported in pytorch/pytorch#20524, python-pillow/Pillow#5991
def test_a_class_of_black_images_is_refused(tmp_path):
    for number in range(3):
        noise(tmp_path / "in" / "a" / f"{number}.png", (20, 20), number)
        dark = np.random.default_rng(number).integers(256, size=(20, 20)).astype(np.uint16)
        (tmp_path / "in" / "b").mkdir(exist_ok=True)
        Image.fromarray(dark).save(tmp_path / "in" / "b" / f"{number}.png")
    with pytest.raises(DataError, match=r"every image of class b is black, e\.g\. .*b/0\.png; 16-bit files"):
        import_folder(tmp_path / "in", tmp_path / "out", "x")


def test_odd_images_are_reported(tmp_path, paint):
    for number in range(4):
        noise(tmp_path / "in" / "a" / f"{number}.png", (20, 30, 3), number)
        noise(tmp_path / "in" / "b" / f"{number}.png", (30, 20, 3), number + 9)
    assert import_folder(tmp_path / "in", tmp_path / "plain", "x").notes[1:] == ()
    noise(tmp_path / "in" / "a" / "strip.png", (1, 5000, 3))
    noise(tmp_path / "in" / "b" / "dot.png", (2, 2, 3))
    Image.new("RGBA", (40, 40), (255, 255, 255, 0)).save(tmp_path / "in" / "a" / "clear.png")
    paint(tmp_path / "in" / "b" / "white.png", (255, 255, 255), size=(90, 90))
    notes = "\n".join(import_folder(tmp_path / "in", tmp_path / "out", "x").notes)
    assert re.search(r"^2 of 12 images show nothing but one colour, e\.g\. .*a/clear\.png \(40x40\)$", notes, re.M)
    assert re.search(r"^2 of 12 images are narrower than 4 pixels.*, e\.g\. .*a/strip\.png \(5000x1\)$", notes, re.M)


def test_the_same_images_in_both_splits_are_reported(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            noise(tmp_path / "in" / split / name / "same.png", (20, 20), len(name))
            noise(tmp_path / "in" / split / name / "other.png", (20, 20), 1000 * len(split) + ord(name))
    notes = import_folder(tmp_path / "in", tmp_path / "out", "x").notes
    assert any("1 different test images are also training images" in note for note in notes)


# --- Hugging Face's files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", ["", "data", "plain_text"])
def test_hugging_face_files(tmp_path, write_shards, home):
    for seed, split in enumerate(("train", "test")):
        write_shards(tmp_path / "in" / home, split, n=12, names=("cat, big", "dog"), shards=2, seed=seed)
    made = import_folder(tmp_path / "in", tmp_path / "out", "pets", flip=False)
    assert (made.class_names, made.sizes, made.shape) == (("cat; big", "dog"), {"train": 12, "test": 12}, (3, 32, 32))
    found = opened(tmp_path / "out")
    direct = open_dataset("pets", DataConfig(data_dir=tmp_path / "in"), notice=quiet)
    assert (found.flip, direct.flip) == (False, True)
    assert found.digest == direct.digest


def test_hugging_face_files_without_a_test_split(tmp_path, write_shards):
    write_shards(tmp_path / "in", "train", n=20, names=("cat", "dog"))
    assert import_folder(tmp_path / "in", tmp_path / "out", "pets").sizes == {"train": 16, "test": 4}


def test_a_known_dataset_may_be_imported_under_its_name(tmp_path, write_shards):
    for seed, split in enumerate(("train", "test")):
        write_shards(tmp_path / "in", split, n=20, classes=10, seed=seed)
    made = import_folder(tmp_path / "in", tmp_path / "out", "cifar10")
    assert made.class_names == KNOWN["cifar10"].class_names
    with pytest.raises(
        DataError, match=r"'mnist', a dataset that the system knows; these are other images \(10 colour"
    ):
        import_folder(tmp_path / "in", tmp_path / "out", "mnist")


def test_files_that_need_no_import(tmp_path, write_file):
    for split in ("train", "test"):
        write_file(tmp_path / "in" / f"{split}.parquet", seed=len(split))
    with pytest.raises(DataError, match="need no import"):
        import_folder(tmp_path / "in", tmp_path / "out", "x")
