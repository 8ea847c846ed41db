"""How good are the digits a run has generated? Run by hand:

    python cgan.py --resume runs/cgan --generate 10000
    python tests/bench_quality.py runs/cgan

It judges the pictures in the run's generated/ folder (--folder for another) against real MNIST, 28x28 pixels, with
a classifier that is trained once (some minutes on a CPU) and kept in --cache. For a run trained on MNIST it prints

    right class        share of pictures in sub-folder k that the classifier takes for k
    rarest class       share of pictures taken for the class seen least: 0 means that one is missing
    Frechet distance   between Gaussians fitted to the classifier's features of the pictures and of the training images
    precision, recall  shares of pictures among real ones, and of these among the pictures (arXiv:1904.06991, k = 3)
    nearest            mean pixel distance to the nearest training image, over real test images': 0 is copying
    trained on it      accuracy on real test images of a classifier trained on the pictures alone (arXiv:1905.10887)

For a run of vqvae.py, on any data, it reads codes.npz instead, and prints of the test images

    error              mean squared error of what their codes decode to, over the variance of all training pixels
    codes used         how many of the codebook occur among their codes
    perplexity         exp of the entropy of their codes
    bits per image     of their codes, each coded by how often (and once more) it occurs in those of the training images
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor, resize


class Classifier(nn.Module):
    """Digits (N, 1, 28, 28) in [0, 1] -> logits (N, 10); `features` gives 128 numbers an image."""

    def __init__(self):
        super().__init__()
        layers = []
        for n_in, n_out in [(1, 32), (32, 64), (64, 128)]:
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 9, 128), nn.ReLU())
        self.last = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


def train_classifier(images: Tensor, labels: Tensor, steps: int) -> Classifier:
    """Train on uint8 (N, 1, 28, 28), shifted by up to 2 pixels, with one cycle of the learning rate."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(len(images), (128,))
        x = F.pad(images[rows].float() / 255, (2, 2, 2, 2))
        dy, dx = torch.randint(5, (2,)).tolist()
        optimizer.zero_grad()
        F.cross_entropy(model(x[:, :, dy : dy + 28, dx : dx + 28]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
        if sys.stdout.isatty():
            print(f"\rclassifier: step {step + 1} of {steps}", end="" if step + 1 < steps else "\n", flush=True)
    return model.eval()


@torch.no_grad()
def apply(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(part.float() / 255) for part in images.split(1000)])


def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    return (apply(model, images).argmax(1) == labels).float().mean().item()


def frechet(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))."""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.double().mean(0), x.double().T.cov()) for x in (a, b))
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()


def covered(real: Tensor, other: Tensor, k: int = 3) -> float:
    """Share of `other` that lies within the distance of some real point to its k-th neighbour."""
    radius = torch.cat([torch.cdist(part, real).kthvalue(k + 1).values for part in real.split(500)])
    return torch.cat([(torch.cdist(part, real) <= radius).any(1) for part in other.split(500)]).float().mean().item()


def nearest(images: Tensor, train: Tensor) -> float:
    train = train.flatten(1).float() / 255
    return torch.cat([torch.cdist(x.flatten(1).float() / 255, train).amin(1) for x in images.split(500)]).mean().item()


def read(folder: Path) -> tuple[Tensor, Tensor | None]:
    """PNG files as uint8 (N, 1, 28, 28), and labels if they lie in sub-folders."""
    files = sorted(folder.rglob("*.png"))
    if len(files) < 1000:
        sys.exit(f"{folder}: {len(files)} pictures are too few to judge; --generate 10000 makes enough")
    images = torch.stack([resize(pil_to_tensor(Image.open(f).convert("L")), [28, 28], antialias=True) for f in files])
    return images, torch.tensor([int(f.parent.name) for f in files]) if files[0].parent != folder else None


@torch.no_grad()
def judge_codes(run: Path) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import vqvae

    model, opt = vqvae.load(run), vqvae.parse_args(["--resume", str(run)])
    images, test = vqvae.load_data(opt)[0], None
    if opt.dataset in vqvae.DATASETS:
        test = vqvae.load_data(opt, train=False)[0]
    else:
        test, images = images[::10], images[np.arange(len(images)) % 10 > 0]
    with np.load(run / "codes.npz") as file:
        codes, tests = (file[name].astype(np.int64) for name in ("codes", "test_codes"))
        done = torch.load(run / "checkpoint.pt", weights_only=True)["position"][0]
        assert file["batches_done"] == done, f"codes of another checkpoint: vqvae.py --resume {run} --n_epochs 0"
    decoded = (model.decode(part) for part in torch.from_numpy(tests).split(500))
    squares = [(x - real / 255).double().square().sum() for x, real in zip(decoded, test.split(500), strict=True)]
    values = np.bincount(images.flatten(), minlength=256) / images.numel()
    levels = np.arange(256) / 255
    variance = (values * levels**2).sum() - (values * levels).sum() ** 2
    uses, trained = (np.bincount(part.flatten(), minlength=opt.n_embeddings) for part in (tests, codes))
    share, expected = uses[uses > 0] / uses.sum(), (trained + 1) / (trained + 1).sum()
    print(f"error              {sum(squares) / test.numel() / variance:.4f}   (of {len(test)} images)")
    print(f"codes used         {(uses > 0).sum()} of {opt.n_embeddings}")
    print(f"perplexity         {np.exp(-(share * np.log(share)).sum()):.1f}")
    print(f"bits per image     {-(uses * np.log2(expected)).sum() / len(tests):.1f}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, help="run folder with generated pictures")
    p.add_argument("--folder", default="generated", help="which of its folders to judge")
    p.add_argument("--data_dir", default="data", help="where MNIST is")
    p.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "mnist_classifier.pt", help="the classifier's file"
    )
    opt = p.parse_args()
    if (opt.run / "codes.npz").exists():
        judge_codes(opt.run)
        return

    data = [torchvision.datasets.MNIST(opt.data_dir, train=train) for train in (True, False)]
    (train, train_labels), (test, test_labels) = ((d.data[:, None], d.targets) for d in data)
    model = Classifier()
    if opt.cache.exists():
        model.load_state_dict(torch.load(opt.cache, weights_only=True))
    else:
        model = train_classifier(train, train_labels, steps=5000)
        opt.cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), opt.cache)
    model.eval()
    judge = accuracy(model, test, test_labels)
    print(f"the classifier's accuracy on real test images: {judge:.2%}")
    assert judge >= 0.993, f"not good enough to judge others; delete {opt.cache} and run again"

    images, labels = read(opt.run / opt.folder)
    # Pictures of another size went through a resize on their way here, and back: so do the real ones.
    size = Image.open(next((opt.run / opt.folder).rglob("*.png"))).size[0]
    train, test = (resize(resize(x, [size, size], antialias=True), [28, 28], antialias=True) for x in (train, test))
    found = apply(model, images).argmax(1)
    real, fake, held_out = (apply(model.features, x) for x in (train, images, test))
    print(f"{len(images)} pictures in {opt.run / opt.folder}")
    if labels is not None:
        print(f"right class        {(found == labels).float().mean():.2%}")
    print(f"rarest class       {found.bincount(minlength=10).min() / len(found):.2%}")
    print(f"Frechet distance   {frechet(fake, real):.2f}   (real test images: {frechet(held_out, real):.2f})")
    known = covered(real[:10000], held_out)
    print(f"precision          {covered(real[:10000], fake[:10000]):.3f}   (real test images: {known:.3f})")
    print(f"recall             {covered(fake[:10000], held_out):.3f}   (real training images: {known:.3f})")
    print(f"nearest            {nearest(images[:2000], train) / nearest(test[:2000], train):.3f}")
    own = train_classifier(images, found if labels is None else labels, steps=2000)
    print(
        f"trained on it      {accuracy(own, test, test_labels):.2%}"
        + (" (labelled by the classifier)" if labels is None else "")
    )


if __name__ == "__main__":
    main()
