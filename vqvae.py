"""Vector-quantised autoencoder: images to a small square of codes and back, in one file.

An encoder makes a square of vectors z of each image x; each becomes e, the nearest of the K vectors of a codebook, so
that the image is a square of whole numbers below K; a decoder makes of these an image x' again. The loss is a sum of
means over elements (van den Oord et al. 2017, arXiv:1711.00937, equation 3), the first over the variance of pixels:

    (x - x')^2 / variance  +  (sg[z] - e)^2  +  0.25 (z - sg[e])^2

sg[a] is a, but no gradient passes it: the second term moves only the codes, the third (commitment) only the encoder.
Choosing the nearest has no gradient either: x' is decoded from z + sg[e - z], which is e, and whose gradient goes
straight through to z. The second term is for --codebook loss; by default (ema, appendix A.1) each code follows the mean
of the z that chose it. A code that is hardly used is set to a z of the batch (Dhariwal et al. 2020, arXiv:2005.00341;
Zeghidour et al. 2021, arXiv:2107.03312): with --no-restart most of the codebook may never be used.

    python vqvae.py --n_epochs 10                            # MNIST; without a network: built-in digits
    python vqvae.py --dataset path/to/folder --img_size 64   # your images, one sub-folder a class
    python vqvae.py --resume runs/vqvae --encode path/to/folder
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "numpy", "pillow>=10.1"]
# ///

import argparse
import copy
import functools
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
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchvision import datasets, utils
from torchvision.transforms import v2

SCRIPT = "vqvae"  # in checkpoints, which no other script reads; give your copy a name of its own

# ---------------- options


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Options from argv (default: the command line). Raises SystemExit for a bad one, OSError for a bad run."""
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, flag = p.add_argument, dict(action=argparse.BooleanOptionalAction)
    add("--n_epochs", type=number(int), default=200, help="passes over the images; 0 only sets up")
    add("--batch_size", type=number(int, 2), default=128, help="images a step, 2 or more")
    add("--lr", type=number(float, 1e-9), default=1e-3, help="Adam's learning rate, above 0")
    add("--b1", type=number(float, below=1), default=0.9, help="Adam's decay of the gradient, in [0, 1)")
    add("--b2", type=number(float, below=1), default=0.999, help="Adam's decay of its square, in [0, 1)")
    add("--codebook", choices=["ema", "loss"], default="ema", help="codes follow means, or their loss")
    add("--decay", type=number(float, below=1), default=0.99, help="of the codes' means and counts, in [0, 1)")
    add("--commitment", type=number(float), default=0.25, help="weight of the third term, 0 or more")
    add("--restart", **flag, default=True, help="set hardly used codes to encoder outputs")
    add("--n_embeddings", type=number(int, 1), default=512, help="size K of the codebook")
    add("--latent_dim", type=number(int, 1), default=64, help="size of a code's vector")
    add("--hidden_dim", type=number(int, 2), default=128, help="channels of the convolutions, 2 or more")
    add("--residual_dim", type=number(int, 1), default=32, help="channels inside a residual block")
    add("--downsample", type=int, choices=[2, 4, 8], default=4, help="side of an image over that of its codes")
    add("--ema", type=number(float, below=1), default=0.999, help="decay of the model's average, in [0, 1); 0: off")
    add("--img_size", type=number(int, 1), default=32, help="side of the images, a multiple of --downsample")
    add("--channels", type=int, choices=[1, 3], help="1: grey, 3: colour; None: as in the data, a folder 3")
    add("--n_classes", type=number(int, 1), help="number of classes; None: the data's")
    add("--sample_interval", type=number(int, 1), default=400, help="batches between sample grids")
    add("--n_cpu", type=number(int), default=8, help="processes to decode a folder, at most")
    add("--dataset", help="mnist, fashion_mnist, cifar10, digits or a folder; None: mnist, or else digits")
    add("--data_dir", default="data", help="where data sets are or come to")
    add("--out_dir", default=f"runs/{SCRIPT}", help="the run's folder; in use: a number is added")
    add("--seed", type=number(int), default=0, help="same seed: same images, on a CPU with as many threads")
    add("--device", default="auto", help="cpu, cuda:1, mps ...; auto: the accelerator or cpu")
    add("--amp", **flag, default=False, help="forward passes in bfloat16")
    add("--compile", **flag, default=False, help="torch.compile")
    add("--resume", metavar="RUN", help="go on with the run in this folder")
    add("--generate", type=number(int, 1), metavar="N", help="with --resume: write N images")
    add("--encode", metavar="FOLDER", help="with --resume: write the codes of its images")
    add("--decode", metavar="FILE.npz", help="with --resume: write the images of its codes")
    opt = finish_options(p, argv, acts=["generate", "encode", "decode"], free=[])
    if opt.img_size % opt.downsample:
        p.error(f"--img_size {opt.img_size}: not a multiple of --downsample {opt.downsample}")
    return opt


# ---------------- networks


class VQVAE(nn.Module):
    """Images (N, dims[0], H, W) in [0, 1] <-> codes (N, h, w); dims: channels of the images and after each halving."""

    def __init__(self, n_embeddings: int, latent_dim: int, dims: list, residual_dim: int):
        super().__init__()
        layers = []
        for n_in, n_out in zip(dims, dims[1:]):
            layers += [nn.Conv2d(n_in, n_out, 4, 2, 1), nn.ReLU()]
        layers += [nn.Conv2d(dims[-1], dims[-1], 3, 1, 1), *(Residual(dims[-1], residual_dim) for _ in range(2))]
        self.encoder = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(dims[-1], latent_dim, 1))
        self.decoder = Decoder(n_embeddings, latent_dim, dims, residual_dim)
        self.register_buffer("counts", torch.zeros(n_embeddings))  # moving mean of a code's uses in a batch

    @property
    def codebook(self) -> Tensor:
        """The vectors of the codes (K, latent_dim)."""
        return self.decoder.codebook

    def nearest(self, z: Tensor) -> Tensor:
        """The code of each vector: z (N, latent_dim, h, w) -> codes (N, h, w)."""
        z = z.movedim(1, -1)
        scores = self.codebook.square().sum(1) - 2 * z @ self.codebook.T  # distance^2 - |z|^2
        return scores.argmin(-1)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Images (N, channels, H, W) in [0, 1] -> codes (N, h, w)."""
        return self.nearest(self.encoder(x).float())

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (N, h, w) -> images (N, channels, H, W) in [0, 1]."""
        return self.decoder(self.decoder.embed(codes)).clamp(0, 1)

    def draw(self, u: Tensor) -> Tensor:
        """Codes (N, h, w), each alone with its frequency in training, from random numbers u (N, h, w) in [0, 1)."""
        edges = self.counts.cumsum(0)
        return torch.searchsorted(edges, u * edges[-1])


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


def train_step(model: VQVAE, optimizer: torch.optim.Optimizer, x: Tensor, variance: Tensor, opt: Namespace) -> dict:
    """One step on images x in [0, 1] down the loss at the top of this file; returns its terms."""
    z = model.encoder(x).float()
    codes = model.nearest(z)
    e = model.decoder.embed(codes)
    error = F.mse_loss(model.decoder(z + (e - z).detach()).float(), x) / variance
    codes_loss = F.mse_loss(e, z.detach())  # constant with --codebook ema
    commitment = F.mse_loss(z, e.detach())
    optimizer.zero_grad()
    (error + codes_loss + opt.commitment * commitment).backward()
    mean_gradients(model)
    optimizer.step()
    update_codebook(model, z.movedim(1, -1).flatten(0, 2), codes.flatten(), opt)
    return dict(error=error.detach(), commitment=commitment.detach())


@torch.no_grad()
def update_codebook(model: VQVAE, z: Tensor, codes: Tensor, opt: Namespace) -> None:
    """Count uses, and let codes follow the mean of the z (n, latent_dim) that chose them: appendix A.1, N = counts and
    m = counts * codebook. Restart the codes that are hardly used; at the first batch, when all counts are 0, all."""
    codebook, counts = model.codebook, model.counts[:, None]  # views: changed in place
    totals = z.new_zeros(len(codebook), 1 + z.shape[1]).index_add_(0, codes, F.pad(z, (1, 0), value=1.0))
    new = z[torch.randint(len(z), (len(codebook),), device=z.device)]
    if WORLD > 1:  # one codebook for all
        dist.all_reduce(totals)
        dist.broadcast(new, 0)
    uses, sums = totals[:, :1], totals[:, 1:]
    first = counts == 0
    counts.lerp_(uses, 1 - opt.decay)
    if opt.codebook == "ema":
        codebook += (1 - opt.decay) * (sums - uses * codebook) / counts.clamp(min=1e-9)
    if opt.restart:
        few = 0.1 * uses.mean()  # a code with fewer uses than a tenth of the mean has to give way
        codebook.copy_(new.where(first | (counts < few), codebook))
        counts.clamp_(min=few)


def average(model_avg: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move model_avg towards the model. Its memory is short at first, so that it forgets how the model started."""
    decay = min(decay, (1 + step) / (10 + step)) if decay else 0.0
    averages, values = (list(m.state_dict().values()) for m in (model_avg, model))
    torch.optim.swa_utils.get_ema_multi_avg_fn(decay)(averages, values, None)


@torch.no_grad()
def test(model: VQVAE, images: Tensor, variance: Tensor, opt: Namespace) -> dict[str, float]:
    """Mean squared error; the same over the variance; of the codes: their perplexity, how many are used, and bits per
    dimension of the images when each code costs what its frequency in training says."""
    mse, uses = 0.0, torch.zeros_like(model.counts)
    for x in images.split(opt.batch_size):
        codes = model.encode(x / 255)
        mse += float((model.decode(codes) - x / 255).square().sum()) / images.numel()
        uses += codes.flatten().bincount(minlength=len(uses))
    share, trained = uses / uses.sum(), model.counts + 0.01 * model.counts.mean()  # none is impossible
    perplexity = float(torch.distributions.Categorical(share).entropy().exp())
    bits = float(-(share * (trained / trained.sum()).log2()).sum()) * codes[0].numel() / images[0].numel()
    row = dict(test_mse=mse, test_error=mse / float(variance), test_perplexity=perplexity)
    return row | dict(test_used=int((uses > 0).sum()), test_bits_per_dim=bits)


def train(opt: Namespace) -> Path:
    """Train and return the run's folder. Raises OSError for bad data or files, FloatingPointError for a bad loss."""
    device = find_device(opt)
    images, labels = (part.to(device) for part in load_data(opt))
    if opt.dataset in DATASETS:
        tests = tuple(part.to(device) for part in load_data(opt, train=False))
    else:  # every tenth image is held out
        kept = [i for i in range(len(images)) if i % 10] or [0]
        tests, images, labels = (images[::10], labels[::10]), images[kept], labels[kept]
    data = TensorDataset(images, labels)
    sampler = BatchSampler(RandomSampler(data), opt.batch_size, drop_last=True)
    loader = DataLoader(data, sampler=sampler, batch_size=None)  # a batch is data[[3, 1, ...]]: one look-up, not 128
    variance = (images[:: -(-len(images) // 10_000)] / 255).var().clamp(min=1e-6)  # of training pixels

    torch.manual_seed(opt.seed)
    model = new_model(opt).to(device, memory_format=torch.channels_last)  # faster for convolutions
    model.codebook.requires_grad_(opt.codebook == "loss")
    model_avg = copy.deepcopy(model).eval().requires_grad_(False)
    for network in (model.encoder, model.decoder):
        if opt.amp:
            network.forward = torch.autocast(device.type, torch.bfloat16)(network.forward)
        if opt.compile:
            network.compile()
    optimizer = torch.optim.Adam(model.parameters(), opt.lr, (opt.b1, opt.b2), fused=True)
    grid_u = torch.rand(100, *[opt.img_size // opt.downsample] * 2).to(device)
    shown = tests[0][torch.linspace(0, len(tests[0]) - 1, min(len(tests[0]), 10)).long()] / 255

    def pictures() -> None:
        save_grid(run, model_avg.decode(model_avg.draw(grid_u)), 10)
        save_grid(run, torch.cat([shown, model_avg.decode(model_avg.encode(shown))]), len(shown), "recon")

    run = start(opt, loader, model=model, model_avg=model_avg, optimizer=optimizer)
    try:
        for epoch in range(run.done // len(loader), opt.n_epochs):
            seed(opt.seed, "epoch", epoch)  # of the order of the images
            for i, (real, _) in enumerate(loader, epoch * len(loader)):
                if i < run.done:  # trained before the checkpoint
                    continue
                if i % opt.sample_interval == 0:
                    pictures()
                seed(opt.seed, "batch", i, RANK)  # of the restarts, so that a resumed run has the same
                losses = train_step(model, optimizer, real[RANK::WORLD].to(device) / 255, variance, opt)
                average(model_avg, model, opt.ema, i)
                after_batch(run, opt, **losses)
            after_epoch(run, opt, **test(model_avg, tests[0], variance, opt))
        pictures()
    finally:  # after Ctrl-C, too
        finish(run, sample="training.gif", recon="recon.gif")
    if RANK == 0:
        codes = torch.arange(opt.n_embeddings, device=device)[:, None, None]
        utils.save_image(F.interpolate(model_avg.decode(codes), scale_factor=4), run.folder / "codebook.png", nrow=32)
        write_codes(run.folder, model_avg, opt, run.done, (images, labels), tests)
    return run.folder


def write_codes(folder: Path, model: VQVAE, opt: Namespace, done: int, images: tuple, tests: tuple) -> None:
    """folder/codes.npz, in one piece: codes of uint8 images in their order, and labels; tests: those held out."""
    arrays = dict(classes=np.array(opt.classes), n_embeddings=opt.n_embeddings, batches_done=done)
    for name, (x, labels) in {"": images, "test_": tests}.items():
        codes = torch.cat([model.encode(part / 255) for part in x.split(opt.batch_size)]).cpu().numpy()
        arrays[f"{name}codes"] = codes.astype(np.min_scalar_type(opt.n_embeddings - 1))
        arrays[f"{name}labels"] = labels.cpu().numpy()
    with open(folder / "codes.tmp", "wb") as file:
        np.savez_compressed(file, **arrays)
    (folder / "codes.tmp").replace(folder / "codes.npz")
    print(f"{len(images[0])} + {len(tests[0])} images as codes in {folder / 'codes.npz'}")


# ---------------- load, generate, encode and decode


def new_model(opt: Namespace) -> VQVAE:
    """An untrained model of these options."""
    halvings = opt.downsample.bit_length() - 1
    dims = [opt.channels, *[opt.hidden_dim // 2] * (halvings - 1), opt.hidden_dim]
    return VQVAE(opt.n_embeddings, opt.latent_dim, dims, opt.residual_dim)


def load(run: str | Path, device: str | torch.device = "cpu") -> VQVAE:
    """The averaged model of a run's folder, in eval mode, with its `.options`. Raises OSError if it has none."""
    state = read_checkpoint(run)
    model = new_model(Namespace(**state["options"]))
    model.load_state_dict(state["model_avg"])
    model.options = state["options"]
    return model.to(device).eval().requires_grad_(False)


def generate(opt: Namespace) -> Path:
    """Write opt.generate images of codes drawn by their frequencies, and say what draws better ones."""
    device, side = find_device(opt), opt.img_size // opt.downsample
    model, folder = load(opt.resume, device), new_folder(Path(opt.resume, "generated"))
    torch.manual_seed(opt.seed)
    for i in range(opt.generate):
        codes = model.draw(torch.rand(1, side, side, device=device))
        utils.save_image(model.decode(codes), folder / f"{i:06}.png")
    print(f"{opt.generate} images in {folder}; better ones: python pixelcnn.py --dataset {opt.resume}")
    return folder


def encode(opt: Namespace) -> Path:
    """Write the codes of all images in the folder opt.encode; returns the folder that they are in."""
    device, done = find_device(opt), read_checkpoint(opt.resume)["position"][0]
    data = Namespace(**vars(opt) | dict(dataset=opt.encode, n_classes=None))
    del data.classes  # it may have others
    images, labels = (part.to(device) for part in load_data(data))
    model, folder = load(opt.resume, device), new_folder(Path(opt.resume, "encoded"))
    write_codes(folder, model, data, done, (images, labels), (images[:0], labels[:0]))
    return folder


def decode(opt: Namespace) -> Path:
    """Write the images of the codes in opt.decode; with labels, a sub-folder a class. Returns the folder."""
    device, side = find_device(opt), opt.img_size // opt.downsample
    try:
        arrays = dict(np.load(opt.decode))
        codes = arrays["codes"]
        names = [Path(arrays["classes"][k]).name for k in arrays.get("labels", [])] or [""] * len(codes)
        if codes.dtype.kind not in "iu" or codes.shape[1:] != (side, side) or len(names) != len(codes):
            raise ValueError(f"{codes.dtype} {codes.shape}, {len(names)} labels, for whole numbers (N, {side}, {side})")
        if not ((codes >= 0) & (codes < opt.n_embeddings)).all():
            raise ValueError(f"codes from {codes.min()} to {codes.max()}, not below {opt.n_embeddings}")
    except Exception as e:  # numpy raises many kinds
        raise OSError(f"--decode {opt.decode}: {e}") from e
    model, folder = load(opt.resume, device), new_folder(Path(opt.resume, "decoded"))
    for i, (square, name) in enumerate(zip(codes.astype(np.int64), names)):
        (folder / name).mkdir(exist_ok=True)
        utils.save_image(model.decode(torch.from_numpy(square[None]).to(device)), folder / name / f"{i:06}.png")
    print(f"{len(codes)} images in {folder}")
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
        act = encode if opt.encode is not None else decode if opt.decode is not None else train
        generate(opt) if opt.generate else act(opt)
    except (OSError, FloatingPointError) as e:  # its last line: a worker's traceback stands before it
        sys.exit(f"{SCRIPT}.py: error: {str(e).splitlines()[-1]}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
