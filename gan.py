"""GAN: a generator learns to draw by fooling a discriminator.

The generator G turns noise z into an image. The discriminator D gives the log-odds (logit) that an image
is real. D learns to tell real images from G's fakes; G learns to have its fakes taken for real, by the
non-saturating loss, whose gradient stays large while D rejects the fakes:

    D maximises    E[log sigmoid(D(x))]  +  E[log(1 - sigmoid(D(G(z))))]
    G maximises    E[log sigmoid(D(G(z)))]

In log.csv, d_loss is minus half of what D maximises and g_loss minus what G maximises. Both are log 2 = 0.69
while D cannot tell real images from fakes.

GAN: Goodfellow et al. 2014, arXiv:1406.2661, equation 1 and section 3. --arch conv is made like DCGAN,
Radford et al. 2015, arXiv:1511.06434; among what differs are the number of channels, the end of G and of D,
and the initial weights, which are PyTorch's. The learning rate falls after --lr_hold steps, so that the
networks settle.

Three additions improve the images. D sees how much its features vary in the batch, which keeps G drawing
different images (Karras et al. 2017, arXiv:1710.10196, section 3). Gaussian noise is added to D's input,
which makes the training more stable (Sønderby et al. 2016, arXiv:1610.04490, where it fades; --noise 0:
none). Samples come from a moving average of G's weights (Yazici et al. 2018, arXiv:1806.04498; --ema 0: from
G itself).

    python gan.py --n_epochs 20                          # MNIST; built-in digits when offline
    python gan.py --arch conv --dataset path/to/folder   # your images
    python gan.py --resume runs/gan --generate 100
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
from torch.nn.functional import logsigmoid
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
    add("--arch", choices=["mlp", "conv"], default="mlp", help="fully connected or convolutional")
    add("--hidden_dim", type=count, default=32,
        help="conv: channels where the side is half the image's; doubled at each halving")  # fmt: skip
    add("--latent_dim", type=count, default=100, help="size of z")
    add("--noise", type=number(float, 0), default=0.1, help="standard deviation of the noise on D's input")
    add("--ema", type=fraction, default=0.999, help="decay rate of G's averaged weights; 0: off")
    add = p.add_argument_group("training").add_argument
    add("--n_epochs", type=count, default=200, help="epochs in total, those before a resume included")
    add("--batch_size", type=number(int, 2), default=64, help="images per step")
    add("--lr", type=positive, default=6e-4, help="Adam: learning rate")
    add("--lr_hold", type=count, default=8000, help="steps at the rate lr; then it falls as 1/sqrt(step)")
    add("--b1", type=fraction, default=0.5, help="Adam: decay rate of the first moment")
    add("--b2", type=fraction, default=0.999, help="Adam: decay rate of the second moment")
    add("--seed", type=number(int, 0), default=0, help="seed; with --generate, another gives other images")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add("--amp", action=ON_OFF, default=False, help="train in bfloat16; slower than float32 on some CPUs")
    add = p.add_argument_group("data").add_argument
    add("--dataset", help="mnist (if not given), fashion_mnist, cifar10, digits or a folder of images")
    add("--data_dir", default="data", help="folder for downloaded data sets")
    add("--img_size", type=count, default=32, help="side of the images in pixels; conv: 8, 12, 16, ...")
    add("--channels", type=int, choices=[1, 3], help="1: grey, 3: colour (default: the data's; a folder: 3)")
    add("--n_cpu", type=count, default=8, help="threads that read the images of a folder")
    add = p.add_argument_group("run").add_argument
    add("--out_dir", default=f"runs/{SCRIPT}", help="folder of a new run; if it exists, a number is added")
    add("--sample_interval", type=count, default=400, help="steps between sample grids and log rows")
    add("--resume", metavar="RUN", help="continue the run in this folder, with its options")
    add("--generate", type=count, metavar="N", help="with --resume: write N images to RUN/generated")
    opt = parse_and_check(p, argv)
    if opt.arch == "conv" and (opt.img_size % 4 or opt.img_size < 8):
        p.error(f"--img_size {opt.img_size}: --arch conv takes a multiple of 4, at least 8")
    return opt


# ---------------------------------------------------------------- networks


class Generator(nn.Module):
    """Noise z (N, latent_dim), standard normal -> images (N, channels, img_size, img_size) in [-1, 1].

    Each level of --arch conv doubles the side of the images.
    """

    def __init__(self, arch: str, img_size: int, channels: int, latent_dim: int, hidden_dim: int):
        super().__init__()
        if arch == "mlp":
            self.net = nn.Sequential(
                nn.Linear(latent_dim, 128), nn.LeakyReLU(0.2),
                nn.Linear(128, 256), nn.BatchNorm1d(256), nn.LeakyReLU(0.2),
                nn.Linear(256, 512), nn.BatchNorm1d(512), nn.LeakyReLU(0.2),
                nn.Linear(512, 1024), nn.BatchNorm1d(1024), nn.LeakyReLU(0.2),
                nn.Linear(1024, channels * img_size**2), nn.Tanh(),
                nn.Unflatten(1, (channels, img_size, img_size)),
            )  # fmt: skip
        else:
            # Built backwards from the image. Each level that is put in front doubles the side; the first has
            # one that is odd or below 8: images of 32 pixels begin with 4, those of 28 with 7. The last level
            # ends with the mean of 2x2 pixels, which removes the fine grid that a transposed convolution
            # leaves: it goes from a side of 16 to 33, and then to 32.
            layers = [
                nn.BatchNorm2d(hidden_dim),
                nn.ReLU(),
                nn.ConvTranspose2d(hidden_dim, channels, 3, 2),
                nn.AvgPool2d(2, 1),
                nn.Tanh(),
            ]
            dim = hidden_dim
            side = img_size // 2
            while side % 2 == 0 and side >= 8:
                layers = [
                    nn.BatchNorm2d(2 * dim),
                    nn.ReLU(),
                    nn.ConvTranspose2d(2 * dim, dim, 4, 2, 1),
                    *layers,
                ]
                dim *= 2
                side //= 2
            self.net = nn.Sequential(
                nn.Linear(latent_dim, dim * side**2), nn.Unflatten(1, (dim, side, side)), *layers
            )

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z)


class Discriminator(nn.Module):
    """Images (N, channels, img_size, img_size) in [-1, 1] -> logits (N, 1): the log-odds of being real.

    A logit also depends on the other images of the batch: give real images and fakes in batches of their own.
    --arch conv halves the side of the images at each level.
    """

    def __init__(self, arch: str, img_size: int, channels: int, hidden_dim: int):
        super().__init__()
        if arch == "mlp":
            n_features = 256
            self.features = nn.Sequential(
                nn.Flatten(),
                nn.Linear(channels * img_size**2, 512), nn.LeakyReLU(0.2),
                nn.Linear(512, 256), nn.LeakyReLU(0.2),
            )  # fmt: skip
        else:
            layers = [nn.Conv2d(channels, hidden_dim, 4, 2, 1), nn.LeakyReLU(0.2)]
            dim = hidden_dim
            side = img_size // 2
            while side % 2 == 0 and side >= 8:
                layers += [nn.Conv2d(dim, 2 * dim, 4, 2, 1), nn.BatchNorm2d(2 * dim), nn.LeakyReLU(0.2)]
                dim *= 2
                side //= 2
            n_features = dim * side**2
            self.features = nn.Sequential(*layers, nn.Flatten())
        self.score = nn.Sequential(nn.Linear(n_features + 1, 256), nn.LeakyReLU(0.2), nn.Linear(256, 1))

    def forward(self, images: Tensor) -> Tensor:
        h = self.features(images)
        # One number for the whole batch: how much the features vary. It is low while G's images are all much
        # alike, which D cannot see from one of them.
        spread = h.std(dim=0, correction=0).mean()
        logits = self.score(torch.cat([h, spread.expand(len(h), 1)], dim=1))
        return logits.float()  # with --amp, losses in float32 are more exact


# ---------------------------------------------------------------- training


def train(opt: Namespace) -> Path:
    """Train, and return the run's folder. Raises InputError, an OSError, for bad data or options."""
    opt = copy.copy(opt)
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group()
    device = find_device(opt.device)
    # For data that is not a folder of images, replace this line. Images are uint8 (N, channels, H, W), with H
    # and W equal to opt.img_size. Labels are int64 (N,), class numbers from 0, which a GAN does not use, and
    # classes is the list of their names.
    images, labels, opt.classes = load_data(opt)
    opt.channels = images.shape[1]
    # All images are kept on the device, as bytes.
    loader = make_loader(images.to(device), labels.to(device), opt.batch_size)

    torch.manual_seed(opt.seed)
    G = Generator(opt.arch, opt.img_size, opt.channels, opt.latent_dim, opt.hidden_dim)
    D = Discriminator(opt.arch, opt.img_size, opt.channels, opt.hidden_dim)
    G.to(device, memory_format=torch.channels_last)  # faster convolutions
    D.to(device, memory_format=torch.channels_last)
    G_avg = copy.deepcopy(G).eval().requires_grad_(False)  # for sample grids and load()
    betas = (opt.b1, opt.b2)
    optimizer_G = torch.optim.Adam(G.parameters(), opt.lr, betas, fused=True)
    optimizer_D = torch.optim.Adam(D.parameters(), opt.lr, betas, fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=opt.amp)

    grid_z = torch.randn(25, opt.latent_dim).to(device)

    # Makes the run's folder or, with --resume, restores these parts and the number of steps done.
    run = Run(opt, loader, G=G, D=D, G_avg=G_avg, optimizer_G=optimizer_G, optimizer_D=optimizer_D)
    for epoch in range(run.step // len(loader), opt.n_epochs):
        seed(opt.seed, "epoch", epoch)  # a resume repeats the order of the images
        # After a resume, this skips the batches of the epoch that are done; otherwise none.
        for real, _ in itertools.islice(loader, run.step % len(loader), None):
            seed(opt.seed, "step", run.step, RANK)  # a resume repeats the random numbers of each step
            lr = opt.lr * min(1, opt.lr_hold / (run.step + 1)) ** 0.5
            optimizer_G.param_groups[0]["lr"] = lr
            optimizer_D.param_groups[0]["lr"] = lr
            real = real[RANK::WORLD] / 127.5 - 1  # the share of this process, from 0..255 to [-1, 1]
            # Without noise, D could know fakes by a trifle: the background of real digits is exactly -1,
            # which tanh only approaches.
            real = real + opt.noise * torch.randn_like(real)
            z = torch.randn(len(real), opt.latent_dim, device=device)

            # generator; its fakes serve the discriminator's step, too
            D.requires_grad_(False)  # gradients pass through D to G; those of D are not needed
            with autocast:
                fake = G(z)
                # Not randn_like(fake): fake is stored channels-last, for which random numbers come slowly.
                fake = fake + opt.noise * torch.randn_like(real)
                fake_logits = D(fake)
            g_loss = -logsigmoid(fake_logits).mean()
            optimizer_G.zero_grad()
            g_loss.backward()
            average_gradients(G)
            optimizer_G.step()

            # discriminator; it sees the fakes again, now for gradients of its own weights
            D.requires_grad_(True)
            with autocast:
                real_logits = D(real)
                fake_logits = D(fake.detach())
            real_loss = -logsigmoid(real_logits).mean()
            fake_loss = -logsigmoid(-fake_logits).mean()  # 1 - sigmoid(a) is sigmoid(-a)
            d_loss = (real_loss + fake_loss) / 2
            optimizer_D.zero_grad()
            d_loss.backward()
            average_gradients(D)
            optimizer_D.step()

            update_average(G_avg, G, opt.ema, run.step)
            run.end_step(d_loss=d_loss, g_loss=g_loss)
            if run.step % opt.sample_interval == 0 or run.step == run.last_step:
                run.save_grid("sample", (G_avg(grid_z) + 1) / 2, 5)
                run.record()
            run.save_if_due()
    run.finish()
    return run.folder


# ---------------------------------------------------------------- load and generate


def load(folder: str | Path, device: str | torch.device = "cpu") -> Generator:
    """The averaged generator of a run, in eval mode, with the run's options as `G.options`.

    G(z) gives images in [-1, 1].
    Raises InputError if the folder is not that of a run of this script.
    """
    state = read_checkpoint(folder)
    o = Namespace(**state["options"])
    G = Generator(o.arch, o.img_size, o.channels, o.latent_dim, o.hidden_dim)
    G.load_state_dict(state["G_avg"])
    G.options = o
    return G.to(device).eval().requires_grad_(False)


def generate(opt: Namespace) -> Path:
    """Write opt.generate images into a new folder, and return it."""
    device = find_device(opt.device)
    G = load(opt.resume, device)
    folder = new_folder(Path(opt.resume, "generated"))
    torch.manual_seed(opt.seed)
    for i in range(opt.generate):
        image = (G(torch.randn(1, opt.latent_dim, device=device)) + 1) / 2
        with replacing(folder / f"{i:06}.png") as file:
            save_image(image, file)
    say(f'{opt.generate} images in "{folder}"')
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
