"""Conditional GAN: a generator that draws the class it is asked for, in one file.

A generator G turns noise z and a label y into an image; a discriminator D scores how real an image looks for its
label. G pulls the scores of its fakes to 1, D pulls them to 0 and those of real images to 1:

    min_G      E[(D(G(z, y), y) - 1)^2]
    min_D  1/2 E[(D(x, y) - 1)^2] + 1/2 E[D(G(z, y), y)^2]

Conditional GAN: Mirza & Osindero 2014, arXiv:1411.1784. Least squares: Mao et al. 2017, arXiv:1611.04076 (equation 9).
Label in D: Miyato & Koyama 2018, arXiv:1802.05637. Noise on what D sees: Sønderby et al. 2016, arXiv:1610.04490.
Mislabelled images as fakes: Reed et al. 2016, arXiv:1605.05396. Average of G: Yazici et al. 2019, arXiv:1806.04498.
The first two papers alone: --conditioning concat --noise 0 --mislabel 0 --ema 0 --lr 2e-4 --lr_hold 0

    python cgan.py --n_epochs 20                  # MNIST; without a network: built-in digits
    python cgan.py --arch conv --dataset folder   # your images, one sub-folder a class
    python cgan.py --resume runs/cgan --generate 100 --labels 3 7
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

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchvision import datasets, utils
from torchvision.transforms import v2

SCRIPT = "cgan"  # in checkpoints, which no other script reads; give your copy a name of its own

# ---------------- options


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Options from argv (default: the command line). Raises SystemExit for a bad one, OSError for a bad run."""
    p = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, flag = p.add_argument, dict(action=argparse.BooleanOptionalAction, default=False)
    add("--n_epochs", type=number(int), default=200, help="passes over the images; 0 only sets up")
    add("--batch_size", type=number(int, 2), default=64, help="images a step, 2 or more")
    add("--lr", type=number(float, 1e-9), default=4e-4, help="Adam's learning rate, above 0")
    add("--lr_hold", type=number(int), default=2000, help="batches at --lr, which then falls as 1/sqrt; 0: it stays")
    add("--b1", type=number(float, below=1), default=0.5, help="Adam's decay of the gradient, in [0, 1)")
    add("--b2", type=number(float, below=1), default=0.999, help="Adam's decay of its square, in [0, 1)")
    add("--arch", choices=["mlp", "conv"], default="mlp", help="fully connected or convolutional")
    add("--conditioning", choices=["projection", "concat"], default="projection", help="how D is given the label")
    add("--noise", type=number(float), help="deviation of the noise that D sees; None: 0.1, conv 0.3")
    add("--mislabel", type=number(float, below=1), help="share of reals D gets with random labels; None: 0, conv 0.05")
    add("--ema", type=number(float, below=1), default=0.999, help="decay of G's average, in [0, 1); 0: off")
    add("--latent_dim", type=number(int, 1), default=100, help="size of z")
    add("--img_size", type=number(int, 1), default=32, help="side of the images; conv: a multiple of 8")
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
    opt = finish_options(p, argv, acts=["generate"], free=["labels"])
    conv = opt.arch == "conv"
    opt.noise = (0.3 if conv else 0.1) if opt.noise is None else opt.noise
    opt.mislabel = 0.05 * conv if opt.mislabel is None else opt.mislabel
    if conv and opt.img_size % 8:
        p.error(f"--img_size {opt.img_size}: --arch conv needs a multiple of 8")
    if opt.labels and not opt.generate:
        p.error("--labels goes with --generate")
    if opt.labels and max(opt.labels) >= opt.n_classes:
        p.error(f"--labels {max(opt.labels)}: the classes are 0 to {opt.n_classes - 1}")
    return opt


# ---------------- networks


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
    """Images (N, channels, img_size, img_size) in [-1, 1], labels (N,) -> scores (N, 1): 1 for real, 0 for fake.

    conditioning: projection scores w.h(x) + e(y).h(x) with features h and an embedding e; concat makes e(y) one more
    input. noise: deviation of what is added to all images in training, or D would know fakes by a background not
    quite black.
    """

    def __init__(self, n_classes: int, img_size: int, channels: int, arch: str, conditioning: str, noise: float = 0.0):
        super().__init__()
        self.arch, self.concat, self.noise = arch, conditioning == "concat", noise
        if arch == "mlp":
            n_features, n_embed, layers = 512, n_classes, []
            for n_in in [channels * img_size**2 + n_embed * self.concat, 512, 512]:
                layers += [nn.Linear(n_in, 512), nn.LeakyReLU(0.2)]
        else:  # concat: the label is one more channel
            n_features, n_embed, layers = 128 * (img_size // 8) ** 2, img_size**2, []
            for n_in, n_out in [(channels + self.concat, 32), (32, 64), (64, 128)]:
                layers += [nn.Conv2d(n_in, n_out, 4, 2, 1), nn.LeakyReLU(0.2)]
            layers += [nn.Flatten()]
        self.features, self.score = nn.Sequential(*layers), nn.Linear(n_features, 1)
        self.embed = nn.Embedding(n_classes, n_embed if self.concat else n_features)
        if not self.concat:  # so that e(y).h(x) does not drown w.h(x) at first
            nn.init.normal_(self.embed.weight, std=n_features**-0.5)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.training and self.noise:
            images = images + self.noise * torch.randn_like(images)
        x, e = images.flatten(1) if self.arch == "mlp" else images, self.embed(labels)
        if self.concat:
            return self.score(self.features(torch.cat([x, e.view(len(x), -1, *x.shape[2:])], 1)))
        h = self.features(x)
        return self.score(h) + (e * h).sum(1, keepdim=True)


# ---------------- training


def generator_step(G: nn.Module, D: nn.Module, opt_G: Optimizer, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pull D's scores of fakes to 1; D stays. Returns loss and scores (N, 1), with their graph, for D's step."""
    fake_scores = D(G(z, labels), labels).float()
    loss = (fake_scores - 1).square().mean()
    opt_G.zero_grad()
    loss.backward(inputs=list(G.parameters()), retain_graph=True)
    mean_gradients(G)
    opt_G.step()
    return loss.detach(), fake_scores


def discriminator_step(
    D: nn.Module, opt_D: Optimizer, real: Tensor, labels: Tensor, shown: Tensor, fake_scores: Tensor
) -> Tensor:
    """Pull D's scores of real images, in [-1, 1], to 1 (`shown` a wrong label: 0), of fakes to 0. Returns the loss."""
    target = (shown == labels).float()[:, None]
    loss = ((D(real, shown).float() - target).square().mean() + fake_scores.square().mean()) / 2
    opt_D.zero_grad()
    loss.backward(inputs=list(D.parameters()))
    mean_gradients(D)
    opt_D.step()
    return loss.detach()


def average(G_avg: nn.Module, G: nn.Module, decay: float, step: int) -> None:
    """Move G_avg towards G. Its memory is short at first, so that it forgets how G started."""
    decay = min(decay, (1 + step) / (10 + step)) if decay else 0.0
    pairs = zip(G_avg.state_dict().values(), G.state_dict().values())  # batch norm's statistics, too
    averages, values = zip(*((a, v) for a, v in pairs if a.is_floating_point()))  # not counters
    torch.optim.swa_utils.get_ema_multi_avg_fn(decay)(averages, values, None)


def train(opt: Namespace) -> Path:
    """Train and return the run's folder. Raises OSError for bad data or files, FloatingPointError for a bad loss."""
    device = find_device(opt)
    data = TensorDataset(*(part.to(device) for part in load_data(opt)))
    sampler = BatchSampler(RandomSampler(data), opt.batch_size, drop_last=True)
    loader = DataLoader(data, sampler=sampler, batch_size=None)  # a batch is data[[3, 1, ...]]: one look-up, not 64

    torch.manual_seed(opt.seed)
    G = Generator(opt.latent_dim, opt.n_classes, opt.img_size, opt.channels, opt.arch)
    D = Discriminator(opt.n_classes, opt.img_size, opt.channels, opt.arch, opt.conditioning, opt.noise)
    G, D = (m.to(device, memory_format=torch.channels_last) for m in (G, D))  # faster
    G_avg = copy.deepcopy(G).eval().requires_grad_(False)
    for network in (G, D):
        if opt.amp:
            network.forward = torch.autocast(device.type, torch.bfloat16)(network.forward)
        if opt.compile:
            network.compile()
    opt_G, opt_D = (torch.optim.Adam(m.parameters(), opt.lr, (opt.b1, opt.b2), fused=True) for m in (G, D))
    columns = min(opt.n_classes, 10)  # column k of the sample grid is class k; a row shares its z
    grid_z = torch.randn(10, opt.latent_dim).repeat_interleave(columns, 0).to(device)
    grid_labels = torch.arange(columns, device=device).repeat(10)

    run = start(opt, loader, G=G, D=D, G_avg=G_avg, opt_G=opt_G, opt_D=opt_D)
    try:
        for epoch in range(run.done // len(loader), opt.n_epochs):
            seed(opt.seed, "epoch", epoch)  # of the order of the images
            for i, (real, labels) in enumerate(loader, epoch * len(loader)):
                if i < run.done:  # trained before the checkpoint
                    continue
                if i % opt.sample_interval == 0:
                    save_grid(run, (G_avg(grid_z, grid_labels) + 1) / 2, columns)
                for group in opt_G.param_groups + opt_D.param_groups:
                    group["lr"] = opt.lr * min(1, (opt.lr_hold or i + 1) / (i + 1)) ** 0.5
                seed(opt.seed, "batch", i, RANK)  # of noise, so that a resumed run has the same
                real, labels = (part[RANK::WORLD].to(device) for part in (real, labels))
                z = torch.randn(len(real), opt.latent_dim, device=device)
                fake_labels = torch.randint_like(labels, opt.n_classes)
                n = len(range(round(opt.mislabel * opt.batch_size))[RANK::WORLD])  # mislabelled here
                shown = torch.cat([fake_labels[:n], labels[n:]])
                g_loss, fake_scores = generator_step(G, D, opt_G, z, fake_labels)
                d_loss = discriminator_step(D, opt_D, real / 127.5 - 1, labels, shown, fake_scores)
                average(G_avg, G, opt.ema, i)
                after_batch(run, opt, d_loss=d_loss, g_loss=g_loss)
            after_epoch(run, opt)
        save_grid(run, (G_avg(grid_z, grid_labels) + 1) / 2, columns)
    finally:  # after Ctrl-C, too
        finish(run, sample="training.gif")
    return run.folder


def load(run: str | Path, device: str | torch.device = "cpu") -> Generator:
    """The averaged generator of a run's folder, in eval mode, with its `.options`. Raises OSError if it has none."""
    state = read_checkpoint(run)
    G = Generator(*(state["options"][k] for k in ("latent_dim", "n_classes", "img_size", "channels", "arch")))
    G.load_state_dict(state["G_avg"])
    G.options = state["options"]
    return G.to(device).eval().requires_grad_(False)


def generate(opt: Namespace) -> Path:
    """Write opt.generate images, as many of each class, in sub-folders; returns the folder."""
    device = find_device(opt)
    G, folder = load(opt.resume, device), new_folder(Path(opt.resume, "generated"))
    classes = sorted(set(opt.labels or range(opt.n_classes)))
    torch.manual_seed(opt.seed)
    for i in range(opt.generate):
        label = torch.tensor([classes[i % len(classes)]], device=device)
        image = (G(torch.randn(1, opt.latent_dim, device=device), label) + 1) / 2
        file = folder / opt.classes[label] / f"{i:06}.png"
        file.parent.mkdir(exist_ok=True)
        utils.save_image(image, file)
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
        generate(opt) if opt.generate else train(opt)
    except (OSError, FloatingPointError) as e:  # its last line: a worker's traceback stands before it
        sys.exit(f"{SCRIPT}.py: error: {str(e).splitlines()[-1]}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
