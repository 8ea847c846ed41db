"""How fast is a script? Run by hand, on a machine that does nothing else:

    python tests/bench_speed.py cgan --old ../before/cgan.py --ours "--arch conv"
    python tests/bench_speed.py cgan --peer ../PyTorch-GAN/implementations/cgan/cgan.py --ours= --ours=--amp
    python tests/bench_speed.py vae --peer ../examples/vae/main.py --peer_options "--epochs {epochs}" \\
        --ours "--arch mlp --img_size 28 --latent_dim 20 --batch_size 128 --likelihood bernoulli"
    python tests/bench_speed.py cgan --folder

--old     Trains ours and another version of the same script in turn, with the same options, on one thread
          that is kept on one core, for one epoch and for two: the difference is one warm epoch, without
          imports and reading data. Prints its CPU seconds (user and system), which other work on the
          machine changes less than those of the clock, and the median ratio: above 1, ours is slower.
--peer    Ours and somebody else's script in the same way, but in seconds of the clock, on all cores.
          MNIST must be where each of them looks for it: ours in --data_dir, the peer's by its own ways.
          Prints how many times as fast ours is.
--folder  Makes a folder of 100,000 images and prints how long it takes to read, and the memory of the
          process at its peak.

Ours are trained on MNIST, unless there is a --dataset among the options in --ours.
"""

import argparse
import importlib
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def clock_seconds(command: list[str], cwd: Path) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def cpu_seconds(command: list[str], cwd: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def warm_epoch(seconds: Callable[[list[str], Path], float], command: list[str], cwd: Path) -> float:
    """The seconds of two epochs less those of one; {epochs} in the command is the number of epochs."""
    one = seconds([word.replace("{epochs}", "1") for word in command], cwd)
    two = seconds([word.replace("{epochs}", "2") for word in command], cwd)
    return two - one


def our_command(opt: argparse.Namespace, script: Path, options: str, folder: str) -> list[str]:
    """Our script, or another version of it, on MNIST unless the options say otherwise."""
    command = [sys.executable, str(script), "--dataset", "mnist", "--data_dir", opt.data_dir]
    return [*command, "--out_dir", f"{folder}/run", "--n_epochs", "{epochs}", *shlex.split(options)]


def compare_old(opt: argparse.Namespace) -> None:
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # the scripts inherit it
    os.environ["OMP_NUM_THREADS"] = "1"
    for options in opt.ours:
        ratios = []
        for i in range(opt.rounds):
            with tempfile.TemporaryDirectory() as folder:
                command = our_command(opt, ROOT / f"{opt.script}.py", options, folder)
                ours = warm_epoch(cpu_seconds, command, Path.cwd())
                command = our_command(opt, Path(opt.old), options, folder)
                old = warm_epoch(cpu_seconds, command, Path.cwd())
            ratios.append(ours / old)
            print(
                f"pair {i + 1}: {ours:.2f} CPU seconds an epoch, the old {old:.2f}: {ours / old:.3f}",
                flush=True,
            )
        median = statistics.median(ratios)
        print(
            f"{opt.script} {options}: {median:.3f} of the old's, from {min(ratios):.3f} to {max(ratios):.3f}"
        )


def compare_peer(opt: argparse.Namespace) -> None:
    ratios = {options: [] for options in opt.ours}
    peer = Path(opt.peer).resolve()
    for i in range(opt.rounds):
        command = [sys.executable, str(peer), *shlex.split(opt.peer_options)]
        b = warm_epoch(clock_seconds, command, peer.parent)
        print(f"round {i + 1}: the peer's {b:.2f} s an epoch", flush=True)
        for options in opt.ours:
            with tempfile.TemporaryDirectory() as folder:
                command = our_command(opt, ROOT / f"{opt.script}.py", options, folder)
                a = warm_epoch(clock_seconds, command, Path.cwd())
            ratios[options].append(b / a)
            print(f"  ours {options} {a:.2f} s: {b / a:.2f} times as fast", flush=True)
    for options, found in ratios.items():
        median = statistics.median(found)
        print(f"ours {options}: median {median:.2f}, from {min(found):.2f} to {max(found):.2f}")


def read_folder(opt: argparse.Namespace) -> None:
    script = importlib.import_module(opt.script)
    n = opt.images
    size = 64
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
        images, _, _ = script.load_data(o)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{n:,} images of 96x96 read as {size}x{size} in {seconds:.1f} s, {n / seconds:,.0f} a second")
    size_of_data = images.numel()
    limit = 1.3 * size_of_data + 1e9
    print(f"peak memory {peak / 1e9:.2f} GB ({before / 1e9:.2f} GB before)")
    print(f"N*C*H*W is {size_of_data / 1e9:.2f} GB; 1.3 times that and 1 GB are {limit / 1e9:.2f} GB")
    print("the limit is kept" if peak <= limit else "THE LIMIT IS EXCEEDED")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("script", choices=["vae", "gan", "cgan", "vqvae", "pixelcnn", "pixelcnnpp"])
    add("--old", help="another version of the script to compare with")
    add("--peer", help="the script to compare with")
    add("--peer_options", default="--n_epochs {epochs}", help="its options; {epochs} is the number of epochs")
    add("--ours", action="append", help="options of our script (and of --old); given again: each in turn")
    add("--data_dir", default="data", help="where our script finds MNIST")
    add("--rounds", type=int, default=5, help="how often each is trained")
    add("--folder", action="store_true", help="measure how a folder is read")
    add("--images", type=int, default=100_000, help="with --folder: how many")
    opt = p.parse_args()
    opt.ours = opt.ours or [""]
    if not (opt.old or opt.peer or opt.folder):
        p.error("nothing to measure: --old, --peer or --folder")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if opt.old:
        compare_old(opt)
    if opt.peer:
        compare_peer(opt)
    if opt.folder:
        read_folder(opt)


if __name__ == "__main__":
    main()
