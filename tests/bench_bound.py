"""The importance-weighted bound of a run of vae.py on its test images. Run by hand:

    python tests/bench_bound.py runs/vae --samples 500

Prints the mean over the test images, in nats per image. With one sample it is the ELBO; with more samples it
approaches log p(x) from below (Burda et al. 2015, arXiv:1509.00519). What log p(x) means, vae.py says at the
top. Other options (--data_dir, --dataset, --device, --seed) are those of vae.py.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vae  # noqa: E402


@torch.no_grad()
def importance_weighted_bound(
    model: vae.VAE, x: Tensor, labels: Tensor, likelihood: str, n_samples: int
) -> Tensor:
    """log 1/k sum_i p(x|z_i) p(z_i) / q(z_i|x) per image, in nats (N,) (arXiv:1509.00519, equation 8)."""
    mu, logvar = model.encode(x, labels)
    log_weights = []
    for _ in range(n_samples):  # one by one, to save memory
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        log_px = vae.log_likelihood(x, model.decode(z, labels), likelihood, model.variance)
        log_pz_over_q = 0.5 * ((z - mu).square() / logvar.exp() + logvar - z.square()).sum(dim=1)
        log_weights.append(log_px + log_pz_over_q)
    return torch.stack(log_weights).logsumexp(dim=0) - math.log(n_samples)


def mean_bound(run: Path, n_samples: int, options: list[str]) -> float:
    """The mean bound of a run's test images; options: those of vae.py that may change."""
    opt = vae.parse_args(["--resume", str(run), *options])
    device = vae.find_device(opt.device)
    model = vae.load(run, device)
    images, labels, _ = vae.load_data(opt)
    _, _, images, labels = vae.hold_out(opt, images, labels)
    vae.seed(opt.seed, "bound")
    total = 0.0
    for x, y in zip(images.to(device).split(100), labels.to(device).split(100)):
        x = vae.to_x(x, opt.binarize)
        total += float(importance_weighted_bound(model, x, y, opt.likelihood, n_samples).sum())
    return total / len(images)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, help="folder of a run of vae.py")
    p.add_argument("--samples", type=int, default=500, help="samples of z per image")
    opt, options = p.parse_known_args()
    if opt.samples < 1:
        p.error("--samples must be 1 or more")
    print(f"{opt.samples} samples: {mean_bound(opt.run, opt.samples, options):.2f} nats per image")


if __name__ == "__main__":
    main()
