"""Conditional GAN: a generator that draws the class it is asked for, in one file.

A generator G turns noise z and a label y into an image; a discriminator D scores how real an image
looks for its label. Both are trained with least squares, G pulling the score of its fakes to 1,
D pulling it to 0 and that of real images to 1. A real image with a wrong label y' is a fake too, of weight m:

    min_G      E[(D(G(z, y), y) - 1)^2]
    min_D  1/2 E[(D(x, y) - 1)^2] + (1 - m)/2 E[D(G(z, y), y)^2] + m/2 E[D(x, y')^2]

Conditional GAN: Mirza & Osindero 2014, arXiv:1411.1784 (equation 2). Least squares: Mao et al. 2017,
arXiv:1611.04076 (equation 9). The label in D: Miyato & Koyama 2018, arXiv:1802.05637. Wrong labels: Reed et al.
2016, arXiv:1605.05396 (algorithm 1). Noise on what D sees: Sønderby et al. 2016, arXiv:1610.04490. Averaged generator:
Yazici et al. 2019, arXiv:1806.04498.

The label as a projection and the wrong labels are there for a quick start: after a minute on two CPU cores 97 % of the
digits drawn are those asked for. The papers' own recipe is --conditioning concat --mismatch 0.

    python cgan.py --n_epochs 20                          # MNIST; without a network: built-in digits
    python cgan.py --arch conv --dataset path/to/folder   # your images, one sub-folder a class
    python cgan.py --resume runs/cgan --generate 100 --labels 3 7
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy"]
# ///

import argparse
import contextlib
import copy
import csv
import datetime
import functools
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import save_image

SCRIPT = "cgan"  # in checkpoints: only the script that wrote one can read it

# ---------------------------------------------------------------- options


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the options from argv (default: the command line).

    With --resume they come from the checkpoint. Raises SystemExit (status 2) for a bad option and
    UserError for a checkpoint that cannot be read.
    """
    p = Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--n_epochs", type=number(int), default=200, help="passes over the training images; 0 only sets the run up")
    add("--batch_size", type=number(int, 2), default=64, help="images a step; 2 or more, for batch norm")
    add("--lr", type=number(float, above=0), default=2e-4, help="Adam's learning rate, above 0")
    add("--b1", type=number(float, below=1), default=0.5, help="Adam's decay of the mean gradient, in [0, 1)")
    add("--b2", type=number(float, below=1), default=0.999, help="Adam's decay of the mean square, in [0, 1)")
    add("--arch", choices=["mlp", "conv"], default="mlp", help="both networks fully connected, or convolutional")
    add("--conditioning", choices=["projection", "concat"], default="projection", help="how D is given the label")
    add("--mismatch", type=number(float, below=1), default=0.1, help="weight of wrongly labelled images in D; 0: off")
    add("--noise", type=number(float), help="deviation of the noise on what D sees; None: 0, with --arch conv 0.2")
    add("--ema", type=number(float, below=1), default=0.999, help="decay a step of G's average, in [0, 1); 0: off")
    add("--latent_dim", type=number(int, 1), default=100, help="size of z")
    add("--img_size", type=number(int, 1), default=32, help="images are resized to this side; conv: a multiple of 8")
    add("--channels", type=int, choices=[1, 3], help="1 is grey, 3 is colour; None: as in the data")
    add("--n_classes", type=number(int, 1), help="number of classes; None: as in the data")
    add("--sample_interval", type=number(int, 1), default=400, help="batches between sample grids")
    add("--n_cpu", type=number(int), default=8, help="most processes that decode an image folder; 0: only this one")
    add("--dataset", default="mnist", help="mnist, fashion_mnist, cifar10, digits, or a folder of class sub-folders")
    add("--data_dir", default="data", help="where data sets are kept and downloaded to")
    add("--out_dir", default="runs/cgan", help="the run's folder; if it is in use, a number is added")
    add("--seed", type=number(int), default=0, help="same seed, same machine: same images")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps ...; auto: the accelerator if there is one, or cpu")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile, for accelerators")
    add("--resume", metavar="PATH", help="run folder or checkpoint to continue, with the options it was made with")
    add("--generate", type=number(int, 1), metavar="N", help="with --resume: no training, write N images")
    add("--labels", type=number(int), nargs="+", metavar="Y", help="with --generate: the classes to draw; None: all")
    opt = finish_options(p, argv, instead=("generate",), free=("seed", "labels"))
    if opt.noise is None:
        opt.noise = {"mlp": 0.0, "conv": 0.2}[opt.arch]
    if opt.arch == "conv" and opt.img_size % 8:
        p.error(f"--img_size {opt.img_size}: --arch conv needs a multiple of 8")
    if opt.labels and not opt.generate:
        p.error("--labels goes with --generate")
    if opt.labels and max(opt.labels) >= opt.n_classes:
        p.error(f"--labels {max(opt.labels)}: the classes are 0 to {opt.n_classes - 1}")
    return opt


# ---------------------------------------------------------------- networks


class Generator(nn.Module):
    """z (N, latent_dim), standard normal, and labels (N,) -> images (N, channels, img_size, img_size) in [-1, 1]."""

    def __init__(self, latent_dim: int, n_classes: int, img_size: int, channels: int, arch: str = "mlp"):
        super().__init__()
        self.embed = nn.Embedding(n_classes, n_classes)
        if arch == "mlp":
            layers = [nn.Linear(latent_dim + n_classes, 128), nn.LeakyReLU(0.2)]
            for n_in, n_out in [(128, 256), (256, 512), (512, 1024)]:
                layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.LeakyReLU(0.2)]
            layers += [nn.Linear(1024, channels * img_size**2), nn.Unflatten(1, (channels, img_size, img_size))]
        else:
            side = img_size // 8
            layers = [nn.Linear(latent_dim + n_classes, 128 * side**2), nn.Unflatten(1, (128, side, side))]
            for n_in, n_out in [(128, 64), (64, 32), (32, channels)]:
                layers += [nn.BatchNorm2d(n_in), nn.ReLU(), nn.ConvTranspose2d(n_in, n_out, 4, 2, 1)]
        self.net = nn.Sequential(*layers, nn.Tanh())

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.net(torch.cat([z, self.embed(labels)], 1))


class Discriminator(nn.Module):
    """Images (N, channels, img_size, img_size) in [-1, 1] and labels (N,) -> scores (N, 1): 1 for real, 0 for fake.

    Labels (N, K), K for each image, give scores (N, K). With features h(x) and an embedding e(y), --conditioning
    projection scores w.h(x) + e(y).h(x) (arXiv:1802.05637, equation 3), so that a second label costs next to nothing;
    concat makes e(y) one more input of the network, as arXiv:1411.1784 does. In training D sees images through noise
    (arXiv:1610.04490): a black background is exactly -1, which no tanh reaches, and would tell every fake. With
    --arch conv on MNIST, recall was 0.39 after 20 epochs without noise, and 0.73 after 10 with 0.2.
    """

    def __init__(
        self,
        n_classes: int,
        img_size: int,
        channels: int,
        arch: str = "mlp",
        conditioning: str = "projection",
        noise: float = 0.0,
    ):
        super().__init__()
        self.arch, self.concat, self.noise = arch, conditioning == "concat", noise
        if arch == "mlp":
            n_features, n_embed = 512, n_classes
            layers = [nn.Linear(channels * img_size**2 + n_embed * self.concat, 512), nn.LeakyReLU(0.2)]
            for _ in range(2):
                layers += [nn.Linear(512, 512), nn.Dropout(0.4), nn.LeakyReLU(0.2)]
        else:  # concat: the label is one more channel, an image of its own
            n_features, n_embed = 128 * (img_size // 8) ** 2, img_size**2
            layers = []
            for n_in, n_out in [(channels + self.concat, 32), (32, 64), (64, 128)]:
                layers += [nn.Conv2d(n_in, n_out, 4, 2, 1), nn.LeakyReLU(0.2)]
            layers += [nn.Flatten(), nn.Dropout(0.4)]
        self.features, self.score = nn.Sequential(*layers), nn.Linear(n_features, 1)
        self.embed = nn.Embedding(n_classes, n_embed if self.concat else n_features)
        if not self.concat:  # so that e(y).h(x) does not drown w.h(x) at first, as entries of size 1 would
            nn.init.normal_(self.embed.weight, std=n_features**-0.5)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.training and self.noise:  # these are this process's rows: the noise is drawn for the whole batch
            noise = torch.randn(len(images) * WORLD, *images.shape[1:], device=images.device)
            images = images + self.noise * share(noise)
        labels = labels.view(len(images), -1)
        e = self.embed(labels)
        if self.concat:
            x = images.repeat_interleave(labels.shape[1], 0)
            x = x.flatten(1) if self.arch == "mlp" else x
            return self.score(self.features(torch.cat([x, e.view(len(x), -1, *x.shape[2:])], 1))).view_as(labels)
        h = self.features(images.flatten(1) if self.arch == "mlp" else images)
        return self.score(h) + (e * h[:, None]).sum(2)


# ---------------------------------------------------------------- one training step


def generator_step(G: nn.Module, D: nn.Module, opt_G: Optimizer, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pull D's scores of fakes to 1 (arXiv:1611.04076, equation 9); D's weights and gradients stay as they are.

    Returns the loss and the scores (N, 1). The scores keep their graph for discriminator_step: D sees a fake once.
    """
    fake_scores = D(G(z, labels), labels)
    loss = (fake_scores - 1).square().mean()
    opt_G.zero_grad()
    loss.backward(inputs=list(G.parameters()), retain_graph=True)
    mean_gradients(G)
    opt_G.step()
    return loss.detach(), fake_scores


def discriminator_step(
    D: nn.Module, opt_D: Optimizer, real: Tensor, labels: Tensor, fake_scores: Tensor, mismatch: float = 0.0
) -> Tensor:
    """Pull D's scores of real images, in [-1, 1], to 1 and those of fakes to 0; G's weights and gradients stay.

    mismatch > 0: labels are (N, 2), right and wrong ones; a real image with its wrong label is a fake of that weight
    (arXiv:1605.05396, algorithm 1). Returns the loss.
    """
    scores = D(real, labels)
    loss_fake = fake_scores.square().mean()
    if mismatch:
        loss_fake = (1 - mismatch) * loss_fake + mismatch * scores[:, 1].square().mean()
    loss = ((scores[:, 0] - 1).square().mean() + loss_fake) / 2
    opt_D.zero_grad()
    loss.backward(inputs=list(D.parameters()))
    mean_gradients(D)
    opt_D.step()
    return loss.detach()


def average(G_avg: Generator, G: Generator, decay: float, step: int) -> None:
    """Move the averaged generator towards G. Its memory starts short, so that a short run is not stuck at the start."""
    decay = min(decay, (1 + step) / (10 + step)) if decay else 0.0
    pairs = zip(G_avg.state_dict().values(), G.state_dict().values())
    averages, values = zip(*((a, v) for a, v in pairs if a.is_floating_point()))
    get_ema_multi_avg_fn(decay)(averages, values, None)


# ---------------------------------------------------------------- training


def train(opt: argparse.Namespace) -> Path:
    """Train with the options of parse_args; returns the run's folder.

    Raises UserError for what the user can put right; Ctrl-C and SIGTERM save a checkpoint and raise SystemExit.
    """
    opt = copy.copy(opt)  # load_data fills in what the data decides
    join_processes()
    device = find_device(opt.device)
    images, labels = load_data(opt, device)
    batches = Batches(images, labels, opt.batch_size)  # or a DataLoader of (images in [0, 1], labels), drop_last=True

    torch.manual_seed(opt.seed)
    G = Generator(opt.latent_dim, opt.n_classes, opt.img_size, opt.channels, opt.arch)
    D = Discriminator(opt.n_classes, opt.img_size, opt.channels, opt.arch, opt.conditioning, opt.noise)
    for network in (G, D):
        network.to(device, memory_format=torch.channels_last)  # faster for convolutions
    G_avg = copy.deepcopy(G).eval()
    opt_G = torch.optim.Adam(G.parameters(), lr=opt.lr, betas=(opt.b1, opt.b2), fused=True)
    opt_D = torch.optim.Adam(D.parameters(), lr=opt.lr, betas=(opt.b1, opt.b2), fused=True)
    distribute(G, D)
    if opt.compile:
        G.compile()
        D.compile()

    mismatch = opt.mismatch if opt.n_classes > 1 else 0.0
    columns = min(opt.n_classes, 10)  # column k of the sample grid is class k; a row shares its z
    grid_z = torch.randn(10, opt.latent_dim).repeat_interleave(columns, 0).to(device)
    grid_labels = torch.arange(columns, device=device).repeat(10)

    with Run(opt, device, len(batches), G=G, D=D, G_avg=G_avg, opt_G=opt_G, opt_D=opt_D) as run:
        if run.batches_done == 0:
            run.picture("sample", draw(G_avg, grid_z, grid_labels), columns)
        for _ in run.epochs():
            for real, real_labels in run.steps(batches):
                z = share(torch.randn(opt.batch_size, opt.latent_dim, device=device))
                fake_labels = share(torch.randint(opt.n_classes, (opt.batch_size,), device=device))
                if mismatch:  # beside each label another one
                    others = share(torch.randint(1, opt.n_classes, (opt.batch_size,), device=device))
                    real_labels = torch.stack([real_labels, (real_labels + others) % opt.n_classes], 1)
                g_loss, fake_scores = generator_step(G, D, opt_G, z, fake_labels)
                d_loss = discriminator_step(D, opt_D, real * 2 - 1, real_labels, fake_scores, mismatch)
                average(G_avg, G, opt.ema, run.batches_done)
                run.record(d_loss=d_loss, g_loss=g_loss)
                if run.batches_done % opt.sample_interval == 0:
                    run.picture("sample", draw(G_avg, grid_z, grid_labels), columns)
        run.picture("sample", draw(G_avg, grid_z, grid_labels), columns)
        run.animate("sample", "training.gif")
    return run.folder


@torch.no_grad()
def draw(G: Generator, z: Tensor, labels: Tensor) -> Tensor:
    """G's images, in [0, 1]."""
    return (G(z, labels) + 1) / 2


# ---------------------------------------------------------------- using what was trained


def load(path: str | Path, device: str | torch.device = "cpu") -> Generator:
    """The averaged generator of a run folder or checkpoint, in eval mode; `.options` are those it was trained with.

    G(z, labels) -> images (N, channels, img_size, img_size) in [-1, 1]. Raises UserError if the path has none.
    """
    state = read_checkpoint(path)
    options = state["options"]
    names = ("latent_dim", "n_classes", "img_size", "channels", "arch")
    G = Generator(**{name: options[name] for name in names})
    G.load_state_dict(state["G_avg"])
    G.options = options
    return G.to(device).eval().requires_grad_(False)


def generate(opt: argparse.Namespace) -> Path:
    """Write opt.generate images, spread evenly over the classes, a sub-folder each; returns their folder."""
    device = find_device(opt.device)
    G = load(opt.resume, device)
    classes = sorted(set(opt.labels or range(opt.n_classes)))[: opt.generate]
    folder = new_folder(checkpoint_file(opt.resume).parent / "generated")
    torch.manual_seed(opt.seed)
    for k, label in enumerate(classes):
        n = opt.generate // len(classes) + (k < opt.generate % len(classes))
        for first in range(0, n, 500):
            z = torch.randn(min(500, n - first), opt.latent_dim, device=device)
            images = draw(G, z, torch.full((len(z),), label, device=device))
            write_images(images, folder / f"{label:0{len(str(opt.n_classes - 1))}}", first)  # names sort as classes do
    print(f"{opt.generate} images in {folder}")
    return folder


# ---------------------------------------------------------------- the plumbing
# What stands between "block" and "end of block" is the same in every script of the collection, to the letter.


# --- block: processes
# torchrun starts a script several times and tells each process which one it is. All draw the same shuffle, noise and
# dropout for the whole batch and use their own rows, so that K processes do what one does, up to rounding.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def share(batch: Tensor) -> Tensor:
    """This process's rows of a whole batch."""
    return batch.chunk(WORLD)[RANK]


def mean_gradients(model: nn.Module) -> None:
    """Replace gradients by their means over the processes: those of the whole batch, as losses are means over rows."""
    for p in model.parameters() if WORLD > 1 else ():
        dist.all_reduce(p.grad)
        p.grad /= WORLD


def join_processes() -> None:
    if WORLD > 1 and not dist.is_initialized():
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()


def distribute(*models: nn.Module) -> None:
    """Let batch norm and dropout in training act on the whole batch."""
    for module in itertools.chain(*(model.modules() for model in models)) if WORLD > 1 else ():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.forward = functools.partial(whole_batch_norm, module)
        if isinstance(module, nn.Dropout):
            module.forward = functools.partial(whole_batch_dropout, module)


class Sum(torch.autograd.Function):
    """Sum over the processes: of values going forward, of gradients going back."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        dist.all_reduce(x := x.clone())
        return x

    backward = forward


def whole_batch_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> Tensor:
    if not norm.training:
        return type(norm).forward(norm, x)
    over, n = [d for d in range(x.ndim) if d != 1], x.numel() // x.shape[1] * WORLD
    mean = Sum.apply(x.sum(over, keepdim=True)) / n
    variance = Sum.apply((x - mean).square().sum(over, keepdim=True)) / n
    norm.running_mean.lerp_(mean.detach().flatten(), norm.momentum)
    norm.running_var.lerp_(variance.detach().flatten() * n / (n - 1), norm.momentum)
    norm.num_batches_tracked += 1
    weight, bias = norm.weight.view(mean.shape[1:]), norm.bias.view(mean.shape[1:])
    return (x - mean) * (variance + norm.eps).rsqrt() * weight + bias


def whole_batch_dropout(dropout: nn.Dropout, x: Tensor) -> Tensor:
    ones = torch.ones(len(x) * WORLD, *x.shape[1:], device=x.device)
    return x * share(F.dropout(ones, dropout.p, dropout.training))


def say(text: str, file=None) -> None:
    """Print a line, from one process."""
    if RANK == 0:
        show("")
        print(text, file=file or sys.stdout, flush=True)


def show(text: str) -> None:
    """On a terminal, replace the line by this text."""
    if RANK == 0 and sys.stdout.isatty():
        print(f"\r{text[: shutil.get_terminal_size().columns - 1]}\033[K", end="", flush=True)


# --- end of block


# --- block: options
class UserError(Exception):
    """What only the user can put right. Run as a command, the script prints it in one line and ends."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


def number(kind: type, low: float = 0, above: float = -1, below: float = 2**31) -> Callable[[str], float]:
    """An argparse type: an int or float that is at least `low`, greater than `above` and less than `below`."""
    wanted = "whole number" if kind is int else "number"
    wanted += (f" above {above}" if above >= 0 else f" of {low} or more") + f" and below {below}"

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) < below and value > above:  # false for nan
                return value
        raise argparse.ArgumentTypeError(f"{text} is not a {wanted}")

    return parse


def finish_options(parser: Parser, argv: list[str] | None, instead: tuple, free: tuple) -> argparse.Namespace:
    """Parse argv; with --resume, take from the checkpoint what the command line may not change.

    `instead` names the options that do something else than train, `free` those that may change for it.
    """
    may_change = {"resume", "n_epochs", "sample_interval", "n_cpu", "data_dir", "device", "compile", *instead}
    opt = parser.parse_args(argv)
    # argparse leaves attributes that are there alone: what is not None after this stood on the command line.
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(opt)))))
    given = {name: value for name, value in given.items() if value is not None}
    other = next((name for name in instead if name in given), None)
    if opt.resume:
        saved = read_checkpoint(opt.resume)["options"]
        for name in given.keys() - may_change - set(free if other else ()):
            if given[name] != saved[name]:
                parser.error(f"--{name} {given[name]}: {opt.resume} has {saved[name]}; leave it out or start a new run")
        opt = argparse.Namespace(**saved | dict.fromkeys(["resume", *instead]) | given)
    elif other:
        parser.error(f"--{other} needs --resume with the run folder to take the model from")
    opt.dataset_given = "dataset" in given
    if not other and opt.dataset not in DATASETS and not Path(opt.dataset).is_dir():
        parser.error(f"--dataset {opt.dataset}: not a folder, and not one of {', '.join(DATASETS)}")
    try:
        find_device(opt.device)
    except UserError as e:
        parser.error(str(e))
    return opt


def find_device(name: str) -> torch.device:
    """The device of that name; auto is the accelerator if there is one, else the CPU."""
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    with contextlib.suppress(RuntimeError):
        device = best if name == "auto" else torch.device(name)
        if device.type in ("cpu", best.type):
            return torch.empty(0, device=device).device
    raise UserError(f"--device {name}: not on this machine, which has {best}; --device auto takes what is there")


# --- end of block


# --- block: data
IDX_FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
CIFAR_FILES = ["batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))]
DATASETS = {  # name: class in torchvision, folder in --data_dir, files in that folder
    "mnist": ("MNIST", "MNIST/raw", IDX_FILES),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", IDX_FILES),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", CIFAR_FILES),
    "digits": ("", "", []),
}


def draw_digits(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n pictures of digits, turned, scaled, sheared and shifted at random: uint8 (n, 1, 28, 28), labels (n,)."""
    random = torch.Generator().manual_seed(seed)
    images = torch.empty(n, 1, 28, 28, dtype=torch.uint8)
    for digit in range(10):
        glyph = Image.new("L", (72, 72))
        ImageDraw.Draw(glyph).text((36, 36), str(digit), 255, ImageFont.load_default(72), anchor="mm", stroke_width=1)
        m = len(images[digit::10])
        turn, wide, high, shear, x, y = torch.rand(6, m, generator=random) * 2 - 1
        turn, wide, high = 0.25 * turn, 1 + 0.15 * wide, 1 + 0.1 * high
        # For each picture, the matrix that maps its pixels to points of the glyph, both from -1 to 1.
        row_x = [wide * turn.cos(), wide * (turn.sin() + 0.2 * shear), 0.1 * x]
        row_y = [-high * turn.sin(), high * turn.cos(), 0.1 * y]
        grid = F.affine_grid(torch.stack(row_x + row_y, 1).view(m, 2, 3), [m, 1, 28, 28], align_corners=False)
        source = pil_to_tensor(glyph).float().expand(m, 1, 72, 72)
        images[digit::10] = F.grid_sample(source, grid, align_corners=False).round().byte()
    return images, torch.arange(n) % 10


def download(name: str, data_dir: Path) -> bool:
    """Fetch a data set into data_dir; True if it arrived. What did not arrive whole leaves nothing behind.

    A child process does it and is ended 20 s after its last byte: a network that swallows packets would hang it.
    """
    kind, folder, files = DATASETS[name]
    code = "import sys, torchvision; getattr(torchvision.datasets, sys.argv[1])(sys.argv[2], download=True)"
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir) as temporary:
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        child = subprocess.Popen([sys.executable, "-c", code, kind, temporary], **quiet)
        size, last_byte = 0, time.monotonic()
        try:
            while child.poll() is None and time.monotonic() < last_byte + 20:
                time.sleep(0.1)
                now = sum(file.stat().st_size for file in Path(temporary).rglob("*"))
                if now > size:
                    size, last_byte = now, time.monotonic()
                    show(f"downloading {name}: {size / 1e6:.0f} MB")
        finally:
            child.kill()
        if arrived := child.wait() == 0:
            (data_dir / folder).mkdir(parents=True, exist_ok=True)
            for file in files:
                os.replace(Path(temporary, folder, file), data_dir / folder / file)
    with contextlib.suppress(OSError):
        data_dir.rmdir()  # if it is empty
    return arrived


def read_named(opt: argparse.Namespace, train: bool) -> tuple[Tensor, Tensor]:
    """The training or test split of a named data set: uint8 (N, C, img_size, img_size), labels (N,).

    If MNIST was not asked for by name and cannot be had, opt.dataset becomes "digits".
    """
    kind, folder, files = DATASETS[opt.dataset]
    place = Path(opt.data_dir, folder)
    if not all((place / file).is_file() for file in files) and not download(opt.dataset, Path(opt.data_dir)):
        lacking = f"cannot be downloaded; put {', '.join(files)} into {place}, or use --dataset digits"
        if opt.dataset_given or opt.resume or opt.dataset != "mnist":
            raise UserError(f"--dataset {opt.dataset}: {lacking}")
        say(f"warning: MNIST is not in {place} and cannot be downloaded: using --dataset digits", sys.stderr)
        opt.dataset = "digits"
    if opt.dataset == "digits":
        images, labels = draw_digits(10_000, seed=0) if train else draw_digits(2_000, seed=1)
    else:
        try:
            data = getattr(torchvision.datasets, kind)(opt.data_dir, train=train)
            images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
            images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
            assert len(images) == len(labels), "not as many labels as images"
        except Exception as e:  # torchvision raises many kinds for a damaged file
            split = "training" if train else "test"
            raise UserError(f"{place}: the {split} files are damaged ({first_line(e)}); put whole ones there") from e
    size = [opt.img_size, opt.img_size]
    return torch.cat([resize(part, size, antialias=True) for part in images.split(1000)]), labels


class Decoder(torch.utils.data.Dataset):
    """Item k is the k-th 64 of the image files: uint8 (64, 1 or 3, size, size), or a message naming a broken file."""

    def __init__(self, files: tuple[str, ...], size: int):
        self.files, self.size = files, (size, size)

    def __len__(self) -> int:
        return -(-len(self.files) // 64)

    def __getitem__(self, k: int) -> Tensor | str:
        images = []
        for file in self.files[k * 64 : (k + 1) * 64]:
            try:
                with Image.open(file) as image:
                    image = ImageOps.exif_transpose(image).convert("L" if image.mode in ("1", "L", "LA") else "RGB")
                    images.append(pil_to_tensor(ImageOps.fit(image, self.size, Image.Resampling.BILINEAR)))
            except Exception as e:  # Pillow raises many kinds for a broken file
                return f"{file}: cannot be read as an image ({first_line(e)}); repair or remove it"
        channels = max(len(image) for image in images)
        return torch.stack([image.expand(channels, -1, -1) for image in images])


def open_folder(path: str) -> torchvision.datasets.ImageFolder:
    """A folder with one sub-folder of images a class: `.samples` is a list of (file, label), `.classes` the names."""
    try:
        return torchvision.datasets.ImageFolder(path)
    except FileNotFoundError as e:
        raise UserError(f"{path}: not a folder with one sub-folder of images a class ({first_line(e)})") from e


def decode_files(samples: list[tuple[str, int]], opt: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Image files, cut to a square about the centre: uint8 (N, C, img_size, img_size), labels (N,).

    C is 3 if any image is coloured, else 1.
    """
    files, labels = zip(*samples)
    chunks, done = Decoder(files, opt.img_size), 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(opt.n_cpu, cores, len(chunks) // 16)  # a process is not worth its start for 1000 files
    images = torch.empty(len(files), 1, opt.img_size, opt.img_size, dtype=torch.uint8)
    for chunk in torch.utils.data.DataLoader(chunks, batch_size=None, num_workers=workers):
        if isinstance(chunk, str):
            raise UserError(chunk)
        if chunk.shape[1] > images.shape[1]:  # the first coloured image: what is grey so far gets three channels
            grey, images = images[:done], images.new_empty(len(files), 3, opt.img_size, opt.img_size)
            images[:done] = grey
        images[done : done + len(chunk)] = chunk
        done += len(chunk)
        show(f"decoding {done:,} of {len(files):,} images")
    return images, torch.tensor(labels)


def check_data(opt: argparse.Namespace, images: Tensor, n_classes: int) -> None:
    """Set opt.channels, n_classes and n_images to what the data has; refuse options that contradict it."""
    for name, found in (("channels", images.shape[1]), ("n_classes", n_classes)):
        if getattr(opt, name) not in (None, found):
            raise UserError(f"--{name} {getattr(opt, name)}: {opt.dataset} has {found}; leave the option out")
        setattr(opt, name, found)
    opt.n_images = len(images)
    if opt.batch_size > opt.n_images:
        raise UserError(f"--batch_size {opt.batch_size}: {opt.dataset} has only {opt.n_images} images to train on")
    if opt.batch_size % WORLD:
        raise UserError(f"--batch_size {opt.batch_size}: cannot be shared evenly among {WORLD} processes")


class Batches:
    """Shuffled (images in [0, 1], labels) of a uint8 data set, made on its device. The short last batch is left out."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int):
        self.images, self.labels, self.batch_size = images, labels, batch_size

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), device=self.images.device)
        for rows in order.split(self.batch_size)[: len(self)]:
            yield self.images[rows].float() / 255, self.labels[rows]


# --- end of block


def load_data(opt: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """The training images, uint8 (N, C, img_size, img_size), and labels (N,). Sets what opt lacks of them."""
    if opt.dataset in DATASETS:
        images, labels = read_named(opt, train=True)
        check_data(opt, images, n_classes=10)
    else:
        folder = open_folder(opt.dataset)
        images, labels = decode_files(folder.samples, opt)
        check_data(opt, images, len(folder.classes))
    return images.to(device), labels.to(device)


# --- block: run
class Run:
    """A training's place on disk and its position in time: run folder, log, checkpoint, pictures, what is printed.

    `parts` is what a checkpoint must hold, each with state_dict and load_state_dict. As a context manager it takes
    Ctrl-C and SIGTERM: the batch at hand is finished, a checkpoint written and SystemExit raised.
    """

    def __init__(self, opt: argparse.Namespace, device: torch.device, per_epoch: int, **parts):
        self.opt, self.device, self.per_epoch, self.parts = opt, device, per_epoch, parts
        self.models = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        self.epoch = self.batch = self.batches_done = 0  # epochs done, batches of this epoch done, batches done in all
        self.seconds, self.totals, self.extra = 0.0, {}, {}  # of this epoch: time, summed losses, more for its log row
        self.epoch_random = random_state(device)  # before this epoch's shuffle
        self.resumed, self.signal, self.last_report = {}, 0, 0.0
        if opt.resume:
            self.folder = checkpoint_file(opt.resume).parent
            self.restore(read_checkpoint(opt.resume))
        else:
            try:
                folder = [new_folder(Path(opt.out_dir), "images") if RANK == 0 else None]
            except OSError as e:
                raise UserError(f"--out_dir {opt.out_dir}: {e.strerror}; name a folder that can be written") from e
            if WORLD > 1:
                dist.broadcast_object_list(folder)
            self.folder = folder[0]
            self.save()
        shape = f"{opt.channels}x{opt.img_size}x{opt.img_size}"
        say(f"{SCRIPT} --arch {opt.arch} on {device}: {opt.dataset}, {opt.n_images:,} images of {shape}")
        sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in self.models.items()}
        say("parameters: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
        say(f"writing to {self.folder}")

    def __enter__(self) -> "Run":
        main = threading.current_thread() is threading.main_thread()  # elsewhere signals cannot be taken
        self.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM) if main}
        return self

    def __exit__(self, kind, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if kind is None:
            say(f"pictures: {self.folder / 'images'}\ncheckpoint: {self.folder / 'checkpoint.pt'}")
            say(f"generate: python {Path(__file__).name} --resume {self.folder} --generate 100")
        if dist.is_initialized():
            dist.destroy_process_group()

    def on_signal(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, self.handlers[number])  # a second one ends the program at once

    def epochs(self) -> Iterator[int]:
        """Yield the epochs that are left. Each ends with a row in log.csv and a checkpoint."""
        for epoch in range(self.epoch, self.opt.n_epochs):
            yield epoch
            row = dict(epoch=epoch + 1, batches_done=self.batches_done) | self.losses() | self.extra
            row |= dict(seconds=round(self.seconds, 2), images_per_second=round(self.rate()))
            self.report()
            with open(self.folder / "log.csv" if RANK == 0 else os.devnull, "a", newline="") as file:
                log = csv.DictWriter(file, row)
                if not file.tell():
                    log.writeheader()
                log.writerow(row)
            self.epoch, self.batch, self.seconds, self.totals, self.extra = epoch + 1, 0, 0.0, {}, {}
            self.epoch_random = random_state(self.device)
            self.save()
        if sys.stdout.isatty() and RANK == 0:
            print()  # leave the last report on the screen

    def steps(self, batches: Iterable) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches that are left of this epoch, on the device."""
        first, start = self.batch, time.monotonic() - self.seconds
        if self.resumed:  # this epoch's shuffle as it was, then the noise from where it was
            set_random_state(self.epoch_random, self.device)
        for i, (images, labels) in enumerate(batches):
            if i < first:
                continue
            if i == first > 0:
                set_random_state(self.resumed["random"], self.device)
            if number := self.agreed_signal(i):
                self.save()
                say(f"stopped; to go on: python {Path(__file__).name} --resume {self.folder}")
                raise SystemExit(128 + number)
            self.batch, self.batches_done = i + 1, self.batches_done + 1
            images, labels = (t.to(self.device, non_blocking=True) for t in (images, labels))
            yield share(images), share(labels)
            self.seconds = time.monotonic() - start
            if sys.stdout.isatty() and WORLD == 1:
                due = time.monotonic() > self.last_report + 0.2
            else:
                due = self.batches_done % self.opt.sample_interval == 0
            if due:
                self.report()
        self.resumed = {}

    def agreed_signal(self, i: int) -> int:
        """The signal that came, if any; several processes ask each other every tenth batch."""
        if WORLD == 1 or i % 10:
            return self.signal if WORLD == 1 else 0
        number = torch.tensor(self.signal, device=self.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def record(self, **losses: Tensor) -> None:
        """Add up losses on the device, without waiting for it."""
        self.totals = {name: self.totals.get(name, 0) + loss for name, loss in losses.items()}

    def losses(self) -> dict[str, float]:
        """Mean losses of this epoch so far. Waits for the device."""
        for total in self.totals.values() if WORLD > 1 else ():
            dist.all_reduce(total)
            total /= WORLD
        means = {name: float(total) / self.batch for name, total in self.totals.items()}
        self.demand_finite(all(map(math.isfinite, means.values())), "a loss")
        return means

    def demand_finite(self, finite: bool, what: str) -> None:
        if not finite:
            place = f"batch {self.batch} of epoch {self.epoch + 1}"
            raise UserError(f"{what} is not finite at {place}; the checkpoint before is kept; try a lower --lr")

    def rate(self) -> float:
        return self.batch * self.opt.batch_size / max(self.seconds, 1e-9)

    def report(self) -> None:
        losses = " ".join(f"{name} {mean:.3f}" for name, mean in (self.losses() | self.extra).items())
        left = ((self.opt.n_epochs - self.epoch) * self.per_epoch - self.batch) * self.opt.batch_size / self.rate()
        text = f"epoch {self.epoch + 1}/{self.opt.n_epochs} batch {self.batch}/{self.per_epoch} {losses}"
        text += f" {self.rate():,.0f} img/s {datetime.timedelta(seconds=round(left))} left"
        self.last_report = time.monotonic()
        show(text) if sys.stdout.isatty() else say(text)

    def save(self) -> None:
        """Write checkpoint.pt in one piece: until the new one is whole, the old one stays."""
        self.losses()
        weights = [p for model in self.models.values() for p in model.parameters()]
        self.demand_finite(all(p.isfinite().all() for p in weights), "a weight")
        position = ("epoch", "batch", "batches_done", "seconds", "totals", "epoch_random")
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= dict(script=SCRIPT, options=vars(self.opt), position={name: getattr(self, name) for name in position})
        state |= dict(random=random_state(self.device))
        file, temporary = self.folder / "checkpoint.pt", self.folder / "checkpoint.tmp"
        if RANK:
            return dist.barrier()
        try:
            with open(temporary, "wb") as f:
                torch.save(state, f)
                os.fsync(f.fileno())
            os.replace(temporary, file)
        except (OSError, RuntimeError) as e:
            temporary.unlink(missing_ok=True)
            raise UserError(f"{file}: cannot be written ({first_line(e)}); the one before, if any, is kept") from e
        if WORLD > 1:
            dist.barrier()

    def restore(self, state: dict) -> None:
        """Go back to where a checkpoint was written; what the log has of later epochs will be done again."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for name, value in state["position"].items():
            setattr(self, name, value)
        self.totals = {name: total.to(self.device) for name, total in self.totals.items()}
        self.resumed = state
        log = self.folder / "log.csv"
        if log.exists() and RANK == 0:
            log.write_text("".join(log.read_text().splitlines(keepends=True)[: self.epoch + 1]))

    def picture(self, name: str, images: Tensor, columns: int) -> None:
        """Save images (N, C, H, W) in [0, 1] as a grid, named after the batches done."""
        if RANK == 0:
            save_image(images, self.folder / "images" / f"{name}_{self.batches_done:06}.png", nrow=columns)

    def animate(self, name: str, file: str) -> None:
        """Make a GIF of the pictures of that name, at most 100 of them, evenly spread."""
        if RANK:
            return
        paths = sorted((self.folder / "images").glob(f"{name}_*.png"))
        chosen = torch.linspace(0, len(paths) - 1, min(len(paths), 100)).round().int().tolist()
        frames = [Image.open(paths[i]) for i in chosen]
        durations = [100] * (len(frames) - 1) + [2000]  # milliseconds; the last one stays
        frames[0].save(self.folder / file, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def first_line(e: Exception) -> str:
    return (str(e) or type(e).__name__).splitlines()[0]


def new_folder(path: Path, claim: str = "") -> Path:
    """Make path/claim and return path; if path is in use, path-2, path-3, ...: nothing is ever overwritten."""
    for n in itertools.count(1):
        folder = path if n == 1 else path.with_name(f"{path.name}-{n}")
        if not (folder.is_dir() and any(folder.iterdir())):
            with contextlib.suppress(FileExistsError):
                (folder / claim).mkdir(parents=True)
                return folder


def write_images(images: Tensor, folder: Path, first: int) -> None:
    """Write images (N, C, H, W) in [0, 1] as PNG files, numbered from `first`."""
    folder.mkdir(exist_ok=True)
    for i, image in enumerate((images * 255).round().byte().cpu()):
        to_pil_image(image).save(folder / f"{first + i:06}.png")


def checkpoint_file(path: str | Path) -> Path:
    return Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)


def read_checkpoint(path: str | Path) -> dict:
    """The checkpoint in a run folder or file. Raises UserError if it is missing, damaged or another script's."""
    file = checkpoint_file(path)
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; give a run folder or its checkpoint.pt")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        made_by = state["script"]
    except Exception as e:  # torch.load raises many kinds for a damaged file
        raise UserError(f"{file}: not a checkpoint, or a damaged one ({first_line(e)})") from e
    if made_by != SCRIPT:
        raise UserError(f"{file}: made by {made_by}.py, so {SCRIPT}.py cannot use it")
    return state


def random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state if device.type == "cpu" else state | {device.type: torch.get_device_module(device).get_rng_state()}


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])


# --- end of block


def main() -> None:
    try:
        opt = parse_args()
        generate(opt) if opt.generate else train(opt)
    except (UserError, OSError) as e:
        show("")
        sys.exit(f"{SCRIPT}.py: error: {e}")
    except RuntimeError as e:
        if WORLD == 1:
            raise
        sys.exit(f"{SCRIPT}.py: error: process {RANK} stopped ({first_line(e)}); --resume the last checkpoint")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
