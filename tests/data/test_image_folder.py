import numpy as np
import pytest
from PIL import Image

from nkat_ray.config import DataConfig
from nkat_ray.data import DataError, import_folder, open_dataset


def quiet(_):
    pass


def paint(path, colour, size=(40, 20), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


@pytest.fixture
def pets(tmp_path):
    folder = tmp_path / "pets"
    for number in range(10):
        paint(folder / "cat" / f"{number}.png", (250, number, 0))
        paint(folder / "dog" / f"{number}.jpg", (0, number, 250), quality=95)
    (folder / "dog" / "notes.txt").write_text("not an image")
    (folder / ".hidden").mkdir()
    return folder


def test_an_imported_folder_is_a_dataset(pets, tmp_path):
    made = import_folder(pets, tmp_path / "out", "pets")
    assert (made.class_names, made.grey, made.height, made.width) == (("cat", "dog"), False, 32, 32)
    assert (made.train, made.test, made.skipped) == (16, 4, ("dog/notes.txt",))
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
    assert (made.grey, made.height, made.width, made.train, made.test) == (True, 28, 28, 4, 2)
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
        (dict(name="cifar10"), "the system knows"),
        (dict(test_fraction=0.0), "allowed: 0 < test_fraction < 1"),
        (dict(test_fraction=1.0), "test_fraction is 1.0"),
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
        (lambda pets: [path.unlink() for path in sorted((pets / "cat").iterdir())[1:]], "holds 1 images; needed"),
        (lambda pets: (pets / "cat").rename(pets / "cat,big"), "must not hold a comma"),
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
