"""Variational autoencoder: images to a few Gaussian numbers and back, in one file.

An encoder turns an image x into q(z|x) = N(mu, exp(logvar)), a decoder z into p(x|z). Both maximise, in nats an image:

    log p(x) >= ELBO = E_q[log p(x|z)] - KL(q(z|x) || N(0, 1))      and with --beta: E_q[log p(x|z)] - beta KL

VAE: Kingma & Welling 2013, arXiv:1312.6114 (equation 10). beta: Higgins et al. 2017. Best --sigma: arXiv:2006.13202.
--iw_samples: Burda et al. 2015, arXiv:1509.00519. --conditional: Sohn et al. 2015. --warmup: arXiv:1602.02282. Tested
and drawn is Polyak's average (--ema 0: the last). z of new images is from a Gaussian fitted to encoded training images
of each class (arXiv:1903.12436). Frechet distance after 10 epochs of MNIST: 16; with --prior normal, N(0, 1): 97.

    python vae.py --n_epochs 20   # MNIST, or built-in digits; --dataset FOLDER: yours, in sub-folders
    python vae.py --resume runs/vae --generate 100
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
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset, TensorDataset
from torchvision import datasets, utils
from torchvision.transforms import v2

SCRIPT = "vae"  # in checkpoints, which no other script reads; give your copy a name of its own
HIDDEN_DIMS = {"vanilla": [32, 64, 128, 256, 512], "conv": [64, 128, 256, 512], "mlp": [400]}
HIDDEN_DIMS |= dict.fromkeys(["burgess", "residual"], [32, 64, 256])

# ---------------- options


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Options from argv (default: the command line). Raises SystemExit for a bad one, OSError for a bad run."""
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, flag = p.add_argument, dict(action=argparse.BooleanOptionalAction, default=False)
    add("--n_epochs", type=number(int), default=200, help="passes over the images; 0 only sets up")
    add("--batch_size", type=number(int, 2), default=64, help="images a step, 2 or more")
    add("--lr", type=number(float, 1e-9), default=1e-3, help="Adam's learning rate, above 0")
    add("--b1", type=number(float, below=1), default=0.9, help="Adam's decay of the gradient, in [0, 1)")
    add("--b2", type=number(float, below=1), default=0.999, help="Adam's decay of its square, in [0, 1)")
    add("--arch", choices=list(HIDDEN_DIMS), default="burgess", help="kind of network")
    add("--hidden_dims", type=number(int, 1), nargs="+", help="channels or units of each layer; None: by arch")
    add("--likelihood", choices=["gaussian", "bernoulli"], help="p(x|z) of a pixel; None: bernoulli if grey")
    add("--sigma", type=number(float, 1e-6), help="gaussian: deviation of a pixel; None: the best one")
    add("--beta", type=number(float), default=1.0, help="weight of the KL, 0 or more; 1 is the ELBO")
    add("--warmup", type=number(int), default=0, help="batches while beta grows from 0")
    add("--prior", choices=["fitted", "normal"], default="fitted", help="where z of new images is from")
    add("--conditional", **flag, help="encode and decode given the label")
    add("--ema", type=number(float, below=1), default=0.999, help="decay of the model's average, in [0, 1); 0: off")
    add("--binarize", **flag, help="bernoulli: draw binary pixels anew each time")
    add("--iw_samples", type=number(int), default=0, help="samples of the importance-weighted bound; 0: none")
    add("--latent_dim", type=number(int, 1), default=32, help="size of z")
    add("--img_size", type=number(int, 1), default=32, help="side of images; conv: 16 n, burgess, residual: 4 n")
    add("--channels", type=int, choices=[1, 3], help="1: grey, 3: colour; None: as in the data, a folder 3")
    add("--n_classes", type=number(int, 1), help="number of classes; None: the data's")
    add("--sample_interval", type=number(int, 1), default=400, help="batches between sample grids")
    add("--n_cpu", type=number(int), default=8, help="processes to decode a folder, at most")
    add("--dataset", help="mnist, fashion_mnist, cifar10, digits or a folder; None: mnist, or else digits")
    add("--data_dir", default="data", help="where data sets are or come to")
    add("--out_dir", default=f"runs/{SCRIPT}", help="the run's folder; in use: a number is added")
    add("--seed", type=number(int), default=0, help="same seed: same images, on a CPU with as many threads")
    add("--device", default="auto", help="cpu, cuda:1, mps ...; auto: the accelerator or cpu")
    add("--amp", **flag, help="forward passes in bfloat16")
    add("--compile", **flag, help="torch.compile")
    add("--resume", metavar="RUN", help="go on with the run in this folder")
    add("--generate", type=number(int, 1), metavar="N", help="with --resume: write N images")
    add("--labels", type=number(int), nargs="+", metavar="Y", help="with --generate: the classes; None: all")
    add("--reconstruct", metavar="FOLDER", help="with --resume: write its images beside their reconstructions")
    opt = finish_options(p, argv, acts=["generate", "reconstruct"], free=["labels", "iw_samples"])
    opt.hidden_dims = opt.hidden_dims or HIDDEN_DIMS[opt.arch]
    halvings = {"vanilla": 0, "conv": len(opt.hidden_dims), "mlp": 0}.get(opt.arch, len(opt.hidden_dims) - 1)
    if opt.img_size % 2**halvings:
        p.error(f"--img_size {opt.img_size}: --arch {opt.arch} needs a multiple of {2**halvings}")
    if opt.arch in ("burgess", "residual") and not halvings:
        p.error(f"--hidden_dims: --arch {opt.arch} needs channels, then units")
    opt.likelihood = opt.likelihood or ("bernoulli" if opt.binarize else "gaussian" if opt.sigma else None)
    if opt.sigma if opt.likelihood == "bernoulli" else opt.binarize:
        p.error("--sigma goes with --likelihood gaussian, --binarize with bernoulli")
    if opt.labels and not (opt.generate and (opt.conditional or opt.prior == "fitted")):
        p.error("--labels goes with --generate and, with --prior normal, --conditional")
    if opt.labels and max(opt.labels) >= opt.n_classes:
        p.error(f"--labels {max(opt.labels)}: the classes are 0 to {opt.n_classes - 1}")
    return opt


# ---------------- network


class VAE(nn.Module):
    """Images (N, channels, size, size) in [0, 1] <-> z (N, latent); conditional: given labels (N,)."""

    def __init__(self, arch: str, dims: list, latent: int, size: int, channels: int, n_classes: int, conditional: bool):
        super().__init__()
        self.latent_dim, self.conditional = latent, conditional
        layers = {"vanilla": vanilla_layers, "conv": conv_layers, "mlp": mlp_layers, "burgess": burgess_layers}
        layers["residual"] = functools.partial(burgess_layers, block=Residual)
        encoder, n_features, decoder = layers[arch](dims, size, channels + conditional, channels)  # label: a channel
        if conditional:
            self.embed = nn.Sequential(nn.Embedding(n_classes, size**2), nn.Unflatten(1, (1, size, size)))
            self.decode_label = nn.Embedding(n_classes, n_features)
        self.encoder = nn.Sequential(*encoder)
        self.mu, self.logvar = nn.Linear(n_features, latent), nn.Linear(n_features, latent)
        self.decode_z, self.decoder = nn.Linear(latent, n_features), nn.Sequential(*decoder)
        self.register_buffer("variance", torch.ones(()))  # of a pixel
        self.register_buffer("z_mean", torch.zeros(n_classes, latent))  # of z in a class
        self.register_buffer("z_scale", torch.eye(latent).repeat(n_classes, 1, 1))  # root of its covariance

    def encode(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), each (N, latent)."""
        h = self.encoder(torch.cat([x, self.embed(labels)], 1) if self.conditional else x)
        return self.mu(h), self.logvar(h)

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        """A sample of q(z|x) that gradients pass through."""
        return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)

    def decode(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (N, channels, size, size): their sigmoid is the mean of p(x|z)."""
        return self.decoder(self.decode_z(z) + (self.decode_label(labels) if self.conditional else 0))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the reconstruction from one sample of q(z|x), then mu and logvar."""
        mu, logvar = self.encode(x, labels)
        return self.decode(self.reparameterize(mu, logvar), labels), mu, logvar

    def sample(self, noise: Tensor, labels: Tensor) -> Tensor:
        """New images, in [0, 1], of labels (N,) from standard normal noise (N, latent)."""
        z = self.z_mean[labels] + (self.z_scale[labels] @ noise[..., None])[..., 0]
        return self.decode(z, labels).sigmoid()

    def reconstruct(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images x again, in [0, 1], from the mean of q(z|x)."""
        return self.decode(self.encode(x, labels)[0], labels).sigmoid()


def vanilla_layers(dims: list, size: int, n_in: int, n_out: int) -> tuple:
    """Encoder layers, number of features, decoder layers. 3x3 convolutions halve the side, rounded up, and back."""
    sides = [-(-size // 2**n) for n in range(len(dims) + 1)]
    encoder, decoder = [], [nn.Unflatten(1, (dims[-1], sides[-1], sides[-1]))]
    for a, b in zip([n_in, *dims], dims):
        encoder += [nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.LeakyReLU()]
    for a, b, side in zip(dims[::-1], [*dims[-2::-1], dims[0]], sides[-2::-1]):
        decoder += [nn.ConvTranspose2d(a, b, 3, 2, 1, 1 - side % 2), nn.BatchNorm2d(b), nn.LeakyReLU()]
    return [*encoder, nn.Flatten()], dims[-1] * sides[-1] ** 2, [*decoder, nn.Conv2d(b, n_out, 3, 1, 1)]


def conv_layers(dims: list, size: int, n_in: int, n_out: int, bn: type = nn.BatchNorm2d, act: type = nn.ReLU) -> tuple:
    """The same with 4x4 convolutions, each halving the side; no batch norm after the first."""
    side = size // 2 ** len(dims)
    encoder, decoder = [nn.Conv2d(n_in, dims[0], 4, 2, 1), act()], [nn.Unflatten(1, (dims[-1], side, side))]
    for a, b in zip(dims, dims[1:]):
        encoder += [nn.Conv2d(a, b, 4, 2, 1), bn(b), act()]
    for a, b in zip(dims[::-1], dims[-2::-1]):
        decoder += [nn.ConvTranspose2d(a, b, 4, 2, 1), bn(b), act()]
    return [*encoder, nn.Flatten()], dims[-1] * side**2, [*decoder, nn.ConvTranspose2d(dims[0], n_out, 4, 2, 1)]


def mlp_layers(dims: list, size: int, n_in: int, n_out: int) -> tuple:
    """The same fully connected, as in the paper (appendix C.1) but with ReLU."""
    encoder, decoder = [nn.Flatten()], [nn.ReLU()]
    for a, b in zip([n_in * size**2, *dims], dims):
        encoder += [nn.Linear(a, b), nn.ReLU()]
    for a, b in zip(dims[::-1], dims[-2::-1]):
        decoder += [nn.Linear(a, b), nn.ReLU()]
    return encoder, dims[-1], [*decoder, nn.Linear(dims[0], n_out * size**2), nn.Unflatten(1, (n_out, size, size))]


def burgess_layers(dims: list, size: int, n_in: int, n_out: int, block: type = nn.Identity) -> tuple:
    """conv_layers with SiLU, no batch norm and a fully connected one (Burgess et al. 2018, arXiv:1804.03599)."""
    *dims, units = dims
    encoder, n_features, decoder = conv_layers(dims, size, n_in, n_out, block, nn.SiLU)
    decoder = [block(units, nn.Linear, ()), nn.SiLU(), nn.Linear(units, n_features), nn.SiLU(), *decoder]
    return [*encoder, nn.Linear(n_features, units), block(units, nn.Linear, ()), nn.SiLU()], units, decoder


class Residual(nn.Sequential):
    """x + f(x), for x (N, dim, ...) (arXiv:1603.05027)."""

    def __init__(self, dim: int, layer: type = nn.Conv2d, more: tuple = (3, 1, 1)):
        super().__init__(nn.SiLU(), layer(dim, dim, *more))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def log_likelihood(x: Tensor, logits: Tensor, likelihood: str, variance: Tensor) -> Tensor:
    """log p(x|z) of each image, in nats (N,): a pixel is 1 with probability sigmoid(logit), or normal about that."""
    if likelihood == "bernoulli":
        return -nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)
    squares = (x - logits.sigmoid()).square() / variance
    return -0.5 * (squares + torch.log(2 * math.pi * variance)).flatten(1).sum(1)


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of each image, in nats (N,) (arXiv:1312.6114, appendix B)."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)


def best_variance(x: Tensor, logits: Tensor) -> Tensor:
    """The variance at which a batch is likeliest (arXiv:2006.13202). Detached: the likelihood's slope in it is 0."""
    return (x - logits.sigmoid()).square().mean().detach().clamp(min=1e-6)


def train_step(model: VAE, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor, opt: Namespace, i: int) -> dict:
    """Raise E_q[log p(x|z)] - beta KL, as of batch i, with one z an image; returns ELBO and terms."""
    logits, mu, logvar = (output.float() for output in model(x, labels))
    variance = model.variance if opt.sigma or opt.likelihood == "bernoulli" else best_variance(x, logits)
    log_px = log_likelihood(x, logits, opt.likelihood, variance).mean()
    kl = kl_divergence(mu, logvar).mean()
    optimizer.zero_grad()
    beta = opt.beta * min(1, (i + 1) / (opt.warmup or 1))
    (beta * kl - log_px).backward()
    mean_gradients(model)
    optimizer.step()
    return dict(elbo=(log_px - kl).detach(), log_px=log_px.detach(), kl=kl.detach())


def average(model_avg: VAE, model: VAE, decay: float, step: int) -> None:
    """Move model_avg towards the model. Its memory is short at first, to forget the start."""
    decay = min(decay, (1 + step) / (10 + step)) if decay else 0.0
    averages, values = model_avg.state_dict(), model.state_dict()  # batch norm's statistics, too
    names = [n for n, v in values.items() if v.is_floating_point() and n not in ("variance", "z_mean", "z_scale")]
    torch.optim.swa_utils.get_ema_multi_avg_fn(decay)([averages[n] for n in names], [values[n] for n in names], None)


@torch.no_grad()
def measure(model: VAE, images: Tensor, labels: Tensor, opt: Namespace) -> None:
    """Fit the variance of a pixel and, in each class, mean and covariance of z to these images."""
    if opt.likelihood == "gaussian" and not opt.sigma:
        variances = [best_variance(x, model(x, y)[0]) * len(x) for x, y in batches(images, labels, opt)]
        model.variance.fill_(sum(variances) / len(images))
    mu, logvar = map(torch.cat, zip(*(model.encode(x, y) for x, y in batches(images, labels, opt))))
    for k in labels.unique() if opt.prior == "fitted" else ():
        m, deviation = mu[labels == k], logvar[labels == k].exp().mean(0).sqrt()
        root = torch.cat([(m - m.mean(0)) / len(m) ** 0.5, deviation.diag()])  # root^T root is the covariance
        model.z_mean[k], model.z_scale[k] = m.mean(0), torch.linalg.qr(root.cpu(), mode="r").R.T


@torch.no_grad()
def test(model: VAE, images: Tensor, labels: Tensor, opt: Namespace) -> dict[str, float]:
    """ELBO of test images and its terms, in nats an image (gaussian: of densities)."""
    log_px, kl = 0.0, 0.0
    for x, y in batches(images, labels, opt):
        logits, mu, logvar = model(x, y)
        log_px += float(log_likelihood(x, logits, opt.likelihood, model.variance).sum()) / len(images)
        kl += float(kl_divergence(mu, logvar).sum()) / len(images)
    return dict(test_elbo=log_px - kl, test_log_px=log_px, test_kl=kl)


@torch.no_grad()
def importance_weighted_bound(model: VAE, x: Tensor, labels: Tensor, opt: Namespace) -> Tensor:
    """log 1/k sum_i p(x|z_i) p(z_i) / q(z_i|x) of each image, in nats (N,) (arXiv:1509.00519, equation 8)."""
    mu, logvar = model.encode(x, labels)
    terms = []
    for _ in range(opt.iw_samples):  # one at a time, to save memory
        z = model.reparameterize(mu, logvar)
        log_px = log_likelihood(x, model.decode(z, labels), opt.likelihood, model.variance)
        log_pz_over_q = 0.5 * ((z - mu).square() / logvar.exp() + logvar - z.square()).sum(1)
        terms += [log_px + log_pz_over_q]
    return torch.stack(terms).logsumexp(0) - math.log(opt.iw_samples)


# ---------------- training


def train(opt: Namespace) -> Path:
    """Train and return the run's folder. Raises OSError for bad data or files, FloatingPointError for a bad loss."""
    device = find_device(opt)
    images, labels = (part.to(device) for part in load_data(opt))
    tests, kept = (images[::10], labels[::10]), [i for i in range(len(images)) if i % 10] or [0]
    if opt.dataset in DATASETS:
        tests, kept = tuple(part.to(device) for part in load_data(opt, train=False)), range(len(images))
    data = Subset(TensorDataset(images, labels), kept)
    sampler = BatchSampler(RandomSampler(data), opt.batch_size, drop_last=True)
    loader = DataLoader(data, sampler=sampler, batch_size=None)
    opt.likelihood = opt.likelihood or {1: "bernoulli", 3: "gaussian"}[opt.channels]
    torch.manual_seed(opt.seed)
    some = data[torch.randperm(len(data))[:10_000].tolist()]  # for measure
    model = VAE(opt.arch, opt.hidden_dims, opt.latent_dim, opt.img_size, opt.channels, opt.n_classes, opt.conditional)
    model.to(device, memory_format=torch.channels_last)  # faster
    model.variance.fill_((opt.sigma or 1) ** 2)
    model_avg = copy.deepcopy(model).eval().requires_grad_(False)
    if opt.amp:
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    if opt.compile:
        model.compile()
    optimizer = torch.optim.Adam(model.parameters(), opt.lr, (opt.b1, opt.b2), fused=True)
    noise, classes = torch.randn(100, opt.latent_dim).to(device), torch.arange(100, device=device) % 10 % opt.n_classes
    shown = next(batches(*(part[torch.linspace(0, len(part) - 1, min(len(part), 10)).long()] for part in tests), opt))

    def pictures() -> None:
        save_grid(run, model_avg.sample(noise, classes), 10)  # column k: class k
        save_grid(run, torch.cat([shown[0], model_avg.reconstruct(*shown)]), len(shown[0]), "recon")

    run = start(opt, loader, model=model, model_avg=model_avg, optimizer=optimizer)
    try:
        for epoch in range(run.done // len(loader), opt.n_epochs):
            seed(opt.seed, "epoch", epoch)  # of the order
            for i, (real, labels) in enumerate(loader, epoch * len(loader)):
                if i < run.done:  # before the checkpoint
                    continue
                if i % opt.sample_interval == 0:
                    pictures()
                seed(opt.seed, "batch", i, RANK)  # a resumed run has the same z
                real, labels = (part[RANK::WORLD].to(device) for part in (real, labels))
                x, y = next(batches(real, labels, opt, len(real)))
                losses = train_step(model, optimizer, x, y, opt, i)
                average(model_avg, model, opt.ema, i)
                after_batch(run, opt, **losses)
            measure(model_avg, *some, opt)
            after_epoch(run, opt, **test(model_avg, *tests, opt))
        pictures()
    finally:  # after Ctrl-C, too
        finish(run, sample="training.gif", recon="recon.gif")
    if RANK == 0:
        draw_latent_space(model_avg, *shown, run.folder)
    if opt.iw_samples and RANK == 0:
        seed(opt.seed, "bound")
        bounds = [importance_weighted_bound(model_avg, *part, opt) for part in batches(*tests, opt)]
        with open(run.folder / "iw_bound.txt", "a") as file:
            file.write(f"{run.done} batches, {opt.iw_samples} samples: {torch.cat(bounds).mean():.2f} nats\n")
    return run.folder


def batches(images: Tensor, labels: Tensor, opt: Namespace, size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
    """uint8 images as the model takes them (binary ones drawn anew), and labels."""
    for x, y in zip(images.split(size), labels.split(size)):
        yield ((x / 255).bernoulli() if opt.binarize else x / 255), y


@torch.no_grad()
def draw_latent_space(model: VAE, x: Tensor, labels: Tensor, folder: Path) -> None:
    """interpolation.png: lines in latent space between images; of 2 dimensions manifold.png."""
    mu = model.encode(x, labels)[0]
    z = torch.lerp(mu[:, None], mu.roll(1, 0)[:, None], torch.linspace(0, 1, 10, device=x.device)[:, None])
    images = model.decode(z.flatten(0, 1), labels.repeat_interleave(10)).sigmoid()
    utils.save_image(images, folder / "interpolation.png", nrow=10)
    if model.latent_dim == 2:  # equal steps of probability (arXiv:1312.6114, figure 4)
        steps = torch.distributions.Normal(0, 1).icdf((torch.arange(20, device=x.device) + 0.5) / 20)
        images = model.decode(torch.cartesian_prod(steps, steps), labels[:1].expand(400)).sigmoid()
        utils.save_image(images, folder / "manifold.png", nrow=20)


def load(run: str | Path, device: str | torch.device = "cpu") -> VAE:
    """The averaged model of a run's folder, in eval mode, with its `.options`. Raises OSError if it has none."""
    state = read_checkpoint(run)
    o = Namespace(**state["options"])
    model = VAE(o.arch, o.hidden_dims, o.latent_dim, o.img_size, o.channels, o.n_classes, o.conditional)
    model.load_state_dict(state["model_avg"])
    model.options = state["options"]
    return model.to(device).eval().requires_grad_(False)


def generate(opt: Namespace) -> Path:
    """Write a folder of opt.generate images, as many of each class; returns it."""
    device = find_device(opt)
    model, folder = load(opt.resume, device), new_folder(Path(opt.resume, "generated"))
    classes, known = sorted(set(opt.labels or range(opt.n_classes))), opt.conditional or opt.prior == "fitted"
    torch.manual_seed(opt.seed)
    for i in range(opt.generate):
        label = torch.tensor([classes[i % len(classes)]], device=device)
        file = folder / (opt.classes[label] if known else "") / f"{i:06}.png"
        file.parent.mkdir(exist_ok=True)
        utils.save_image(model.sample(torch.randn(1, opt.latent_dim, device=device), label), file)
    print(f"{opt.generate} images in {folder}")
    return folder


def reconstruct(opt: Namespace) -> Path:
    """Write each image in opt.reconstruct beside its reconstruction, given its folder's class."""
    device = find_device(opt)
    files = sorted(f for f in Path(opt.reconstruct).rglob("*") if f.suffix.lower() in datasets.folder.IMG_EXTENSIONS)
    if not files or opt.conditional and not {file.parent.name for file in files} <= set(opt.classes):
        raise OSError(f"--reconstruct {opt.reconstruct}: no images, or in other folders than {opt.classes}")
    images = torch.stack([read_image(str(file), opt) for file in files]).to(device)
    labels = torch.tensor([opt.classes.index(file.parent.name) if opt.conditional else 0 for file in files]).to(device)
    model, folder = load(opt.resume, device), new_folder(Path(opt.resume, "reconstructed"))
    torch.manual_seed(opt.seed)  # for --binarize
    for i, (x, y) in enumerate(batches(images, labels, opt, 1)):
        utils.save_image(torch.cat([x, model.reconstruct(x, y)], 3), folder / f"{i:06}.png")
    print(f"{len(files)} reconstructions in {folder}")
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
        action = generate if opt.generate else reconstruct if opt.reconstruct is not None else train
        action(opt)
    except (OSError, FloatingPointError) as e:  # its last line: a worker's traceback stands before it
        sys.exit(f"{SCRIPT}.py: error: {str(e).splitlines()[-1]}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
