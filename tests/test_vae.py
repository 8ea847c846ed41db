"""vae.py: the objective against torch.distributions, the bounds, the architectures."""

import argparse
import csv
import math
import os

import pytest
import torch
import torchvision
from conftest import make_folder
from PIL import Image
from torch.distributions import Bernoulli, Normal
from torchvision.transforms.v2.functional import pil_to_tensor


@pytest.fixture
def vae():
    import vae

    return vae


ARCHES = {"vanilla": [32, 64, 128, 256, 512], "conv": [64, 128, 256, 512], "mlp": [400]}
ARCHES |= {"burgess": [32, 64, 256], "residual": [32, 64, 256]}
ONE = torch.ones(())
real_mnist = pytest.mark.skipif(not os.environ.get("DATA_DIR"), reason="DATA_DIR names no folder with MNIST")


def batch(n=6, channels=1, img_size=16):
    torch.manual_seed(0)
    return torch.rand(n, channels, img_size, img_size), torch.randn(n, channels, img_size, img_size)


# ---------------------------------------------------------------- the objective


def test_kl(vae):
    torch.manual_seed(0)
    mu, logvar = torch.randn(6, 5), torch.randn(6, 5)
    wanted = torch.distributions.kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0, 1)).sum(1)
    torch.testing.assert_close(vae.kl_divergence(mu, logvar), wanted)


def test_gaussian_likelihood(vae):
    x, logits = batch()
    for variance in (ONE, 0.3 * ONE):
        wanted = Normal(logits.sigmoid(), variance.sqrt()).log_prob(x).flatten(1).sum(1)
        torch.testing.assert_close(vae.log_likelihood(x, logits, "gaussian", variance), wanted)


def test_bernoulli_likelihood(vae):
    x, logits = batch()
    x = x.bernoulli()
    wanted = Bernoulli(logits=logits).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(vae.log_likelihood(x, logits, "bernoulli", ONE), wanted)


def test_sigma_one_is_half_the_squared_error(vae):
    """Up to the normal distribution's constant."""
    x, logits = batch()
    constant = x[0].numel() / 2 * math.log(2 * math.pi)
    wanted = -0.5 * (x - logits.sigmoid()).square().flatten(1).sum(1) - constant
    torch.testing.assert_close(vae.log_likelihood(x, logits, "gaussian", ONE), wanted)


def test_the_measured_sigma_is_the_best_one(vae):
    """Its likelihood is the highest, and its gradient that of the closed form -D/2 log(mse)."""
    x, logits = batch()
    logits.requires_grad_()
    best = vae.best_variance(x, logits)
    at = {
        scale: vae.log_likelihood(x, logits, "gaussian", best * scale).mean().item()
        for scale in (0.9, 0.99, 1, 1.01, 1.1)
    }
    assert max(at, key=at.get) == 1
    mse = (x - logits.sigmoid()).square().mean()
    closed = -x[0].numel() / 2 * (torch.log(2 * math.pi * mse) + 1)
    assert at[1] == pytest.approx(closed.item(), rel=1e-5)
    ours = torch.autograd.grad(vae.log_likelihood(x, logits, "gaussian", best).mean(), logits)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(closed, logits)[0])


GAUSSIAN = [("gaussian", None), ("gaussian", 0.3)]


@pytest.mark.parametrize("warmup, step, share", [(0, 0, 1.0), (4, 2, 0.75), (4, 9, 1.0)])
@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("likelihood, sigma", [("bernoulli", None), *GAUSSIAN])
def test_the_step_follows_the_objective(vae, beta, likelihood, sigma, warmup, step, share):
    """One SGD step moves the weights by the gradient of -(log p(x|z) - beta KL) in nats per image; beta may grow."""
    x, _ = batch()
    model = vae.VAE("mlp", [8], 3, 16, 1, 1, False)
    if sigma is not None:
        model.variance.fill_(sigma**2)
    weights = list(model.parameters())
    torch.manual_seed(1)
    logits, mu, logvar = model(x)
    if likelihood == "bernoulli":
        log_px = Bernoulli(logits=logits, validate_args=False).log_prob(x).sum() / len(x)
    else:
        deviation = (x - logits.sigmoid()).square().mean().sqrt() if sigma is None else sigma
        log_px = Normal(logits.sigmoid(), deviation).log_prob(x).sum() / len(x)
    kl = torch.distributions.kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0, 1)).sum() / len(x)
    gradients = torch.autograd.grad(beta * share * kl - log_px, weights)
    wanted = [(p - 1e-3 * g).detach() for p, g in zip(weights, gradients)]
    torch.manual_seed(1)
    opt = argparse.Namespace(likelihood=likelihood, beta=beta, sigma=sigma, warmup=warmup)
    terms = vae.train_step(model, torch.optim.SGD(weights, lr=1e-3), x, None, opt, step)
    torch.testing.assert_close(weights, wanted)
    torch.testing.assert_close(terms["log_px"], log_px.detach())
    torch.testing.assert_close(terms["kl"], kl.detach())
    torch.testing.assert_close(terms["elbo"], (log_px - kl).detach())


def test_gradients_pass_through_the_sample(vae):
    x, _ = batch()
    model = vae.VAE("mlp", [8], 3, 16, 1, 1, False)
    vae.log_likelihood(x, model(x)[0], "bernoulli", ONE).mean().backward()
    assert all(
        p.grad.abs().sum() > 0
        for p in [*model.encoder.parameters(), *model.mu.parameters(), *model.logvar.parameters()]
    )


def test_reparameterize(vae):
    torch.manual_seed(0)
    mu, logvar = (
        torch.tensor([[1.0, -2.0]]).expand(100_000, 2),
        torch.tensor([[0.0, 2 * math.log(3)]]).expand(100_000, 2),
    )
    z = vae.VAE("mlp", [8], 2, 8, 1, 1, False).reparameterize(mu, logvar)
    torch.testing.assert_close(z.mean(0), torch.tensor([1.0, -2.0]), atol=0.05, rtol=0)
    torch.testing.assert_close(z.std(0), torch.tensor([1.0, 3.0]), atol=0.05, rtol=0)


# ---------------------------------------------------------------- the importance-weighted bound


class LinearGaussian(torch.nn.Module):
    """z ~ N(0, 1) in 2 dimensions, x ~ N(Wz, v): log p(x) is known. The encoder is off by a bit."""

    def __init__(self, vae):
        super().__init__()
        torch.manual_seed(0)
        self.W, self.variance = torch.randn(3, 2), torch.tensor(0.5)
        self.covariance = torch.linalg.inv(torch.eye(2) + self.W.T @ self.W / self.variance)  # of z given x
        self.reparameterize = lambda mu, logvar: mu + (logvar / 2).exp() * torch.randn_like(mu)

    def encode(self, x, labels=None):
        mu = x @ self.W @ self.covariance / self.variance + 0.2
        return mu, (self.covariance.diag() * 1.5).log().expand_as(mu)

    def decode(self, z, labels=None):
        return z @ self.W.T

    def log_px(self, x):
        covariance = self.W @ self.W.T + self.variance * torch.eye(3)
        return torch.distributions.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)


@pytest.fixture
def toy(vae, monkeypatch):
    # Its decoder's output is the mean itself, not a logit.
    monkeypatch.setattr(
        vae, "log_likelihood", lambda x, mean, _, variance: Normal(mean, variance.sqrt()).log_prob(x).sum(1)
    )
    return LinearGaussian(vae)


def bound(vae, model, x, k):
    return vae.importance_weighted_bound(model, x, None, argparse.Namespace(iw_samples=k, likelihood="gaussian"))


def test_the_bound_approaches_the_likelihood(vae, toy):
    x = torch.randn(50, 3)
    gaps = []
    for k in (1, 10, 1000):
        torch.manual_seed(0)
        gaps.append((toy.log_px(x) - bound(vae, toy, x, k)).mean().item())
    assert gaps[0] > gaps[1] > gaps[2]
    assert abs(gaps[2]) < 0.01


def test_the_bound_is_the_mean_of_the_weights(vae, toy):
    """Of p(x, z) / q(z|x) over the samples: those of k bounds with one sample each."""
    x, k = torch.randn(20, 3), 7
    torch.manual_seed(3)
    together = bound(vae, toy, x, k)
    torch.manual_seed(3)
    singles = torch.stack([bound(vae, toy, x, 1) for _ in range(k)])
    torch.testing.assert_close(together, torch.logsumexp(singles, 0) - math.log(k))


# ---------------------------------------------------------------- the network


SIZES = {"vanilla": [16, 28, 48], "conv": [16, 48], "mlp": [16, 28, 48], "burgess": [16, 28], "residual": [16, 28]}


@pytest.mark.parametrize("arch, img_size", [(arch, size) for arch, sizes in SIZES.items() for size in sizes])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("conditional", [False, True])
def test_shapes(vae, arch, channels, img_size, conditional):
    dims = [d // 8 for d in ARCHES[arch]]
    model = vae.VAE(arch, dims, 5, img_size, channels, 3, conditional)
    x, labels = torch.rand(4, channels, img_size, img_size), torch.arange(4) % 3
    given = labels if conditional else None  # else it needs none
    logits, mu, logvar = model(x, given)
    assert logits.shape == x.shape and mu.shape == logvar.shape == (4, 5)
    for images in (model.sample(torch.randn(4, 5), labels), model.reconstruct(x, given)):
        assert images.shape == x.shape and 0 <= images.min() and images.max() <= 1


@pytest.mark.parametrize(
    "arch, encoder, decoder",
    [
        ("vanilla", "C b l C b l F", "U T b l T b l C"),
        ("conv", "C r C b r F", "U T b r T"),
        ("mlp", "F L r L r", "r L r L U"),
        ("burgess", "C s C i s F L i s", "i s L s U T i s T"),
        ("residual", "C s C R s F L R s", "R s L s U T R s T"),
    ],
)
def test_what_stands_between_the_layers(vae, arch, encoder, decoder):
    """Without an activation a network may learn nearly as well, and be another."""
    names = dict(C="Conv2d", T="ConvTranspose2d", L="Linear", F="Flatten", U="Unflatten", b="BatchNorm2d")
    names |= dict(l="LeakyReLU", r="ReLU", s="SiLU", i="Identity", R="Residual")
    model = vae.VAE(arch, [4, 8, 8] if arch in ("burgess", "residual") else [4, 8], 5, 16, 1, 1, False)
    for layers, wanted in ((model.encoder, encoder), (model.decoder, decoder)):
        assert [type(layer).__name__ for layer in layers] == [names[k] for k in wanted.split()]


def test_a_residual_block_adds(vae):
    """All of it worked out by hand; and with its last layer at zero, nothing."""
    torch.manual_seed(0)
    x, block = torch.randn(5, 3), vae.Residual(3, torch.nn.Linear, ())
    torch.testing.assert_close(block(x), x + (x * x.sigmoid()) @ block[-1].weight.T + block[-1].bias)
    x, block = torch.randn(2, 3, 5, 5), vae.Residual(3)
    torch.nn.init.zeros_(block[-1].weight), torch.nn.init.zeros_(block[-1].bias)
    assert torch.equal(block(x), x)


def encoded_toy(vae, monkeypatch):
    """A model whose encoder is known: of images of noise, mu and logvar by their pixels and their class."""
    torch.manual_seed(0)
    model = vae.VAE("mlp", [8], 3, 16, 1, 4, False).eval()
    turn, logvar = torch.randn(3, 3), torch.randn(4, 3)
    x, labels = torch.randint(256, (3000, 1, 16, 16), dtype=torch.uint8), torch.arange(3000) % 3  # none of class 3
    x[labels == 1] //= 2
    monkeypatch.setattr(model, "encode", lambda x, y: (x[:, 0, 0, :3] @ turn, logvar[y] - 3 * x[:, 0, 1, :3]))
    opt = argparse.Namespace(binarize=False, likelihood="bernoulli", sigma=None, prior="fitted")
    return model, x, labels, opt, logvar


def test_the_prior_is_what_the_images_of_a_class_encode_to(vae, monkeypatch):
    """z of a class: mean and covariance of the mixture of its q(z|x), by the law of total covariance."""
    model, x, labels, opt, _ = encoded_toy(vae, monkeypatch)
    vae.measure(model, x, labels, opt)
    for k in range(3):
        mu, logvar = model.encode(x[labels == k] / 255, labels[labels == k])
        torch.testing.assert_close(model.z_mean[k], mu.mean(0))
        wanted = mu.T.cov(correction=0) + logvar.exp().mean(0).diag()
        torch.testing.assert_close(model.z_scale[k] @ model.z_scale[k].T, wanted, rtol=1e-4, atol=1e-5)
    assert (model.z_mean[3] == 0).all() and torch.equal(model.z_scale[3], torch.eye(3))  # no image: N(0, 1)


def test_the_variance_is_of_all_images_alike(vae):
    """A short last batch counts by its images: 500 are as their mean, one is not."""
    x, labels = torch.full((501, 1, 16, 16), 127, dtype=torch.uint8), torch.zeros(501, dtype=torch.long)
    x[500] = 0
    model = vae.VAE("mlp", [8], 3, 16, 1, 1, False)
    for p in model.parameters():
        p.data.zero_()  # draws 0.5
    vae.measure(model, x, labels, argparse.Namespace(binarize=False, likelihood="gaussian", sigma=None, prior="normal"))
    assert model.variance.item() == pytest.approx((500 * (0.5 - 127 / 255) ** 2 + 0.25) / 501, rel=1e-3)


def test_samples_have_the_fitted_z(vae, monkeypatch):
    model, x, labels, opt, _ = encoded_toy(vae, monkeypatch)
    vae.measure(model, x, labels, opt)
    monkeypatch.setattr(model, "decode", lambda z, y: z)
    for k in (1, 2):
        z = model.sample(torch.randn(200_000, 3), torch.full((200_000,), k)).logit(1e-7)
        torch.testing.assert_close(z.mean(0), model.z_mean[k], rtol=0.02, atol=0.02)
        torch.testing.assert_close(z.T.cov(), model.z_scale[k] @ model.z_scale[k].T, rtol=0.05, atol=0.02)


def test_a_class_of_one_image_has_a_prior(vae, monkeypatch):
    """No fewer images than numbers in z are needed, nor a variance above 0."""
    model, x, labels, opt, logvar = encoded_toy(vae, monkeypatch)
    logvar.fill_(-200)
    vae.measure(model, x[:3], labels[:3], opt)
    torch.testing.assert_close(model.z_mean[:3], model.encode(x[:3] / 255, labels[:3])[0])
    assert model.z_scale[:3].abs().max() < 1e-6


def test_the_normal_prior_is_standard(vae, small):
    """As in the paper: with --prior normal z is N(0, 1), whatever the encoder says."""
    for prior in ("normal", "fitted"):
        state = vae.load(vae.train(vae.parse_args([*small, "--n_epochs", "1", "--prior", prior]))).state_dict()
        standard = (state["z_mean"] == 0).all() and (state["z_scale"] == torch.eye(len(state["z_mean"][0]))).all()
        assert bool(standard) == (prior == "normal")


def conv(a, b, side):
    return a * b * side**2 + b


def test_parameter_counts_worked_out_by_hand(vae):
    count = lambda *args: sum(p.numel() for p in vae.VAE(*args, 1, False).parameters())  # noqa: E731
    dims = ARCHES["vanilla"]
    chain = list(zip([3, *dims], dims)) + list(zip(dims[::-1], [*dims[-2::-1], 32]))
    vanilla = sum(conv(a, b, 3) + 2 * b for a, b in chain) + conv(32, 3, 3)
    flat = 512 * 2 * 2  # 64x64 images: the feature maps are 32, 16, 8, 4, 2 wide
    assert count("vanilla", dims, 128, 64, 3) == vanilla + 2 * (flat * 128 + 128) + 128 * flat + flat
    dims = ARCHES["conv"]
    down = conv(1, 64, 4) + sum(conv(a, b, 4) + 2 * b for a, b in zip(dims, dims[1:]))
    up = sum(conv(a, b, 4) + 2 * b for a, b in zip(dims[::-1], dims[-2::-1])) + conv(64, 1, 4)
    flat = 512 * 2 * 2
    assert count("conv", dims, 20, 32, 1) == down + up + 2 * (flat * 20 + 20) + 20 * flat + flat
    # 28x28 images: the feature maps are 14 and 7 wide
    down = conv(1, 32, 4) + conv(32, 64, 4) + (64 * 7 * 7 * 256 + 256)
    up = (256 * 64 * 7 * 7 + 64 * 7 * 7) + conv(64, 32, 4) + conv(32, 1, 4)
    burgess = down + up + 2 * (256 * 20 + 20) + (20 * 256 + 256)
    assert count("burgess", ARCHES["burgess"], 20, 28, 1) == burgess
    blocks = conv(64, 64, 3) + conv(32, 32, 3) + 2 * (256 * 256 + 256)
    assert count("residual", ARCHES["residual"], 20, 28, 1) == burgess + blocks
    # 784-400-20 and back, as in the paper
    assert count("mlp", [400], 20, 28, 1) == (784 * 400 + 400) + 2 * (400 * 20 + 20) + (20 * 400 + 400) + (
        400 * 784 + 784
    )


@pytest.mark.parametrize("arch", ARCHES)
def test_encoder_and_decoder_use_the_label(vae, arch):
    torch.manual_seed(0)
    model = vae.VAE(arch, [d // 8 for d in ARCHES[arch]], 5, 16, 1, 3, True).eval()
    x, z, labels = torch.rand(1, 1, 16, 16).expand(2, -1, -1, -1), torch.randn(1, 5).expand(2, 5), torch.tensor([0, 1])
    for output in (model.encode(x, labels)[0], model.decode(z, labels)):
        assert not torch.allclose(output[0], output[1])


# ---------------------------------------------------------------- the script


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--arch", "conv", "--img_size", "40"], ["--img_size 40", "multiple of 16"]),
        (["--arch", "conv", "--hidden_dims", "8", "16", "--img_size", "30"], ["--img_size 30", "multiple of 4"]),
        (["--arch", "burgess", "--img_size", "30"], ["--img_size 30", "multiple of 4"]),
        (["--arch", "burgess", "--hidden_dims", "8"], ["--hidden_dims", "burgess"]),
        (["--arch", "residual", "--hidden_dims", "8"], ["--hidden_dims", "residual"]),
        (["--arch", "residual", "--img_size", "30"], ["--img_size 30", "multiple of 4"]),
        (["--sigma", "0"], ["--sigma"]),
        (["--sigma", "0.1", "--likelihood", "bernoulli"], ["--sigma", "gaussian"]),
        (["--sigma", "nan"], ["--sigma"]),
        (["--beta", "-1"], ["--beta"]),
        (["--beta", "inf"], ["--beta"]),
        (["--hidden_dims", "0"], ["--hidden_dims"]),
        (["--iw_samples", "-1"], ["--iw_samples"]),
        (["--likelihood", "poisson"], ["--likelihood"]),
        (["--binarize", "--sigma", "0.1"], ["--sigma", "gaussian"]),
        (["--binarize", "--likelihood", "gaussian"], ["--binarize", "bernoulli"]),
        (["--labels", "1"], ["--labels", "--generate"]),
        (["--prior", "flat"], ["--prior"]),
        (["--reconstruct", "x"], ["--reconstruct", "--resume"]),
    ],
)
def test_bad_options(vae, refused, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    refused(vae, *arguments, says=says)
    assert not list(tmp_path.iterdir())


def test_every_tenth_image_of_a_folder_is_held_out(vae, tmp_path, monkeypatch):
    """It is never trained on, and the test is of nothing else. Steps are counted over epochs, for --warmup."""
    folder = make_folder(tmp_path / "f", classes=["a", "b"], per_class=15)
    opt = vae.parse_args(["--dataset", str(folder), "--img_size", "8", "--batch_size", "9", "--n_epochs", "2"])
    opt.arch, opt.hidden_dims, opt.conditional, opt.out_dir = "mlp", [4], True, str(tmp_path / "run")
    trained, steps, tested, measured, step, test, measure = [], [], [], [], vae.train_step, vae.test, vae.measure
    monkeypatch.setattr(vae, "measure", lambda *args: (measured.append(args[1] / 255), measure(*args))[1])
    monkeypatch.setattr(
        vae, "train_step", lambda *args: (trained.append(args[2]), steps.append(args[5]), step(*args))[2]
    )
    monkeypatch.setattr(vae, "test", lambda *args: (tested.append(args[1:3]), test(*args))[1])
    vae.train(opt)
    everything = vae.load_data(opt)[0] / 255
    assert torch.equal(tested[0][0] / 255, everything[::10]) and tested[0][1].tolist() == [0, 0, 1]
    wanted = torch.stack([image for i, image in enumerate(everything) if i % 10])
    assert steps == list(range(6))
    for epoch in (trained[:3], trained[3:], measured[:1]):
        assert sorted(torch.cat(epoch).flatten(1).tolist()) == sorted(wanted.flatten(1).tolist())


@real_mnist
def test_the_test_images_of_a_named_data_set(vae, tmp_path, monkeypatch):
    tested = []
    monkeypatch.setattr(vae, "test", lambda model, images, labels, opt: tested.append((images, labels)) or {})
    monkeypatch.setattr(vae, "after_batch", lambda run, opt, **losses: setattr(run, "done", run.done + 1))
    monkeypatch.setattr(vae, "train_step", lambda *_: {})
    monkeypatch.setattr(vae, "report", lambda *_, **more: more)
    arguments = ["--img_size", "28", "--arch", "mlp", "--n_epochs", "1", "--batch_size", "30000"]
    opt = vae.parse_args([*arguments, "--data_dir", os.environ["DATA_DIR"], "--out_dir", str(tmp_path / "run")])
    vae.train(opt)
    raw = torchvision.datasets.MNIST(os.environ["DATA_DIR"], train=False)
    assert torch.equal(tested[0][0][:, 0], raw.data) and torch.equal(tested[0][1], raw.targets)


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_what_is_kept_is_the_average(vae, small, ema, monkeypatch):
    """Its weights, and its batch norm statistics, of all batches; with --ema 0 the model as it is."""
    names = ("mu.weight", "encoder.1.running_mean")
    seen, average = [], vae.average

    def record(model_avg, model, decay, step):
        if not seen:
            seen.append({name: model_avg.state_dict()[name].clone() for name in names})
        seen.append({name: model.state_dict()[name].clone() for name in names})
        average(model_avg, model, decay, step)

    monkeypatch.setattr(vae, "average", record)
    arguments = [*small, "--arch", "vanilla", "--n_epochs", "1", "--hidden_dims", "4", "--ema", str(ema)]
    kept = vae.load(vae.train(vae.parse_args(arguments))).state_dict()
    for name in names:
        wanted = seen[0][name]
        for step, values in enumerate(seen[1:]):  # the first steps forget faster
            wanted = torch.lerp(values[name], wanted, min(ema, (1 + step) / (10 + step)))
        torch.testing.assert_close(kept[name], wanted)
        assert torch.equal(kept[name], seen[-1][name]) == (ema == 0)


def test_what_is_measured_is_not_averaged(vae):
    """A checkpoint in mid-epoch has the variance and the prior that were measured last."""
    model, model_avg = vae.VAE("mlp", [8], 3, 16, 1, 1, False), vae.VAE("mlp", [8], 3, 16, 1, 1, False)
    measured = [model_avg.variance.fill_(0.2), model_avg.z_mean.fill_(0.3), model_avg.z_scale.fill_(0.4)]
    vae.average(model_avg, model, 0.9, step=10**6)
    assert [part.unique().item() for part in measured] == pytest.approx([0.2, 0.3, 0.4])
    assert not torch.equal(model_avg.mu.weight, model.mu.weight)


def test_the_variance_is_the_averaged_model_s_own(vae, small, images):
    """Measured on training images, and not averaged over steps."""
    run = vae.train(vae.parse_args([*small, "--n_epochs", "3"]))
    model, opt = vae.load(run), vae.parse_args(["--resume", str(run)])
    x = vae.load_data(opt)[0][[i for i in range(54) if i % 10]] / 255
    errors = [(model(x)[0].sigmoid() - x).square().mean().item() for _ in range(20)]
    assert model.variance.item() == pytest.approx(sum(errors) / 20, rel=0.1)


def test_a_given_sigma_is_kept(vae, small):
    run = vae.train(vae.parse_args([*small, "--n_epochs", "1", "--sigma", "0.3"]))
    assert vae.load(run).variance.item() == pytest.approx(0.09)


def test_pictures_and_log(vae, small):
    run = vae.train(vae.parse_args([*small, "--n_epochs", "1", "--latent_dim", "2"]))
    left = {str(file.relative_to(run)) for file in run.rglob("*.*")}
    assert {"interpolation.png", "manifold.png", "training.gif", "recon.gif", "images/recon_000000.png"} <= left
    # 6 test images, each above its own
    assert Image.open(run / "images/recon_000000.png").size == (6 * 18 + 2, 2 * 18 + 2)
    assert Image.open(run / "interpolation.png").size == (10 * 18 + 2, 6 * 18 + 2)
    assert Image.open(run / "manifold.png").size == (20 * 18 + 2,) * 2
    header = (run / "log.csv").read_text().splitlines()[0].split(",")
    assert {"elbo", "log_px", "kl", "test_elbo", "test_log_px", "test_kl"} <= set(header)


def test_interpolation_goes_from_image_to_image(vae, tmp_path):
    torch.manual_seed(0)
    model = vae.VAE("mlp", [8], 3, 16, 1, 1, False).eval().requires_grad_(False)
    x = torch.rand(4, 1, 16, 16)
    vae.draw_latent_space(model, x, torch.zeros(4), tmp_path)
    grid = pil_to_tensor(Image.open(tmp_path / "interpolation.png"))[:1] / 255
    ends = model.reconstruct(x)
    for k in range(4):
        first, last = (grid[:, k * 18 + 2 : k * 18 + 18, c * 18 + 2 : c * 18 + 18] for c in (0, 9))
        torch.testing.assert_close(first, ends[k], atol=0.003, rtol=0)
        torch.testing.assert_close(last, ends[k - 1], atol=0.003, rtol=0)


def test_the_manifold_has_equal_steps_of_probability(vae, tmp_path, monkeypatch):
    model, seen = vae.VAE("mlp", [8], 2, 16, 1, 1, False).eval().requires_grad_(False), []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda z, labels: seen.append(z) or decode(z, labels))
    vae.draw_latent_space(model, torch.rand(4, 1, 16, 16), torch.zeros(4), tmp_path)
    steps = (torch.arange(20) + 0.5) / 20
    torch.testing.assert_close(Normal(0, 1).cdf(seen[-1]), torch.cartesian_prod(steps, steps))


def test_the_bound_of_a_trained_run(vae, small, command):
    """--iw_samples is free on resume; the result is written, and comes again."""
    run = vae.train(vae.parse_args([*small, "--n_epochs", "1"]))
    assert not (run / "iw_bound.txt").exists()
    for _ in range(2):
        assert command(vae, "--resume", run, "--iw_samples", 3) == (0, [])
    one, two = (run / "iw_bound.txt").read_text().splitlines()
    assert one == two and one.startswith("6 batches, 3 samples: ") and one.endswith(" nats")


def test_binary_pixels_are_drawn_anew(vae):
    images = torch.full((500, 1, 8, 8), 128, dtype=torch.uint8)
    opt = argparse.Namespace(binarize=True)
    (one, _), (two, _) = (next(vae.batches(images, torch.zeros(500), opt)) for _ in range(2))
    assert set(one.unique().tolist()) == {0, 1}
    assert not torch.equal(one, two) and abs(one.mean() - 128 / 255) < 0.02


@pytest.mark.parametrize("flags", [["--conditional"], [], ["--conditional", "--prior", "normal"]])
def test_generate_by_class(vae, small, command, refused, flags):
    """Classes are told apart by the decoder, or by the prior."""
    run = vae.train(vae.parse_args([*small, "--n_epochs", "1", *flags]))
    assert command(vae, "--resume", run, "--generate", 5, "--labels", 2, 0) == (0, [])
    assert {sub.name: len(list(sub.iterdir())) for sub in (run / "generated").iterdir()} == {"blue": 3, "red": 2}
    refused(vae, "--resume", run, "--generate", 5, "--labels", 3, says=["--labels 3"])


def test_generate_without_classes(vae, small, command, refused):
    run = vae.train(vae.parse_args([*small, "--n_epochs", "1", "--prior", "normal"]))
    refused(vae, "--resume", run, "--generate", 5, "--labels", 1, says=["--labels", "--conditional"])
    assert command(vae, "--resume", run, "--generate", 5) == (0, [])
    assert len(list((run / "generated").glob("*.png"))) == 5


@pytest.mark.parametrize("channels, likelihood", [(1, "bernoulli"), (3, "gaussian")])
def test_the_likelihood_is_by_the_data(vae, small, channels, likelihood):
    """Of grey pixels as of probabilities, unless something else is asked for."""
    arguments = [*small, "--n_epochs", "0", "--channels", str(channels)]
    for more, wanted in (([], likelihood), (["--sigma", "0.1"], "gaussian"), (["--binarize"], "bernoulli")):
        assert vae.load(vae.train(vae.parse_args([*arguments, *more]))).options["likelihood"] == wanted


@pytest.mark.parametrize("conditional", [False, True])
def test_reconstruct(vae, small, images, command, refused, tmp_path, conditional):
    flag = ["--conditional"] if conditional else []
    run = vae.train(vae.parse_args([*small, "--n_epochs", "0", *flag]))
    assert command(vae, "--resume", run, "--reconstruct", images) == (0, [])
    files = sorted((run / "reconstructed").iterdir())
    assert len(files) == 54 and Image.open(files[0]).size == (32, 16)
    for file, path in zip(files, sorted(images.rglob("*.png")), strict=True):  # in the order of their paths
        shown, wanted = (pil_to_tensor(Image.open(f))[:, 5, 5].int() for f in (file, path))
        assert (shown - wanted).abs().max() < 4

    (tmp_path / "none").mkdir()
    refused(vae, "--resume", run, "--reconstruct", tmp_path / "none", says=[tmp_path / "none"])
    flat = make_folder(tmp_path / "grey", classes=["one"], mode="L") / "one"  # grey images for a colour model
    if conditional:  # "one" is none of its classes: it would take a wrong label
        refused(vae, "--resume", run, "--reconstruct", flat, says=[flat, "blue"])
    else:
        assert command(vae, "--resume", run, "--reconstruct", flat) == (0, [])


def test_what_is_tested_and_shown_is_of_the_average(vae, small, monkeypatch):
    """One of zeros has a KL of 0, and every picture of it is grey."""

    def zero(average, model, decay, step):
        for p in average.parameters():
            p.zero_()

    monkeypatch.setattr(vae, "average", zero)
    run = vae.train(vae.parse_args([*small, "--n_epochs", "1", "--latent_dim", "2", "--iw_samples", "2"]))
    (row,) = csv.DictReader((run / "log.csv").read_text().splitlines())
    assert float(row["test_kl"]) == 0 != float(row["kl"])
    assert float((run / "iw_bound.txt").read_text().split()[-2]) == pytest.approx(float(row["test_elbo"]), abs=0.01)
    for name, box in {
        "interpolation": (2, 2, 18, 18),
        "manifold": (2, 2, 18, 18),
        "images/recon_000006": (2, 20, 18, 36),
    }.items():
        assert {*Image.open(run / f"{name}.png").convert("L").crop(box).tobytes()} <= {127, 128}, name


@pytest.mark.parametrize("flag", [["--conditional"], []])
def test_labels_are_those_asked_for(vae, small, images, command, monkeypatch, flag):
    """A decoder that paints its label, or a prior that has it, shows what is drawn for which."""
    monkeypatch.setattr(
        vae.VAE, "decode", lambda model, z, y: (((y + 1) / 4).logit())[:, None, None, None].expand(-1, 3, 16, 16)
    )
    run = vae.train(vae.parse_args([*small, "--n_epochs", "0", *flag]))
    grid = Image.open(run / "images/sample_000000.png")
    assert [grid.getpixel((10 + 18 * k, 10))[0] for k in range(3)] == pytest.approx([64, 128, 191], abs=1)
    assert command(vae, "--resume", run, "--generate", 6) == (0, [])
    assert command(vae, "--resume", run, "--reconstruct", images) == (0, [])
    beside = [Image.open(file).getpixel((24, 8))[0] for file in sorted((run / "reconstructed").iterdir())]
    for k, name in enumerate(["blue", "green", "red"]):
        for file in (run / "generated" / name).iterdir():
            assert Image.open(file).getpixel((3, 3))[0] == pytest.approx(64 * (k + 1), abs=1)
        assert not flag or beside[18 * k : 18 * k + 18] == pytest.approx([64 * (k + 1)] * 18, abs=1)


def test_one_image_is_not_enough(vae, small, refused, tmp_path):
    folder = make_folder(tmp_path / "f", classes=["only"], per_class=1)
    refused(vae, *small, "--dataset", folder, says=["--batch_size"])


@pytest.mark.parametrize("flags, share", [(["--conditional"], 0.8), ([], 0.5)])
def test_it_learns_the_digits(vae, tmp_path, flags, share):
    """One epoch on the built-in digits: better than the start, better than the mean image, and column k is digit k."""
    options = f"--n_epochs 1 --dataset digits --arch mlp --batch_size 32 --out_dir {tmp_path / 'run'}"
    opt = vae.parse_args([*options.split(), *flags])
    run = vae.train(opt)
    model = vae.load(run)
    (images, labels), (test_images, test_labels) = vae.load_data(opt), vae.load_data(opt, train=False)
    torch.manual_seed(0)
    untrained = vae.VAE("mlp", [400], 32, 32, 1, 10, opt.conditional)
    untrained.variance.copy_(model.variance)
    before, after = (vae.test(m, test_images, test_labels, opt)["test_elbo"] for m in (untrained, model))
    assert after > before + 100
    x, mean = test_images / 255, images.float().mean(0) / 255
    assert (model.reconstruct(x, test_labels) - x).square().mean() < 0.5 * (mean - x).square().mean()
    means = torch.stack([images[labels == k].float().mean(0) / 255 for k in range(10)]).flatten(1)
    torch.manual_seed(0)
    asked = torch.arange(10).repeat(20)
    found = torch.cdist(model.sample(torch.randn(200, 32), asked).flatten(1), means).argmin(1)
    assert (found == asked).float().mean() > share
