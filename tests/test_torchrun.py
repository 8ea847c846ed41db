"""torchrun: several processes train one model."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, SMALL, SMALLER

STEPS = f"""
import sys, torch, torch.distributed as dist
sys.path.insert(0, {str(ROOT)!r})
import argparse, cgan, gan, pixelcnn, vae, vqvae
torch.manual_seed(0)
real, z, labels = torch.rand(8, 1, 16, 16), torch.randn(8, 4), torch.arange(8) % 3
shown = torch.ones_like(labels)
mine = slice(cgan.RANK, None, cgan.WORLD)
if cgan.WORLD > 1:
    dist.init_process_group("gloo")
gradients = {{}}
def sgd(model): return torch.optim.SGD(model.parameters(), lr=0.1)
conditional = cgan, (3,), (labels[mine],), (shown[mine],), dict(conditioning="projection")
for script, options, given, wrong, more in (conditional, (gan, (), (), (), dict(spread=False))):
    for arch in ("mlp", "conv"):
        G = script.Generator(4, *options, 16, 1, arch).eval()
        D = script.Discriminator(*options, 16, 1, arch, **more).eval()
        _, fake = script.generator_step(G, D, sgd(G), z[mine], *given)
        script.discriminator_step(D, sgd(D), real[mine] * 2 - 1, *given, *wrong, fake)
        for k, p in enumerate([*G.parameters(), *D.parameters()]):
            gradients[f"{{script.__name__}} {{arch}} {{k}}"] = p.grad
model = vae.VAE("mlp", [8], 3, 16, 1, 1, False)
model.reparameterize = lambda mu, logvar: mu + torch.exp(0.5 * logvar)
opt = argparse.Namespace(likelihood="bernoulli", beta=1.0, sigma=None, warmup=0)
vae.train_step(model, sgd(model), real[mine], None, opt, 0)
gradients |= {{f"vae {{k}}": p.grad for k, p in enumerate(model.parameters())}}
for mode in ("ema", "loss"):
    model = vqvae.VQVAE(5, 3, [1, 4, 8], 4)
    model.codebook.requires_grad_(mode == "loss")
    opt = argparse.Namespace(codebook=mode, commitment=0.25, decay=0.9, restart=False)
    vqvae.train_step(model, sgd(model), real[mine], torch.tensor(0.1), opt)
    gradients |= {{f"vqvae {{mode}} {{k}}": p.grad for k, p in enumerate(model.parameters()) if p.grad is not None}}
    gradients |= {{f"vqvae {{mode}} codebook": model.codebook.detach(), f"vqvae {{mode}} counts": model.counts}}
for arch in ("pixelcnn", "gated", "plusplus"):
    model = pixelcnn.PixelCNN(arch, "bernoulli", 2, 1, 16, 4, 2, 0.0, 3)
    pixelcnn.train_step(model, sgd(model), (real[mine] > 0.5).long(), labels[mine])
    gradients |= {{f"pixelcnn {{arch}} {{k}}": p.grad for k, p in enumerate(model.parameters())}}
torch.save(gradients, f"{{cgan.WORLD}}.{{cgan.RANK}}.pt")
"""

TRAIN = f"""
import importlib, sys, torch
sys.path.insert(0, {str(ROOT)!r})
for name in {SCRIPTS!r}:
    script = importlib.import_module(name)
    opt = script.parse_args(sys.argv[1:] + {SMALLER!r}[name])
    parts, start = {{}}, script.start
    def start_and_keep(*args, **given):
        parts.update(given)
        return start(*args, **given)
    script.start = start_and_keep
    step = "discriminator_step" if "gan" in name else "train_step"
    real_step, draws = getattr(script, step), []
    def step_and_keep(*args):
        draws.append((args[2].clone(), torch.rand(4)))
        torch.manual_seed(int(draws[-1][1][0] * 2**31))
        return real_step(*args)
    setattr(script, step, step_and_keep)
    script.train(opt)
    torch.save(draws, f"{{name}}.draws.{{script.RANK}}.pt")
    kept = torch.nn.Module.state_dict if name == "vqvae" else lambda part: dict(part.named_parameters())
    models = {{k: kept(part) for k, part in parts.items() if isinstance(part, torch.nn.Module)}}
    torch.save(models, f"{{name}}.{{script.RANK}}.pt")
"""


PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def torchrun(folder, file, *arguments):
    """A program in two processes, started in a folder and not waited for."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(file)]
    return subprocess.Popen([*launcher, *arguments], cwd=folder, **PIPES)


def begin(folder, images):
    """One process that does the steps above, and two that do them and then train each script."""
    (folder / "both.py").write_text(STEPS + TRAIN)
    options = ["--dataset", str(images), *SMALL, "--n_epochs", "2", "--device", "cpu"]
    one = subprocess.Popen([sys.executable, "-c", STEPS], cwd=folder, **PIPES)
    return one, torchrun(folder, "both.py", *options)


@pytest.fixture(scope="module")
def two(begun):
    """What these processes leave and print."""
    folder, processes = begun
    for child in processes:
        out, err = child.communicate()
        assert child.returncode == 0, err
    return folder, out


def test_gradients_are_those_of_one_process(two, monkeypatch):
    """Up to rounding, for networks without batch norm and dropout: here in eval mode, with given rows and noise."""
    monkeypatch.chdir(two[0])
    one, first, second = (torch.load(f"{name}.pt") for name in ("1.0", "2.0", "2.1"))
    assert one.keys() == first.keys() == second.keys()
    for name in one:
        torch.testing.assert_close(one[name], first[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(first[name], second[name]), name


def test_only_training_is_shared(cgan, images, refused, tmp_path, monkeypatch):
    """Processes that all generate would write everything twice, or wait for one another for ever."""
    run = cgan.train(cgan.parse_args(["--dataset", str(images), *SMALL, "--n_epochs", "0", "--out_dir", str(tmp_path)]))
    monkeypatch.setattr(cgan, "WORLD", 2)
    refused(cgan, "--resume", run, "--generate", 1, says=["--generate", "torchrun"])


def test_both_processes_end_with_the_same_weights(two, monkeypatch):
    """Although each has rows, noise and dropout of its own; and one process goes on where two stopped."""
    folder, out = two
    monkeypatch.chdir(folder)
    for name in SCRIPTS:
        assert out.count(f"writing to runs/{name}") == 1 and not Path(f"runs/{name}-2").exists()
        first, second = (torch.load(f"{name}.{rank}.pt") for rank in (0, 1))
        for (mine, noise), (theirs, other) in zip(
            *(torch.load(f"{name}.draws.{rank}.pt") for rank in (0, 1)), strict=True
        ):
            assert len(mine) == len(theirs) == 4 and not (mine[:, None] == theirs).flatten(2).all(2).any()
            assert not (noise == other).any()
        for part in first:
            for key, value in first[part].items():
                assert torch.equal(value, second[part][key]), f"{name} {part} {key}"
        script = __import__(name)
        script.train(script.parse_args(["--resume", f"runs/{name}", "--n_epochs", "3"]))
        assert len(Path(f"runs/{name}/log.csv").read_text().splitlines()) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="kills a process by its name in /proc")
def test_a_worker_that_dies(cgan, images, tmp_path, monkeypatch):
    """The others end too, and the last checkpoint is there to go on from."""
    monkeypatch.chdir(tmp_path)
    options = ["--dataset", str(images), *SMALL, "--n_epochs", "100000", "--device", "cpu", "--out_dir", "two"]
    child = torchrun(tmp_path, cgan.__file__, *options)
    while not Path("two/log.csv").exists() or not Path("two/log.csv").stat().st_size:
        assert child.poll() is None, child.communicate()
        time.sleep(0.1)
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"cgan.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[-1], signal.SIGKILL)
    child.communicate(timeout=300)  # for ever, if the others were left waiting
    assert child.returncode != 0
    done = torch.load("two/checkpoint.pt", weights_only=True)["position"][0]
    cgan.train(cgan.parse_args(["--resume", "two", "--n_epochs", str(done // 6 + 1)]))
