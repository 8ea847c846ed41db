"""How fast is a script? Run by hand, on a machine that does nothing else:

    python tests/bench_speed.py cgan --peer ../PyTorch-GAN/implementations/cgan/cgan.py --ours= --ours=--amp
    python tests/bench_speed.py vae --peer ../examples/vae/main.py --ours "--arch mlp --img_size 28 --latent_dim 20 \\
        --batch_size 128 --likelihood bernoulli" --peer_options "--epochs {epochs}"
    python tests/bench_speed.py cgan --floor
    python tests/bench_speed.py cgan --folder

--peer    Trains ours and the peer's script in turn, several rounds, for one epoch and for two: the difference is one
          warm epoch, without imports and reading data. Prints each round's seconds, the median ratio and its spread.
          MNIST must be where each of them looks for it: ours in --data_dir, the peer's by its own ways.
--floor   Of a GAN with --arch mlp: our step's time over that of what no step can avoid, measured in the same process:
          its matrix products, and one pass of Adam and of the average over the weights.
--folder  Makes a folder of 100,000 images and prints how long it takes to read, and the memory of the process that
          gathers them, without those that decode, at its peak.
"""

import argparse
import copy
import importlib
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def seconds(command: list[str], cwd: Path) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def warm_epoch(command: list[str], options: str, cwd: Path) -> float:
    one, two = (seconds([*command, *shlex.split(options.format(epochs=n))], cwd) for n in (1, 2))
    return two - one


def compare(opt: argparse.Namespace) -> None:
    ratios = {options: [] for options in opt.ours}
    with tempfile.TemporaryDirectory() as folder:
        ours = [sys.executable, str(ROOT / f"{opt.script}.py"), "--data_dir", str(Path(opt.data_dir).resolve())]
        ours += ["--dataset", "mnist", "--out_dir", f"{folder}/run"]
        peer = [sys.executable, str(Path(opt.peer).resolve())]
        for i in range(opt.rounds):
            b = warm_epoch(peer, opt.peer_options, Path(opt.peer).resolve().parent)
            print(f"round {i + 1}: the peer's {b:.2f} s an epoch", flush=True)
            for options, found in ratios.items():
                a = warm_epoch(ours, "--n_epochs {epochs} " + options, Path(folder))
                found.append(b / a)
                print(f"  ours {options} {a:.2f} s: {b / a:.2f} times as fast", flush=True)
    for options, found in ratios.items():
        print(f"ours {options}: median {statistics.median(found):.2f}, from {min(found):.2f} to {max(found):.2f}")


def median_time(work, n: int = 100) -> float:
    times = []
    for _ in range(n):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def floor(opt: argparse.Namespace) -> None:
    """Of a GAN with --arch mlp: a linear layer takes one product forward, one for its weights and one for its input."""
    script = importlib.import_module(opt.script)
    o = script.parse_args(shlex.split(opt.ours[0]))
    if opt.script == "vae" or o.arch != "mlp" or o.amp or len(opt.ours) > 1:
        sys.exit("--floor: of gan and cgan with --arch mlp, in float32, with one --ours")
    script.find_device(o)  # so that steps keep their memory, as in training
    extra = [10] if opt.script == "cgan" else []
    seen = [o.conditioning, o.noise] if extra else [o.noise, o.spread]  # by D
    G = script.Generator(o.latent_dim, *extra, o.img_size, 1, "mlp")
    D = script.Discriminator(*extra, o.img_size, 1, "mlp", *seen)
    G_avg = copy.deepcopy(G).requires_grad_(False)
    opt_G, opt_D = (torch.optim.Adam(m.parameters(), lr=o.lr, betas=(o.b1, o.b2), fused=True) for m in (G, D))
    labels = torch.arange(o.batch_size) % 10
    given = [labels] if extra else []
    real = torch.rand(o.batch_size, 1, o.img_size, o.img_size)

    def step():
        _, fake = script.generator_step(G, D, opt_G, torch.randn(o.batch_size, o.latent_dim), *given)
        script.discriminator_step(D, opt_D, real, *given * 2, fake)  # cgan: labels, and those shown
        script.average(G_avg, G, o.ema, 10**6)

    products = []
    for network, forward in ((G, 1), (D, 2)):  # D sees fakes and real images
        for i, layer in enumerate(m for m in network.modules() if isinstance(m, torch.nn.Linear)):
            w, x = layer.weight.detach(), torch.randn(o.batch_size, layer.in_features)
            y = torch.randn(o.batch_size, layer.out_features)
            products += [(x, w.T)] * forward + [(y.T, x)] * forward  # forward; the gradient of the weights
            into = (1 if network is D else 0) + (forward if i else 0)  # through D to G; to the layer below
            products += [(y, w)] * into

    def unavoidable():  # after a step, when there are gradients
        for a, b in products:
            torch.mm(a, b)
        opt_G.step()
        opt_D.step()
        script.average(G_avg, G, o.ema, 10**6)

    ratios = []
    for i in range(opt.rounds):
        a, b = median_time(step), median_time(unavoidable)
        ratios.append(a / b)
        print(f"round {i + 1}: a step {a * 1e3:.2f} ms, what it cannot avoid {b * 1e3:.2f} ms: {a / b:.2f}")
    print(f"median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")


def read_folder(opt: argparse.Namespace) -> None:
    from PIL import Image

    script = importlib.import_module(opt.script)
    n, size = opt.images, 64
    with tempfile.TemporaryDirectory() as folder:
        random = torch.Generator().manual_seed(0)
        for i in range(n):
            place = Path(folder, str(i % 10))
            place.mkdir(exist_ok=True)
            pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=random).numpy()
            Image.fromarray(pixels).resize((96, 96)).save(place / f"{i}.jpg")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        o = script.parse_args(["--dataset", folder, "--img_size", str(size), *shlex.split(opt.ours[0])])
        start = time.perf_counter()
        data = script.load_data(o)
        taken = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    bytes_of_data = sum(t.numel() for t in data if t.dtype == torch.uint8)
    print(f"{n:,} images of 96x96 read as {size}x{size} in {taken:.1f} s, {n / taken:,.0f} a second")
    limit = 1.3 * bytes_of_data + 1e9
    print(f"peak memory {peak / 1e9:.2f} GB ({before / 1e9:.2f} GB before); N*C*H*W is {bytes_of_data / 1e9:.2f} GB")
    print(f"limit 1.3 N*C*H*W + 1 GB = {limit / 1e9:.2f} GB: {'kept' if peak <= limit else 'EXCEEDED'}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("script", choices=["vae", "gan", "cgan"])
    p.add_argument("--peer", help="the script to compare with")
    p.add_argument(
        "--peer_options", default="--n_epochs {epochs}", help="its options; {epochs} is the number of epochs"
    )
    p.add_argument("--ours", action="append", help="options of our script; with --peer given again: each in turn")
    p.add_argument("--data_dir", default="data", help="where our script finds MNIST")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--floor", action="store_true")
    p.add_argument("--folder", action="store_true")
    p.add_argument("--images", type=int, default=100_000, help="with --folder: how many")
    opt = p.parse_args()
    opt.ours = opt.ours or [""]
    if not (opt.peer or opt.floor or opt.folder):
        p.error("nothing to measure: --peer, --floor or --folder")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if opt.peer:
        compare(opt)
    if opt.floor:
        floor(opt)
    if opt.folder:
        read_folder(opt)


if __name__ == "__main__":
    main()
