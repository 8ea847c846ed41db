"""PixelCNN++: draws images, or the codes of a vqvae.py run, one position after another.

The probability of an image x is a product over its positions in raster order, each given those before it:

    log p(x)  =  sum over i of  log p(x_i | x_1, ..., x_(i-1))

A convolutional network whose output at a position depends only on those before it computes all factors in
one pass. Training maximises log p(x), which is exact. Drawing takes one pass per position. A factor is a
mixture of logistics for grey levels and colours, and a softmax for black and white (--binarize) and codes.

PixelCNN++: Salimans et al. 2017, arXiv:1701.05517; the defaults are a small model. Two streams without a
blind spot, and the label as a bias: van den Oord et al. 2016, arXiv:1606.05328. Codes: van den Oord et al.
2017, arXiv:1711.00937. Averaged weights: Polyak & Juditsky 1992. Beyond these papers, each position has a
bias of its own, by which the network knows where in the image it is, and codes are embedded. The first
filters see more, and the norms of all filters start at 1, not from a first batch.

    python pixelcnnpp.py --conditional --n_epochs 20               # MNIST; built-in digits when offline
    python pixelcnnpp.py --dataset path/to/folder --img_size 32    # your images
    python pixelcnnpp.py --dataset runs/vqvae --out_dir runs/prior # the codes of a run of vqvae.py
    python pixelcnnpp.py --resume runs/pixelcnnpp --generate 100
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
from torch.distributions import Categorical
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
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
    add("--conditional", action=ON_OFF, default=False, help="model p(x | class), by the labels of the images")
    add("--hidden_dim", type=number(int, 2), default=32, help="channels of the hidden layers")
    add("--n_layers", type=count, default=1, help="blocks on each of the three sizes, down and up again")
    add("--dropout", type=fraction, default=0.5, help="share of the features to drop in training")
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
        "or a run of vqvae.py")  # fmt: skip
    add("--data_dir", default="data", help="folder for downloaded data sets")
    add("--img_size", type=count, default=28,
        help="side of the images in pixels (codes have their own), a multiple of 4")  # fmt: skip
    add("--channels", type=int, choices=[1, 3], help="1: grey, 3: colour (default: the data's; a folder: 3)")
    add("--binarize", action=ON_OFF, default=False,
        help="make each pixel white or black, at random: its grey is the probability of white")  # fmt: skip
    add("--n_cpu", type=count, default=8, help="threads that read the images of a folder")
    add = p.add_argument_group("run").add_argument
    add("--out_dir", default=f"runs/{SCRIPT}", help="folder of a new run; if it exists, a number is added")
    add("--sample_interval", type=count, default=4000, help="steps between tests, sample grids and log rows")
    add("--resume", metavar="RUN", help="continue the run in this folder, with its options")
    add("--generate", type=count, metavar="N", help="with --resume: write N images to RUN/generated")
    p.set_defaults(codes_hash=None)  # not an option: load_codes() sets it
    opt = parse_and_check(p, argv)
    if opt.binarize:
        if opt.channels == 3:
            p.error("--binarize makes one channel, not --channels 3")
        opt.channels = 1
    return opt


# ---------------------------------------------------------------- mixture of logistics

# How many numbers the network gives for each of a pixel's 10 logistics, with 1 or 3 channels: a logit,
# which says how likely it is; a mean and a log-scale for each channel; alpha, beta, gamma of equation 3.
NUMBERS = {1: [1, 1, 1, 0], 3: [1, 3, 3, 3]}


def logistics(out: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, 10, ...), and means and scales (N, 10, C, ...), of the network's output (N, n_out, ...).

    x (N, C, ...) are the pixels, in [-1, 1]: the mean of green depends on the pixel's red, and the mean of
    blue on its red and green (arXiv:1701.05517, equation 3).
    """
    out = out.unflatten(1, (10, -1))
    logits, means, log_scales, coefficients = out.split(NUMBERS[x.shape[1]], dim=2)
    if x.shape[1] == 3:
        red, green, _ = x[:, None].unbind(2)
        alpha, beta, gamma = coefficients.tanh().unbind(2)
        shifts = [torch.zeros_like(alpha), alpha * red, beta * red + gamma * green]
        means = means + torch.stack(shifts, dim=2)
    return logits.squeeze(2), means, log_scales.clamp(-7, 7).exp()


def mixture_log_prob(out: Tensor, x: Tensor) -> Tensor:
    """log p (N, ...), in nats, of pixels x (N, C, ...) from 0 to 255, for the output (N, n_out, ...).

    A value has the probability of the interval of half-width 1/255 around it in [-1, 1]; those of 0 and of
    255 reach to infinity (arXiv:1701.05517, equation 2). With a and b for the ends of the interval, minus
    the mean and divided by the scale, that probability is

        s(b) - s(a)  =  s(b) s(-a) (1 - exp(a - b)),    where s is the sigmoid function:

    three factors whose logarithms stay finite, however far away the mean is.
    """
    centre = x.to(out.dtype) / 127.5 - 1
    logits, means, scales = logistics(out, centre)
    lower = torch.where(x == 0, -1e6, centre - 1 / 255)[:, None]  # 1e6 is as good as infinity
    upper = torch.where(x == 255, 1e6, centre + 1 / 255)[:, None]
    log_s_b = F.logsigmoid((upper - means) / scales)
    log_s_minus_a = F.logsigmoid((means - lower) / scales)
    log_rest = torch.log(-torch.expm1((lower - upper) / scales))
    log_p = (log_s_b + log_s_minus_a + log_rest).sum(2)  # of all channels, by each logistic
    return torch.logsumexp(logits.log_softmax(1) + log_p, dim=1)


def draw_from_mixture(out: Tensor, channels: int) -> Tensor:
    """Draw pixels (N, channels) from 0 to 255, given the network's output for each (N, n_out)."""
    x = out.new_zeros(len(out), channels)
    logits, _, _ = logistics(out, x)  # the logits do not depend on x
    k = Categorical(logits=logits).sample()
    n = torch.arange(len(out))
    for c in range(channels):
        _, means, scales = logistics(out, x / 127.5 - 1)  # given the channels before
        noise = torch.rand_like(means).logit()  # of the standard logistic distribution
        drawn = (means + scales * noise)[n, k, c]
        x[:, c] = ((drawn + 1) * 127.5).round().clamp(0, 255)
    return x.long()


# ---------------------------------------------------------------- networks


def normed(conv: nn.Module, dim: int = 0) -> nn.Module:
    """Apply weight normalisation (arXiv:1602.07868); the scales start at 1. dim is that of the outputs."""
    weight_norm(conv, dim=dim)
    nn.init.ones_(conv.parametrizations.weight.original0)
    return conv


def shifted_conv(n_in: int, n_out: int, kernel_size: tuple, padding: tuple, stride: int = 1) -> nn.Module:
    """A convolution of the zero-padded input. padding: left, right, top, bottom; a negative one cuts off."""
    conv = nn.Conv2d(n_in, n_out, kernel_size, stride)
    return nn.Sequential(nn.ZeroPad2d(padding), normed(conv))


def concat_elu(x: Tensor) -> Tensor:
    """ELU of x and of -x: twice the channels."""
    return F.elu(torch.cat([x, -x], dim=1))


class GatedBlock(nn.Module):
    """Features x (N, dim, H, W) -> x + a * sigmoid(b), where two convolutions in a row make a and b.

    At position (i, j) each sees the rows i - 1 and i, with width 2 their columns j - 1 and j, with width 3
    also j + 1. If n_other > 0, a 1x1 convolution of other features (N, n_other, H, W) is added after the
    first; if n_classes > 0, a bias for each label after the second. resize: "halve" or "double" the height
    and width of x first, or "".
    """

    def __init__(self, width: int, resize: str, n_other: int, dim: int, dropout: float, n_classes: int):
        super().__init__()
        kernel_size = (2, width)
        padding = (1, width - 2, 1, 0)  # left, right, top, bottom
        self.resize = nn.Identity()
        # Halving makes row i of the rows 2i - 1 and 2i, and doubling makes it the rows 2i and 2i + 1 again:
        # after both, no row has seen a later one. The same holds for columns, if the width is 2.
        if resize == "halve":
            self.resize = shifted_conv(dim, dim, kernel_size, padding, stride=2)
        if resize == "double":
            self.resize = normed(nn.ConvTranspose2d(dim, dim, 2, stride=2), dim=1)
        self.first = shifted_conv(2 * dim, dim, kernel_size, padding)
        self.second = shifted_conv(2 * dim, 2 * dim, kernel_size, padding)
        if n_other > 0:
            self.other = normed(nn.Conv2d(2 * n_other, dim, 1))
        self.label_bias = nn.Parameter(torch.zeros(n_classes, 2 * dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, other: Tensor | None, labels: Tensor) -> Tensor:
        x = self.resize(x)
        h = self.first(concat_elu(x))
        if other is not None:
            h = h + self.other(concat_elu(other))
        h = self.second(self.dropout(concat_elu(h)))
        if len(self.label_bias) > 0:
            h = h + F.embedding(labels, self.label_bias)[:, :, None, None]
        return x + F.glu(h, dim=1)


class PixelCNNpp(nn.Module):
    """The probability p(x) of values x (N, channels, size, size), int64; size is a multiple of 4.

    With softmax=True x has 1 channel of values from 0 to n_values - 1; otherwise 1 or 3 channels, n_values is
    256, and a mixture of logistics takes the softmax's place. Labels (N,) are used only if n_classes > 0:
    then the model is p(x | label). model(x, labels) gives (N, n_out, H, W): what the softmax or the mixture
    needs at each position, given those before it. x may be only the first rows, if their number is a
    multiple of 4.

    The network is figure 2 of arXiv:1701.05517. It has two streams of features: at each position, u sees the
    rows above, and ul also what is to the left, as far as the filters reach. Both go down to a half and a
    quarter of the size, through n_layers blocks on each size, and up again, where each block gets the
    features of one on the way down.
    """

    def __init__(
        self,
        softmax: bool,
        n_values: int,
        channels: int,
        size: int,
        dim: int,
        n_layers: int,
        dropout: float,
        n_classes: int,
    ):
        super().__init__()
        self.softmax = softmax
        self.n_values = n_values
        self.channels = channels
        self.size = size
        self.decoder = None  # the path of decoder.pt2, if the values are codes
        if softmax:
            n_in = min(n_values, dim)  # enough to tell the values apart
            n_out = n_values
            self.embed = nn.Embedding(n_values, n_in)
        else:
            n_in = channels
            n_out = 10 * sum(NUMBERS[channels])
        self.position_bias = nn.Parameter(torch.zeros(1, dim, size, size))
        # Row i of first_u sees the rows i - 3 to i - 1; column j of first_ul the columns j - 3 to j - 1.
        self.first_u = shifted_conv(n_in, dim, (3, 7), (3, 3, 3, -1))
        self.first_ul = shifted_conv(n_in, dim, (1, 3), (3, -1, 0, 0))
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for i in range(3 * n_layers):
            resizes = i in (n_layers, 2 * n_layers)  # the first block of another size
            resize = "halve" if resizes else ""
            u_block = GatedBlock(3, resize, 0, dim, dropout, n_classes)
            ul_block = GatedBlock(2, resize, dim, dim, dropout, n_classes)  # its other features are u
            self.down.append(nn.ModuleList([u_block, ul_block]))
            resize = "double" if resizes else ""
            u_block = GatedBlock(3, resize, dim, dim, dropout, n_classes)
            ul_block = GatedBlock(2, resize, 2 * dim, dim, dropout, n_classes)
            self.up.append(nn.ModuleList([u_block, ul_block]))
        self.out = nn.Sequential(nn.ELU(), normed(nn.Conv2d(dim, n_out, 1)))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.softmax:
            inputs = self.embed(x[:, 0]).movedim(-1, 1)
        else:
            if x.is_floating_point():
                raise TypeError("x must be int64, from 0 to 255")
            inputs = (x / 127.5 - 1).type_as(self.position_bias)
        u = self.position_bias[:, :, : x.shape[2]] + self.first_u(inputs)
        ul = u + self.first_ul(inputs)
        shortcuts = []
        for u_block, ul_block in self.down:
            u = u_block(u, None, labels)
            ul = ul_block(ul, u, labels)
            shortcuts.append((u, ul))
        for u_block, ul_block in self.up:
            # The first ones up are u and ul themselves: the paper's shortcut from block 3 to 4.
            u_down, ul_down = shortcuts.pop()
            u = u_block(u, u_down, labels)
            ul = ul_block(ul, torch.cat([u, ul_down], dim=1), labels)
        return self.out(ul)

    def log_prob(self, x: Tensor, labels: Tensor) -> Tensor:
        """log p(x) (N,), in nats."""
        out = self(x, labels).float()
        if self.softmax:
            log_p = -F.cross_entropy(out, x[:, 0], reduction="none")
        else:
            log_p = mixture_log_prob(out, x)
        return log_p.sum(dim=(1, 2))

    def images(self, x: Tensor) -> Tensor:
        """Values (N, channels, size, size) -> images in [0, 1]. Codes are decoded, on the CPU."""
        if self.decoder is None:
            return x / (self.n_values - 1)
        decode = torch.export.load(io.BytesIO(self.decoder.read_bytes())).module()
        return decode(x[:, 0].cpu())

    @torch.no_grad()
    @parametrize.cached()  # weight norm is computed once
    def sample(self, labels: Tensor) -> Tensor:
        """Draw values x (N, channels, size, size), one for each label (N,).

        Raises InputError if the output of the network is not finite.
        """
        x = labels.new_zeros(len(labels), self.channels, self.size, self.size)
        for i in range(self.size):
            n_rows = 4 * (i // 4 + 1)  # up to row i; a multiple of 4, as they are halved twice
            for j in range(self.size):
                out = self(x[:, :, :n_rows], labels)[:, :, i, j].float()
                if not out.isfinite().all():
                    raise InputError("the output of the network is not finite; start again with a lower --lr")
                if self.softmax:
                    x[:, 0, i, j] = Categorical(logits=out).sample()
                else:
                    x[:, :, i, j] = draw_from_mixture(out, self.channels)
        return x


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
def test(model: PixelCNNpp, x: Tensor, labels: Tensor) -> dict[str, float]:
    """-log p(x) of test values: nats per image, and bits per pixel (and channel) or per code."""
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
        # For data that is not a folder of images, replace this line. Images are uint8 (N, channels, H, W),
        # with H and W equal to opt.img_size. Labels are int64 (N,), class numbers from 0, and classes is the
        # list of their names, which become names of folders. Leave out --dataset: then every tenth image is
        # for the test. There are 1 or 3 channels, with --binarize 1.
        images, labels, opt.classes = load_data(opt)
        images, labels, test_images, test_labels = hold_out(opt, images, labels)
        opt.n_values = 2 if opt.binarize else 256
    images = images.to(device)  # all are kept on the device
    labels = labels.to(device)
    opt.channels = images.shape[1]
    if opt.img_size % 4:
        raise InputError(f"size {opt.img_size} is no multiple of 4: give --img_size, for codes to vqvae.py")
    loader = make_loader(images, labels, opt.batch_size)
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


def new_model(opt: Namespace) -> PixelCNNpp:
    softmax = opt.binarize or opt.codes_hash is not None
    n_classes = len(opt.classes) if opt.conditional else 0
    return PixelCNNpp(
        softmax, opt.n_values, opt.channels, opt.img_size,
        opt.hidden_dim, opt.n_layers, opt.dropout, n_classes,
    )  # fmt: skip


def load(folder: str | Path, device: str | torch.device = "cpu") -> PixelCNNpp:
    """The averaged model of a run, in eval mode, with the run's options as `model.options`.

    model.log_prob(x, labels) is log p(x) in nats, model.sample(labels) draws x, and model.images(x) makes
    images of x, values (N, channels, size, size) of type int64. Label k is the class
    model.options.classes[k]; without --conditional the labels only say how many to draw.
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
