"""Data sets: people's folders of images, data sets with a name and their download, the built-in digits.

The plumbing is the same in every script, so it is tested in one, `cgan`.
"""

import os
import socket
import struct
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import make_folder
from PIL import Image

SIZE = 8  # of the images that are read


def read(cgan, folder, *arguments):
    """Images, labels and classes of a folder, or of a data set with a name."""
    opt = cgan.parse_args(["--dataset", str(folder), "--img_size", str(SIZE), *arguments])
    return cgan.load_data(opt)


def save(file: Path, colour=(200, 100, 50), mode="RGB", size=(SIZE, SIZE)) -> Path:
    """An image of one colour."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(file)
    return file


def is_of(image: torch.Tensor, *colour: int, tolerance=0) -> bool:
    """Whether every pixel of an image (3, H, W) or (1, H, W) has that colour."""
    difference = image.int() - torch.tensor(colour).view(-1, 1, 1)
    return bool(difference.abs().max() <= tolerance)


# ---------------------------------------------------------------- an image

# How a picture with the corners AB (top) and CD (bottom) is stored, by its EXIF orientation. The standard
# says which side of the picture the first row is, and which the first column: for 6 the right and the top.
STORED = {1: "AB CD", 2: "BA DC", 3: "DC BA", 4: "CD AB", 5: "AC BD", 6: "BD AC", 7: "DB CA", 8: "CA DB"}
SHADES = {"A": 0, "B": 80, "C": 160, "D": 240}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_photograph_is_turned_upright(cgan, tmp_path, orientation, kind):
    photograph = Image.new("L", (32, 32))
    for row, corners in enumerate(STORED[orientation].split()):
        for column, corner in enumerate(corners):
            photograph.paste(SHADES[corner], (16 * column, 16 * row, 16 * column + 16, 16 * row + 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph.save(tmp_path / f"1.{kind}", exif=exif)
    upright = cgan.read_image(tmp_path / f"1.{kind}", 16, 1)[0]
    corners = [upright[0, 0], upright[0, -1], upright[-1, 0], upright[-1, -1]]
    assert [int(corner) for corner in corners] == pytest.approx([0, 80, 160, 240], abs=6)


def half_transparent(mode: str) -> Image.Image:
    """A picture whose left half is transparent, and whose right half is of one colour."""
    right = (SIZE // 2, 0, SIZE, SIZE)
    if mode == "palette":
        image = Image.new("P", (SIZE, SIZE), 0)
        image.putpalette([1, 2, 3, 200, 100, 50])
        image.paste(1, right)
        image.info["transparency"] = bytes([0, 255])  # of each colour in the palette
    elif mode == "colour":  # one colour means transparent
        image = Image.new("RGB", (SIZE, SIZE), (1, 2, 3))
        image.paste((200, 100, 50), right)
        image.info["transparency"] = (1, 2, 3)
    elif mode == "RGBA":
        image = Image.new("RGBA", (SIZE, SIZE), (1, 2, 3, 0))
        image.paste((200, 100, 50, 255), right)
    else:
        image = Image.new("LA", (SIZE, SIZE), (1, 0))
        image.paste((100, 255), right)
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "palette", "colour"])
def test_what_is_transparent_is_white(cgan, tmp_path, mode):
    half_transparent(mode).save(tmp_path / "1.png")
    with Image.open(tmp_path / "1.png") as image:
        assert image.has_transparency_data
    image = cgan.read_image(tmp_path / "1.png", SIZE, 3)
    right = [100, 100, 100] if mode == "LA" else [200, 100, 50]
    assert is_of(image[:, :, : SIZE // 2], 255, 255, 255)
    assert is_of(image[:, :, SIZE // 2 :], *right)
    grey = cgan.read_image(tmp_path / "1.png", SIZE, 1)
    assert is_of(grey[:, :, : SIZE // 2], 255)


def test_what_is_half_transparent_is_half_white(cgan, tmp_path):
    file = save(tmp_path / "1.png", (0, 0, 200, 128), "RGBA")
    assert is_of(cgan.read_image(file, SIZE, 3), 127, 127, 227, tolerance=1)


@pytest.mark.parametrize(
    "mode, kind, colour, expected",
    [
        ("RGBA", "png", (200, 100, 50, 255), (200, 100, 50)),  # with transparency, but nowhere transparent
        ("L", "png", 77, (77, 77, 77)),
        ("1", "png", 1, (255, 255, 255)),
        ("1", "png", 0, (0, 0, 0)),
        ("CMYK", "tif", (255, 0, 0, 0), (0, 255, 255)),
        ("P", "png", (200, 100, 50), (200, 100, 50)),
        ("RGB", "webp", (255, 255, 255), (255, 255, 255)),
    ],
)
def test_kinds_of_images(cgan, tmp_path, mode, kind, colour, expected):
    file = save(tmp_path / f"1.{kind}", colour, mode)
    assert is_of(cgan.read_image(file, SIZE, 3), *expected)
    grey = cgan.read_image(file, SIZE, 1)
    luma = 0.299 * expected[0] + 0.587 * expected[1] + 0.114 * expected[2]
    assert grey.shape == (1, SIZE, SIZE) and is_of(grey, round(luma), tolerance=1)


DEEP = [("I;16", "png"), ("I;16", "tif"), ("I", "pgm"), ("I", "tif"), ("F", "tif")]


@pytest.mark.parametrize("mode, kind", DEEP)
def test_more_than_8_bits_are_refused_by_name(cgan, tmp_path, mode, kind):
    save(tmp_path / "f/a/flat.png")
    deep = save(tmp_path / f"f/a/deep.{kind}", 200, mode)
    with pytest.raises(cgan.InputError, match="8 bits") as error:
        read(cgan, tmp_path / "f")
    assert str(deep) in str(error.value) and "flat.png" not in str(error.value)


@pytest.mark.parametrize("size, middle", [((40, 20), (10, 0, 30, 20)), ((20, 40), (0, 10, 20, 30))])
def test_an_image_is_cut_to_a_square_about_its_centre(cgan, tmp_path, size, middle):
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 255, 0), middle)
    image.save(tmp_path / "1.png")
    for img_size in (5, 20, 50):
        image = cgan.read_image(tmp_path / "1.png", img_size, 3)
        assert image.shape == (3, img_size, img_size) and image.dtype == torch.uint8
        assert is_of(image, 0, 255, 0, tolerance=80)  # the red beside it shines in


# ---------------------------------------------------------------- a folder


def test_sub_folders_are_classes(cgan, tmp_path, capsys):
    """Whatever lies deeper belongs to the sub-folder at the top; one without images is no class."""
    save(tmp_path / "f/dog/1.png", (10, 0, 0))
    save(tmp_path / "f/dog/2.JPEG", (20, 20, 20))
    save(tmp_path / "f/cat/deeper/still/1.png", (30, 0, 0))
    save(tmp_path / "f/cat/9.bmp", (40, 0, 0))
    save(tmp_path / "f/cat/deeper/1.png", (50, 0, 0))
    (tmp_path / "f/empty").mkdir()
    images, labels, classes = read(cgan, tmp_path / "f")
    assert images.shape == (5, 3, SIZE, SIZE) and images.dtype == torch.uint8
    assert classes == ["cat", "dog"] and labels.dtype == torch.int64
    reds = images[:, 0, 0, 0].tolist()
    assert sorted(zip(labels.tolist(), reds)) == [(0, 30), (0, 40), (0, 50), (1, 10), (1, 20)]
    assert capsys.readouterr().out == f"{tmp_path / 'f'}: 5 images (cat: 3, dog: 2)\n"


def test_without_sub_folders_all_are_of_one_class(cgan, tmp_path, monkeypatch):
    save(tmp_path / "f/1.png")
    save(tmp_path / "f/2.png")
    for here, folder in (("", "f"), ("", "f/"), ("", tmp_path / "f"), ("f", ".")):
        monkeypatch.chdir(tmp_path / here)
        _, labels, classes = read(cgan, folder)
        assert labels.tolist() == [0, 0] and classes == ["all"]


def test_threads_keep_the_order(cgan, tmp_path):
    """Large images among small ones take longer."""
    for i in range(60):
        side = 500 if i % 7 == 0 else SIZE
        save(tmp_path / f"f/{i // 20}/{i:02}.png", (4 * i, 0, 0), size=(side, side))
    for n_cpu in ("1", "8"):
        images, labels, _ = read(cgan, tmp_path / "f", "--n_cpu", n_cpu)
        assert images[:, 0, 0, 0].tolist() == [4 * i for i in range(60)]
        assert labels.tolist() == [i // 20 for i in range(60)]


def test_hidden_files_and_folders_are_ignored(cgan, tmp_path, capsys):
    save(tmp_path / "f/cat/1.png")
    save(tmp_path / "f/dog/1.png")
    save(tmp_path / "f/.ipynb_checkpoints/1-checkpoint.png")
    save(tmp_path / "f/dog/.ipynb_checkpoints/1-checkpoint.png")
    (tmp_path / "f/cat/._1.png").write_bytes(b"\0\5\26\7Mac OS X")
    (tmp_path / "f/cat/.DS_Store").touch()
    (tmp_path / "f/.DS_Store").touch()
    images, _, classes = read(cgan, tmp_path / "f")
    assert len(images) == 2 and classes == ["cat", "dog"]
    assert "warning" not in capsys.readouterr().out


def test_what_is_not_read_is_said(cgan, tmp_path, capsys):
    save(tmp_path / "f/cat/1.png")
    save(tmp_path / "f/cat/2.gif", 0, "P")
    save(tmp_path / "f/cat/3.gif", 0, "P")
    (tmp_path / "f/cat/README").touch()
    (tmp_path / "f/labels.csv").touch()
    images, _, classes = read(cgan, tmp_path / "f")
    assert len(images) == 1 and classes == ["cat"]
    warning, read_line = capsys.readouterr().out.splitlines()
    assert warning == f"warning: {tmp_path / 'f'}: not read as images: 2 .gif, 1 README, 1 .csv"
    assert read_line.endswith("1 images (cat: 1)")


@pytest.mark.parametrize("names", [("train", "test"), ("Train", "Val"), ("test", "validation"), ("train",)])
def test_sets_for_training_and_testing_are_no_classes(cgan, tmp_path, names):
    for name in names:
        save(tmp_path / "f" / name / "cat/1.png")
    with pytest.raises(cgan.InputError, match="give the path of one of them") as error:
        read(cgan, tmp_path / "f")
    assert names[0] in str(error.value) and str(tmp_path / "f") in str(error.value)
    assert read(cgan, tmp_path / "f" / names[0])[2] == ["cat"]  # as it says


def test_a_class_may_be_called_test(cgan, tmp_path):
    save(tmp_path / "f/test/1.png")
    save(tmp_path / "f/control/1.png")
    assert read(cgan, tmp_path / "f")[2] == ["control", "test"]


def test_images_beside_sub_folders_are_refused(cgan, tmp_path):
    save(tmp_path / "f/cat/1.png")
    save(tmp_path / "f/2.png")
    save(tmp_path / "f/3.png")
    with pytest.raises(cgan.InputError, match="move 2 images into a sub-folder"):
        read(cgan, tmp_path / "f")


def test_a_folder_without_images(cgan, tmp_path):
    (tmp_path / "f/cat").mkdir(parents=True)
    (tmp_path / "f/cat/notes.txt").touch()
    with pytest.raises(cgan.InputError, match="no images") as error:
        read(cgan, tmp_path / "f")
    assert str(tmp_path / "f") in str(error.value)


@pytest.mark.parametrize("name", ["nosuch", "MNIST", "a_file", "./digits", ""])
def test_no_folder(cgan, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("a_file").touch()
    with pytest.raises(cgan.InputError, match=f'"{name}" is not a folder; .* digits, mnist'):
        read(cgan, name)


def test_a_folder_named_as_a_data_set(cgan, tmp_path, monkeypatch, capsys):
    """`./digits` is the folder, `digits` the digits."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "digits/seven/1.png")
    images, _, classes = read(cgan, "./digits")
    assert len(images) == 1 and classes == ["seven"]
    images, _, classes = read(cgan, "digits")
    assert len(images) == 10_000 and classes == list("0123456789")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "./digits: 1 images (seven: 1)"
    assert lines[1].startswith("digits: 10000 images (0: 1000, 1: 1000, ")


def test_channels_convert(cgan, tmp_path):
    folder = make_folder(tmp_path / "f", per_class=4)
    colour, _, _ = read(cgan, folder)
    grey, _, _ = read(cgan, folder, "--channels", "1")
    assert colour.shape == (12, 3, SIZE, SIZE) and grey.shape == (12, 1, SIZE, SIZE)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    assert ((colour * weights).sum(dim=1, keepdim=True) - grey).abs().max() <= 1
    for channels in (1, 3):
        digits, _, _ = read(cgan, "digits", "--channels", str(channels))
        assert digits.shape == (10_000, channels, SIZE, SIZE) and digits.max() > 100
        assert (digits == digits[:, :1]).all()


# ---------------------------------------------------------------- links, rights and damage


def link(path: Path, target: Path) -> None:
    """Make a symbolic link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        pytest.skip("symbolic links are not allowed here")


def test_a_link_to_a_folder_is_followed(cgan, tmp_path):
    """And has the name of the class."""
    save(tmp_path / "elsewhere/siamese/1.png")
    save(tmp_path / "elsewhere/siamese/2.png")
    save(tmp_path / "f/dog/1.png")
    link(tmp_path / "f/cat", tmp_path / "elsewhere/siamese")
    link(tmp_path / "f/dog/2.png", tmp_path / "elsewhere/siamese/2.png")
    _, labels, classes = read(cgan, tmp_path / "f")
    assert classes == ["cat", "dog"] and labels.tolist() == [0, 0, 1, 1]
    link(tmp_path / "g", tmp_path / "f")
    assert read(cgan, tmp_path / "g")[2] == ["cat", "dog"]


@pytest.mark.parametrize("target", ["f", "f/dog", "."])
def test_a_link_to_a_folder_above_is_not(cgan, tmp_path, target):
    """Or the images would be read again and again; or, from above the data set, what is not of it."""
    save(tmp_path / "f/dog/1.png")
    save(tmp_path / "f/dog/deeper/2.png")
    save(tmp_path / "f/cat/3.png")
    save(tmp_path / "other/4.png")
    link(tmp_path / "f/dog/deeper/above", tmp_path / target)
    files = [file.relative_to(tmp_path).as_posix() for file in cgan.find_files(tmp_path / "f")]
    assert files == ["f/cat/3.png", "f/dog/1.png", "f/dog/deeper/2.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("mode", [0o000, 0o400])
def test_a_folder_that_may_not_be_read(cgan, tmp_path, mode):
    """Is not left out in silence."""
    save(tmp_path / "f/cat/1.png")
    save(tmp_path / "f/dog/1.png")
    (tmp_path / "f/dog").chmod(mode)
    try:
        with pytest.raises(OSError, match="Permission denied.*dog"):
            read(cgan, tmp_path / "f")
    finally:
        (tmp_path / "f/dog").chmod(0o700)


def test_an_error_in_a_folder_is_not_silent(cgan, tmp_path, monkeypatch):
    """The same for root, who may read everything: a disk that fails."""
    save(tmp_path / "f/cat/1.png")
    save(tmp_path / "f/dog/1.png")
    scandir = os.scandir
    listdir = os.listdir

    def failing(list_folder):
        def list_or_fail(path="."):
            if Path(path).name == "dog":
                raise OSError(5, "Input/output error", str(path))
            return list_folder(path)

        return list_or_fail

    monkeypatch.setattr(os, "scandir", failing(scandir))  # Path.iterdir uses one of the two, by version
    monkeypatch.setattr(os, "listdir", failing(listdir))
    with pytest.raises(OSError, match="Input/output error.*dog"):
        read(cgan, tmp_path / "f")


def test_all_damaged_files_are_named_at_once(cgan, refused, tmp_path, monkeypatch):
    """And nothing is trained."""
    monkeypatch.chdir(tmp_path)
    for name in ("cut", "empty", "text", "good", "gone"):
        save(tmp_path / f"f/{name[:1]}/{name}.png", size=(40, 40))
    os.truncate("f/c/cut.png", 70)
    os.truncate("f/e/empty.png", 0)
    Path("f/t/text.png").write_text("<html>404 Not found</html>")
    Path("f/g/gone.png").unlink()
    link(tmp_path / "f/g/gone.png", tmp_path / "nowhere.png")
    damaged = [Path("f/c/cut.png"), Path("f/e/empty.png"), Path("f/g/gone.png"), Path("f/t/text.png")]
    refused(cgan, "--dataset", "f", "--img_size", SIZE, says=damaged)
    with pytest.raises(cgan.InputError) as error:
        read(cgan, "f")
    assert "good.png" not in str(error.value)
    assert not Path("runs").exists()


# ---------------------------------------------------------------- data sets with a name


def write_idx(data_dir: Path, name="MNIST", n=20) -> Path:
    """A data set as MNIST's files have it: image i has pixels i, and test image i has pixels 100 + i."""
    raw = data_dir / name / "raw"
    raw.mkdir(parents=True)
    for split, first in (("train", 0), ("t10k", 100)):
        images = torch.arange(first, first + n, dtype=torch.uint8).repeat_interleave(28 * 28)
        labels = torch.arange(n, dtype=torch.uint8) % 10
        header = struct.pack(">IIII", 0x803, n, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        header = struct.pack(">II", 0x801, n)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(header + labels.numpy().tobytes())
    return raw


@pytest.mark.parametrize("dataset", [[], ["--dataset", "mnist"]])
def test_mnist_that_is_there(cgan, tmp_path, capsys, dataset):
    write_idx(tmp_path)
    opt = cgan.parse_args(["--data_dir", str(tmp_path), "--img_size", "28", *dataset])
    for train, first in ((True, 0), (False, 100)):
        images, labels, classes = cgan.load_data(opt, train=train)
        assert images.shape == (20, 1, 28, 28) and images.dtype == torch.uint8
        assert all(is_of(image, first + i) for i, image in enumerate(images))
        assert labels.tolist() == [*range(10), *range(10)] and classes == list("0123456789")
    assert opt.dataset == "mnist"
    assert "mnist: 20 images (0: 2, 1: 2, 2: 2, " in capsys.readouterr().out


IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"
CUTS = [(IMAGES, 10_000), (IMAGES, 6), (IMAGES, 0), (LABELS, 20), (LABELS, None)]  # None: it is not there


@pytest.mark.parametrize("file, size", CUTS)
@pytest.mark.parametrize("dataset", [[], ["--dataset", "mnist"]])
def test_damaged_mnist(cgan, tmp_path, dataset, file, size):
    """Is an error that says what to do; nobody trains on digits instead."""
    raw = write_idx(tmp_path)
    if size is None:
        (raw / file).unlink()
    else:
        os.truncate(raw / file, size)
    with pytest.raises(cgan.InputError, match="damaged or incomplete: remove it") as error:
        cgan.load_data(cgan.parse_args(["--data_dir", str(tmp_path), *dataset]))
    assert f'"{tmp_path / "MNIST"}"' in str(error.value)


def test_names_of_classes_are_names_of_folders(cgan, tmp_path):
    write_idx(tmp_path, "FashionMNIST")
    _, _, classes = read(cgan, "fashion_mnist", "--data_dir", str(tmp_path))
    assert classes[0] == "T-shirt or top" and classes[-1] == "Ankle boot" and len(classes) == 10
    assert not any("/" in name for name in classes)


def test_a_coloured_data_set(cgan, tmp_path, monkeypatch):
    """torchvision has CIFAR-10's images as an array (N, H, W, C), and its labels as a list."""
    colours = torch.zeros(5, SIZE, SIZE, 3, dtype=torch.uint8)
    colours[:, :2, :, 0] = 200  # red above
    colours[:, :, :4, 1] = 100  # green on the left

    class Coloured:
        data = colours.numpy()
        targets = [3, 1, 4, 1, 5]
        classes = ["airplane", "automobile", "bird", "cat", "deer", "dog"]

        def __init__(self, root, train=True, download=False):
            pass

    monkeypatch.setitem(cgan.TORCHVISION, "cifar10", (Coloured, "cifar-10-batches-py"))
    (tmp_path / "cifar-10-batches-py").mkdir()
    images, labels, classes = read(cgan, "cifar10", "--data_dir", str(tmp_path))
    assert torch.equal(images, colours.permute(0, 3, 1, 2))
    assert labels.tolist() == [3, 1, 4, 1, 5] and classes == Coloured.classes


real_mnist = pytest.mark.skipif(not os.environ.get("DATA_DIR"), reason="DATA_DIR names no folder with MNIST")


@real_mnist
def test_real_mnist(cgan):
    opt = cgan.parse_args(["--data_dir", os.environ["DATA_DIR"], "--img_size", "28"])
    images, labels, classes = cgan.load_data(opt, train=False)
    raw = torchvision.datasets.MNIST(os.environ["DATA_DIR"], train=False)
    assert torch.equal(images[:, 0], raw.data) and torch.equal(labels, raw.targets)
    assert opt.dataset == "mnist" and classes == list("0123456789")


# ---------------------------------------------------------------- downloads


def test_no_network_and_no_data(cgan, tmp_path, capsys):
    """The digits, with a line that says why; conftest.py has cut the network."""
    opt = cgan.parse_args(["--data_dir", str(tmp_path / "data")])
    images, _, classes = cgan.load_data(opt, train=False)
    assert opt.dataset == "digits" and len(images) == 2000 and classes == list("0123456789")
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert f'mnist is not in "{tmp_path / "data"}"' in warning
    assert "refused" in warning and "digits" in warning  # why, and what is used
    assert not list(tmp_path.glob("data/*"))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_asked_for_and_not_there(cgan, refused, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    refused(cgan, "--dataset", name, says=[f'{name} is not in "data"', "refused"])
    assert not Path("runs").exists() and not list(Path("data").iterdir())


@pytest.mark.parametrize("dataset", [[], ["--dataset", "mnist"]])
def test_data_dir_cannot_be_made(cgan, tmp_path, capsys, dataset):
    (tmp_path / "file").touch()
    opt = cgan.parse_args(["--data_dir", str(tmp_path / "file/data"), *dataset])
    if dataset:
        with pytest.raises(OSError, match="file/data.*Not a directory"):
            cgan.load_data(opt)
    else:
        cgan.load_data(opt)
        assert "Not a directory" in capsys.readouterr().out


class FakeMNIST:
    """A data set that writes its files one after another, and calls `between` after each. It needs all."""

    names = ["images", "labels", "more images", "more labels"]
    classes = ["no", "yes"]
    downloads = 0

    def __init__(self, root, train=True, download=False):
        self.folder = folder = Path(root, "MNIST")
        if download:
            FakeMNIST.downloads += 1
            folder.mkdir(exist_ok=True)
            for name in self.names:
                (folder / name).touch()
                self.between(name)
        if not all((folder / name).exists() for name in self.names):
            raise RuntimeError("half of it")
        self.data = torch.zeros(4, 28, 28, dtype=torch.uint8)
        self.targets = torch.tensor([0, 1, 0, 1])

    def between(self, name):
        pass


@pytest.fixture
def fake(cgan, monkeypatch):
    """FakeMNIST instead of MNIST."""
    monkeypatch.setitem(cgan.TORCHVISION, "mnist", (FakeMNIST, "MNIST"))
    monkeypatch.setattr(FakeMNIST, "downloads", 0)
    timeout = socket.getdefaulttimeout()
    yield FakeMNIST
    socket.setdefaulttimeout(timeout)


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


WHOLE = ["MNIST", *sorted(f"MNIST/{name}" for name in FakeMNIST.names)]


def test_a_download_is_put_in_place_in_one_go(cgan, fake, tmp_path, monkeypatch):
    """The whole folder is moved there, once."""
    there = []
    inodes = []

    def look(dataset, name):
        there.append((tmp_path / "data/MNIST").exists())
        inodes.append(dataset.folder.stat().st_ino)

    monkeypatch.setattr(fake, "between", look)
    for _ in range(2):
        images, labels, classes = read(cgan, "mnist", "--data_dir", str(tmp_path / "data"))
    assert images.shape == (4, 1, SIZE, SIZE) and labels.tolist() == [0, 1, 0, 1] and classes == ["no", "yes"]
    assert there == [False] * 4 and fake.downloads == 1
    assert inodes == [(tmp_path / "data/MNIST").stat().st_ino] * 4
    assert files_in(tmp_path / "data") == WHOLE


def test_downloads_at_once(cgan, fake, tmp_path, monkeypatch):
    """Three begin together, and wait for one another in the middle: each finds a whole data set then."""
    all_there = threading.Barrier(3)

    def wait(dataset, name):
        if name == "labels":
            all_there.wait(timeout=5)

    def load(_):
        opt = cgan.parse_args(["--data_dir", str(tmp_path)])
        images, _, _ = cgan.load_data(opt)
        return opt.dataset, len(images)

    monkeypatch.setattr(fake, "between", wait)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(load, range(3))) == [("mnist", 4)] * 3
    assert fake.downloads == 3
    assert files_in(tmp_path) == WHOLE


@pytest.mark.parametrize("stop", [RuntimeError("HTTP Error 503"), KeyboardInterrupt()])
def test_a_failed_download_leaves_nothing(cgan, fake, tmp_path, monkeypatch, stop):
    def fail(dataset, name):
        if name == "more images":
            raise stop

    monkeypatch.setattr(fake, "between", fail)
    expected = KeyboardInterrupt if isinstance(stop, KeyboardInterrupt) else OSError
    with pytest.raises(expected) as error:
        read(cgan, "mnist", "--data_dir", str(tmp_path))
    if expected is OSError:
        assert "HTTP Error 503" in str(error.value)
    assert files_in(tmp_path) == []
    monkeypatch.undo()
    monkeypatch.setitem(cgan.TORCHVISION, "mnist", (FakeMNIST, "MNIST"))
    assert len(read(cgan, "mnist", "--data_dir", str(tmp_path))[0]) == 4  # now it works


@pytest.mark.parametrize("fails", [False, True])
def test_the_socket_timeout_is_put_back(cgan, fake, tmp_path, monkeypatch, fails):
    timeouts = []

    def look(dataset, name):
        timeouts.append(socket.getdefaulttimeout())
        if fails:
            raise RuntimeError

    monkeypatch.setattr(fake, "between", look)
    socket.setdefaulttimeout(7.5)
    try:
        read(cgan, "mnist", "--data_dir", str(tmp_path))
    except OSError:
        assert fails
    assert socket.getdefaulttimeout() == 7.5
    assert all(1 < timeout < 61 and timeout != 7.5 for timeout in timeouts) and timeouts


def test_only_the_first_process_downloads(cgan, fake, tmp_path, monkeypatch):
    """The others wait for it."""
    waited = []

    def first_process_downloads():
        waited.append(True)
        fake(tmp_path, download=True)

    monkeypatch.setattr(cgan, "WORLD", 2)
    monkeypatch.setattr(cgan, "RANK", 1)
    monkeypatch.setattr(cgan.dist, "barrier", first_process_downloads)
    assert len(read(cgan, "mnist", "--data_dir", str(tmp_path))[0]) == 4
    assert waited == [True] and fake.downloads == 1


def test_a_silent_network_is_given_up(cgan, tmp_path, monkeypatch, capsys):
    """One that takes the connection and never answers. Seconds pass quickly here."""
    set_timeout = socket.setdefaulttimeout

    def set_shorter_timeout(seconds):
        set_timeout(seconds and seconds / 100)

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        mirror = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [mirror])
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers proxies
        monkeypatch.setattr(socket, "setdefaulttimeout", set_shorter_timeout)
        opt = cgan.parse_args(["--data_dir", str(tmp_path)])
        cgan.load_data(opt, train=False)
    assert opt.dataset == "digits" and "timed out" in capsys.readouterr().out


# ---------------------------------------------------------------- digits


def test_digits(cgan):
    """All ten, evenly; upright and whole, but no two alike; the nearest class mean tells which they are."""
    images, labels, classes = cgan.draw_digits(10_000)
    test_images, test_labels, _ = cgan.draw_digits(2000)
    assert images.shape == (10_000, 1, 28, 28) and images.dtype == torch.uint8
    assert test_images.shape == (2000, 1, 28, 28) and classes == list("0123456789")
    assert labels.bincount().tolist() == [1000] * 10 and test_labels.bincount().tolist() == [200] * 10
    assert images.amax(dim=(1, 2, 3)).min() > 200
    assert (images[:, :, [0, -1]] > 0).float().mean() < 0.01  # nothing is cut off
    assert len(torch.cat([images, test_images]).unique(dim=0)) == 12_000

    means = torch.stack([images[labels == k].float().mean(dim=0).flatten() for k in range(10)])
    nearest = torch.cdist(test_images.float().flatten(1), means).argmin(dim=1)
    assert (nearest == test_labels).float().mean() > 0.85


def test_digits_are_always_the_same(cgan):
    draw_digits = cgan.draw_digits.__wrapped__  # conftest.py keeps what has been drawn
    torch.manual_seed(5)
    images, labels, _ = draw_digits(30)
    again, _, _ = draw_digits(30)
    assert torch.equal(images, again) and labels.tolist() == [*range(10)] * 3
