"""PixelCNN: images, or the codes of a vqvae.py run, drawn one position after another, in one file.

The probability of x is a product over its positions in raster order, each given those before it, so it is exact:

    log p(x) = sum_i log p(x_i | x_1, ..., x_{i-1})      in nats; bits per dimension: over log 2 and the values of x

A convolutional network that sees no later position gives all factors at once; drawing takes one pass a position.

--arch pixelcnn: van den Oord et al. 2016, arXiv:1601.06759; its masked filters have a blind spot, above to the right.
--arch gated: van den Oord et al. 2016, arXiv:1606.05328; filters for the rows above and for the row itself leave none.
--arch plusplus: PixelCNN++, Salimans et al. 2017, arXiv:1701.05517; on three sizes, down and up again with short cuts.
--likelihood logistic: its mixture and last filter, for grey levels and colours, in any arch. --conditional: a bias for
each label, as in gated. Beyond the papers, each position has one, too. Codes: van den Oord et al. 2017,
arXiv:1711.00937. What is tested, drawn and kept is the model with averaged weights (Polyak & Juditsky 1992).

    python pixelcnn.py --binarize --n_epochs 5     # MNIST in black and white; without a network: built-in digits
    python pixelcnn.py --dataset runs/vqvae        # the codes of a run of vqvae.py: its prior
    python pixelcnn.py --arch plusplus --dataset path/to/folder --img_size 32   # colour
    python pixelcnn.py --resume runs/pixelcnn --generate 100
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy", "pillow>=10.1"]
# ///

import argparse
import copy
import functools
import math
import os
import random
import socket
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchvision import datasets, utils
from torchvision.transforms import v2

SCRIPT = "pixelcnn"  # in checkpoints, which no other script reads; give your copy a name of its own

# ---------------- options


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Options from argv (default: the command line). Raises SystemExit for a bad one, OSError for a bad run."""
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, flag = p.add_argument, dict(action=argparse.BooleanOptionalAction, default=False)
    add("--n_epochs", type=number(int), default=200, help="passes over the images; 0 only sets up")
    add("--batch_size", type=number(int, 2), default=16, help="images a step, 2 or more")
    add("--lr", type=number(float, 1e-9), default=2e-3, help="Adam's learning rate, above 0")
    add("--b1", type=number(float, below=1), default=0.9, help="Adam's decay of the gradient, in [0, 1)")
    add("--b2", type=number(float, below=1), default=0.999, help="Adam's decay of its square, in [0, 1)")
    add("--arch", choices=["pixelcnn", "gated", "plusplus"], default="gated", help="kind of network")
    add("--likelihood", choices=["bernoulli", "softmax", "logistic"], help="p(x_i | ...); None: by data and arch")
    add("--binarize", **flag, help="draw black and white pixels from grey ones, anew each time")
    add("--conditional", **flag, help="draw given the label")
    add("--hidden_dim", type=number(int, 2), default=32, help="channels of a layer, 2 or more")
    add("--n_layers", type=number(int, 1), help="None: 8; plusplus: 1 on each of three sizes, down and up")
    add("--dropout", type=number(float, below=1), help="share of features to drop, in [0, 1); None: 0, plusplus 0.5")
    add("--ema", type=number(float, below=1), default=0.999, help="decay of the model's average, in [0, 1); 0: off")
    add("--img_size", type=number(int, 1), default=28, help="side of the images; of codes: theirs")
    add("--channels", type=int, choices=[1, 3], help="1: turn colour into grey; None: as in the data")
    add("--n_classes", type=number(int, 1), help="number of classes; None: the data's")
    add("--sample_interval", type=number(int, 1), default=4000, help="batches between sample grids")
    add("--n_cpu", type=number(int), default=8, help="processes to decode a folder, at most")
    add("--dataset", help=f"{', '.join(DATASETS)}, a folder or a run of vqvae.py; None: mnist, or else digits")
    add("--data_dir", default="data", help="where data sets are or come to")
    add("--out_dir", default=f"runs/{SCRIPT}", help="the run's folder; in use: a number is added")
    add("--seed", type=number(int), default=0, help="same seed: same images, on a CPU with as many threads")
    add("--device", default="auto", help="cpu, cuda:1, mps ...; auto: the accelerator or cpu")
    add("--amp", **flag, help="forward passes in bfloat16")
    add("--compile", **flag, help="torch.compile")
    add("--resume", metavar="RUN", help="go on with the run in this folder")
    add("--generate", type=number(int, 1), metavar="N", help="with --resume: write N images")
    add("--labels", type=number(int), nargs="+", metavar="Y", help="with --generate: the classes; None: all")
    add("--temperature", type=number(float, 1e-3), default=1.0, help="with --generate: below 1 draws what is likelier")
    opt = finish_options(p, argv, acts=["generate"], free=["labels", "temperature"])
    n_layers, dropout = (1, 0.5) if opt.arch == "plusplus" else (8, 0.0)
    opt.n_layers, opt.dropout = opt.n_layers or n_layers, dropout if opt.dropout is None else opt.dropout
    if opt.likelihood and opt.binarize != (opt.likelihood == "bernoulli"):
        p.error("--binarize and --likelihood bernoulli go together")
    if opt.temperature != 1 and not opt.generate:
        p.error("--temperature goes with --generate")
    if opt.labels and not (opt.generate and opt.conditional and max(opt.labels) < opt.n_classes):
        p.error(f"--labels {max(opt.labels)}: goes with --generate and a run with --conditional, if it has so many")
    return opt


# ---------------- networks


class PixelCNN(nn.Module):
    """p(x) of whole numbers x (N, channels, size, size) below n_values; labels (N,) matter if n_classes > 0.

    likelihood of the values of a position: logistic, for 256 values in 1 or 3 channels; else x has 1 channel.
    """

    def __init__(
        self,
        arch: str,
        likelihood: str,
        n_values: int,
        channels: int,
        size: int,
        dim: int,
        n_layers: int,
        dropout: float,
        n_classes: int,
    ):
        super().__init__()
        self.logistic, self.decoder = likelihood == "logistic", None  # codes get their decoder in new_model
        self.size, self.n_values, self.channels = size, n_values, channels if self.logistic else 1
        n_in, n_out = (channels, 10 * sum(LOGISTIC[channels])) if self.logistic else (min(n_values, dim), n_values)
        self.embed = None if self.logistic else nn.Embedding(n_values, n_in)
        stack = {"pixelcnn": MaskedStack, "gated": GatedStack, "plusplus": PlusPlusStack}[arch]
        self.stack = stack(n_in, size, dim, n_layers, dropout, n_classes)
        self.out = nn.Sequential(nn.ReLU(), nn.Conv2d(dim, 2 * dim, 1), nn.ReLU(), nn.Conv2d(2 * dim, n_out, 1))
        if arch == "plusplus" or self.logistic:  # as in arXiv:1701.05517; a mean is nearly a sum of pixels
            self.out = nn.Sequential(nn.ELU(), normed(nn.Conv2d(dim, n_out, 1)))

    def vectors(self, x: Tensor) -> Tensor:
        """Values (N, channels, H, W), int64 -> a vector of each position (N, ., H, W). Raises TypeError for floats."""
        if x.is_floating_point():
            raise TypeError(f"x must be of type int64, with values from 0 to {self.n_values - 1}")
        return self.embed(x[:, 0]).movedim(-1, 1) if self.embed else (x / 127.5 - 1).type_as(self.stack.place)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """What the likelihood of each position takes (N, ., H, W), such as logits, given the positions before it."""
        return self.out(self.stack(self.vectors(x), labels))

    def log_prob(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """log p(x) of each x (N, channels, H, W), int64, in nats (N,)."""
        out = self(x, labels).float()
        log_p = logistic_log_prob(out, x) if self.logistic else -F.cross_entropy(out, x[:, 0], reduction="none")
        return log_p.flatten(1).sum(1)

    def images(self, x: Tensor) -> Tensor:
        """Values (N, channels, H, W) as images in [0, 1]; codes decoded."""
        return self.decoder(self.decoder.embed(x[:, 0])).clamp(0, 1) if self.decoder else x / (self.n_values - 1)

    @torch.no_grad()
    @parametrize.cached()  # weight norm: computed once
    def sample(
        self, n: int, labels: Tensor | None = None, given: Tensor | None = None, rows: int = 0, temperature: float = 1.0
    ) -> Tensor:
        """n new x (n, channels, size, size), position by position. given: x whose first `rows` rows stay."""
        x = self.stack.place.new_zeros(1, self.channels, self.size, self.size, dtype=int) if given is None else given
        x = x.expand(n, -1, -1, -1).clone()
        for i in range(rows, self.size):
            last_row = self.stack.last_row(self.vectors(x[:, :, : i + 1]), labels)  # once for what is above
            for j in range(self.size):
                out = self.out(last_row(self.vectors(x[:, :, i : i + 1]))[..., j : j + 1])[:, :, 0, 0]
                out = out.float().nan_to_num(0, 1e9, -1e9)  # in bfloat16 a random number is 0 too often
                if self.logistic:
                    x[:, :, i, j] = logistic_draw(out, self.channels, temperature)
                else:
                    x[:, 0, i, j] = torch.distributions.Categorical(logits=out / temperature).sample()
            if sys.stdout.isatty():
                print(f"drawing {n}: row {i + 1} of {self.size}", end="\r", flush=True)
        return x


# By channels: how many numbers are a logistic's logit, means, log-scales and, in equation 3, alpha, beta and gamma.
LOGISTIC = {1: [1, 1, 1, 0], 3: [1, 3, 3, 3]}


def logistics(out: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The K logistics of out (N, ., ...) for values x (N, C, ...) in [-1, 1] (arXiv:1701.05517, equation 3).

    Logits (N, K, ...), and (N, K, C, ...) means, which depend on the channels before, and scales.
    """
    sizes = LOGISTIC[x.shape[1]]
    logits, mean, log_scale, weights = out.unflatten(1, (-1, sum(sizes))).split(sizes, 2)
    if x.shape[1] == 3:
        (red, green, _), (alpha, beta, gamma) = x[:, None].unbind(2), weights.tanh().unbind(2)
        mean = mean + torch.stack([torch.zeros_like(alpha), alpha * red, beta * red + gamma * green], 2)
    return logits.squeeze(2), mean, log_scale.clamp(-7, 7).exp()


def logistic_log_prob(out: Tensor, x: Tensor) -> Tensor:
    """log p(x) in nats (N, ...) of x (N, C, ...) in 0 to 255, by the mixture of out (arXiv:1701.05517, equation 2).

    With s the sigmoid, p = s(b) - s(a) = s(b) s(-a) (1 - e^(a-b)) for the edges a < b of a value, in scales from the
    mean: three factors whose logarithms do not underflow. The lowest value's a is -inf, the highest's b is inf.
    """
    centre = x.type_as(out) / 127.5 - 1
    logits, mean, scale = logistics(out, centre)
    x, from_mean, half = x[:, None], centre[:, None] - mean, 1 / 127.5 / 2
    above = F.logsigmoid((from_mean + half) / scale) * (x < 255)
    below = F.logsigmoid((half - from_mean) / scale) * (x > 0)
    between = (-torch.expm1(-2 * half / scale)).log() * ((x > 0) & (x < 255))
    return torch.logsumexp(logits.log_softmax(1) + (above + below + between).sum(2), 1)


def logistic_draw(out: Tensor, channels: int, temperature: float = 1.0) -> Tensor:
    """Values (N, channels) from 0 to 255 of the mixtures out (N, .); a low temperature: by the likeliest's mean."""
    x = out.new_zeros(len(out), channels)
    k = torch.distributions.Categorical(logits=logistics(out, x)[0] / temperature).sample()
    out = out.unflatten(1, (-1, sum(LOGISTIC[channels]))).take_along_dim(k[:, None, None], 1)[:, 0]  # the k-th alone
    for c in range(channels):  # its mean depends on those before
        _, mean, scale = logistics(out, x / 127.5 - 1)
        drawn = mean[:, 0, c] + temperature * scale[:, 0, c] * torch.rand_like(x[:, c]).logit()
        x[:, c] = ((drawn + 1) * 127.5).round().clamp(0, 255)
    return x.long()


class MaskedConv(nn.Conv2d):
    """A convolution that sees no later position, and its own only if `own` (masks A and B of arXiv:1601.06759)."""

    def __init__(self, n_in: int, n_out: int, side: int, own: bool):
        super().__init__(n_in, n_out, side, padding=side // 2)
        self.register_buffer("mask", (torch.arange(side**2) < side**2 // 2 + own).float().view(side, side))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class MaskedStack(nn.Module):
    """(N, n_in, H, W) -> (N, dim, H, W): figure 5 of arXiv:1601.06759, with the label as a bias of each block."""

    def __init__(self, n_in: int, size: int, dim: int, n_layers: int, dropout: float, n_classes: int):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, dim, size, size))  # a bias of each position
        self.first, self.dropout, half = MaskedConv(n_in, dim, 7, own=False), nn.Dropout2d(dropout), dim // 2
        self.blocks, self.labels = nn.ModuleList(), nn.ParameterList()
        for _ in range(n_layers):
            down, masked, up = nn.Conv2d(dim, half, 1), MaskedConv(half, half, 3, own=True), nn.Conv2d(half, dim, 1)
            self.blocks.append(nn.Sequential(nn.ReLU(), down, nn.ReLU(), masked, nn.ReLU(), up))
            self.labels.append(torch.zeros(n_classes, dim) if n_classes else None)

    def forward(self, e: Tensor, labels: Tensor | None) -> Tensor:
        h = self.first(e) + self.place[:, :, : e.shape[2]]
        for block, label in zip(self.blocks, self.labels):
            h = h + self.dropout(block(h + label[labels][:, :, None, None] if label is not None else h))
        return h

    def last_row(self, e: Tensor, labels: Tensor | None) -> Callable:
        """The function that maps the last row of e, e[:, :, -1:], to that of forward(e), for the rows above it in e."""
        return lambda row: self(torch.cat([e[:, :, :-1], row], 2), labels)[:, :, -1:]


class GatedStack(nn.Module):
    """(N, n_in, H, W) -> (N, dim, H, W): figure 2 of arXiv:1606.05328; above: its vertical stack, left: horizontal."""

    def __init__(self, n_in: int, size: int, dim: int, n_layers: int, dropout: float, n_classes: int):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, dim, size, size))  # a bias of each position
        self.first_above, self.first_left = nn.Conv2d(n_in, dim, (3, 7)), nn.Conv2d(n_in, dim, (1, 3))
        self.convs, self.labels, self.dropout = nn.ModuleList(), nn.ParameterList(), nn.Dropout2d(dropout)
        for _ in range(n_layers):
            above, left = nn.Conv2d(dim, 2 * dim, (2, 3)), nn.Conv2d(dim, 2 * dim, (1, 2))
            self.convs.append(nn.ModuleList([above, nn.Conv2d(2 * dim, 2 * dim, 1), left, nn.Conv2d(dim, dim, 1)]))
            self.labels.append(torch.zeros(n_classes, 2 * dim) if n_classes else None)

    def above(self, e: Tensor, labels: Tensor | None) -> list[Tensor]:
        """What each layer hands to the horizontal stack (N, 2 dim, H, W): in row i, of the rows above i."""
        h = self.first_above(F.pad(e, (3, 3, 3, -1)))  # 3 zero rows above, the last row cut off: i sees i - 3 to i - 1
        h, handed = h + self.place[:, :, : e.shape[2]], []  # the first rows of a picture that is being drawn
        for (above, to_left, _, _), label in zip(self.convs, self.labels):
            both = above(F.pad(h, (1, 1, 1, 0)))
            both = both + label[labels][:, :, None, None] if label is not None else both  # to_left has it
            handed.append(to_left(both))
            h = gate(both)
        return handed

    def forward(self, e: Tensor, labels: Tensor | None, above: list[Tensor] | None = None) -> Tensor:
        h = self.first_left(F.pad(e, (3, -1)))  # j sees j - 3 to j - 1
        for (_, _, left, out), handed in zip(self.convs, above or self.above(e, labels)):
            h = h + self.dropout(out(gate(left(F.pad(h, (1, 0))) + handed)))
        return h

    def last_row(self, e: Tensor, labels: Tensor | None) -> Callable:
        """As in MaskedStack, but what is above is computed once for the row."""
        above = [handed[:, :, -1:] for handed in self.above(e, labels)]
        return lambda row: self(row, labels, above)


def gate(h: Tensor, tanh: bool = True) -> Tensor:
    """The first half of the channels, or tanh of it, times sigmoid of the second."""
    a, b = (half.contiguous(memory_format=torch.channels_last) for half in h.chunk(2, 1))  # faster than as they lie
    return (a.tanh() if tanh else a) * b.sigmoid()


class PlusPlusStack(nn.Module):
    """(N, n_in, H, W) -> (N, dim, H, W), H and W multiples of 4: figure 2 of arXiv:1701.05517.

    Its stream u, going down, sees the rows above; ul, going down and right, also what is left in the row.
    """

    def __init__(self, n_in: int, size: int, dim: int, n_layers: int, dropout: float, n_classes: int):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, dim, size, size))  # a bias of each position
        self.first_u = normed(Shifted(n_in, dim, (3, 7), (3, 3, 3, -1)))
        self.first_ul = normed(Shifted(n_in, dim, (1, 3), (3, -1, 0, 0)))
        self.down, self.up, same = nn.ModuleList(), nn.ModuleList(), (dim, dropout, n_classes)
        for i in range(3 * n_layers):  # as many on the whole, half and quarter size, going down and up
            down = "half" if i in (n_layers, 2 * n_layers) else ""
            up = "double" if i + 1 in (n_layers, 2 * n_layers) else ""
            self.down.append(nn.ModuleList([PlusPlusBlock(3, 0, down, *same), PlusPlusBlock(2, dim, down, *same)]))
            self.up.append(nn.ModuleList([PlusPlusBlock(3, dim, up, *same), PlusPlusBlock(2, 2 * dim, up, *same)]))

    def forward(self, e: Tensor, labels: Tensor | None, top: int = 0, seen: dict | None = None) -> Tensor:
        u = self.place[:, :, top : top + e.shape[2]] + self.first_u(e, seen)  # place first: its memory format stays
        ul, cuts = u + self.first_ul(e, seen), []
        for u_block, ul_block in self.down:
            u = u_block(u, None, labels, seen)
            ul = ul_block(ul, u, labels, seen)
            cuts.append((u, ul))
        for (u_block, ul_block), (u_cut, ul_cut) in zip(reversed(self.up), reversed(cuts)):
            u = u_block(u, u_cut, labels, seen)
            ul = ul_block(ul, torch.cat([u, ul_cut], 1), labels, seen)
        return ul

    def last_row(self, e: Tensor, labels: Tensor | None) -> Callable:
        """As in MaskedStack; but only four rows, one of a quarter of the size, see anew, and remember those above."""
        fours, i = divmod(e.shape[2] - 1, 4)  # those above; and of its own four, which one is the row
        four, seen = F.pad(e[:, :, 4 * fours :], (0, 0, 0, 3 - i)), {}
        self(torch.cat([e[:, :, : 4 * fours], four], 2), labels, 0, seen)
        above, below = four[:, :, :i], four[:, :, i + 1 :]
        return lambda row: self(torch.cat([above, row, below], 2), labels, 4 * fours, seen)[:, :, i : i + 1]


class PlusPlusBlock(nn.Module):
    """x + a sigmoid(b), where a, b come from x by two filters and from `more` by a 1x1 filter; x is resized before.

    x and the result (N, dim, H, W), more (N, n_more, H, W) or None; resize: "", "half" or "double" the size of x.
    """

    def __init__(self, width: int, n_more: int, resize: str, dim: int, dropout: float, n_classes: int):
        super().__init__()
        filters = (2, width), (1, width - 2, 1, 0)  # a row above, and one to the left, if 3 wide also to the right
        self.smaller = normed(Shifted(dim, dim, *filters, stride=2)) if resize == "half" else None
        self.larger = normed(nn.ConvTranspose2d(dim, dim, 2, 2), 1) if resize == "double" else None
        self.first = normed(Shifted(2 * dim, dim, *filters))
        self.second = normed(Shifted(2 * dim, 2 * dim, *filters))
        self.more = normed(nn.Conv2d(2 * n_more, dim, 1)) if n_more else None
        self.label = nn.Parameter(torch.zeros(n_classes, 2 * dim)) if n_classes else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, more: Tensor | None, labels: Tensor | None, seen: dict | None) -> Tensor:
        x = self.smaller(x, seen) if self.smaller else self.larger(x) if self.larger else x
        h = self.first(concat_elu(x), seen)
        h = h + self.more(concat_elu(more)) if self.more else h
        h = self.second(self.dropout(concat_elu(h)), seen)
        h = h + self.label[labels][:, :, None, None] if self.label is not None else h
        return x + gate(h, tanh=False)


class Shifted(nn.Conv2d):
    """A convolution of x shifted: padded by (left, right, top, bottom), where below 0 cuts off.

    seen: {} remembers what it sees of x; then, given the last rows of such an x, it takes those above from there.
    """

    def __init__(self, n_in: int, n_out: int, kernel: tuple, shift: tuple, stride: int = 1):
        super().__init__(n_in, n_out, kernel, stride)
        self.shift = shift

    def forward(self, x: Tensor, seen: dict | None) -> Tensor:
        x, top = F.pad(x, self.shift), self.shift[2]
        if seen is not None:
            x = torch.cat([seen.setdefault(self, x)[:, :, -x.shape[2] :][:, :, :top], x[:, :, top:]], 2)
        return super().forward(x)


def normed(conv: nn.Module, dim: int = 0) -> nn.Module:
    """Put weight norm on a filter, whose outputs are the dimension `dim` of its weights; each begins with norm 1."""
    nn.init.ones_(weight_norm(conv, dim=dim).parametrizations.weight.original0)
    return conv


def concat_elu(x: Tensor) -> Tensor:
    """ELU of x and of -x: twice the channels."""
    return F.elu(torch.cat([x, -x], 1))


# --- block: decoder
class Residual(nn.Sequential):
    """x + f(x) for x (N, dim, h, w)."""

    def __init__(self, dim: int, residual_dim: int):
        super().__init__(nn.ReLU(), nn.Conv2d(dim, residual_dim, 3, 1, 1), nn.ReLU(), nn.Conv2d(residual_dim, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Decoder(nn.Module):
    """The vectors of codes e (N, latent_dim, h, w) -> images (N, dims[0], H, W), the encoder in reverse."""

    def __init__(self, n_embeddings: int, latent_dim: int, dims: list, residual_dim: int):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(n_embeddings, latent_dim))
        layers = [nn.Conv2d(latent_dim, dims[-1], 3, 1, 1), *(Residual(dims[-1], residual_dim) for _ in range(2))]
        for n_in, n_out in zip(dims[::-1], dims[-2::-1]):
            layers += [nn.ReLU(), nn.ConvTranspose2d(n_in, n_out, 4, 2, 1)]
        self.layers = nn.Sequential(*layers)

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (N, h, w) -> their vectors (N, latent_dim, h, w)."""
        return F.embedding(codes.long(), self.codebook).movedim(-1, 1)

    def forward(self, e: Tensor) -> Tensor:
        return self.layers(e)


# ---------------- training


def train_step(model: PixelCNN, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> dict:
    """Raise log p(x) of a batch; returns what it was, as a loss, in nats per image."""
    nats = -model.log_prob(x, labels).mean()
    optimizer.zero_grad()
    nats.backward()
    mean_gradients(model)
    optimizer.step()
    return dict(nats=nats.detach())


def average(model_avg: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move model_avg towards the model. Its memory is short at first, so that it forgets how the model started."""
    decay = min(decay, (1 + step) / (10 + step)) if decay else 0.0
    torch.optim.swa_utils.get_ema_multi_avg_fn(decay)([*model_avg.parameters()], [*model.parameters()], None)


@torch.no_grad()
def test(model: PixelCNN, x: Tensor, labels: Tensor) -> dict[str, float]:
    """-log p(x) of test images: nats per image, bits per dimension (of an image that is one of codes: per code)."""
    nats = -sum(float(model.log_prob(*part).sum()) for part in zip(x.split(100), labels.split(100))) / len(x)
    return dict(test_nats=nats, test_bits_per_dim=nats / math.log(2) / x[0].numel())


def train(opt: Namespace) -> Path:
    """Train and return the run's folder. Raises OSError for bad data or files, FloatingPointError for a bad loss."""
    device = find_device(opt)
    of_codes = vars(opt).get("codebook") or (opt.dataset and Path(opt.dataset, "checkpoint.pt").exists())
    data, tests, decoder = load_codes(opt) if of_codes else load_images(opt)
    if opt.arch == "plusplus" and opt.img_size % 4:
        raise OSError(f"side {opt.img_size}: --arch plusplus needs a multiple of 4 (--img_size; of codes: in vqvae.py)")
    torch.manual_seed(0)  # black and white test images are drawn once
    tests = ((tests[0] / 255).bernoulli() if opt.binarize else tests[0]).long().to(device), tests[1].to(device)
    data = TensorDataset(*(part.to(device) for part in data))
    sampler = BatchSampler(RandomSampler(data), opt.batch_size, drop_last=True)
    loader = DataLoader(data, sampler=sampler, batch_size=None)  # a batch is data[[3, 1, ...]]: one look-up, not 16

    torch.manual_seed(opt.seed)
    model = new_model(opt)
    model.load_state_dict(decoder, strict=False)  # of codes: to draw without the run of vqvae.py
    model.to(device, memory_format=torch.channels_last)  # faster for convolutions
    model_avg = copy.deepcopy(model).eval().requires_grad_(False)
    if opt.amp:
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    if opt.compile:
        model.compile()
    optimizer = torch.optim.Adam(model.parameters(), opt.lr, (opt.b1, opt.b2), fused=True)
    columns = min(opt.n_classes, 10) if opt.conditional else 10
    grid_labels = torch.arange(3 * columns, device=device) % columns

    def picture() -> None:
        seed(opt.seed, "grid")  # the same noise each time
        save_grid(run, model_avg.images(model_avg.sample(3 * columns, grid_labels)), columns)

    run = start(opt, loader, model=model, model_avg=model_avg, optimizer=optimizer)
    try:
        for epoch in range(run.done // len(loader), opt.n_epochs):
            seed(opt.seed, "epoch", epoch)  # of the order of the images
            for i, (real, labels) in enumerate(loader, epoch * len(loader)):
                if i < run.done:  # trained before the checkpoint
                    continue
                if i % opt.sample_interval == 0:
                    picture()
                seed(opt.seed, "batch", i, RANK)  # of dropout and binary pixels, so that a resumed run has the same
                real, labels = (part[RANK::WORLD].to(device) for part in (real, labels))
                x = (real / 255).bernoulli() if opt.binarize else real  # black and white pixels, drawn anew
                losses = train_step(model, optimizer, x.long(), labels)
                average(model_avg, model, opt.ema, i)
                after_batch(run, opt, **losses)
            after_epoch(run, opt, **test(model_avg, *tests))
        picture()
        x, y = (part[torch.linspace(0, len(part) - 1, 6).long()].repeat_interleave(8, 0) for part in tests)
        drawn = model_avg.sample(len(x), y, x, model.size // 2)
        drawn[::8] = x[::8]  # each row: a test image, then what its upper half was completed to
        if RANK == 0:
            utils.save_image(model_avg.images(drawn), run.folder / "completion.png", nrow=8)
    finally:  # after Ctrl-C, too
        finish(run, sample="training.gif")
    return run.folder


def load_images(opt: Namespace) -> tuple[tuple, tuple, dict]:
    """Images (N, C, H, W), uint8, and labels (N,), to train and to test with; no decoder."""
    data = load_data(opt)
    by_arch = "logistic" if opt.channels == 3 or opt.arch == "plusplus" else "softmax"
    opt.likelihood = opt.likelihood or ("bernoulli" if opt.binarize else by_arch)
    if opt.channels == 3 and opt.likelihood != "logistic":
        raise OSError(f"{opt.dataset} is read in colour: for --likelihood logistic; or give --channels 1")
    opt.codebook, opt.decoder, opt.n_values = None, None, 2 if opt.binarize else 256
    if opt.dataset in DATASETS:
        return data, load_data(opt, train=False), {}
    kept = [i for i in range(len(data[0])) if i % 10] or [0]  # every tenth image is held out
    return tuple(part[kept] for part in data), tuple(part[::10] for part in data), {}


def load_codes(opt: Namespace) -> tuple[tuple, tuple, dict]:
    """Codes (N, 1, h, w) of the run of vqvae.py opt.dataset, and labels, to train and to test with; decoder weights."""
    try:
        state = torch.load(Path(opt.dataset, "checkpoint.pt"), map_location="cpu", weights_only=True)
        o, done = Namespace(**state["options"]), state["position"][0]
        arrays = np.load(Path(opt.dataset, "codes.npz")) if state["script"] == "vqvae" else {}
        if arrays.get("batches_done") != done:
            raise ValueError(f"{state['script']}.py, {done} batches done; codes.npz: {arrays.get('batches_done')}")
        names = ("codes", "labels", "test_codes", "test_labels")
        x, labels, test_x, test_labels = (torch.from_numpy(arrays[name].astype(np.int64)) for name in names)
    except Exception as e:  # torch and numpy raise many kinds
        raise OSError(f"{opt.dataset}: {e!r}; its codes: python vqvae.py --resume {opt.dataset} --n_epochs 0") from e
    made = float(state["model_avg"]["decoder.codebook"].sum())  # is another after more training
    if (vars(opt).get("codebook") or made) != made or opt.n_classes not in (None, o.n_classes):
        raise OSError(f"{opt.dataset}: its codes have changed, or --n_classes does not fit; start anew")
    if opt.likelihood not in (None, "softmax") or opt.binarize:
        raise OSError(f"{opt.dataset}: codes are for --likelihood softmax, without --binarize")
    dims = [o.channels, *[o.hidden_dim // 2] * (o.downsample.bit_length() - 2), o.hidden_dim]
    opt.codebook, opt.n_values, opt.decoder = made, o.n_embeddings, [o.n_embeddings, o.latent_dim, dims, o.residual_dim]
    opt.channels, opt.img_size, opt.classes, opt.n_classes = o.channels, x.shape[2], o.classes, o.n_classes
    opt.likelihood = "softmax"
    decoder = {name: weight for name, weight in state["model_avg"].items() if name.startswith("decoder.")}
    return (x[:, None], labels), (test_x[:, None], test_labels), decoder


# ---------------- load and generate


def new_model(opt: Namespace) -> PixelCNN:
    """An untrained model of these options."""
    n_classes = opt.n_classes if opt.conditional else 0
    of_x, of_layers = (opt.n_values, opt.channels, opt.img_size), (opt.hidden_dim, opt.n_layers, opt.dropout, n_classes)
    model = PixelCNN(opt.arch, opt.likelihood, *of_x, *of_layers)
    model.decoder = Decoder(*opt.decoder).requires_grad_(False) if opt.decoder else None
    return model


def load(run: str | Path, device: str | torch.device = "cpu") -> PixelCNN:
    """The averaged model of a run's folder, in eval mode, with its `.options`. Raises OSError if it has none."""
    state = read_checkpoint(run)
    model = new_model(Namespace(**state["options"]))
    model.load_state_dict(state["model_avg"])
    model.options = state["options"]
    return model.to(device).eval().requires_grad_(False)


def generate(opt: Namespace) -> Path:
    """Write opt.generate images; given labels, as many of each class, in sub-folders. Returns the folder."""
    device = find_device(opt)
    model, folder = load(opt.resume, device), new_folder(Path(opt.resume, "generated"))
    classes = sorted(set(opt.labels or range(opt.n_classes)))
    torch.manual_seed(opt.seed)
    labels = torch.tensor([classes[i % len(classes)] for i in range(opt.generate)], device=device)
    drawn = torch.cat([model.sample(len(y), y, temperature=opt.temperature) for y in labels.split(100)])
    for i, x in enumerate(drawn):
        file = folder / (opt.classes[labels[i]] if opt.conditional else "") / f"{i:06}.png"
        file.parent.mkdir(exist_ok=True)
        utils.save_image(model.images(x[None]), file)
    if model.decoder:  # for vqvae.py --decode
        named = dict(labels=labels.cpu().numpy(), classes=np.array(opt.classes)) if opt.conditional else {}
        np.savez_compressed(folder / "codes.npz", codes=drawn[:, 0].cpu().numpy(), **named)
    print(f"{opt.generate} images in {folder}")
    return folder


# ---------------- the plumbing: the same in every script, to the letter, from "block: processes" to main


# --- block: processes
# A process of torchrun has its rows of a batch, noise, dropout and batch norm; the first writes.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def find_device(opt: Namespace) -> torch.device:
    """The device of the options, tried. Raises OSError if it does not work."""
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.device(best if opt.device == "auto" else opt.device)
        if WORLD > 1 and device.type != "cpu":
            torch.get_device_module(device).set_device(int(os.environ["LOCAL_RANK"]))
        torch.zeros(8_000_000, device=device)[0].item()  # 32 MB, freed: glibc then keeps 64 MB of a step
        if opt.amp:
            torch.autocast(device.type, torch.bfloat16)
    except (RuntimeError, AssertionError, ImportError) as e:
        raise OSError(f"--device {opt.device}{' --amp' * opt.amp}: not on this machine; try --device auto") from e
    return device


def mean_gradients(model: nn.Module) -> None:
    """Average gradients over processes, as losses are means."""
    for grad in [p.grad for p in model.parameters() if p.grad is not None] if WORLD > 1 else ():
        dist.all_reduce(grad)
        grad.div_(WORLD)


def seed(*position: int | str) -> None:
    """Seed torch; random numbers of two positions have nothing in common."""
    rng = torch if torch.accelerator.is_available() else torch.default_generator  # torch.manual_seed: 0.3 ms
    rng.manual_seed(random.Random(repr(position)).getrandbits(64))


# --- block: options
def number(kind: type, low: float = 0, below: float = 2**31) -> Callable:
    """An argparse type: an int or float that is at least `low` and less than `below`."""

    def number(text: str) -> float:
        if low <= kind(text) < below:  # nan is not
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not from {low} to below {below}")

    return number


def finish_options(p: ArgumentParser, argv: list[str] | None, acts: list[str], free: list[str]) -> Namespace:
    """Parse argv; with --resume the run's options are the defaults, and only `free` and `acts` on it may change."""
    opt = p.parse_args(argv)
    acting = any(getattr(opt, name) is not None for name in acts)
    if acting and (opt.resume is None or WORLD > 1):
        p.error(f"--{', --'.join(acts)}: only with --resume RUN, without torchrun")
    saved = read_checkpoint(opt.resume)["options"] if opt.resume is not None else {}
    p.set_defaults(**saved)  # for what argv leaves out
    opt = p.parse_args(argv)
    free = {"resume", "n_epochs", "sample_interval", "n_cpu", "data_dir", "device", "amp", "compile", *acts, *free}
    for name in saved.keys() - free - {"seed" if acting else ""}:
        if getattr(opt, name) != saved[name]:
            p.error(f"--{name} {getattr(opt, name)}: the run has {saved[name]}; start a new one")
    return opt


# --- block: data
def draw_digits(root: str = "", train: bool = True, download: bool = False) -> Namespace:
    """Digits turned, shifted, scaled and sheared at random: .data (n, 28, 28), uint8, and .targets (n,)."""
    n, font = 10_000 if train else 2_000, ImageFont.load_default(26)
    affine = v2.RandomAffine(15, (0.05, 0.05), (0.85, 1.15), 10, v2.InterpolationMode.BILINEAR)
    images = torch.empty(n, 28, 28, dtype=torch.uint8)
    torch.manual_seed(n)
    for i in range(n):
        glyph = Image.new("L", (28, 28))
        ImageDraw.Draw(glyph).text((14, 14), str(i % 10), 255, font, anchor="mm")
        images[i] = v2.functional.pil_to_tensor(affine(glyph))
    return Namespace(data=images, targets=torch.arange(n) % 10)


DATASETS = dict(mnist=datasets.MNIST, fashion_mnist=datasets.FashionMNIST, cifar10=datasets.CIFAR10, digits=draw_digits)


def load_data(opt: Namespace, train: bool = True) -> tuple[Tensor, Tensor]:
    """Images, uint8 (N, channels, img_size, img_size), and labels (N,). Adds to opt what the data decides."""
    if RANK and not dist.is_initialized():
        dist.init_process_group()  # waits for the first process, which joins in start() when it has the data
    if opt.dataset in (None, *DATASETS):
        name, classes = opt.dataset or "mnist", [str(k) for k in range(10)]
        socket.setdefaulttimeout(20)  # seconds: a network that swallows packets ends, too
        try:
            data = DATASETS[name](opt.data_dir, train=train, download=True)
        except Exception as e:  # of many kinds
            text = f"{name} is not in {opt.data_dir}, nor to be downloaded ({' '.join(str(e).split())})"
            if opt.dataset:
                raise OSError(f"{text}; --dataset digits is built in") from e
            print(f"warning: {text}; using --dataset digits", file=sys.stderr)
            name, data = "digits", draw_digits(train=train)
        images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        opt.dataset, opt.channels = name, opt.channels or images.shape[1]
        if images.shape[1] != opt.channels:
            images = v2.functional.rgb_to_grayscale(images, opt.channels)  # or grey in three channels
        images = v2.functional.resize(images, [opt.img_size, opt.img_size])
    else:
        if not Path(opt.dataset).is_dir() or Path(opt.dataset, "checkpoint.pt").exists():
            raise OSError(f"--dataset {opt.dataset}: neither one of {', '.join(DATASETS)} nor a folder of images")
        data = datasets.ImageFolder(opt.dataset, loader=functools.partial(read_image, opt=opt))
        opt.channels, classes, labels = opt.channels or 3, data.classes, torch.tensor(data.targets)
        images = torch.empty(len(data), opt.channels, opt.img_size, opt.img_size, dtype=torch.uint8)
        workers = min(opt.n_cpu, os.cpu_count(), len(data) // 1000)  # fewer are not worth a process
        for i, (part, _) in enumerate(DataLoader(data, 64, num_workers=workers)):
            images[i * 64 : i * 64 + 64] = part
    if opt.n_classes not in (None, len(classes)) or getattr(opt, "classes", classes) != classes:
        raise OSError(f"--n_classes {opt.n_classes} {vars(opt).get('classes')}: the data has {len(classes)}, {classes}")
    opt.n_classes, opt.classes = len(classes), classes
    return images, labels


def read_image(file: str, opt: Namespace) -> Tensor:
    """An image, cut to a square about its centre: uint8 (channels, img_size, img_size)."""
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":  # Pillow would make them white
                raise ValueError("more than 8 bits a channel")
            image = ImageOps.fit(image.convert("L" if opt.channels == 1 else "RGB"), (opt.img_size, opt.img_size))
            return v2.functional.pil_to_tensor(image)
    except Exception as e:  # of many kinds
        raise OSError(f"{file}: not a good image ({e}); repair or remove it") from e


# --- block: run
CHECKPOINT_SECONDS = 30  # at most so much is trained again after a stop


def start(opt: Namespace, loader: DataLoader, **parts) -> Namespace:
    """A new run, or the one to resume at its checkpoint, which holds `parts`; `done` counts batches."""
    if len(loader) == 0 or opt.batch_size % WORLD or opt.batch_size < 2 * WORLD:
        raise OSError(f"--batch_size {opt.batch_size}: above {len(loader.dataset)} images or not for {WORLD} processes")
    if loader.dataset[0][0].is_floating_point():
        raise TypeError("images must be uint8, from 0 to 255")
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group()
    run = Namespace(folder=Path(opt.resume or opt.out_dir), parts=parts, per_epoch=len(loader))
    state = read_checkpoint(opt.resume) if opt.resume else dict(position=[0, len(loader), {}, [], 0.0])
    run.done, per_epoch, run.totals, run.rows, seconds = state["position"]
    if per_epoch != len(loader):
        raise OSError(f"{opt.dataset} has {len(loader)} batches an epoch now, and had {per_epoch}: start a new run")
    for name, part in parts.items() if opt.resume else ():
        part.load_state_dict(state[name])
    run.folder = run.folder if RANK or opt.resume else new_folder(run.folder, "images")
    run.began = time.monotonic() - seconds
    save(run, opt)
    if RANK == 0:
        print(f"{opt.dataset}: {len(loader)} batches an epoch, {run.done} done; writing to {run.folder}", flush=True)
    return run


def after_batch(run: Namespace, opt: Namespace, **losses: Tensor) -> None:
    """Count a batch and add up its losses; now and then report, and write a checkpoint."""
    before = run.totals if run.done % run.per_epoch else {}  # sums start anew with an epoch
    run.done, run.totals = run.done + 1, {name: before.get(name, 0) + loss for name, loss in losses.items()}
    if run.done % run.per_epoch:
        if run.done % (50 if sys.stdout.isatty() else opt.sample_interval) == 0:
            report(run, opt)
        if time.monotonic() > run.saved + CHECKPOINT_SECONDS:
            save(run, opt)


def after_epoch(run: Namespace, opt: Namespace, **more: float) -> None:
    """Add the epoch's row to log.csv, `more` in it, and write a checkpoint."""
    run.rows, run.began = [*run.rows, report(run, opt, **more)], time.monotonic()
    save(run, opt)


def report(run: Namespace, opt: Namespace, **more: float) -> dict[str, float]:
    """Print and return a row of log.csv: the epoch's mean losses so far, and `more`."""
    n, seconds = (run.done - 1) % run.per_epoch + 1, time.monotonic() - run.began
    row = dict(epoch=(run.done - n) // run.per_epoch + 1, batches_done=run.done)
    row |= {name: float(total) / n for name, total in run.totals.items()} | more
    row |= dict(seconds=round(seconds, 2), images_per_second=round(n * opt.batch_size / seconds))
    if RANK == 0:
        text = " ".join(f"{name} {round(value, 4)}" for name, value in row.items())
        width = max(os.get_terminal_size().columns, 1) - 1 if sys.stdout.isatty() else 0  # over the last report
        print(f"{text:{width}.{width}}" if width else text, end="\r" if width else "\n", flush=True)
    return row


def save(run: Namespace, opt: Namespace) -> None:
    """Write checkpoint.pt, in one piece, and log.csv. If this fails, the old checkpoint stays."""
    run.saved = time.monotonic()
    if RANK:
        return
    weights = [p for part in run.parts.values() if isinstance(part, nn.Module) for p in part.parameters()]
    if not all(torch.as_tensor(x).isfinite().all() for x in [*weights, *run.totals.values()]):
        raise FloatingPointError(f"batch {run.done}: a loss or weight is not finite; start anew, with a lower --lr")
    state = {name: part.state_dict() for name, part in run.parts.items()} | dict(script=SCRIPT, options=vars(opt))
    state["position"] = [run.done, run.per_epoch, run.totals, run.rows, run.saved - run.began]
    table = [*run.rows[:1], *(row.values() for row in run.rows)]  # first the keys
    new = run.folder / "checkpoint.tmp"
    try:
        torch.save(state, new)
        new.replace(run.folder / "checkpoint.pt")
        (run.folder / "log.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in table))
    except (OSError, RuntimeError) as e:  # torch raises the latter for a full disk
        new.unlink(missing_ok=True)
        raise OSError(f"{run.folder}: checkpoint.pt cannot be written ({e}); the last one stays") from e


def read_checkpoint(run: str | Path) -> dict:
    """The checkpoint in a run's folder. Raises OSError if it is missing, damaged or another script's."""
    try:
        state = torch.load(Path(run, "checkpoint.pt"), map_location="cpu", weights_only=True)
        if state["script"] != SCRIPT:
            raise ValueError(f"made by {state['script']}.py")
    except Exception as e:  # of many kinds
        raise OSError(f"{run}/checkpoint.pt is not one of {SCRIPT}.py ({' '.join(repr(e).split())})") from e
    return state


def new_folder(path: Path, inside: str = "") -> Path:
    """Make path/inside and return path; if path is in use, path-2, path-3, ...: nothing is overwritten."""
    folder, n = path, 1
    while any(folder.glob("*")):
        n += 1
        folder = path.parent / f"{path.name or 'run'}-{n}"
    (folder / inside).mkdir(parents=True, exist_ok=not inside)
    return folder


def save_grid(run: Namespace, images: Tensor, columns: int, name: str = "sample") -> None:
    """Save images (N, C, H, W) in [0, 1] as a grid, named after run.done."""
    if RANK == 0:
        new = run.folder / "grid.tmp"
        utils.save_image(images, new, nrow=columns, format="png")
        new.replace(run.folder / "images" / f"{name}_{run.done:06}.png")


def finish(run: Namespace, **gifs: str) -> None:
    """Make a GIF of the grids of each name, at most 100, evenly spread, and say how to go on."""
    for name, file in gifs.items() if RANK == 0 else ():
        paths = sorted(run.folder.glob(f"images/{name}_*.png"), key=lambda path: (len(path.name), path))
        frames = [Image.open(path) for path in paths[:: -(len(paths) // 100 + 1)]][::-1]  # ends with the last
        if frames:
            frames[0].save(run.folder / file, save_all=True, append_images=frames[1:], duration=100, loop=0)
            print(f"\n{run.folder / file}; to go on: python {Path(__file__).name} --resume {run.folder}")


def main() -> None:
    try:
        opt = parse_args()
        action = generate if opt.generate else train
        action(opt)
    except (OSError, FloatingPointError) as e:  # its last line: a worker's traceback stands before it
        sys.exit(f"{SCRIPT}.py: error: {str(e).splitlines()[-1]}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
