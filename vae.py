"""Variational autoencoder (VAE): encodes images as small random vectors, decodes them, and draws new images.

The encoder turns an image x into a Gaussian q(z|x) = N(mu, diag(exp(logvar))). The decoder turns a vector z
into p(x|z), a distribution over images. Together they maximise the evidence lower bound (ELBO), in nats per
image, with the prior p(z) = N(0, I):

    log p(x)  >=  ELBO  =  E_q[log p(x|z)] - KL(q(z|x) || p(z))

E_q is estimated with one sample of z per image. --beta weights the KL; if it is not 1, the training
objective is no longer the ELBO, but the log still reports the ELBO. With --conditional, encoder and decoder
are given the label, and the ELBO bounds log p(x|label).

What log p(x) is depends on the likelihood. Compare ELBOs only of the same likelihood and images:

    gaussian                the log-density of pixels scaled to [0, 1]
    bernoulli, --binarize   the log-probability of a binary image
    bernoulli               no likelihood of x: pixels between 0 and 1 are taken as probabilities, and the
                            ELBO bounds E[log p(b)], where b is a binary image drawn with them.

MNIST is enlarged to 32x32 pixels. Most published ELBOs are of 28x28 binary ones: --img_size 28 --binarize.

New images are the mean of p(x|z). Their z is drawn from a Gaussian that is fitted to the encoded training
images of a class, anew for each sample grid. With --prior normal, and before the first grid, it is drawn from
p(z). The KL is always that to p(z).

VAE: Kingma & Welling 2013, arXiv:1312.6114, equation 10. Beta: Higgins et al. 2017. Optimal variance: Rybkin
et al. 2020, arXiv:2006.13202. Conditional VAE: Sohn et al. 2015. Fitted prior: Ghosh et al. 2019,
arXiv:1903.12436. Averaged weights: Yazici et al. 2018, arXiv:1806.04498.

    python vae.py --n_epochs 20                              # MNIST; built-in digits when offline
    python vae.py --arch vanilla --dataset path/to/folder    # your images; sub-folders are classes
    python vae.py --resume runs/vae --generate 100 --labels 3 7
    python vae.py --resume runs/vae --reconstruct path/to/folder
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "pillow>=10.1"]
# ///

import argparse
import copy
import csv
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

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.utils import save_image

SCRIPT = Path(__file__).stem  # a run is read only by a script of this file name, and not by a renamed copy
USES = {"generate", "labels", "reconstruct"}  # options that use a trained run: they need --resume

# ---------------------------------------------------------------- options
# Names such as count, ON_OFF, Run and seed are defined in the last part of the script, the plumbing. RANK is
# the number of this process under torchrun, and WORLD the number of processes.


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Parse argv (default: the command line).

    Raises SystemExit for a bad option, and InputError if --resume names no run of this script.
    """
    p = ArgumentParser(usage="%(prog)s [options]", description=__doc__, formatter_class=Help)
    add = p.add_argument_group("model").add_argument
    add("--arch", choices=["burgess", "conv", "vanilla", "mlp"], default="burgess",
        help="burgess: light convolutions; conv, vanilla: wider ones; mlp: fully connected")  # fmt: skip
    add("--conditional", action=ON_OFF, default=False, help="give the label to encoder and decoder")
    add("--likelihood", choices=["bernoulli", "gaussian"],
        help="p(x|z) of a pixel; if not given: bernoulli for grey images, gaussian for colour")  # fmt: skip
    add("--binarize", action=ON_OFF, default=False,
        help="train on binary images, drawn anew each time with the pixels as probabilities")  # fmt: skip
    add("--beta", type=number(float, 0), default=1.0, help="weight of the KL in the loss; 1: the ELBO")
    add("--prior", choices=["fitted", "normal"], default="fitted",
        help="z of new images only: from a Gaussian fitted to each class, or from N(0, I)")  # fmt: skip
    add("--latent_dim", type=count, default=128, help="size of z")
    add("--ema", type=fraction, default=0.999, help="decay rate of the averaged weights; 0: off")
    add = p.add_argument_group("training").add_argument
    add("--n_epochs", type=count, default=200, help="epochs in total, those before a resume included")
    add("--batch_size", type=number(int, 2), default=64, help="images per step")
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
        help="side of the images in pixels; burgess: a multiple of 4; conv: of 16")  # fmt: skip
    add("--channels", type=int, choices=[1, 3], help="1: grey, 3: colour (default: the data's; a folder: 3)")
    add("--n_cpu", type=count, default=8, help="threads that read the images of a folder")
    add = p.add_argument_group("run").add_argument
    add("--out_dir", default=f"runs/{SCRIPT}", help="folder of a new run; if it exists, a number is added")
    add("--sample_interval", type=count, default=1000, help="steps between tests, grids and log rows")
    add("--resume", metavar="RUN", help="continue the run in this folder, with its options")
    add("--generate", type=count, metavar="N", help="with --resume: write N images to RUN/generated")
    add("--labels", nargs="+", metavar="CLASS", help="with --generate: only of these classes")
    add("--reconstruct", metavar="FOLDER",
        help="with --resume: write the images of a folder beside their reconstructions")  # fmt: skip
    opt = parse_and_check(p, argv)
    divisor = {"burgess": 4, "conv": 16}.get(opt.arch, 1)
    if opt.img_size % divisor:
        p.error(f"--img_size {opt.img_size}: --arch {opt.arch} needs a multiple of {divisor}")
    if opt.binarize:
        if opt.likelihood == "gaussian":
            p.error("--binarize needs --likelihood bernoulli")
        opt.likelihood = "bernoulli"
    if opt.generate and opt.reconstruct:
        p.error("--generate and --reconstruct cannot be used together")
    if opt.labels and not opt.generate:
        p.error("--labels needs --generate N")
    for name in opt.labels or []:
        if name not in opt.classes:  # parse_and_check() has them from the run
            p.error(f"--labels {name}: not one of this run's classes: {shorten(', '.join(opt.classes), 400)}")
    return opt


# ---------------------------------------------------------------- networks


def down(n_in: int, n_out: int, kernel_size: int) -> nn.Sequential:
    """A level of the encoder: halves the side of the images; with kernel_size 3 rounded up, with 4 down."""
    return nn.Sequential(nn.Conv2d(n_in, n_out, kernel_size, 2, 1), nn.BatchNorm2d(n_out), nn.LeakyReLU())


def up(n_in: int, n_out: int, kernel_size: int) -> nn.Sequential:
    """A level of the decoder: doubles the side of the images. kernel_size: 3 or 4."""
    conv = nn.ConvTranspose2d(n_in, n_out, kernel_size, 2, 1, output_padding=4 - kernel_size)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.LeakyReLU())


class VAE(nn.Module):
    """Images x (N, channels, img_size, img_size) in [0, 1] to z (N, latent_dim), and back.

    With `conditional`, encoder and decoder also see the labels (N,). Otherwise labels are not used.
    """

    def __init__(
        self, arch: str, img_size: int, channels: int, latent_dim: int, n_classes: int, conditional: bool
    ):
        super().__init__()
        self.conditional = conditional
        n_in = channels + 1 if conditional else channels  # the label's embedding is a channel
        # x -> encoder -> n_features numbers -> mu, logvar;  z -> decode_z -> n_features numbers -> decoder
        if arch == "mlp":  # Kingma & Welling, appendix C, with ReLU, and 400 units as in PyTorch's example
            n_features = 400
            self.encoder = nn.Sequential(
                nn.Flatten(),
                nn.Linear(n_in * img_size**2, 400), nn.ReLU(),
            )  # fmt: skip
            self.decoder = nn.Sequential(
                nn.ReLU(), nn.Linear(400, channels * img_size**2),
                nn.Unflatten(1, (channels, img_size, img_size)),
            )  # fmt: skip
        elif arch == "vanilla":  # as in PyTorch-VAE
            side = math.ceil(img_size / 32)
            n_features = 512 * side**2
            self.encoder = nn.Sequential(
                down(n_in, 32, 3), down(32, 64, 3), down(64, 128, 3), down(128, 256, 3), down(256, 512, 3),
                nn.Flatten(),
            )  # fmt: skip
            self.decoder = nn.Sequential(
                nn.Unflatten(1, (512, side, side)),
                up(512, 256, 3), up(256, 128, 3), up(128, 64, 3), up(64, 32, 3), up(32, 32, 3),
                nn.Conv2d(32, channels, 3, 1, 1),
                v2.CenterCrop(img_size),  # the levels end with 32 * side pixels
            )  # fmt: skip
        elif arch == "conv":  # with the kernels and channels of PyTorch's DCGAN example
            side = img_size // 16
            n_features = 512 * side**2
            self.encoder = nn.Sequential(
                down(n_in, 64, 4), down(64, 128, 4), down(128, 256, 4), down(256, 512, 4),
                nn.Flatten(),
            )  # fmt: skip
            self.decoder = nn.Sequential(
                nn.Unflatten(1, (512, side, side)),
                up(512, 256, 4), up(256, 128, 4), up(128, 64, 4),
                nn.ConvTranspose2d(64, channels, 4, 2, 1),
            )  # fmt: skip
        else:  # after Burgess et al. 2018, arXiv:1804.03599, with fewer layers and SiLU
            side = img_size // 4
            encoder = [nn.Conv2d(n_in, 32, 4, 2, 1), nn.SiLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.SiLU()]
            decoder = [nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.SiLU()]
            decoder += [nn.ConvTranspose2d(32, channels, 4, 2, 1)]
            # Larger images have more levels, so that the linear layers stay small: a side of 64 pixels ends
            # with 8 and one of 96 with 6. One of 100 ends with 25, which cannot be halved.
            while side > 8 and side % 2 == 0:
                side //= 2
                encoder += [nn.Conv2d(64, 64, 4, 2, 1), nn.SiLU()]
                decoder = [nn.ConvTranspose2d(64, 64, 4, 2, 1), nn.SiLU(), *decoder]
            n_features = 256
            self.encoder = nn.Sequential(
                *encoder,
                nn.Flatten(),
                nn.Linear(64 * side**2, 256), nn.SiLU(),
            )  # fmt: skip
            self.decoder = nn.Sequential(
                nn.SiLU(), nn.Linear(256, 64 * side**2), nn.SiLU(),
                nn.Unflatten(1, (64, side, side)),
                *decoder,
            )  # fmt: skip
        self.mu = nn.Linear(n_features, latent_dim)
        self.logvar = nn.Linear(n_features, latent_dim)
        self.decode_z = nn.Linear(latent_dim, n_features)
        if conditional:
            self.encode_label = nn.Embedding(n_classes, img_size**2)
            self.decode_label = nn.Embedding(n_classes, n_features)
        self.register_buffer("variance", torch.tensor(1.0))  # sigma^2 of a pixel, for the gaussian likelihood

    def encode(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), each (N, latent_dim)."""
        if self.conditional:
            label_channel = self.encode_label(labels).view(-1, 1, *x.shape[2:])
            x = torch.cat([x, label_channel], dim=1)
        h = self.encoder(x)
        return self.mu(h), self.logvar(h)

    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        """Logits (N, channels, img_size, img_size): their sigmoid is the mean of p(x|z)."""
        h = self.decode_z(z)
        if self.conditional:
            h = h + self.decode_label(labels)
        return self.decoder(h)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits decoded from one sample of q(z|x), and its mu and logvar."""
        mu, logvar = self.encode(x, labels)
        # Reparametrisation: z is a function of mu and logvar, to which it passes gradients.
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return self.decode(z, labels), mu, logvar

    def reconstruct(self, x: Tensor, labels: Tensor) -> Tensor:
        """The images in [0, 1] decoded from the mean of q(z|x)."""
        mu, _ = self.encode(x, labels)
        return self.decode(mu, labels).sigmoid()


class Prior(nn.Module):
    """For each class, a Gaussian from which the z of new images is drawn.

    It is not the p(z) of the KL, which stays N(0, I). A class that is not yet fitted, or has no training
    images, has N(0, I), too.
    """

    def __init__(self, n_classes: int, latent_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_classes, latent_dim))
        self.register_buffer("scale", torch.eye(latent_dim).repeat(n_classes, 1, 1))

    def fit(self, model: VAE, images: Tensor, labels: Tensor, binarize: bool) -> None:
        """Fit the Gaussian of each class to the z of up to 1,000 of its images.

        It gets the mean and covariance of the mixture of their q(z|x). The covariance is that of mu, plus
        diag(mean of exp(logvar)) (law of total covariance).
        """
        for k in labels.unique():
            x = images[labels == k]
            x = to_x(x[:: len(x) // 1001 + 1], binarize)  # spread evenly: those of a folder are sorted
            encoded = [model.encode(part, k.expand(len(part))) for part in x.split(100)]  # to save memory
            mu = torch.cat([mu for mu, _ in encoded]).cpu().double()  # not every device has double precision
            logvar = torch.cat([logvar for _, logvar in encoded]).cpu().double()
            # With --beta 0 the variance can shrink to 0, and Cholesky needs more than 0.
            variance = logvar.exp().mean(dim=0) + 1e-10
            covariance = mu.T.cov(correction=0) + variance.diag()
            self.mean[k] = mu.mean(dim=0)
            self.scale[k] = torch.linalg.cholesky_ex(covariance).L  # L @ L.T is the covariance

    def sample(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Standard normal noise (N, latent_dim) and labels (N,) -> z (N, latent_dim): mean + L noise."""
        return self.mean[labels] + torch.einsum("nij,nj->ni", self.scale[labels], noise)


# ---------------------------------------------------------------- losses and training


def log_likelihood(x: Tensor, logits: Tensor, likelihood: str, variance: Tensor) -> Tensor:
    """log p(x|z) per image, in nats (N,), where the mean of a pixel is m = sigmoid(logit).

    bernoulli: the pixel is 1 with probability m:  x log m + (1 - x) log(1 - m)
    gaussian: it is from N(m, variance):  -((x - m)^2 / variance + log(2 pi variance)) / 2
    """
    if likelihood == "bernoulli":
        log_lik = -nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    else:
        squares = (x - logits.sigmoid()).square()
        log_lik = -0.5 * (squares / variance + torch.log(2 * math.pi * variance))
    return log_lik.flatten(1).sum(dim=1)


def best_variance(x: Tensor, logits: Tensor) -> Tensor:
    """The variance that maximises the likelihood of images x: their mean squared error (Rybkin et al.).

    It needs no gradient: at the maximum, the likelihood's derivative with respect to the variance is 0.
    With several processes, each has its own, as with batch norm.
    """
    return (x - logits.detach().sigmoid()).square().mean().clamp(min=1e-6)


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, diag(exp(logvar))) || N(0, I)) per image, in nats (N,) (Kingma & Welling, appendix B)."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=1)


def to_x(images: Tensor, binarize: bool) -> Tensor:
    """uint8 images to [0, 1]; or to 0 and 1, drawn with these as probabilities."""
    x = images / 255
    return x.bernoulli() if binarize else x


def test(model: VAE, images: Tensor, labels: Tensor, opt: Namespace) -> float:
    """The mean ELBO of test images, in nats per image."""
    total = 0.0
    for x, y in zip(images.split(100), labels.split(100)):
        x = to_x(x, opt.binarize)
        logits, mu, logvar = model(x, y)
        elbo = log_likelihood(x, logits, opt.likelihood, model.variance) - kl_divergence(mu, logvar)
        total += float(elbo.sum())
    return total / len(images)


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
    # their names, which become names of folders. Leave out --dataset: then every tenth image is for the test.
    images, labels, opt.classes = load_data(opt)
    images, labels, test_images, test_labels = hold_out(opt, images, labels)
    if opt.prior == "normal" and not opt.conditional:
        opt.classes = ["all"]  # labels are not used; so --resume compares only the number of images
    n_classes = len(opt.classes)
    opt.channels = images.shape[1]
    if opt.likelihood is None:
        opt.likelihood = "bernoulli" if opt.channels == 1 else "gaussian"
    # All images are kept on the device, as bytes.
    images = images.to(device)
    labels = labels.to(device)
    test_images = test_images.to(device)
    test_labels = test_labels.to(device)
    loader = make_loader(images, labels, opt.batch_size)

    torch.manual_seed(opt.seed)
    model = VAE(opt.arch, opt.img_size, opt.channels, opt.latent_dim, n_classes, opt.conditional)
    model.to(device, memory_format=torch.channels_last)  # faster convolutions
    model_avg = copy.deepcopy(model).eval().requires_grad_(False)  # for all but training; without gradients
    prior = Prior(n_classes, opt.latent_dim).to(device)
    optimizer = torch.optim.Adam(model.parameters(), opt.lr, (opt.b1, opt.b2), fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=opt.amp)

    # Column k of a sample grid is class k, for at most ten classes; if there are fewer, they repeat.
    grid_noise = torch.randn(100, opt.latent_dim).to(device)
    grid_labels = torch.arange(100, device=device) % 10 % n_classes
    every = len(test_images) // 10 + 1  # up to ten test images, spread evenly
    grid_x = to_x(test_images[::every], opt.binarize)
    grid_y = test_labels[::every]

    # Makes the run's folder or, with --resume, restores these parts and the number of steps done.
    run = Run(opt, loader, model=model, model_avg=model_avg, prior=prior, optimizer=optimizer)
    for epoch in range(run.step // len(loader), opt.n_epochs):
        seed(opt.seed, "epoch", epoch)  # a resume repeats the order of the images
        # After a resume, this skips the batches of the epoch that are done; otherwise none.
        for batch, y in itertools.islice(loader, run.step % len(loader), None):
            seed(opt.seed, "step", run.step, RANK)  # a resume repeats the random numbers of each step
            x = to_x(batch[RANK::WORLD], opt.binarize)
            y = y[RANK::WORLD]

            with autocast:
                logits, mu, logvar = model(x, y)
            logits = logits.float()
            if opt.likelihood == "gaussian":
                model.variance.copy_(best_variance(x, logits))  # of this batch; model_avg averages it
            log_lik = log_likelihood(x, logits, opt.likelihood, model.variance).mean()
            kl = kl_divergence(mu.float(), logvar.float()).mean()
            loss = opt.beta * kl - log_lik
            optimizer.zero_grad()
            loss.backward()
            average_gradients(model)
            optimizer.step()

            update_average(model_avg, model, opt.ema, run.step)
            run.end_step(elbo=log_lik - kl, log_lik=log_lik, kl=kl)  # means since the last row
            if run.step % opt.sample_interval == 0 or run.step == run.last_step:
                if opt.prior == "fitted":
                    prior.fit(model_avg, images, labels, opt.binarize)
                z = prior.sample(grid_noise, grid_labels)
                run.save_grid("sample", model_avg.decode(z, grid_labels).sigmoid(), 10)
                pairs = torch.cat([grid_x, model_avg.reconstruct(grid_x, grid_y)])
                run.save_grid("recon", pairs, len(grid_x))  # the test images, and below them the model's
                # test_elbo is of the averaged weights at this step, and often higher than elbo.
                run.record(test_elbo=test(model_avg, test_images, test_labels, opt))
            run.save_if_due()
    run.finish()
    return run.folder


# ---------------------------------------------------------------- load and generate


def load(folder: str | Path, device: str | torch.device = "cpu") -> VAE:
    """The averaged model of a run, in eval mode, with the run's options as `model.options`.

    x are images (N, channels, img_size, img_size) in [0, 1], with --binarize only 0 and 1. Labels are int64
    (N,); k stands for the class model.options.classes[k]. All are on the model's device:

        mu, logvar = model.encode(x, labels)
        images = model.reconstruct(x, labels)
        noise = torch.randn(len(labels), model.options.latent_dim, device=labels.device)
        z = model.prior.sample(noise, labels)
        images = model.decode(z, labels).sigmoid()  # new ones

    Raises InputError if the folder is not that of a run of this script.
    """
    state = read_checkpoint(folder)
    o = Namespace(**state["options"])
    model = VAE(o.arch, o.img_size, o.channels, o.latent_dim, len(o.classes), o.conditional)
    model.load_state_dict(state["model_avg"])
    model.prior = Prior(len(o.classes), o.latent_dim)
    model.prior.load_state_dict(state["prior"])
    model.options = o
    return model.to(device).eval().requires_grad_(False)


def generate(opt: Namespace) -> Path:
    """Write opt.generate images, spread evenly over the classes, in one sub-folder per class."""
    device = find_device(opt.device)
    model = load(opt.resume, device)
    folder = new_folder(Path(opt.resume, "generated"))
    names = opt.labels or opt.classes
    torch.manual_seed(opt.seed)
    for i in range(opt.generate):
        name = names[i % len(names)]
        label = torch.tensor([opt.classes.index(name)], device=device)
        z = model.prior.sample(torch.randn(1, opt.latent_dim, device=device), label)
        (folder / name).mkdir(exist_ok=True)
        with replacing(folder / name / f"{i:06}.png") as file:
            save_image(model.decode(z, label).sigmoid(), file)
    say(f'{opt.generate} images in "{folder}"')
    return folder


def reconstruct(opt: Namespace) -> Path:
    """Write each image of the folder opt.reconstruct beside its reconstruction.

    The folder is one that could be trained on. The files are numbered in the order of the images' paths. With
    --conditional, sub-folders are classes. Raises InputError if one is none of the run's.
    """
    device = find_device(opt.device)
    model = load(opt.resume, device)
    opt.dataset = opt.reconstruct
    images, labels, names = load_folder(opt)
    if opt.conditional:
        if not set(names) <= set(opt.classes):
            raise InputError(
                f'"{opt.reconstruct}": its sub-folders must be classes of the run: '
                f"{shorten(', '.join(opt.classes), 400)}"
            )
        labels = torch.tensor([opt.classes.index(names[k]) for k in labels])
    folder = new_folder(Path(opt.resume, "reconstructed"))
    torch.manual_seed(opt.seed)
    for i in range(len(images)):
        x = to_x(images[[i]].to(device), opt.binarize)
        y = labels[[i]].to(device)
        with replacing(folder / f"{i:06}.png") as file:
            save_image(torch.cat([x, model.reconstruct(x, y)], dim=3), file)
    say(f'{len(images)} reconstructions in "{folder}"')
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
        elif opt.reconstruct is not None:
            reconstruct(opt)
        else:
            train(opt)
    except OSError as e:
        sys.exit(f"{SCRIPT}.py: error: {' '.join(str(e).split())}")
    except KeyboardInterrupt:
        say("\nstopped; a training that has begun continues with --resume RUN")
        sys.exit(130)


if __name__ == "__main__":
    main()
