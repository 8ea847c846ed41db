"""Vector-quantised autoencoder (VQ-VAE): turns images into small grids of codes, and codes into images.

The encoder turns an image x into a grid of vectors z. Each z is replaced by e, the nearest of the K vectors
of a codebook, so that the image becomes a grid of codes, integers from 0 to K - 1. The decoder turns the
vectors e into an image x' like x. Training minimises a sum of three means, after equation 3 of the paper:

    mean (x' - x)^2 / variance  +  mean (sg[z] - e)^2  +  0.25 mean (z - sg[e])^2

The variance is that of all values of the training images, estimated on 1,000 of them, so that an x' that is
their mean everywhere would cost about 1. The operator sg[] stops the gradient: the second term, the codebook
loss, moves only e, and the third, the commitment loss, only the encoder. Choosing the nearest vector has no
gradient, so the decoder's gradient with respect to e is copied to z. By default (--codebook ema) there is no
codebook loss: each vector of the codebook is a moving average of the z that chose it (appendix A.1). One that
is hardly ever chosen is replaced by a random z of the batch, because otherwise most of the codebook might
never be used.

VQ-VAE: van den Oord et al. 2017, arXiv:1711.00937. --restart: Dhariwal et al. 2020, arXiv:2005.00341, and
Zeghidour et al. 2021, arXiv:2107.03312. Averaged weights (--ema): Yazici et al. 2018, arXiv:1806.04498.

    python vqvae.py --n_epochs 10                            # MNIST; built-in digits when offline
    python vqvae.py --dataset path/to/folder --img_size 64   # your images, with or without sub-folders
    python pixelcnnpp.py --dataset runs/vqvae                # learns the codes, and draws new ones

When a run ends, it writes the decoder to decoder.pt2, and to codes.npz the codes of the training images and
their labels ("codes", "labels") and those of the test images ("test_codes", "test_labels"):

    codes = torch.from_numpy(numpy.load("runs/vqvae/codes.npz")["codes"][:64])
    images = torch.export.load("runs/vqvae/decoder.pt2").module()(codes.long())

A run that was stopped has not written them yet. To have it write them, give --resume runs/vqvae and
--n_epochs 1: it ends at once, or after its first epoch if it was stopped in that one. To train it further
after that, give --n_epochs again.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy", "pillow>=10.1"]
# ///

import argparse
import copy
import csv
import io
import itertools
import json
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
from torch.distributions import Categorical
from torch.nn.functional import mse_loss
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
    add("--codebook", choices=["ema", "loss"], default="ema",
        help="how the codebook learns: as moving averages of z, or by the codebook loss")  # fmt: skip
    add("--decay", type=fraction, default=0.99, help="decay rate of the codebook's averages and counts")
    add("--commitment", type=number(float, 0), default=0.25, help="weight of the commitment loss")
    add("--restart", action=ON_OFF, default=True, help="replace vectors of the codebook that are hardly used")
    add("--n_embeddings", type=count, default=512, help="K, the number of codes")
    add("--latent_dim", type=count, default=64, help="size of each vector z, and of a code's vector")
    add("--hidden_dim", type=number(int, 2), default=128,
        help="channels at the size of the grid of codes; half as many at larger sizes")  # fmt: skip
    add("--residual_dim", type=count, default=32, help="channels inside a residual block")
    add("--downsample", type=int, choices=[2, 4, 8], default=4, help="pixels per code along a side")
    add("--ema", type=fraction, default=0.999, help="decay rate of an average of the whole model; 0: off")
    add = p.add_argument_group("training").add_argument
    add("--n_epochs", type=count, default=200, help="epochs in total, those before a resume included")
    add("--batch_size", type=number(int, 2), default=128, help="images per step")
    add("--lr", type=positive, default=1e-3, help="Adam: learning rate")
    add("--b1", type=fraction, default=0.9, help="Adam: decay rate of the first moment")
    add("--b2", type=fraction, default=0.999, help="Adam: decay rate of the second moment")
    add("--seed", type=number(int, 0), default=0, help="seed; with --generate, another gives other images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--amp", action=ON_OFF, default=False, help="train in bfloat16; slower than float32 on some CPUs")
    add = p.add_argument_group("data").add_argument
    add("--dataset", help="mnist (if not given), fashion_mnist, cifar10, digits or a folder of images")
    add("--data_dir", default="data", help="folder for downloaded data sets")
    add("--img_size", type=count, default=32,
        help="side in pixels, a multiple of --downsample; for pixelcnnpp.py, of 4 times it")  # fmt: skip
    add("--channels", type=int, choices=[1, 3], help="1: grey, 3: colour (default: the data's; a folder: 3)")
    add("--n_cpu", type=count, default=8, help="threads that read the images of a folder")
    add = p.add_argument_group("run").add_argument
    add("--out_dir", default=f"runs/{SCRIPT}", help="folder of a new run; if it exists, a number is added")
    add("--sample_interval", type=count, default=400,
        help="steps between sample grids and log rows, each with a test on all test images")  # fmt: skip
    add("--resume", metavar="RUN", help="continue the run in this folder, with its options")
    add("--generate", type=count, metavar="N",
        help="with --resume: write N images, of codes drawn one by one, to RUN/generated")  # fmt: skip
    opt = parse_and_check(p, argv)
    if opt.img_size % opt.downsample:
        p.error(f"--img_size {opt.img_size}: not a multiple of --downsample {opt.downsample}")
    return opt


# ---------------------------------------------------------------- networks


class Residual(nn.Sequential):
    """A residual block: x (N, dim, h, w) -> x + f(x), where f is a sequence of layers."""

    def __init__(self, dim: int, residual_dim: int):
        super().__init__(
            nn.ReLU(), nn.Conv2d(dim, residual_dim, 3, 1, 1),
            nn.ReLU(), nn.Conv2d(residual_dim, dim, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class VQVAE(nn.Module):
    """Images (N, channels, H, W) in [0, 1] <-> codes (N, H / downsample, W / downsample), int64."""

    def __init__(
        self,
        channels: int,
        n_embeddings: int,
        latent_dim: int,
        hidden_dim: int,
        residual_dim: int,
        downsample: int,
    ):
        super().__init__()
        half_dim = hidden_dim // 2
        dims = {  # channels of the image, and after each convolution that halves its side
            2: [channels, hidden_dim],
            4: [channels, half_dim, hidden_dim],
            8: [channels, half_dim, half_dim, hidden_dim],
        }[downsample]
        down = []
        up = []
        for n_in, n_out in itertools.pairwise(dims):
            down = [*down, nn.Conv2d(n_in, n_out, 4, 2, 1), nn.ReLU()]
            up = [nn.ReLU(), nn.ConvTranspose2d(n_out, n_in, 4, 2, 1), *up]
        self.encoder = nn.Sequential(
            *down,
            nn.Conv2d(hidden_dim, hidden_dim, 3, 1, 1),
            Residual(hidden_dim, residual_dim),
            Residual(hidden_dim, residual_dim),
            nn.ReLU(), nn.Conv2d(hidden_dim, latent_dim, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_dim, hidden_dim, 3, 1, 1),
            Residual(hidden_dim, residual_dim),
            Residual(hidden_dim, residual_dim),
            *up,
        )
        self.codebook = nn.Parameter(torch.randn(n_embeddings, latent_dim))
        self.register_buffer("counts", torch.zeros(n_embeddings))  # moving average of uses per batch

    def nearest(self, z: Tensor) -> Tensor:
        """Vectors z (N, latent_dim, h, w) -> codes (N, h, w): for each z, that of the nearest vector e."""
        z = z.movedim(1, -1)
        # |z - e|^2 without |z|^2, which is the same for every e.
        distances = self.codebook.square().sum(1) - 2 * z @ self.codebook.T
        return distances.argmin(-1)

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (N, h, w) -> their vectors e (N, latent_dim, h, w)."""
        return self.codebook[codes].movedim(-1, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, channels, H, W) in [0, 1] -> codes (N, h, w)."""
        return self.nearest(self.encoder(images))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (N, h, w) -> images (N, channels, H, W) in [0, 1]."""
        return self.decoder(self.embed(codes)).clamp(0, 1)

    forward = decode  # so that this is what torch.export exports

    def frequencies(self) -> Categorical:
        """About how often each code is used in training, as a distribution. No probability is 0."""
        return Categorical(self.counts + 1e-3)


# ---------------------------------------------------------------- training


@torch.no_grad()
def update_codebook(model: VQVAE, z: Tensor, codes: Tensor, opt: Namespace) -> None:
    """Count the uses of the codes of z (N, latent_dim, h, w), and fit the codebook to z.

    With --codebook ema each vector is an average of the z that chose it (appendix A.1 of the paper):

        count  = decay * count + (1 - decay) * (number of z that chose the code)
        total  = decay * total + (1 - decay) * (sum of the z that chose the code)
        vector = total / count

    With --restart a vector whose count is below a tenth of the batch's mean number of z per code is replaced
    by a random z, and its count set to that tenth: unless the next batch uses it as often, it is replaced
    again. In the first step every vector is replaced.
    """
    codebook = model.codebook
    counts = model.counts
    z = z.movedim(1, -1).flatten(0, 2)
    codes = codes.flatten()
    uses = torch.zeros_like(counts).index_add_(0, codes, z.new_ones(len(z)))
    sums = torch.zeros_like(codebook).index_add_(0, codes, z)
    candidates = z[torch.randint(len(z), counts.shape, device=z.device)]
    if WORLD > 1:  # all processes keep the same codebook
        dist.all_reduce(uses)
        dist.all_reduce(sums)
        dist.broadcast(candidates, 0)
    is_rare = counts == 0  # all are in the first step: the first vectors have nothing to do with z
    counts.lerp_(uses, 1 - opt.decay)
    if opt.codebook == "ema":
        # The total is not stored. Before this step it was the old count * vector; put into the formulas
        # above, that gives vector + change / new count. The change is 0 for a vector that no z chose.
        change = (1 - opt.decay) * (sums - uses[:, None] * codebook)
        codebook += change / counts[:, None].clamp(min=1e-9)
    if opt.restart:
        least = 0.1 * uses.mean()  # a tenth of what each code would have if all were used evenly
        is_rare |= counts < least
        codebook.copy_(torch.where(is_rare[:, None], candidates, codebook))
        counts.masked_fill_(is_rare, least)  # as if the new vectors had been used that often


def measure(model: VQVAE, images: Tensor, variance: Tensor, opt: Namespace) -> dict[str, float]:
    """Metrics of uint8 test images (N, channels, H, W).

    test_mse is the mean squared error of pixels in [0, 1], and test_error the same over the variance. (The
    log's error is of training batches since the last row, by weights that are not averaged: mostly higher.)
    test_perplexity is exp(entropy) of the codes: the number of evenly used codes with the same entropy;
    test_used is how many are used. test_code_bits is the length of an image's codes, in bits, if each takes
    -log2 of its probability in frequencies(): the size of a lossy compression, not a likelihood.
    """
    mse = 0.0
    uses = 0
    for x in images.split(opt.batch_size):
        x = x / 255
        codes = model.encode(x)
        mse += float(mse_loss(model.decode(codes), x)) * len(x) / len(images)
        uses += codes.flatten().bincount(minlength=opt.n_embeddings)
    log2_frequencies = model.frequencies().probs.log2()
    return {
        "test_mse": mse,
        "test_error": mse / float(variance),
        "test_perplexity": float(Categorical(uses).perplexity()),
        "test_used": int(uses.count_nonzero()),
        "test_code_bits": -float((uses * log2_frequencies).sum()) / len(images),
    }


def hold_out(opt: Namespace, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then test images and labels.

    A named data set has its own test images. Otherwise every tenth image is one.
    """
    if opt.dataset in NAMED:
        test_images, test_labels, _ = load_data(opt, train=False)
        return images, labels, test_images, test_labels
    is_test = torch.arange(len(images)) % 10 == 0
    return images[~is_test], labels[~is_test], images[is_test], labels[is_test]


def train(opt: Namespace) -> Path:
    """Train, and return the run's folder. Raises InputError, an OSError, for bad data or options."""
    opt = copy.copy(opt)
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group()
    device = find_device(opt.device)
    # For data that is not a folder of images, replace this line. Images are uint8 (N, channels, H, W), with H
    # and W equal to opt.img_size. Labels are int64 (N,), class numbers from 0, and classes is the list of
    # their names. Leave out --dataset: then every tenth image is for the test.
    images, labels, opt.classes = load_data(opt)
    images, labels, test_images, test_labels = hold_out(opt, images, labels)
    # All images are kept on the device, as bytes.
    images = images.to(device)
    test_images = test_images.to(device)
    opt.channels = images.shape[1]
    loader = make_loader(images, labels, opt.batch_size)

    torch.manual_seed(opt.seed)
    model = new_model(opt).to(device, memory_format=torch.channels_last)  # faster convolutions
    model.codebook.requires_grad_(opt.codebook == "loss")
    model_avg = copy.deepcopy(model).eval().requires_grad_(False)  # for tests, grids, codes and load()
    optimizer = torch.optim.Adam(model.parameters(), opt.lr, (opt.b1, opt.b2), fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=opt.amp)

    # Up to ten test images for the grids, evenly spread, as those of a folder are sorted by class; and up to
    # 1,000 random training images for the variance of the pixels.
    grid_images = test_images[:: len(test_images) // 10 + 1] / 255
    variance = (images[torch.randperm(len(images))[:1000]] / 255).var().clamp(min=1e-6)

    # Makes the run's folder or, with --resume, restores these parts and the number of steps done.
    run = Run(opt, loader, model=model, model_avg=model_avg, optimizer=optimizer)
    for epoch in range(run.step // len(loader), opt.n_epochs):
        seed(opt.seed, "epoch", epoch)  # a resume repeats the order of the images
        # After a resume, this skips the batches of the epoch that are done; otherwise none.
        for x, _ in itertools.islice(loader, run.step % len(loader), None):
            seed(opt.seed, "step", run.step, RANK)  # a resume repeats the random numbers of each step
            x = x[RANK::WORLD] / 255  # from 0..255 to [0, 1]
            with autocast:
                z = model.encoder(x).float()
            codes = model.nearest(z)
            e = model.embed(codes)
            with autocast:  # the decoder's input has the values of e, and passes its gradient to z
                reconstruction = model.decoder(z + (e - z).detach()).float()
            error = mse_loss(reconstruction, x) / variance
            codebook_loss = mse_loss(e, z.detach())  # without a gradient if --codebook ema
            commitment = mse_loss(z, e.detach())
            loss = error + codebook_loss + opt.commitment * commitment
            optimizer.zero_grad()
            loss.backward()
            average_gradients(model)
            optimizer.step()

            update_codebook(model, z, codes, opt)
            update_average(model_avg, model, opt.ema, run.step)
            run.end_step(error=error, commitment=commitment)
            if run.step % opt.sample_interval == 0 or run.step == run.last_step:
                seed(opt.seed, "sample")  # the same random numbers for each sample grid
                # Codes drawn one by one, as many images as in a batch: patchwork, which shows what codes are.
                grid_codes = model_avg.frequencies().sample(codes.shape)
                run.save_grid("sample", model_avg.decode(grid_codes), 16)
                grid_recon = model_avg.decode(model_avg.encode(grid_images))
                run.save_grid("recon", torch.cat([grid_images, grid_recon]), len(grid_images))
                run.record(**measure(model_avg, test_images, variance, opt))
            run.save_if_due()
    run.save()  # write_codes() loads the model from it
    if RANK == 0:
        write_codes(
            run.folder,
            codes=encode_all(model_avg, images, opt),
            labels=labels,
            test_codes=encode_all(model_avg, test_images, opt),
            test_labels=test_labels,
            classes=opt.classes,
            n_embeddings=opt.n_embeddings,
        )
    run.finish()
    return run.folder


def encode_all(model: VQVAE, images: Tensor, opt: Namespace) -> np.ndarray:
    """The codes (N, h, w) of uint8 images, in the smallest unsigned type that holds every code."""
    codes = torch.cat([model.encode(x / 255) for x in images.split(opt.batch_size)])
    return codes.cpu().numpy().astype(np.min_scalar_type(opt.n_embeddings - 1))


def write_codes(folder: Path, **arrays) -> None:
    """Write codes.npz, which holds the arrays, and decoder.pt2, a decoder that works without this script.

    torch.export.load(file).module() turns codes (N, h, w), int64, of the run's h and w, into images
    (N, channels, H, W) in [0, 1]. Raises OSError if a file cannot be written.
    """
    model = load(folder)
    del model.encoder
    example_codes = torch.from_numpy(arrays["codes"][:2]).long()
    decoder = torch.export.export(model, (example_codes,), dynamic_shapes=[{0: torch.export.Dim("N")}])
    # Both files are made in memory, which is slow, and then written one right after the other, because they
    # must fit each other after a stop. Also, torch would abort the process if it met a full disk itself.
    decoder_file = io.BytesIO()
    torch.export.save(decoder, decoder_file)
    codes_file = io.BytesIO()
    np.savez_compressed(codes_file, **arrays)
    for name, content in (("decoder.pt2", decoder_file), ("codes.npz", codes_file)):
        with replacing(folder / name) as file:
            file.write_bytes(content.getbuffer())
    say(f'codes of all images in "{folder}"; to learn to draw new ones: pixelcnnpp.py --dataset "{folder}"')


# ---------------------------------------------------------------- load and generate


def new_model(opt: Namespace) -> VQVAE:
    """An untrained model of these options."""
    return VQVAE(
        opt.channels, opt.n_embeddings, opt.latent_dim, opt.hidden_dim, opt.residual_dim, opt.downsample
    )


def load(folder: str | Path, device: str | torch.device = "cpu") -> VQVAE:
    """The averaged model of a run, in eval mode, with the run's options as `model.options`.

    codes = model.encode(images) gives the codes (N, h, w) of images (N, channels, H, W) in [0, 1], and
    images = model.decode(codes) the images of codes; the vector of code k is model.codebook[k].
    Raises InputError if the folder is not that of a run of this script.
    """
    state = read_checkpoint(folder)
    options = Namespace(**state["options"])
    model = new_model(options)
    model.load_state_dict(state["model_avg"])
    model.options = options
    return model.to(device).eval().requires_grad_(False)


def generate(opt: Namespace) -> Path:
    """Write opt.generate images of random codes, drawn independently by their frequencies in training."""
    device = find_device(opt.device)
    model = load(opt.resume, device)
    folder = new_folder(Path(opt.resume, "generated"))
    side = opt.img_size // opt.downsample
    torch.manual_seed(opt.seed)
    for i in range(opt.generate):
        codes = model.frequencies().sample((1, side, side))
        with replacing(folder / f"{i:06}.png") as file:
            save_image(model.decode(codes), file)
    say(
        f'{opt.generate} images in "{folder}"; pixelcnnpp.py and pixelcnn.py draw better ones: '
        f'python pixelcnnpp.py --dataset "{opt.resume}"'
    )
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
