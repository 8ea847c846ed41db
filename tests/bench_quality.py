"""How good are the pictures that a run has generated? Run by hand:

    python cgan.py --resume runs/cgan --generate 10000
    python tests/bench_quality.py runs/cgan                  # a run on MNIST
    python tests/bench_quality.py runs/cgan-2 --data cifar   # a run in colour

It judges the pictures in the run's generated/ folder (--folder for another) with a classifier of real
images, which is trained once and kept in the folder --cache. Grey pictures are judged as digits, against
MNIST, at 28x28 pixels. Pictures in colour are judged at 32x32 pixels, against the images in cifar/train
and cifar/test, which hold a sub-folder per class: CIFAR-10 as a folder of images. It prints

    right class        share of pictures in the sub-folder of a class that the classifier takes for it
    rarest class       share of pictures taken for the class seen least: 0 means that one is missing
    Frechet distance   between Gaussians fitted to the features of the pictures and of the training images
    precision, recall  shares of pictures among real ones, and of these among the pictures
                       (arXiv:1904.06991, k = 3)
    nearest            mean distance in pixels to the nearest training image, over that of real test
                       images: 0 is copying
    trained on it      accuracy on real test images of a classifier trained on the pictures alone
                       (arXiv:1905.10887); only of digits, as it takes too long in colour

The features are what the last layer of the classifier sees: of a digit 128 numbers after a ReLU, of an
image in colour 256 numbers, the means over the positions of channels after a ReLU. The Frechet distances
of digits and of images in colour cannot be compared.

For a run of vqvae.py, on any data, it reads codes.npz instead, and prints of the test images

    error              mean squared error of what their codes decode to, over the variance of all
                       training pixels
    codes used         how many of the codebook occur among their codes
    perplexity         exp of the entropy of their codes
    bits per image     of their codes, each coded by how often (and once more) it occurs in those of the
                       training images
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor, resize

FEWEST = 1000  # images that can be judged

# ---------------------------------------------------------------- classifiers


class Classifier(nn.Module):
    """Images (N, channels, H, W) in [0, 1] -> logits (N, n_classes), from features (N, n_features)."""

    def __init__(self, features: nn.Module, n_features: int, n_classes: int):
        super().__init__()
        self.features = features
        self.last = nn.Linear(n_features, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


def digit_classifier() -> Classifier:
    """For images (N, 1, 28, 28)."""
    features = nn.Sequential(
        nn.Conv2d(1, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, 1, 1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 9, 128), nn.ReLU(),
    )  # fmt: skip
    return Classifier(features, 128, 10)


def colour_classifier() -> Classifier:
    """For images (N, 3, 32, 32)."""
    features = nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1, 1), nn.MaxPool2d(2), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 128, 3, 1, 1), nn.BatchNorm2d(128), nn.ReLU(),
        nn.Conv2d(128, 128, 3, 1, 1), nn.MaxPool2d(2), nn.BatchNorm2d(128), nn.ReLU(),
        nn.Conv2d(128, 256, 3, 1, 1), nn.BatchNorm2d(256), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    return Classifier(features, 256, 10).to(memory_format=torch.channels_last)


def train_classifier(
    new_model: Callable[[], Classifier],
    images: Tensor,
    labels: Tensor,
    steps: int,
    batch_size: int = 128,
    lr: float = 3e-3,
    flip: bool = False,
    amp: bool = False,
) -> Classifier:
    """Train on uint8 images, shifted by up to 2 pixels, with one cycle of the learning rate.

    flip: mirror every second image, on average. amp: forward passes in bfloat16.
    """
    torch.manual_seed(0)
    model = new_model()
    side = images.shape[-1]
    optimizer = torch.optim.AdamW(model.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (batch_size,))
        x = F.pad(images[rows].float() / 255, (2, 2, 2, 2))
        dy, dx = torch.randint(5, (2,)).tolist()
        x = x[:, :, dy : dy + side, dx : dx + side]
        if flip:
            is_flipped = torch.rand(batch_size, 1, 1, 1) < 0.5
            x = torch.where(is_flipped, x.flip(3), x).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            logits = model(x)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels[rows]).backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            print(f"classifier: step {step} of {steps}", flush=True)
    return model.eval()


@torch.no_grad()
def apply(network: nn.Module, images: Tensor) -> Tensor:
    """What a network makes of uint8 images."""
    return torch.cat([network(batch.float() / 255) for batch in images.split(500)])


def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    return (apply(model, images).argmax(1) == labels).float().mean().item()


# ---------------------------------------------------------------- measures


def spread(x: Tensor, n: int) -> Tensor:
    """At most n rows of x, evenly spread, as files are sorted by class."""
    n = min(n, len(x))
    return x[torch.arange(n) * len(x) // n]


def frechet(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), of features (N, n) and (M, n)."""
    a = a.double()
    b = b.double()
    cov_a = a.T.cov()
    cov_b = b.T.cov()
    # The eigenvalues of the product are not negative, but for rounding.
    trace_of_root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    squares = (a.mean(0) - b.mean(0)).square().sum()
    return (squares + cov_a.trace() + cov_b.trace() - 2 * trace_of_root).item()


def covered(real: Tensor, other: Tensor, k: int = 3) -> float:
    """Share of `other` that lies within the distance of some real point to its k-th neighbour."""
    # The nearest to a point is itself, at a distance of 0.
    radius = [torch.cdist(rows, real).kthvalue(k + 1).values for rows in real.split(500)]
    radius = torch.cat(radius)
    n_inside = 0
    for rows in other.split(500):
        n_inside += (torch.cdist(rows, real) <= radius).any(1).sum().item()
    return n_inside / len(other)


def nearest(images: Tensor, train: Tensor) -> float:
    """Mean distance of uint8 images to the nearest training image, with pixels in [0, 1]."""
    train = train.flatten(1).float() / 255
    images = images.flatten(1).float() / 255
    distances = [torch.cdist(rows, train).amin(1) for rows in images.split(500)]
    return torch.cat(distances).mean().item()


def measure_codes(codes: np.ndarray, test_codes: np.ndarray, n_embeddings: int) -> tuple[int, float, float]:
    """Of the test codes (N, h, w): how many are used, their perplexity, and the bits per image."""
    uses = np.bincount(test_codes.flatten(), minlength=n_embeddings)
    share = uses[uses > 0] / uses.sum()
    perplexity = np.exp(-(share * np.log(share)).sum())
    expected = np.bincount(codes.flatten(), minlength=n_embeddings) + 1
    bits = -(uses * np.log2(expected / expected.sum())).sum()
    return len(share), perplexity, bits / len(test_codes)


# ---------------------------------------------------------------- data


def read_folder(folder: Path, channels: int, side: int) -> tuple[Tensor, list[str]]:
    """The images below a folder, uint8 (N, channels, side, side), and the names of their folders."""
    mode = {1: "L", 3: "RGB"}[channels]
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in IMG_EXTENSIONS]
    if len(files) < FEWEST:
        sys.exit(f"{folder}: {len(files)} images are too few; --generate 10000 makes enough")
    images = torch.empty(len(files), channels, side, side, dtype=torch.uint8)
    for i, file in enumerate(files):
        with Image.open(file) as image:
            images[i] = resize(pil_to_tensor(image.convert(mode)), [side, side])
    return images, [file.parent.name for file in files]


def to_labels(names: list[str], classes: list[str], folder: Path) -> Tensor:
    unknown = sorted(set(names) - set(classes))
    if unknown:
        sys.exit(f"{folder} holds {', '.join(unknown)}; the classes are {', '.join(classes)}")
    return torch.tensor([classes.index(name) for name in names])


def read_mnist(data_dir: str) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """Training images and labels, test images and labels, and the names of the classes."""
    train = torchvision.datasets.MNIST(data_dir, train=True)
    test = torchvision.datasets.MNIST(data_dir, train=False)
    return train.data[:, None], train.targets, test.data[:, None], test.targets, list("0123456789")


def read_colour(data: Path) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """The same of a folder with train/ and test/, which hold a sub-folder per class."""
    train, train_names = read_folder(data / "train", 3, 32)
    test, test_names = read_folder(data / "test", 3, 32)
    classes = sorted(set(train_names))
    train_labels = to_labels(train_names, classes, data / "train")
    test_labels = to_labels(test_names, classes, data / "test")
    return train, train_labels, test, test_labels, classes


def find_options(run: Path) -> dict:
    """The options of a run; of a run on the codes of vqvae.py, those of that run, which knows the images."""
    options = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)["options"]
    data = Path(options["dataset"])
    return find_options(data) if (data / "checkpoint.pt").exists() else options


# ---------------------------------------------------------------- judges


@torch.no_grad()
def judge_codes(run: Path, data_dir: str) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import vqvae

    opt = vqvae.parse_args(["--resume", str(run), "--data_dir", data_dir])
    images, labels, _ = vqvae.load_data(opt)
    images, _, test, _ = vqvae.hold_out(opt, images, labels)
    with np.load(run / "codes.npz") as file:
        codes = file["codes"].astype(np.int64)
        test_codes = file["test_codes"].astype(np.int64)
    now = vqvae.load(run).encode(test[:1000] / 255).numpy()
    same = (now == test_codes[:1000]).mean()
    assert same > 0.99, "codes.npz is older than checkpoint.pt; resume the run and let it finish"

    decoder = torch.export.load(run / "decoder.pt2").module()
    squares = 0.0
    for c, x in zip(torch.from_numpy(test_codes).split(500), test.split(500), strict=True):
        squares += (decoder(c) - x / 255).double().square().sum().item()
    shares = np.bincount(images.flatten(), minlength=256) / images.numel()
    levels = np.arange(256) / 255
    variance = (shares * levels**2).sum() - (shares * levels).sum() ** 2
    n_used, perplexity, bits = measure_codes(codes, test_codes, opt.n_embeddings)
    print(f"error              {squares / test.numel() / variance:.4f}   (of {len(test)} images)")
    print(f"codes used         {n_used} of {opt.n_embeddings}")
    print(f"perplexity         {perplexity:.1f}")
    print(f"bits per image     {bits:.1f}")


def judge(opt: argparse.Namespace, channels: int) -> None:
    if channels == 1:
        new_model = digit_classifier
        train, train_labels, test, test_labels, classes = read_mnist(opt.data_dir)
        cache = opt.cache / "mnist_classifier.pt"
        how = {"steps": 5000}
        enough = 0.993
    else:
        new_model = colour_classifier
        train, train_labels, test, test_labels, classes = read_colour(opt.data)
        cache = opt.cache / "cifar10_classifier.pt"
        how = {"steps": 2000, "batch_size": 256, "lr": 1e-2, "flip": True, "amp": opt.amp}
        enough = 0.84
    side = train.shape[-1]

    if cache.exists():
        model = new_model().eval()
        model.load_state_dict(torch.load(cache, weights_only=True))
    else:
        model = train_classifier(new_model, train, train_labels, **how)
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), cache)
    known = accuracy(model, test, test_labels)
    print(f"the classifier's accuracy on real test images: {known:.2%}", flush=True)
    assert known >= enough, f"not good enough to judge others; delete {cache} and run again"

    folder = opt.run / opt.folder
    images, names = read_folder(folder, channels, side)
    labels = None
    if names[0] != folder.name:
        labels = to_labels(names, classes, folder)
    # Pictures of another size were resized when they were read. So that real images have gone through
    # the same, they are resized to that size and back.
    with Image.open(next(folder.rglob("*.png"))) as image:
        size = image.size[0]
    train = resize(resize(train, [size, size]), [side, side])
    test = resize(resize(test, [size, size]), [side, side])

    fake_features = apply(model.features, images)
    train_features = apply(model.features, train)
    test_features = apply(model.features, test)
    found = model.last(fake_features).argmax(1)
    print(f"{len(images)} pictures in {folder}")
    if labels is not None:
        right = (found == labels).float().mean()
        print(f"right class        {right:.2%}   (real test images: {known:.2%})")
    print(f"rarest class       {found.bincount(minlength=10).min() / len(found):.2%}")

    distance = frechet(fake_features, train_features)
    known = frechet(test_features, train_features)
    print(f"Frechet distance   {distance:.3f}   (real test images: {known:.3f})")

    some_real = spread(train_features, 10_000)
    some_fake = spread(fake_features, 10_000)
    precision = covered(some_real, some_fake)
    recall = covered(some_fake, test_features)
    known = covered(some_real, test_features)
    print(f"precision          {precision:.3f}   (real test images: {known:.3f})")
    print(f"recall             {recall:.3f}   (real training images: {known:.3f})")

    ratio = nearest(spread(images, 2000), train) / nearest(spread(test, 2000), train)
    print(f"nearest            {ratio:.3f}")

    if channels == 1:
        whose = " (labelled by the classifier)" if labels is None else ""
        labels = found if labels is None else labels
        own = train_classifier(new_model, images, labels, steps=2000)
        print(f"trained on it      {accuracy(own, test, test_labels):.2%}{whose}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("run", type=Path, help="run folder with generated pictures")
    add("--folder", default="generated", help="which of its folders to judge")
    add("--data_dir", default="data", help="where MNIST is")
    add("--data", type=Path, help="for a run in colour: folder with train/ and test/ of real images")
    add("--cache", type=Path, default=Path.home() / ".cache", help="folder for the classifiers")
    add("--amp", action="store_true",
        help="train the classifier of colour in bfloat16: faster on some CPUs, slower on others")  # fmt: skip
    opt = p.parse_args()
    if (opt.run / "codes.npz").exists():
        judge_codes(opt.run, opt.data_dir)
        return
    channels = find_options(opt.run)["channels"]
    if channels == 3 and opt.data is None:
        p.error(f"{opt.run} is a run in colour, which needs --data FOLDER")
    if channels == 1 and opt.data is not None:
        p.error(f"{opt.run} is a run in grey, which is judged as digits, without --data")
    judge(opt, channels)


if __name__ == "__main__":
    main()
