"""vae.py: the objective, training, the prior, the networks, what a run is used for; and bench_bound.py."""

import copy
import csv
import math
import os
import shutil
from types import SimpleNamespace

import bench_bound
import pytest
import torch
import torchvision
from conftest import checkpoint, make_folder
from PIL import Image
from torch import nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor


@pytest.fixture
def vae():
    import vae

    return vae


ARCHES = ["burgess", "conv", "mlp", "vanilla"]
real_mnist = pytest.mark.skipif(not os.environ.get("DATA_DIR"), reason="DATA_DIR names no folder with MNIST")


def batch(n=6, channels=1, img_size=16):
    """Images and logits."""
    torch.manual_seed(0)
    return torch.rand(n, channels, img_size, img_size), torch.randn(n, channels, img_size, img_size)


def make_model(vae, arch="mlp", img_size=16, channels=1, latent_dim=3, n_classes=3, conditional=False):
    torch.manual_seed(0)
    model = vae.VAE(arch, img_size, channels, latent_dim, n_classes, conditional)
    return model.eval().requires_grad_(False)


def painted(vae, monkeypatch, n_classes=3):
    """Every decoder paints its label k as the grey level (k + 1) / (n_classes + 1)."""

    def decode(model, z, labels):
        return ((labels + 1) / (n_classes + 1)).logit()[:, None, None, None].expand(-1, 3, 16, 16)

    monkeypatch.setattr(vae.VAE, "decode", decode)


# ---------------------------------------------------------------- the objective


def test_kl(vae):
    torch.manual_seed(0)
    mu, logvar = torch.randn(6, 5), torch.randn(6, 5)
    wanted = torch.distributions.kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0, 1)).sum(1)
    torch.testing.assert_close(vae.kl_divergence(mu, logvar), wanted)


@pytest.mark.parametrize("sigma", [1.0, 0.3])
def test_gaussian_likelihood(vae, sigma):
    x, logits = batch()
    wanted = Normal(logits.sigmoid(), sigma).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(vae.log_likelihood(x, logits, "gaussian", torch.tensor(sigma**2)), wanted)


def test_bernoulli_likelihood_of_binary_images(vae):
    x, logits = batch()
    x = x.bernoulli()
    wanted = Bernoulli(logits=logits).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(vae.log_likelihood(x, logits, "bernoulli", torch.ones(())), wanted)


def test_bernoulli_likelihood_of_grey_images(vae):
    """The mean log-probability of the binary images that are drawn with the grey pixels as probabilities."""
    x, logits = batch(n=1, img_size=4)
    drawn = x.expand(200_000, -1, -1, -1).bernoulli()
    wanted = Bernoulli(logits=logits).log_prob(drawn).flatten(1).sum(1).mean()
    found = vae.log_likelihood(x, logits, "bernoulli", torch.ones(()))[0]
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=0)


def test_the_best_variance(vae):
    """Its likelihood is the highest, and its gradient that of the closed form -D/2 log(mse)."""
    x, logits = batch()
    logits.requires_grad_()
    best = vae.best_variance(x, logits)
    at = {
        factor: vae.log_likelihood(x, logits, "gaussian", best * factor).mean().item()
        for factor in (0.9, 0.99, 1, 1.01, 1.1)
    }
    assert max(at, key=at.get) == 1
    mse = (x - logits.sigmoid()).square().mean()
    closed = -x[0].numel() / 2 * (torch.log(2 * math.pi * mse) + 1)
    assert at[1] == pytest.approx(closed.item(), rel=1e-5)
    ours = torch.autograd.grad(vae.log_likelihood(x, logits, "gaussian", best).mean(), logits)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(closed, logits)[0])


def test_the_best_variance_of_perfect_reconstructions_is_not_zero(vae):
    assert vae.best_variance(torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), -1e4)) == pytest.approx(1e-6)


def test_z_is_a_sample_of_the_encoder_s_gaussian(vae, monkeypatch):
    """With the right moments, new for each image, and gradients pass through it to mu and logvar."""
    mu = torch.tensor([[1.0, -2.0]]).repeat(100_000, 1).requires_grad_()
    logvar = torch.tensor([[0.0, 2 * math.log(3)]]).repeat(100_000, 1).requires_grad_()
    model = make_model(vae)
    monkeypatch.setattr(model, "encode", lambda x, labels: (mu, logvar))
    monkeypatch.setattr(model, "decode", lambda z, labels: z)
    z, *others = model(None, None)
    assert others[0] is mu and others[1] is logvar
    torch.testing.assert_close(z.mean(0), torch.tensor([1.0, -2.0]), atol=0.05, rtol=0)
    torch.testing.assert_close(z.std(0), torch.tensor([1.0, 3.0]), atol=0.05, rtol=0)
    d_mu, d_logvar = torch.autograd.grad(z.sum(), [mu, logvar])
    torch.testing.assert_close(d_mu, torch.ones_like(mu))
    torch.testing.assert_close(d_logvar, ((z - mu) / 2).detach())


def test_binary_pixels_are_drawn_anew(vae):
    images = torch.full((500, 1, 8, 8), 128, dtype=torch.uint8)
    assert torch.equal(vae.to_x(images, False), images / 255)
    one, two = vae.to_x(images, True), vae.to_x(images, True)
    assert set(one.unique().tolist()) == {0, 1}
    assert not torch.equal(one, two) and abs(one.mean() - 128 / 255) < 0.02


# ---------------------------------------------------------------- the training step


def sgd(parameters, lr, betas, fused):
    return torch.optim.SGD(parameters, lr)


BERNOULLI = ["--likelihood", "bernoulli"]
GAUSSIAN = ["--likelihood", "gaussian"]


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("options", [BERNOULLI, GAUSSIAN], ids=" ".join)
def test_a_step_follows_the_objective(vae, small, monkeypatch, beta, options):
    """One step of SGD moves the weights by the gradient of -(log p(x|z) - beta KL), in nats per image."""
    before = []
    forward = vae.VAE.forward

    def record(model, x, labels):
        before.append((copy.deepcopy(model), x, labels))
        return forward(model, x, labels)

    monkeypatch.setattr(torch.optim, "Adam", sgd)
    monkeypatch.setattr(vae.VAE, "forward", record)
    one_step = ["--batch_size", "48", "--n_epochs", "1", "--lr", "1e-3", "--beta", str(beta)]
    state = checkpoint(vae.train(vae.parse_args([*small, *options, *one_step])))
    model, x, labels = before[0]
    weights = dict(model.named_parameters())
    vae.seed(0, "step", 0, 0)
    logits, mu, logvar = forward(model, x, labels)
    if options == BERNOULLI:
        log_px = Bernoulli(logits=logits, validate_args=False).log_prob(x).sum() / 48
    else:
        sigma = (x - logits.sigmoid()).square().mean().sqrt()
        log_px = Normal(logits.sigmoid(), sigma).log_prob(x).sum() / 48
    kl = torch.distributions.kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0, 1)).sum() / 48
    gradients = torch.autograd.grad(beta * kl - log_px, list(weights.values()))
    for (name, p), gradient in zip(weights.items(), gradients, strict=True):
        torch.testing.assert_close(state["model"][name], p.detach() - 1e-3 * gradient, rtol=1e-4, atol=1e-6)
    (row,) = state["log"]
    assert row["elbo"] == pytest.approx((log_px - kl).item(), rel=1e-4)
    assert row["log_lik"] == pytest.approx(log_px.item(), rel=1e-4)
    assert row["kl"] == pytest.approx(kl.item(), rel=1e-4)


def test_pixels_are_binary_where_asked(vae, small, monkeypatch):
    """In training, in tests and where the prior is fitted; elsewhere grey levels are used."""
    seen = []
    encode = vae.VAE.encode

    def record(model, x, labels):
        seen.append(len(x.unique()))
        return encode(model, x, labels)

    monkeypatch.setattr(vae.VAE, "encode", record)
    for options, binary in ((["--likelihood", "bernoulli", "--binarize"], True), ([], False)):
        seen.clear()
        vae.train(vae.parse_args([*small, *options, "--n_epochs", "1"]))
        assert len(seen) > 10 and all((n <= 2) == binary for n in seen)


def test_every_tenth_image_of_a_folder_is_held_out(vae, tmp_path, monkeypatch):
    """It is never trained on, and the prior is not fitted to it; the test is of nothing else."""
    folder = make_folder(tmp_path / "f", classes=["a", "b"], per_class=15)
    options = f"--img_size 8 --batch_size 9 --n_epochs 2 --arch mlp --device cpu --out_dir {tmp_path / 'run'}"
    opt = vae.parse_args(["--dataset", str(folder), *options.split()])
    trained, tested, fitted = [], [], []
    forward, test, fit = vae.VAE.forward, vae.test, vae.Prior.fit

    def record_forward(model, x, labels):
        if model.training:
            trained.append(x)
        return forward(model, x, labels)

    def record_test(model, images, labels, opt):
        tested.append((images / 255, labels))
        return test(model, images, labels, opt)

    def record_fit(prior, model, images, labels, binarize):
        fitted.append(images / 255)
        fit(prior, model, images, labels, binarize)

    monkeypatch.setattr(vae.VAE, "forward", record_forward)
    monkeypatch.setattr(vae, "test", record_test)
    monkeypatch.setattr(vae.Prior, "fit", record_fit)
    vae.train(opt)
    everything = vae.load_data(opt)[0] / 255
    assert torch.equal(tested[0][0], everything[::10]) and tested[0][1].tolist() == [0, 0, 1]
    wanted = sorted(image.flatten().tolist() for i, image in enumerate(everything) if i % 10)
    assert len(trained) == 6
    for images in (torch.cat(trained[:3]), torch.cat(trained[3:]), fitted[0]):
        assert sorted(images.flatten(1).tolist()) == wanted


@real_mnist
def test_a_named_data_set_has_its_own_test_images(vae):
    opt = vae.parse_args(["--dataset", "mnist", "--img_size", "28", "--data_dir", os.environ["DATA_DIR"]])
    images, labels, _ = vae.load_data(opt)
    train_images, _, test_images, test_labels = vae.hold_out(opt, images, labels)
    raw = torchvision.datasets.MNIST(os.environ["DATA_DIR"], train=False)
    assert torch.equal(test_images[:, 0], raw.data) and torch.equal(test_labels, raw.targets)
    assert torch.equal(train_images, images)


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_what_is_kept_is_the_average(vae, small, ema, monkeypatch):
    """Of weights, batch norm's statistics and variance, over all steps; with --ema 0 the model itself."""
    names = ("mu.weight", "encoder.0.1.running_mean", "variance")
    values = []
    update_average = vae.update_average

    def record(average, model, decay, step):
        if not values:
            values.append({name: average.state_dict()[name].clone() for name in names})
        values.append({name: model.state_dict()[name].clone() for name in names})
        update_average(average, model, decay, step)

    monkeypatch.setattr(vae, "update_average", record)
    arguments = [*small, "--arch", "vanilla", "--n_epochs", "1", "--ema", str(ema)]
    kept = vae.load(vae.train(vae.parse_args(arguments))).state_dict()
    for name in names:
        wanted = values[0][name]
        for step, value in enumerate(values[1:]):  # the first steps forget faster
            wanted = torch.lerp(value[name], wanted, min(ema, (1 + step) / (10 + step)))
        torch.testing.assert_close(kept[name], wanted)
        assert torch.equal(kept[name], values[-1][name]) == (ema == 0)


# ---------------------------------------------------------------- tests and grids


def test_the_elbo_of_test_images(vae, monkeypatch):
    """The mean over all of them: 500 are as their reconstruction, one in a batch of its own is not."""
    images = torch.full((501, 1, 16, 16), 255, dtype=torch.uint8)
    images[500] = 0
    model = make_model(vae)
    for p in model.parameters():
        p.zero_()
    model.decoder[1].bias.fill_(2.0)  # so p(x|z) of a pixel is sigmoid(2), and the KL is 0
    opt = vae.parse_args(BERNOULLI)
    labels = torch.zeros(501, dtype=torch.long)
    found = vae.test(model, images, labels, opt)
    right = 256 * Bernoulli(logits=2.0).log_prob(torch.tensor(1.0)).item()
    wrong = 256 * Bernoulli(logits=2.0).log_prob(torch.tensor(0.0)).item()
    assert found == pytest.approx((500 * right + wrong) / 501, rel=1e-5)
    model.mu.bias.fill_(1.0)  # now it is 3 / 2
    assert vae.test(model, images, labels, opt) == pytest.approx(found - 1.5, rel=1e-5)


def test_pictures_and_log(vae, small):
    run = vae.train(vae.parse_args([*small, "--n_epochs", "1"]))
    files = {str(file.relative_to(run)) for file in run.rglob("*.*")}
    grids = [f"images/{name}_0000000{n}.png" for name in ("sample", "recon") for n in (4, 6)]
    assert files == {*grids, "checkpoint.pt", "log.csv"}
    # Six test images, each above its reconstruction.
    assert Image.open(run / grids[0]).size == (10 * 18 + 2, 10 * 18 + 2)
    assert Image.open(run / grids[2]).size == (6 * 18 + 2, 2 * 18 + 2)
    rows = list(csv.DictReader((run / "log.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["4", "6"]
    assert {"elbo", "log_lik", "kl", "test_elbo"} <= rows[0].keys()


def test_what_is_tested_and_drawn_is_of_the_average(vae, small, monkeypatch):
    """One of zeros reconstructs grey, and the ELBO of its test images has no KL."""

    def zero(average, model, decay, step):
        for p in average.parameters():
            p.zero_()

    monkeypatch.setattr(vae, "update_average", zero)
    run = vae.train(vae.parse_args([*small, *BERNOULLI, "--n_epochs", "1"]))
    assert checkpoint(run)["log"][-1]["test_elbo"] == pytest.approx(-3 * 16 * 16 * math.log(2), rel=1e-5)
    for name, top in {"sample": 2, "recon": 20}.items():
        image = Image.open(run / f"images/{name}_00000006.png").convert("L").crop((2, top, 18, top + 16))
        assert {*image.tobytes()} <= {127, 128}, name


def test_column_k_of_the_grid_is_class_k(vae, small, monkeypatch):
    """With three classes, they repeat."""
    painted(vae, monkeypatch)
    monkeypatch.setattr(vae, "test", lambda *_: 0.0)
    run = vae.train(vae.parse_args([*small, "--n_epochs", "1", "--lr", "1e-9", "--conditional"]))
    grid = Image.open(run / "images/sample_00000006.png")
    levels = [grid.getpixel((10 + 18 * k, 100))[0] for k in range(5)]
    assert levels == pytest.approx([64, 128, 191, 64, 128], abs=1)


# ---------------------------------------------------------------- the prior


def encoded_toy(vae, monkeypatch):
    """A model whose encoder is known: of images of noise, mu and logvar by their pixels and their class."""
    torch.manual_seed(0)
    model = make_model(vae, n_classes=4)
    turn, logvar = torch.randn(3, 3), torch.randn(4, 3)
    images = torch.randint(256, (2100, 1, 16, 16), dtype=torch.uint8)
    labels = torch.arange(2100) % 3  # none of class 3
    images[labels == 1] //= 2

    def encode(x, y):
        return x[:, 0, 0, :3] @ turn, logvar[y] - 3 * x[:, 0, 1, :3]

    monkeypatch.setattr(model, "encode", encode)
    return model, images, labels, logvar


def test_the_prior_is_what_the_images_of_a_class_encode_to(vae, monkeypatch):
    """Mean and covariance of the mixture of its q(z|x), by the law of total covariance."""
    model, images, labels, _ = encoded_toy(vae, monkeypatch)
    prior = vae.Prior(4, 3)
    prior.fit(model, images, labels, False)
    for k in range(3):
        mu, logvar = model.encode(images[labels == k] / 255, labels[labels == k])
        torch.testing.assert_close(prior.mean[k], mu.mean(0))
        wanted = mu.T.cov(correction=0) + logvar.exp().mean(0).diag()
        torch.testing.assert_close(prior.scale[k] @ prior.scale[k].T, wanted, rtol=1e-4, atol=1e-5)
    assert (prior.mean[3] == 0).all() and torch.equal(prior.scale[3], torch.eye(3))  # no image: N(0, 1)


def test_samples_have_the_fitted_mean_and_covariance(vae, monkeypatch):
    model, images, labels, _ = encoded_toy(vae, monkeypatch)
    prior = vae.Prior(4, 3)
    prior.fit(model, images, labels, False)
    for k in (1, 2):
        z = prior.sample(torch.randn(200_000, 3), torch.full((200_000,), k))
        torch.testing.assert_close(z.mean(0), prior.mean[k], rtol=0.02, atol=0.02)
        torch.testing.assert_close(z.T.cov(), prior.scale[k] @ prior.scale[k].T, rtol=0.05, atol=0.02)


def test_a_class_of_one_image_has_a_prior(vae, monkeypatch):
    """No fewer images than numbers in z are needed, nor a variance above 0."""
    model, images, labels, logvar = encoded_toy(vae, monkeypatch)
    logvar.fill_(-200)
    prior = vae.Prior(4, 3)
    prior.fit(model, images[:3], labels[:3], False)
    torch.testing.assert_close(prior.mean[:3], model.encode(images[:3] / 255, labels[:3])[0])
    assert prior.scale[:3].abs().max() < 1e-4


def test_a_prior_of_weights_that_are_not_finite(vae, refused, small):
    """It is fitted for the sample grid, before a checkpoint would say that the training has failed."""
    refused(vae, *small, "--n_epochs", 2, "--sample_interval", 3, "--lr", 9e17, says=["model is not finite"])


def test_a_thousand_images_are_all_encoded(vae):
    """Of more, every second one, or fewer."""
    n_encoded = 0

    def encode(x, labels):
        nonlocal n_encoded
        n_encoded += len(x)
        return x.flatten(1), torch.zeros(len(x), 4)

    model = SimpleNamespace(encode=encode)
    for n, wanted in [(999, 999), (1000, 1000), (1001, 501)]:
        n_encoded = 0
        vae.Prior(1, 4).fit(model, torch.zeros(n, 1, 2, 2), torch.zeros(n, dtype=torch.int64), False)
        assert n_encoded == wanted


def test_the_normal_prior_is_standard(vae, small):
    """As in the paper: with --prior normal z is N(0, 1), whatever the encoder says."""
    for kind in ("normal", "fitted"):
        prior = vae.load(vae.train(vae.parse_args([*small, "--n_epochs", "1", "--prior", kind]))).prior
        standard = (prior.mean == 0).all() and (prior.scale == torch.eye(4)).all()
        assert bool(standard) == (kind == "normal")


# ---------------------------------------------------------------- the networks

SIZES = [
    ("burgess", 16),
    ("burgess", 28),
    ("burgess", 64),
    ("mlp", 13),
    ("vanilla", 13),
    ("vanilla", 28),
    ("vanilla", 64),
    ("conv", 16),
]


@pytest.mark.parametrize("arch, img_size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("conditional", [False, True])
def test_shapes(vae, arch, channels, img_size, conditional):
    model = make_model(vae, arch, img_size, channels, 5, 3, conditional)
    x, labels = torch.rand(4, channels, img_size, img_size), torch.arange(4) % 3
    given = labels if conditional else None  # else it needs none
    logits, mu, logvar = model(x, given)
    assert logits.shape == x.shape and mu.shape == logvar.shape == (4, 5)
    images = model.reconstruct(x, given)
    assert torch.equal(images, model.decode(model.encode(x, given)[0], given).sigmoid())
    assert images.shape == x.shape and 0 <= images.min() and images.max() <= 1


LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)


def layers_of(network):
    return [module for module in network.modules() if isinstance(module, LAYERS)]


def test_burgess_by_hand(vae):
    model = make_model(vae, "burgess")
    x, z = torch.randn(4, 1, 16, 16), torch.randn(4, 3)
    first, second, linear = layers_of(model.encoder)
    h = F.silu(second(F.silu(first(x))))
    h = F.silu(linear(h.flatten(1)))
    torch.testing.assert_close(model.encode(x, None), (model.mu(h), model.logvar(h)))
    linear, first, second = layers_of(model.decoder)
    h = F.silu(linear(F.silu(model.decode_z(z)))).view(4, 64, 4, 4)
    torch.testing.assert_close(model.decode(z, None), second(F.silu(first(h))))


def test_burgess_has_a_level_more_for_images_twice_as_large(vae):
    """64 pixels become 32, 16 and 8, and 8 pixels 16, 32 and 64."""
    model = make_model(vae, "burgess", 64)
    h, z = torch.randn(4, 1, 64, 64), torch.randn(4, 3)
    wanted = model.encode(h, None)
    *convolutions, linear = layers_of(model.encoder)
    for convolution, side in zip(convolutions, (32, 16, 8), strict=True):
        h = F.silu(convolution(h))
        assert h.shape[2:] == (side, side)
    h = F.silu(linear(h.flatten(1)))
    torch.testing.assert_close(wanted, (model.mu(h), model.logvar(h)))
    linear, *convolutions, last = layers_of(model.decoder)
    h = F.silu(linear(F.silu(model.decode_z(z)))).view(4, 64, 8, 8)
    assert len(convolutions) == 2
    for convolution in convolutions:
        h = F.silu(convolution(h))
    torch.testing.assert_close(model.decode(z, None), last(h))


def test_mlp_by_hand(vae):
    model = make_model(vae, "mlp")
    x, z = torch.randn(4, 1, 16, 16), torch.randn(4, 3)
    (linear,) = layers_of(model.encoder)
    h = F.relu(linear(x.flatten(1)))
    torch.testing.assert_close(model.encode(x, None), (model.mu(h), model.logvar(h)))
    (linear,) = layers_of(model.decoder)
    torch.testing.assert_close(model.decode(z, None), linear(F.relu(model.decode_z(z))).view(4, 1, 16, 16))


def test_vanilla_by_hand(vae):
    """28 pixels become 14, 7, 4, 2 and 1; on the way back 32, of which the middle is taken."""
    model = make_model(vae, "vanilla", img_size=28)
    h, z = torch.randn(4, 1, 28, 28), torch.randn(4, 3)
    wanted = model.encode(h, None)
    layers = layers_of(model.encoder)
    for convolution, norm in zip(layers[::2], layers[1::2]):
        h = F.leaky_relu(norm(convolution(h)), 0.01)
    torch.testing.assert_close(wanted, (model.mu(h.flatten(1)), model.logvar(h.flatten(1))))
    *layers, last = layers_of(model.decoder)
    h = model.decode_z(z).view(4, 512, 1, 1)
    for convolution, norm in zip(layers[::2], layers[1::2]):
        h = F.leaky_relu(norm(convolution(h)), 0.01)
    torch.testing.assert_close(model.decode(z, None), last(h)[:, :, 2:30, 2:30])


def test_conv_by_hand(vae):
    """Four levels: 32 pixels become 16, 8, 4 and 2, and back."""
    model = make_model(vae, "conv", img_size=32)
    h, z = torch.randn(4, 1, 32, 32), torch.randn(4, 3)
    wanted = model.encode(h, None)
    layers = layers_of(model.encoder)
    for convolution, norm in zip(layers[::2], layers[1::2], strict=True):
        assert convolution.kernel_size == (4, 4)
        h = F.leaky_relu(norm(convolution(h)), 0.01)
    assert h.shape == (4, 512, 2, 2)
    torch.testing.assert_close(wanted, (model.mu(h.flatten(1)), model.logvar(h.flatten(1))))
    *layers, last = layers_of(model.decoder)
    h = model.decode_z(z).view(4, 512, 2, 2)
    for convolution, norm in zip(layers[::2], layers[1::2], strict=True):
        h = F.leaky_relu(norm(convolution(h)), 0.01)
    torch.testing.assert_close(model.decode(z, None), last(h))


def conv(a, b, side):
    return a * b * side**2 + b


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts_worked_out_by_hand(vae):
    dims = [32, 64, 128, 256, 512]
    chain = [*zip([3, *dims], dims), (512, 256), (256, 128), (128, 64), (64, 32), (32, 32)]
    vanilla = sum(conv(a, b, 3) + 2 * b for a, b in chain) + conv(32, 3, 3)
    flat = 512 * 2 * 2  # 64x64 images: the feature maps are 32, 16, 8, 4, 2 wide
    model = make_model(vae, "vanilla", 64, 3, 128)
    assert count(model) == vanilla + 2 * (flat * 128 + 128) + 128 * flat + flat
    # 28x28 images: the feature maps are 14 and 7 wide
    down = conv(1, 32, 4) + conv(32, 64, 4) + (64 * 7 * 7 * 256 + 256)
    up = (256 * 64 * 7 * 7 + 64 * 7 * 7) + conv(64, 32, 4) + conv(32, 1, 4)
    assert count(make_model(vae, "burgess", 28, 1, 20)) == down + up + 2 * (256 * 20 + 20) + (20 * 256 + 256)
    # 784-400-20 and back, as in the paper
    mlp = (784 * 400 + 400) + 2 * (400 * 20 + 20) + (20 * 400 + 400) + (400 * 784 + 784)
    assert count(make_model(vae, "mlp", 28, 1, 20)) == mlp


@pytest.mark.parametrize("arch", ARCHES)
def test_encoder_and_decoder_use_the_label(vae, arch):
    model = make_model(vae, arch, conditional=True)
    x = torch.rand(1, 1, 16, 16).expand(2, -1, -1, -1)
    z = torch.randn(1, 3).expand(2, 3)
    labels = torch.tensor([0, 1])
    for output in (model.encode(x, labels)[0], model.decode(z, labels)):
        assert not torch.allclose(output[0], output[1])


# ---------------------------------------------------------------- the importance-weighted bound


class LinearGaussian(nn.Module):
    """z ~ N(0, 1) in 2 dimensions, x ~ N(Wz, variance): log p(x) is known. The encoder is off by a bit."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.W, self.variance = torch.randn(3, 2), torch.tensor(0.5)
        self.covariance = torch.linalg.inv(torch.eye(2) + self.W.T @ self.W / self.variance)  # of z given x

    def encode(self, x, labels):
        mu = x @ self.W @ self.covariance / self.variance + 0.2
        return mu, (self.covariance.diag() * 1.5).log().expand_as(mu)

    def decode(self, z, labels):
        return z @ self.W.T

    def log_px(self, x):
        covariance = self.W @ self.W.T + self.variance * torch.eye(3)
        return MultivariateNormal(torch.zeros(3), covariance).log_prob(x)


@pytest.fixture
def toy(vae, monkeypatch):
    def log_likelihood(x, mean, likelihood, variance):  # its decoder's output is the mean itself, not a logit
        return Normal(mean, variance.sqrt()).log_prob(x).sum(1)

    monkeypatch.setattr(vae, "log_likelihood", log_likelihood)
    return LinearGaussian()


def bound(model, x, n_samples):
    return bench_bound.importance_weighted_bound(model, x, None, "gaussian", n_samples)


def test_the_bound_approaches_the_likelihood(toy):
    x = torch.randn(50, 3)
    gaps = []
    for n_samples in (1, 10, 1000):
        torch.manual_seed(0)
        gaps.append((toy.log_px(x) - bound(toy, x, n_samples)).mean().item())
    assert gaps[0] > gaps[1] > gaps[2]
    assert abs(gaps[2]) < 0.01


def test_the_bound_is_the_log_of_the_mean_weight(toy):
    """Of p(x, z) / q(z|x) over the samples: those of k bounds with one sample each."""
    x = torch.randn(20, 3)
    torch.manual_seed(3)
    together = bound(toy, x, 7)
    torch.manual_seed(3)
    singles = torch.stack([bound(toy, x, 1) for _ in range(7)])
    torch.testing.assert_close(together, torch.logsumexp(singles, 0) - math.log(7))


def test_the_bound_of_a_trained_run(vae, small, monkeypatch, capsys):
    """Of its test images, with its variance; with one sample it is the ELBO, but for what z is drawn."""
    run = vae.train(vae.parse_args([*small, *BERNOULLI, "--n_epochs", "2"]))
    elbo = checkpoint(run)["log"][-1]["test_elbo"]
    one = bench_bound.mean_bound(run, 1, [])
    assert one == bench_bound.mean_bound(run, 1, []) == pytest.approx(elbo, abs=15)
    assert bench_bound.mean_bound(run, 50, []) > one
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["bench_bound.py", str(run), "--samples", "1", "--device", "cpu"])
    bench_bound.main()
    assert capsys.readouterr().out.splitlines()[-1] == f"1 samples: {one:.2f} nats per image"


# ---------------------------------------------------------------- the options


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--img_size", "30"], ["--img_size 30", "multiple of 4"]),
        (["--arch", "residual"], ["--arch"]),
        (["--arch", "conv", "--img_size", "28"], ["--img_size 28", "multiple of 16"]),
        (["--binarize", "--likelihood", "gaussian"], ["--binarize needs --likelihood bernoulli"]),
        (["--beta", "-1"], ["argument --beta"]),
        (["--beta", "inf"], ["argument --beta"]),
        (["--likelihood", "poisson"], ["argument --likelihood"]),
        (["--prior", "flat"], ["argument --prior"]),
        (["--labels", "1"], ["--labels needs --resume"]),
        (["--reconstruct", "x"], ["--reconstruct needs --resume"]),
    ],
)
def test_bad_options(vae, refused, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    refused(vae, *arguments, says=says)
    assert not list(tmp_path.iterdir())


LIKELIHOODS = [
    (1, [], "bernoulli"),
    (3, [], "gaussian"),
    (1, GAUSSIAN, "gaussian"),
    (3, BERNOULLI, "bernoulli"),
]


@pytest.mark.parametrize("channels, options, wanted", LIKELIHOODS)
def test_the_likelihood_is_by_the_channels(vae, small, channels, options, wanted):
    """Unless it is given."""
    run = vae.train(vae.parse_args([*small, *options, "--n_epochs", "1", "--channels", str(channels)]))
    assert vae.load(run).options.likelihood == wanted


# ---------------------------------------------------------------- load and generate


@pytest.mark.parametrize("flags", [["--conditional"], [], ["--conditional", "--prior", "normal"]])
def test_generate_by_class(vae, small, command, refused, flags):
    """Classes are told apart by the decoder, or by the prior."""
    run = vae.train(vae.parse_args([*small, "--n_epochs", "1", *flags]))
    assert command(vae, "--resume", run, "--generate", 5, "--labels", "red", "blue") == (0, [])
    folders = (run / "generated").iterdir()
    assert {folder.name: len(list(folder.iterdir())) for folder in folders} == {"blue": 2, "red": 3}
    refused(vae, "--resume", run, "--generate", 5, "--labels", "pink", says=["--labels pink", "green, red"])
    refused(vae, "--resume", run, "--labels", "red", says=["--labels needs --generate"])


def test_generate_without_classes(vae, small, command, refused):
    """Neither the decoder nor a normal prior can tell classes apart: images are all of one."""
    run = vae.train(vae.parse_args([*small, "--n_epochs", "1", "--prior", "normal"]))
    refused(vae, "--resume", run, "--generate", 5, "--labels", "red", says=["--labels red", "classes: all"])
    assert command(vae, "--resume", run, "--generate", 5) == (0, [])
    assert len(list((run / "generated" / "all").glob("*.png"))) == 5


def test_a_folder_without_sub_folders(vae, small, images, command):
    """Is one class: it trains, generates and reconstructs, with the label and without."""
    for flags in ([], ["--conditional"]):
        run = vae.train(vae.parse_args([*small, "--dataset", str(images / "red"), "--n_epochs", "1", *flags]))
        assert command(vae, "--resume", run, "--generate", 2, "--labels", "all") == (0, [])
        assert command(vae, "--resume", run, "--reconstruct", images / "blue") == (0, [])
        assert len(list((run / "generated" / "all").glob("*.png"))) == 2
        assert len(list((run / "reconstructed").glob("*.png"))) == 18


@pytest.mark.parametrize("flags", [["--conditional"], []])
def test_images_are_of_the_class_asked_for(vae, small, images, command, monkeypatch, flags):
    """A decoder that paints its label shows what is drawn for which."""
    run = vae.train(vae.parse_args([*small, "--n_epochs", "1", *flags]))
    painted(vae, monkeypatch)
    assert command(vae, "--resume", run, "--generate", 6) == (0, [])
    assert command(vae, "--resume", run, "--reconstruct", images) == (0, [])
    beside = [Image.open(file).getpixel((24, 8))[0] for file in sorted((run / "reconstructed").iterdir())]
    for k, name in enumerate(["blue", "green", "red"]):
        for file in (run / "generated" / name).iterdir():
            assert Image.open(file).getpixel((3, 3))[0] == pytest.approx(64 * (k + 1), abs=1)
        assert beside[18 * k : 18 * k + 18] == pytest.approx([64 * (k + 1)] * 18, abs=1)


def test_generated_z_is_drawn_from_the_prior(vae, small, command, monkeypatch):
    """A decoder that paints the mean of z, and a prior far from N(0, 1)."""
    run = vae.train(vae.parse_args([*small, "--n_epochs", "1"]))
    load = vae.load

    def far(*arguments):
        model = load(*arguments)
        model.prior.mean[:] = torch.tensor([-2.0, 0.0, 2.0])[:, None]
        model.prior.scale.zero_()
        return model

    def decode(model, z, labels):
        return z.mean(1)[:, None, None, None].expand(-1, 3, 16, 16)

    monkeypatch.setattr(vae, "load", far)
    monkeypatch.setattr(vae.VAE, "decode", decode)
    assert command(vae, "--resume", run, "--generate", 3) == (0, [])
    values = [
        Image.open(file).getpixel((3, 3))[0] / 255 for file in sorted((run / "generated").rglob("*.png"))
    ]
    assert values == pytest.approx(torch.tensor([-2.0, 0.0, 2.0]).sigmoid().tolist(), abs=0.01)


@pytest.mark.parametrize("conditional", [False, True])
def test_reconstruct(vae, small, images, command, refused, tmp_path, conditional):
    flags = ["--conditional"] if conditional else []
    run = vae.train(vae.parse_args([*small, "--n_epochs", "1", *flags]))
    assert command(vae, "--resume", run, "--reconstruct", images) == (0, [])
    files = sorted((run / "reconstructed").iterdir())
    paths = sorted(images.rglob("*.png"))
    assert len(files) == 54 and Image.open(files[0]).size == (32, 16)
    model = vae.load(run)
    for i in (0, 20, 53):  # in the order of their paths
        left, right = (pil_to_tensor(Image.open(files[i])) / 255).split(16, dim=2)
        x = vae.read_image(paths[i], 16, 3) / 255
        torch.testing.assert_close(left, x)
        wanted = model.reconstruct(x[None], torch.tensor([i // 18]))[0]
        torch.testing.assert_close(right, wanted, atol=0.003, rtol=0)

    shutil.copytree(images / "red", tmp_path / "some" / "red")  # not all classes of the run
    assert command(vae, "--resume", run, "--reconstruct", tmp_path / "some") == (0, [])
    again = sorted((run / "reconstructed-2").iterdir())
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files[36:]]

    (tmp_path / "none").mkdir()
    refused(vae, "--resume", run, "--reconstruct", tmp_path / "none", says=[tmp_path / "none", "no images"])
    grey = make_folder(tmp_path / "grey", classes=["one"], mode="L")  # grey images for a colour model
    if conditional:  # "one" is none of its classes: it would take a wrong label
        refused(
            vae, "--resume", run, "--reconstruct", grey, says=[grey, "must be classes", "blue, green, red"]
        )
    else:
        assert command(vae, "--resume", run, "--reconstruct", grey) == (0, [])
        assert len(list((run / "reconstructed-3").iterdir())) == 18


def test_a_binary_model_is_given_binary_images(vae, small, images, command):
    run = vae.train(vae.parse_args([*small, "--n_epochs", "1", "--binarize", "--channels", "1"]))
    assert command(vae, "--resume", run, "--reconstruct", images) == (0, [])
    left = pil_to_tensor(Image.open(run / "reconstructed/000000.png"))[:, :, :16]
    assert set(left.unique().tolist()) <= {0, 255}


def test_one_use_at_a_time(vae, small, images, refused):
    run = vae.train(vae.parse_args([*small, "--n_epochs", "1"]))
    refused(vae, "--resume", run, "--generate", 2, "--reconstruct", images, says=["together"])


def test_it_learns_the_digits(vae, tmp_path, monkeypatch):
    """Reconstructions are better than the mean image, and new images are of the class asked for."""
    draw_digits = vae.draw_digits
    monkeypatch.setattr(vae, "draw_digits", lambda n: draw_digits(n // 5))
    options = "--n_epochs 6 --dataset digits --arch mlp --batch_size 32 --img_size 20 --lr 4e-3 --device cpu"
    options += " --latent_dim 32"
    opt = vae.parse_args([*options.split(), *BERNOULLI, "--out_dir", str(tmp_path / "run")])
    model = vae.load(vae.train(opt))
    images, labels, _ = vae.load_data(opt)
    _, _, test_images, test_labels = vae.hold_out(opt, images, labels)
    untrained = make_model(vae, img_size=20, latent_dim=32, n_classes=10)
    before, after = (vae.test(m, test_images, test_labels, opt) for m in (untrained, model))
    assert after > before + 25
    x, mean = test_images / 255, images.float().mean(0) / 255
    assert (model.reconstruct(x, test_labels) - x).square().mean() < 0.5 * (mean - x).square().mean()
    means = torch.stack([images[labels == k].float().mean(0) / 255 for k in range(10)]).flatten(1)
    torch.manual_seed(0)
    asked = torch.arange(10).repeat(20)
    z = model.prior.sample(torch.randn(200, 32), asked)
    found = torch.cdist(model.decode(z, asked).sigmoid().flatten(1), means).argmin(1)
    assert (found == asked).float().mean() > 0.5
