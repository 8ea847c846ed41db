"""PixelCNN: draws images, or the codes of a vqvae.py run, one position after the other.

The probability of an image x is exact: a product over its positions, row by row from the top left, of the
probability of each value given those before it. A convolutional network whose output at a position depends
neither on the value there nor on a later one gives all factors in one pass. Training maximises their
product. Drawing takes one pass per position.

    minimised:    -log p(x) = -sum_i log p(x_i | x_1, ..., x_{i-1})    in nats per image

A value is one of 256 grey levels, black or white (--binarize), or one of the codes of a vqvae.py run. Colour
images are converted to grey: pixelcnnpp.py draws colours. Codes are decoded to what vqvae.py was trained on.

--arch pixelcnn: van den Oord et al. 2016, arXiv:1601.06759. It has a blind spot: part of what is above and
to the right of a position never reaches it. --arch gated: van den Oord et al. 2016, arXiv:1606.05328. It has
no blind spot: one stack of layers sees the rows above, another the positions to the left. A position sees
n_layers + 3 rows up with either arch, 11 by default.

Codes: van den Oord et al. 2017, arXiv:1711.00937. Averaged weights: Polyak & Juditsky 1992. Beyond these
papers, values are embedded, each position has a bias of its own, and --arch pixelcnn knows labels, too.

    python pixelcnn.py --binarize --n_epochs 5    # MNIST in black and white; built-in digits when offline
    python pixelcnn.py --dataset runs/vqvae       # the codes of a run of vqvae.py
    python pixelcnn.py --resume runs/pixelcnn --generate 100
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy", "pillow>=10.1"]
# ///

import argparse
import copy
import csv
import hashlib
import io
import itertools
import json
import math
import os
import random
import socket
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.utils import save_image

SCRIPT = Path(__file__).stem  # a run is read only by a script of this file name, and not by a renamed copy
USES = {"generate"}  # options that use a trained run: they need --resume

# ---------------------------------------------------------------- options
# Names such as count, ON_OFF, Run and seed are defined in the last part of the script, the plumbing. RANK is
# the number of this process under torchrun, and WORLD the number of processes.


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Parse argv (default: the command line).

    Raises SystemExit for a bad option, and InputError if --resume names no run of this script.
    """
    p = ArgumentParser(usage="%(prog)s [options]", description=__doc__, formatter_class=Help)
    add = p.add_argument_group("model").add_argument
    add("--arch", choices=["pixelcnn", "gated"], default="gated", help="with a blind spot, or without one")
    add("--conditional", action=ON_OFF, default=False, help="model p(x | class), by the labels of the images")
    add("--hidden_dim", type=number(int, 2), default=32, help="channels of the hidden layers")
    add("--n_layers", type=count, default=8, help="layers after the first one; each sees a row farther up")
    add("--ema", type=fraction, default=0.999, help="decay rate of the averaged weights; 0: off")
    add = p.add_argument_group("training").add_argument
    add("--n_epochs", type=count, default=200, help="epochs in total, those before a resume included")
    add("--batch_size", type=number(int, 2), default=16, help="images per step")
    add("--lr", type=positive, default=2e-3, help="Adam: learning rate")
    add("--b1", type=fraction, default=0.9, help="Adam: decay rate of the first moment")
    add("--b2", type=fraction, default=0.999, help="Adam: decay rate of the second moment")
    add("--seed", type=number(int, 0), default=0, help="seed; with --generate, another gives other images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--amp", action=ON_OFF, default=False, help="train in bfloat16; slower than float32 on some CPUs")
    add = p.add_argument_group("data").add_argument
    add("--dataset", help="mnist (if not given), fashion_mnist, cifar10, digits, a folder of images "
        "or a run of vqvae.py; images become grey")  # fmt: skip
    add("--data_dir", default="data", help="folder for downloaded data sets")
    add("--img_size", type=count, default=28, help="side of the images in pixels; codes have their own")
    add("--binarize", action=ON_OFF, default=False,
        help="make each pixel white or black, at random: its grey is the probability of white")  # fmt: skip
    add("--n_cpu", type=count, default=8, help="threads that read the images of a folder")
    add = p.add_argument_group("run").add_argument
    add("--out_dir", default=f"runs/{SCRIPT}", help="folder of a new run; if it exists, a number is added")
    add("--sample_interval", type=count, default=4000, help="steps between tests, sample grids and log rows")
    add("--resume", metavar="RUN", help="continue the run in this folder, with its options")
    add("--generate", type=count, metavar="N", help="with --resume: write N images to RUN/generated")
    # Not options: images are always grey, and load_codes() sets the hash.
    p.set_defaults(channels=1, codes_hash=None)
    return parse_and_check(p, argv)


# ---------------------------------------------------------------- networks


class PixelCNN(nn.Module):
    """What both networks share: p(x) of values x (N, 1, size, size), int64, below n_values.

    Each adds forward(): model(x, labels) gives the logits (N, n_values, H, W) of the value at each position,
    given those before it; x may be the first rows only. Labels (N,), int64, are used only if the network was
    made with n_classes > 0: then p(x) is always p(x | label).
    """

    def __init__(self, n_values: int, size: int, hidden_dim: int):
        super().__init__()
        self.n_values = n_values
        self.size = size
        self.decoder = None  # the path of decoder.pt2, if the values are codes
        self.embed = nn.Embedding(n_values, min(n_values, hidden_dim))  # enough to tell the values apart
        self.position_bias = nn.Parameter(torch.zeros(1, hidden_dim, size, size))
        self.out = nn.Sequential(
            nn.ReLU(), nn.Conv2d(hidden_dim, 2 * hidden_dim, 1),
            nn.ReLU(), nn.Conv2d(2 * hidden_dim, n_values, 1),
        )  # fmt: skip

    def log_prob(self, x: Tensor, labels: Tensor) -> Tensor:
        """log p(x) (N,), in nats."""
        logits = self(x, labels).float()
        return -F.cross_entropy(logits, x[:, 0], reduction="none").sum(dim=(1, 2))

    def images(self, x: Tensor) -> Tensor:
        """Values (N, 1, size, size) -> images in [0, 1]. Codes are decoded, on the CPU."""
        if self.decoder is None:
            return x / (self.n_values - 1)
        decode = torch.export.load(io.BytesIO(self.decoder.read_bytes())).module()
        return decode(x[:, 0].cpu())

    @torch.no_grad()
    def sample(self, labels: Tensor) -> Tensor:
        """Draw values x (N, 1, size, size), int64, one for each label (N,), int64.

        Raises InputError if the output of the network is not finite.
        """
        x = labels.new_zeros(len(labels), 1, self.size, self.size)
        for i in range(self.size):
            drawn, above = self.start_row(x[:, :, : i + 1], labels)
            for j in range(self.size):
                logits = self(drawn, labels, above)[:, :, -1, j].float()
                if not logits.isfinite().all():
                    raise InputError("the output of the network is not finite; start again with a lower --lr")
                # drawn shares the memory of x, so that the next pass sees the new value.
                x[:, :, i, j] = torch.multinomial(logits.softmax(dim=1), 1)
        return x

    def start_row(self, x: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        """The arguments x and `above` with which forward() gives the logits of the last row of x.

        sample() asks once a row, so that what a whole row shares can be computed once. Here, that is nothing.
        """
        return x, None


class MaskedConv(nn.Conv2d):
    """A convolution in which only the first n_seen of the kernel_size^2 positions count, from the top left.

    kernel_size^2 // 2 are those before the centre (mask A of the paper); one more is the centre (mask B).
    """

    def __init__(self, n_in: int, n_out: int, kernel_size: int, n_seen: int):
        super().__init__(n_in, n_out, kernel_size, padding=kernel_size // 2)
        mask = torch.arange(kernel_size**2) < n_seen
        self.register_buffer("mask", mask.float().view(kernel_size, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class MaskedPixelCNN(PixelCNN):
    """--arch pixelcnn: masked convolutions in residual blocks (arXiv:1601.06759, figure 5)."""

    def __init__(self, n_values: int, size: int, hidden_dim: int, n_layers: int, n_classes: int):
        super().__init__(n_values, size, hidden_dim)
        half = hidden_dim // 2
        self.first = MaskedConv(self.embed.embedding_dim, hidden_dim, 7, n_seen=24)
        self.label_bias = nn.Parameter(torch.zeros(n_classes, hidden_dim))
        self.blocks = nn.ModuleList()
        for _ in range(n_layers):
            self.blocks.append(nn.Sequential(
                nn.ReLU(), nn.Conv2d(hidden_dim, half, 1),
                nn.ReLU(), MaskedConv(half, half, 3, n_seen=5),
                nn.ReLU(), nn.Conv2d(half, hidden_dim, 1),
            ))  # fmt: skip

    def forward(self, x: Tensor, labels: Tensor, above=None) -> Tensor:
        """The logits, as in PixelCNN. above is not used: sample() passes it for GatedPixelCNN."""
        e = self.embed(x[:, 0]).movedim(-1, 1)
        h = add_bias(self.first(e), self.label_bias, labels) + self.position_bias[:, :, : x.shape[2]]
        for block in self.blocks:
            h = h + block(h)
        return self.out(h)


class GatedPixelCNN(PixelCNN):
    """--arch gated (arXiv:1606.05328, figure 2).

    The vertical stack sees the rows above. The horizontal one sees the positions to the left in the row, and
    is handed the features of the vertical stack, to which the label's bias has been added. No filter needs a
    mask: the first ones are shifted, so that row i of the vertical features has seen only rows above it, and
    column j of the horizontal ones only columns before it. So later filters may see row i or column j, too.
    """

    def __init__(self, n_values: int, size: int, hidden_dim: int, n_layers: int, n_classes: int):
        super().__init__(n_values, size, hidden_dim)
        self.first_vertical = nn.Conv2d(self.embed.embedding_dim, hidden_dim, (3, 7))
        self.first_horizontal = nn.Conv2d(self.embed.embedding_dim, hidden_dim, (1, 3))
        self.layers = nn.ModuleList(GatedLayer(hidden_dim, n_classes) for _ in range(n_layers))

    def forward(self, x: Tensor, labels: Tensor, above: list[Tensor] | None = None) -> Tensor:
        """The logits, as in PixelCNN. above: the output of vertical() for the rows of x, if it is known."""
        e = self.embed(x[:, 0]).movedim(-1, 1)
        h = self.first_horizontal(F.pad(e[..., :-1], (3, 0)))  # column j sees columns j - 3 to j - 1
        for layer, from_above in zip(self.layers, above or self.vertical(x, labels)):
            new = gate(layer.horizontal(F.pad(h, (1, 0))) + from_above)
            h = h + layer.residual(new)
        return self.out(h)

    def vertical(self, x: Tensor, labels: Tensor) -> list[Tensor]:
        """What the vertical stack hands to the horizontal one in each layer (N, 2 hidden_dim, H, W)."""
        e = self.embed(x[:, 0]).movedim(-1, 1)
        v = self.first_vertical(F.pad(e[:, :, :-1], (3, 3, 3, 0)))  # row i sees rows i - 3 to i - 1
        v = v + self.position_bias[:, :, : x.shape[2]]
        handed = []
        for layer in self.layers:
            both = add_bias(layer.vertical(F.pad(v, (1, 1, 1, 0))), layer.label_bias, labels)
            v = gate(both)
            handed.append(layer.to_horizontal(both))
        return handed

    def start_row(self, x: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The last row alone, and what the vertical stack hands to it, which depends only on rows above."""
        return x[:, :, -1:], [handed[:, :, -1:] for handed in self.vertical(x, labels)]


class GatedLayer(nn.Module):
    """The weights of a layer of GatedPixelCNN. The vertical stack runs through all layers first."""

    def __init__(self, dim: int, n_classes: int):
        super().__init__()
        self.label_bias = nn.Parameter(torch.zeros(n_classes, 2 * dim))
        self.vertical = nn.Conv2d(dim, 2 * dim, (2, 3))
        self.to_horizontal = nn.Conv2d(2 * dim, 2 * dim, 1)
        self.horizontal = nn.Conv2d(dim, 2 * dim, (1, 2))
        self.residual = nn.Conv2d(dim, dim, 1)


def gate(h: Tensor) -> Tensor:
    """tanh of the first half of the channels times sigmoid of the second (arXiv:1606.05328, equation 2)."""
    a, b = h.chunk(2, dim=1)
    return a.tanh() * b.sigmoid()


def add_bias(h: Tensor, label_bias: Tensor, labels: Tensor) -> Tensor:
    """Features h (N, C, H, W) plus label_bias (n_classes, C) of each label (N,), if there are classes."""
    if len(label_bias) == 0:
        return h
    return h + F.embedding(labels, label_bias)[:, :, None, None]


# ---------------------------------------------------------------- training


def hold_out(opt: Namespace, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then test images and labels.

    A named data set has its own test images. Otherwise every tenth image is one.
    """
    if opt.dataset in NAMED:
        test_images, test_labels, _ = load_data(opt, train=False)
        return images, labels, test_images, test_labels
    is_test = torch.arange(len(images)) % 10 == 0
    return images[~is_test], labels[~is_test], images[is_test], labels[is_test]


def load_codes(opt: Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training codes (N, 1, h, w) and labels (N,), then test codes and labels, of a run of vqvae.py.

    Sets the options that the codes determine: classes, n_values, img_size and codes_hash. Raises InputError
    if there are no codes, if a resumed run was started with others, and with --binarize.
    """
    file = Path(opt.dataset, "codes.npz")
    try:
        arrays = dict(np.load(file))
    except Exception as e:  # numpy raises many kinds
        raise InputError(f'"{file}", which vqvae.py writes when it ends, cannot be read ({e})') from e
    codes_hash = hashlib.sha256(arrays["codes"].tobytes() + arrays["test_codes"].tobytes()).hexdigest()
    if opt.resume is not None and codes_hash != opt.codes_hash:
        raise InputError(f'"{opt.resume}" was not started with the codes in "{file}"')
    if opt.binarize:
        raise InputError("--binarize is for images, not for codes")
    opt.codes_hash = codes_hash
    opt.classes = arrays["classes"].tolist()
    opt.n_values = int(arrays["n_embeddings"])
    opt.img_size = arrays["codes"].shape[1]
    codes, labels, test_codes, test_labels = [
        torch.from_numpy(arrays[name]).long() for name in ("codes", "labels", "test_codes", "test_labels")
    ]
    return codes[:, None], labels, test_codes[:, None], test_labels


def to_values(images: Tensor, binarize: bool) -> Tensor:
    """Images or codes as int64. With binarize, a grey level g becomes 1 with probability g / 255, else 0."""
    if binarize:
        return (images / 255).bernoulli().long()
    return images.long()


@torch.no_grad()
def test(model: PixelCNN, x: Tensor, labels: Tensor) -> dict[str, float]:
    """-log p(x) of test values: nats per image, and bits per pixel or per code."""
    parts = zip(x.split(100), labels.split(100))
    log_p = torch.cat([model.log_prob(*part) for part in parts])
    nats = -log_p.mean().item()
    return {"test_nats": nats, "test_bits_per_dim": nats / math.log(2) / x[0].numel()}


def train(opt: Namespace) -> Path:
    """Train, and return the run's folder. Raises InputError, an OSError, for bad data or options."""
    opt = copy.copy(opt)
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group()
    device = find_device(opt.device)
    # A resumed run on codes has their hash. A new run is on codes if the folder holds a run of vqvae.py.
    is_folder = opt.dataset and opt.dataset not in NAMED
    if opt.codes_hash or (is_folder and Path(opt.dataset, "checkpoint.pt").exists()):
        images, labels, test_images, test_labels = load_codes(opt)
    else:
        # For data that is not a folder of images, replace this line. Images are uint8 (N, 1, H, W), with H
        # and W equal to opt.img_size. Labels are int64 (N,), class numbers from 0, and classes is the list of
        # their names, which become names of folders. Leave out --dataset: then every tenth image is for the
        # test.
        images, labels, opt.classes = load_data(opt)
        images, labels, test_images, test_labels = hold_out(opt, images, labels)
        opt.n_values = 2 if opt.binarize else 256
    # All images are kept on the device.
    loader = make_loader(images.to(device), labels.to(device), opt.batch_size)
    seed("test images")  # with --binarize, their black and white is always the same
    test_x = to_values(test_images, opt.binarize).to(device)
    test_labels = test_labels.to(device)

    torch.manual_seed(opt.seed)
    model = new_model(opt).to(device, memory_format=torch.channels_last)  # faster convolutions
    model_avg = copy.deepcopy(model).eval().requires_grad_(False)  # for tests, sample grids and load()
    optimizer = torch.optim.Adam(model.parameters(), opt.lr, (opt.b1, opt.b2), fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=opt.amp)

    # With --conditional, column k of a sample grid is class k; if there are fewer than 10, they repeat.
    grid_labels = torch.arange(30, device=device) % 10 % len(opt.classes)

    # Makes the run's folder or, with --resume, restores these parts and the number of steps done.
    run = Run(opt, loader, model=model, model_avg=model_avg, optimizer=optimizer)
    if opt.codes_hash and RANK == 0:
        model_avg.decoder = run.folder / "decoder.pt2"
        decoder = Path(opt.dataset, "decoder.pt2").read_bytes()
        with replacing(model_avg.decoder) as file:  # a copy, so that drawing needs no run of vqvae.py
            file.write_bytes(decoder)
    for epoch in range(run.step // len(loader), opt.n_epochs):
        seed(opt.seed, "epoch", epoch)  # a resume repeats the order of the images
        # After a resume, this skips the batches of the epoch that are done; otherwise none.
        for batch, y in itertools.islice(loader, run.step % len(loader), None):
            seed(opt.seed, "step", run.step, RANK)  # a resume repeats the random numbers of each step
            x = to_values(batch[RANK::WORLD], opt.binarize)  # black and white is drawn anew in each epoch
            y = y[RANK::WORLD]

            with autocast:
                nats = -model.log_prob(x, y).mean()  # log_prob itself changes to float32 for the loss
            optimizer.zero_grad()
            nats.backward()
            average_gradients(model)
            optimizer.step()

            update_average(model_avg, model, opt.ema, run.step)
            run.end_step(nats=nats)
            if run.step % opt.sample_interval == 0 or run.step == run.last_step:
                seed(opt.seed, "grid")  # the same random numbers each time
                drawn = model_avg.sample(grid_labels)
                run.save_grid("sample", model_avg.images(drawn), 10)
                run.record(**test(model_avg, test_x, test_labels))
            run.save_if_due()

    run.finish()
    return run.folder


# ---------------------------------------------------------------- load and generate


def new_model(opt: Namespace) -> PixelCNN:
    network = GatedPixelCNN if opt.arch == "gated" else MaskedPixelCNN
    n_classes = len(opt.classes) if opt.conditional else 0
    return network(opt.n_values, opt.img_size, opt.hidden_dim, opt.n_layers, n_classes)


def load(folder: str | Path, device: str | torch.device = "cpu") -> PixelCNN:
    """The averaged model of a run, in eval mode, with the run's options as `model.options`.

    model.log_prob(x, labels) is log p(x) in nats, model.sample(labels) draws x, and model.images(x) makes
    images of x, values (N, 1, H, W) of type int64 below model.n_values. Label k is the class
    model.options.classes[k]; without --conditional only the number of labels matters.
    Raises InputError if the folder is not that of a run of this script.
    """
    state = read_checkpoint(folder)
    options = Namespace(**state["options"])
    model = new_model(options)
    model.load_state_dict(state["model_avg"])
    if options.codes_hash:
        model.decoder = Path(folder, "decoder.pt2")
    model.options = options
    return model.to(device).eval().requires_grad_(False)


def generate(opt: Namespace) -> Path:
    """Write opt.generate images; with --conditional evenly over the classes, in one sub-folder per class."""
    device = find_device(opt.device)
    model = load(opt.resume, device)
    folder = new_folder(Path(opt.resume, "generated"))
    labels = torch.arange(opt.generate, device=device) % len(opt.classes)
    torch.manual_seed(opt.seed)
    n_drawn = 0
    for part in labels.split(100):
        for image, label in zip(model.images(model.sample(part)), part):
            place = folder / opt.classes[label] if opt.conditional else folder
            place.mkdir(exist_ok=True)
            with replacing(place / f"{n_drawn:06}.png") as file:
                save_image(image, file)
            n_drawn += 1
        say(f'{n_drawn} of {opt.generate} images in "{folder}"')
    return folder


# ================================================================ plumbing: the same in every script
# From here to main, each script of the collection has the same text, so that each stands alone; a few lines
# serve only some of them.
# ---------------------------------------------------------------- options


class InputError(OSError):
    """Something that the user can put right. Like any OSError, it is reported in one line."""


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the description as it is written, and the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


def number(kind: type, low: float, below: float = 1e18) -> Callable[[str], float]:
    """An argparse type: a number of that kind, at least `low` and less than `below`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value < below:  # so nan is refused, too
            raise argparse.ArgumentTypeError(f"{text}: must be at least {low:g} and less than {below:g}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


count = number(int, 1)
positive = number(float, 1e-9)
fraction = number(float, 0, 1)
ON_OFF = argparse.BooleanOptionalAction

# What may change when a run is resumed, in addition to USES. A data set may have moved: Run.restore
# compares the number of its images and its classes.
MAY_CHANGE = {"n_epochs", "sample_interval", "dataset", "data_dir", "n_cpu", "device", "amp", "resume"}


def parse_and_check(p: ArgumentParser, argv: list[str] | None) -> Namespace:
    """Parse argv. With --resume, the run's options are the defaults, and few of them may change."""
    opt = p.parse_args(argv)
    uses = sorted(name for name in USES if getattr(opt, name) is not None)
    if uses and (opt.resume is None or WORLD > 1):
        p.error(f"--{uses[0]} needs --resume RUN, the run to use, and a single process, without torchrun")
    if opt.resume is not None:
        saved = read_checkpoint(opt.resume)["options"]
        p.set_defaults(**saved)  # for what argv leaves out; sets opt.classes, too, which train() has saved
        opt = p.parse_args(argv)
        for name, value in vars(opt).items():
            may_change = name in MAY_CHANGE | USES or (uses and name == "seed")
            if value != saved.get(name, value) and not may_change:
                p.error(f"--{name} {value}: this run has {saved[name]}; start a new one")
    return opt


# ---------------------------------------------------------------- devices and processes

# Under torchrun each process trains on its share of every batch, with its own noise and batch-norm
# statistics; gradients are averaged. Only the first process writes files and reports.
WORLD = int(os.environ.get("WORLD_SIZE") or 1)  # the number of processes
RANK = int(os.environ.get("RANK") or 0) if WORLD > 1 else 0  # this one's number


def find_device(name: str) -> torch.device:
    """The device of that name, tried, or the best one if it is "auto". Raises InputError."""
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.device(best if name == "auto" else name)
        if WORLD > 1 and device.type != "cpu":
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
            device = torch.device(device.type)  # the one of that index
        # A trial of the device. On a CPU its 32 MB matter, too: when they are freed, glibc begins to keep
        # blocks up to that size for reuse, which makes steps faster.
        torch.zeros(8_000_000, device=device)[0].item()
    except (RuntimeError, AssertionError, ImportError) as e:
        raise InputError(f"--device {name} does not work here ({shorten(str(e), 300)}); use cpu") from e
    return device


def average_gradients(model: nn.Module) -> None:
    """Average the gradients over the processes of torchrun."""
    if WORLD > 1:
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= WORLD


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights, and batch norm's statistics, towards the model's.

    Early on they move faster (with a decay of 0.999, for 9,000 steps), so that the untrained weights do not
    stay in the average.
    """
    decay = min(decay, (1 + step) / (10 + step))
    for a, b in zip(average.state_dict().values(), model.state_dict().values()):
        if a.is_floating_point():  # not batch norm's counter
            a.lerp_(b, 1 - decay)


def seed(*key: int | str) -> None:
    """Seed torch from a key such as (seed, "step", 17), so that any step can be repeated by itself.

    A resumed run therefore needs no saved random state.
    """
    # Where there is only a CPU, seeding its generator alone is faster than asking for all kinds of devices.
    rng = torch if torch.accelerator.is_available() else torch.default_generator
    rng.manual_seed(random.Random(repr(key)).getrandbits(64))


def say(text: str) -> None:
    """Print, in the first process. A print that fails does not stop the training."""
    if RANK == 0:
        with suppress(OSError, ValueError):  # a closed pipe; a terminal that cannot encode the text
            print(text, flush=True)


# ---------------------------------------------------------------- data

TORCHVISION = {  # its class for each data set, and the folder that it creates
    "mnist": (datasets.MNIST, "MNIST"),
    "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST"),
    "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
}
NAMED = ["digits", *TORCHVISION]


def load_data(opt: Namespace, train: bool = True) -> tuple[Tensor, Tensor, list[str]]:
    """Images, uint8 (N, channels, img_size, img_size), labels (N,) and the names of the classes.

    With train=False, they are the test images of a named data set; a folder has none, and all its images are
    returned. Sets opt.dataset if it is None. Raises InputError if there is no such data, or if it is damaged.
    """
    if opt.dataset is None:
        opt.dataset = "mnist"
        try:
            download("mnist", opt.data_dir)
        except InputError as e:
            say(f"warning: {e}; using --dataset digits, which is built in")
            opt.dataset = "digits"
    if opt.dataset == "digits":
        images, labels, classes = draw_digits(10_000 if train else 2000)
    elif opt.dataset in TORCHVISION:
        images, labels, classes = load_torchvision(opt.dataset, opt.data_dir, train)
    else:
        images, labels, classes = load_folder(opt)
    if opt.channels not in (None, images.shape[1]):
        images = v2.functional.rgb_to_grayscale(images, opt.channels)  # or grey in three channels
    counts = Counter(labels.tolist())
    per_class = ", ".join(f"{name}: {counts[k]}" for k, name in enumerate(classes))
    say(f"{opt.dataset}: {len(images)} images ({shorten(per_class, 200)})")
    return v2.functional.resize(images, [opt.img_size, opt.img_size]), labels, classes


def load_torchvision(name: str, data_dir: str, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    download(name, data_dir)
    dataset, folder = TORCHVISION[name]
    try:
        data = dataset(data_dir, train)
    except Exception as e:  # torchvision raises many kinds
        place = Path(data_dir, folder)
        raise InputError(f'"{place}" is damaged or incomplete: remove it to download it again ({e!r})') from e
    images = torch.as_tensor(data.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    # MNIST's are called "0 - zero"; and they become names of folders.
    classes = [name.split(" - ")[0].replace("/", " or ") for name in data.classes]
    return images, torch.as_tensor(data.targets), classes


def download(name: str, data_dir: str) -> None:
    """Download a data set unless it is there. Raises InputError if that fails.

    It is put in place in one go, so that no other process ever finds half of it.
    """
    dataset, folder = TORCHVISION[name]
    place = Path(data_dir, folder)
    reason = ""
    if RANK == 0 and not place.exists():
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(20)  # seconds; a dead network should not block for ever
        try:
            Path(data_dir).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="download-", dir=data_dir) as new:
                dataset(new, download=True)
                Path(new, folder).rename(place)
        except Exception as e:  # torchvision raises many kinds
            reason = shorten(str(e), 300)
        finally:
            socket.setdefaulttimeout(timeout)
    if WORLD > 1:
        dist.barrier()
    if not place.exists():
        raise InputError(f'{name} is not in "{data_dir}" and cannot be downloaded ({reason})')


SPLITS = {"train", "test", "val", "valid", "validation"}


def load_folder(opt: Namespace) -> tuple[Tensor, Tensor, list[str]]:
    """The images of a folder, decoded once. A sub-folder is a class; without any, there is one class."""
    root = Path(opt.dataset)
    if not opt.dataset or not root.is_dir():
        raise InputError(f'"{opt.dataset}" is not a folder; data sets with a name are {", ".join(NAMED)}')
    files, others = [], Counter()
    for file in find_files(root):
        if file.suffix.lower() in datasets.folder.IMG_EXTENSIONS:
            files.append(file)
        else:
            others[file.suffix or file.name] += 1
    if others:
        kinds = ", ".join(f"{n} {kind}" for kind, n in others.items())
        say(f"warning: {root}: not read as images: {shorten(kinds, 200)}")
    if not files:
        raise InputError(f'"{root}": no images there')
    n_loose = sum(file.parent == root for file in files)
    if 0 < n_loose < len(files):
        raise InputError(f'"{root}": move {n_loose} images into a sub-folder, as sub-folders are the classes')
    names = ["all" if n_loose else file.relative_to(root).parts[0] for file in files]
    classes = sorted(set(names))
    if not n_loose and SPLITS.issuperset(name.lower() for name in classes):
        raise InputError(f'"{root}" holds {", ".join(classes)}, not classes: give the path of one of them')

    channels = opt.channels or 3
    images = torch.empty(len(files), channels, opt.img_size, opt.img_size, dtype=torch.uint8)
    damaged = []

    def read(i: int) -> None:
        try:
            images[i] = read_image(files[i], opt.img_size, channels)
        except Exception as e:  # Pillow raises many kinds
            damaged.append(f"{files[i]} ({e})")

    with ThreadPoolExecutor(opt.n_cpu) as pool:  # Pillow decodes in parallel
        list(pool.map(read, range(len(files))))
    if damaged:
        text = shorten(", ".join(sorted(damaged)), 2000)
        raise InputError(f"repair or remove what cannot be read: {text}")
    return images, torch.tensor([classes.index(name) for name in names]), classes


def find_files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """The files in a folder and below, sorted. Skips hidden ones, and links back to a folder above."""
    above |= {folder.resolve(), *folder.resolve().parents}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif path.resolve() not in above:
            yield from find_files(path, above)


def read_image(file: Path, img_size: int, channels: int) -> Tensor:
    """An image, upright and cut to a square about its centre: uint8 (channels, img_size, img_size)."""
    with Image.open(file) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            raise ValueError("more than 8 bits per channel: convert it")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (img_size, img_size))
        return v2.functional.pil_to_tensor(image.convert("L") if channels == 1 else image)


def draw_digits(n: int) -> tuple[Tensor, Tensor, list[str]]:
    """n digits of Pillow's font, rotated, shifted, scaled and sheared at random. n is the seed, too."""
    font = ImageFont.load_default(26)
    distort = v2.RandomAffine(15, (0.05, 0.05), (0.85, 1.15), 10, v2.InterpolationMode.BILINEAR)
    images = []
    torch.manual_seed(n)
    for i in range(n):
        glyph = Image.new("L", (28, 28))
        ImageDraw.Draw(glyph).text((14, 14), str(i % 10), 255, font, anchor="mm")
        images.append(v2.functional.pil_to_tensor(distort(glyph)))
    return torch.stack(images), torch.arange(n) % 10, list("0123456789")


def make_loader(images: Tensor, labels: Tensor, batch_size: int) -> DataLoader:
    """Shuffled batches of images in memory, without what is left over at the end of an epoch."""
    if images.is_floating_point():
        raise TypeError("images must be whole numbers, from 0 to 255")
    if batch_size > len(images):
        raise InputError(f"--batch_size {batch_size} is more than the {len(images)} training images")
    if batch_size % WORLD or batch_size < 2 * WORLD:
        raise InputError(f"--batch_size {batch_size}: {WORLD} processes need equal shares, 2 images or more")
    data = TensorDataset(images, labels)
    # The sampler yields lists of indices, so that a whole batch is looked up at once.
    sampler = BatchSampler(RandomSampler(data), batch_size, drop_last=True)
    return DataLoader(data, sampler=sampler, batch_size=None)


# ---------------------------------------------------------------- runs

CHECKPOINT_SECONDS = 30  # at least, between two checkpoints: about what a stop may cost


class Run:
    """A run: its folder, step and log. A checkpoint holds the options, step, log and the state of `parts`."""

    def __init__(self, opt: Namespace, loader: DataLoader, **parts):
        self.opt = opt
        self.loader = loader
        self.parts = parts
        self.data = f"{len(loader.dataset)} images of {', '.join(opt.classes)}"
        self.last_step = opt.n_epochs * len(loader)
        self.step = 0
        self.log = []
        self.sums = {}  # of the metrics since the last record
        self.n_steps = 0  # in the sums
        self.start = time.perf_counter()  # after a resume, moved back by the seconds trained before
        if opt.resume is not None:
            self.folder = Path(opt.resume)
            self.restore(read_checkpoint(self.folder))
        else:
            self.folder = new_folder(Path(opt.out_dir))
        self.save()
        say(
            f"{opt.n_epochs} epochs of {len(loader)} steps, {self.step} steps done\n"
            f'to continue after a stop: --resume "{self.folder}"'
        )

    def restore(self, state: dict) -> None:
        """Go back to where a checkpoint was written. Raises InputError if the data is not the same."""
        if self.data != state["data"]:
            raise InputError(
                f"the data has {shorten(self.data, 300)}; "
                f"the run was started with {shorten(state['data'], 300)}"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        self.log = state["log"]
        self.sums = state["sums"]
        self.n_steps = state["n_steps"]
        self.start -= state["seconds"]

    def end_step(self, **metrics: Tensor) -> None:
        """Count a step, and add up its metrics. Every step must give the same names."""
        self.step += 1
        self.n_steps += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()

    def record(self, **more: float) -> None:
        """Log and print the means of the metrics since the last record, and `more`.

        Every call must give the same names in `more`, as log.csv has one header.
        """
        seconds = time.perf_counter() - self.start
        minutes_left = (self.last_step / self.step - 1) * seconds / 60
        row = {
            "step": self.step,
            "epoch": round(self.step / len(self.loader), 2),
            "seconds": round(seconds, 2),
        }
        row |= {name: float(total) / self.n_steps for name, total in self.sums.items()} | more
        self.log.append(row)
        self.sums = {}
        self.n_steps = 0
        numbers = "  ".join(f"{name} {value:.6g}" for name, value in row.items())
        say(f"{numbers}  {minutes_left:.1f} minutes left")

    def save_if_due(self) -> None:
        """Save if CHECKPOINT_SECONDS have passed since the last time."""
        if time.perf_counter() > self.saved + CHECKPOINT_SECONDS:
            self.save()
            say(f"step {self.step}")

    def save(self) -> None:
        """Write checkpoint.pt and log.csv. Raises InputError if the weights are not finite."""
        self.saved = time.perf_counter()
        state = {
            "script": SCRIPT,
            "options": json.loads(json.dumps(vars(self.opt), default=str)),  # a Path becomes a str
            "data": self.data,
            "step": self.step,
            "seconds": self.saved - self.start,
            "log": self.log,
            "sums": self.sums,
            "n_steps": self.n_steps,
        }
        for name, part in self.parts.items():
            if isinstance(part, nn.Module) and not all(p.isfinite().all() for p in part.parameters()):
                raise InputError(f"by step {self.step}, {name} is not finite; start again with a lower --lr")
            state[name] = part.state_dict()
        if RANK > 0:
            return  # all processes have checked the weights; one writes
        buffer = io.BytesIO()  # torch.save would hide that the disk is full
        torch.save(state, buffer)
        with replacing(self.folder / "checkpoint.pt") as file:
            file.write_bytes(buffer.getbuffer())
        if self.log:
            with replacing(self.folder / "log.csv") as file, open(file, "w", newline="") as table:
                writer = csv.DictWriter(table, self.log[-1])
                writer.writeheader()
                writer.writerows(self.log)

    def save_grid(self, name: str, images: Tensor, n_columns: int) -> None:
        """Save images (N, C, H, W) in [0, 1] as a grid, images/name_step.png."""
        if RANK == 0:
            (self.folder / "images").mkdir(exist_ok=True)
            with replacing(self.folder / "images" / f"{name}_{self.step:08}.png") as file:
                save_image(images, file, nrow=n_columns)

    def finish(self) -> None:
        """Write the last checkpoint."""
        self.save()
        say(f'done; to train longer: --resume "{self.folder}" --n_epochs N')


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yields a temporary path, which replaces `file` at the end; if writing fails, `file` stays as it was."""
    temporary = file.with_name(f".{os.getpid()}-{file.name}")
    try:
        yield temporary
        temporary.replace(file)
    except OSError as e:
        raise OSError(f'"{file}" cannot be written ({e})') from e
    finally:
        with suppress(OSError):
            temporary.unlink()


def read_checkpoint(folder: str | Path) -> dict:
    """The checkpoint of a run. Raises InputError if it is missing, damaged or another script's."""
    file = Path(folder, "checkpoint.pt")
    if not file.exists():
        raise InputError(f'"{folder}" is not the folder of a run: it has no checkpoint.pt')
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        script = state["script"]
    except Exception as e:  # torch and pickle raise many kinds
        raise InputError(f'"{file}" cannot be read ({shorten(repr(e), 300)})') from e
    if script != SCRIPT:
        raise InputError(f'"{folder}" is a run of {script}.py: use that, not {SCRIPT}.py')
    return state


def new_folder(path: Path) -> Path:
    """Make the folder path, or path-2, path-3, ... if it exists: nothing is overwritten.

    Under torchrun the first process makes it, and all return its name.
    """
    folder = path
    n = 1
    while RANK == 0:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if not folder.is_dir():
                raise
            n += 1
            folder = path.parent / f"{path.name or 'run'}-{n}"
    if WORLD > 1:
        names = [str(folder)]
        dist.broadcast_object_list(names)
        folder = Path(names[0])
    return folder


def main() -> None:
    with suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals without UTF-8
    try:
        opt = parse_args()
        if opt.generate:
            generate(opt)
        else:
            train(opt)
    except OSError as e:
        sys.exit(f"{SCRIPT}.py: error: {' '.join(str(e).split())}")
    except KeyboardInterrupt:
        say("\nstopped; a training that has begun continues with --resume RUN")
        sys.exit(130)


if __name__ == "__main__":
    main()
