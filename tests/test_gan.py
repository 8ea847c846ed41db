"""gan.py: the networks, the training step, and what --generate writes."""

import pytest
import torch
from conftest import checkpoint
from PIL import Image
from torch import nn
from torch.nn.functional import leaky_relu, relu
from torchvision.transforms.v2.functional import pil_to_tensor


@pytest.fixture
def gan():
    import gan

    return gan


def networks(gan, arch="mlp", img_size=16, channels=1, hidden_dim=8):
    torch.manual_seed(0)
    G = gan.Generator(arch, img_size, channels, 4, hidden_dim)
    D = gan.Discriminator(arch, img_size, channels, hidden_dim)
    return G, D


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def normed(norm, x):
    return nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True)


def of_kind(network, *kinds):
    return [layer for layer in network.modules() if isinstance(layer, kinds)]


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("arch", ["mlp", "conv"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("img_size", [8, 28, 32, 48])
def test_shapes_and_ranges(gan, arch, channels, img_size):
    G, D = networks(gan, arch, img_size, channels)
    images = G(torch.randn(5, 4))
    assert images.shape == (5, channels, img_size, img_size)
    assert -1 <= images.min() and images.max() <= 1
    assert D(images).shape == (5, 1)


def test_the_mlp_generator_by_hand(gan):
    """Linear layers, batch norm on all but the first and the last, leaky ReLU of 0.2, tanh."""
    G, _ = networks(gan)
    z = torch.randn(5, 4)
    first, *middle, last = of_kind(G, nn.Linear)
    h = leaky_relu(linear(first, z), 0.2)
    for layer, norm in zip(middle, of_kind(G, nn.BatchNorm1d), strict=True):
        h = leaky_relu(normed(norm, linear(layer, h)), 0.2)
    wanted = linear(last, h).tanh().view(5, 1, 16, 16)
    torch.testing.assert_close(G(z), wanted, rtol=1e-3, atol=1e-4)


def score(D, h):
    """From the features of a batch: the last layers are told how much they vary in it, too."""
    spread = (h - h.mean(0)).square().mean(0).sqrt().mean()
    first, last = of_kind(D.score, nn.Linear)
    return linear(last, leaky_relu(linear(first, torch.cat([h, spread.expand(len(h), 1)], dim=1)), 0.2))


def test_the_mlp_discriminator_by_hand(gan):
    _, D = networks(gan)
    x = torch.randn(5, 1, 16, 16)
    first, second = of_kind(D.features, nn.Linear)
    h = leaky_relu(linear(first, x.flatten(1)), 0.2)
    h = leaky_relu(linear(second, h), 0.2)
    torch.testing.assert_close(D(x), score(D, h), rtol=1e-3, atol=1e-4)


def test_equal_images_give_finite_gradients(gan):
    """The slope of a standard deviation of 0, where all fakes are the same, is taken as 0."""
    _, D = networks(gan)
    images = torch.zeros(4, 1, 16, 16, requires_grad=True)
    D(images).sum().backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("img_size, dims", [(28, [8, 16]), (32, [8, 16, 32]), (48, [8, 16, 32])])
def test_the_conv_networks_by_hand(gan, img_size, dims):
    """DCGAN: batch norm in G but on the output, in D but on the input; ReLU in G, leaky ReLU in D. The
    side of the images is halved down to 4 to 7, and the channels are doubled. At its end, G averages the
    pixels over 2x2.
    """
    G, D = networks(gan, "conv", img_size)
    side = img_size // 2 ** len(dims)
    z = torch.randn(5, 4)
    (first,) = of_kind(G, nn.Linear)
    h = linear(first, z).view(5, dims[-1], side, side)
    norms, layers = of_kind(G, nn.BatchNorm2d), of_kind(G, nn.ConvTranspose2d)
    assert [layer.in_channels for layer in layers] == dims[::-1]
    assert len(norms) == len(layers)
    for norm, layer in zip(norms, layers):
        h = relu(normed(norm, h))
        padding = 0 if layer is layers[-1] else 1
        h = nn.functional.conv_transpose2d(h, layer.weight, layer.bias, stride=2, padding=padding)
    means = (h[..., 1:, 1:] + h[..., 1:, :-1] + h[..., :-1, 1:] + h[..., :-1, :-1]) / 4
    images = G(z)
    torch.testing.assert_close(images, means.tanh(), rtol=1e-3, atol=1e-4)

    first, *more = of_kind(D, nn.Conv2d)
    assert [layer.out_channels for layer in (first, *more)] == dims
    h = leaky_relu(nn.functional.conv2d(images, first.weight, first.bias, stride=2, padding=1), 0.2)
    for norm, layer in zip(of_kind(D, nn.BatchNorm2d), more, strict=True):
        h = nn.functional.conv2d(h, layer.weight, layer.bias, stride=2, padding=1)
        h = leaky_relu(normed(norm, h), 0.2)
    torch.testing.assert_close(D(images), score(D, h.flatten(1)), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- the training step


@pytest.fixture
def one_step(gan, small, recorded, monkeypatch):
    """Trains for one step with SGD of rate 1: gives both networks as recorded, and the checkpoint after
    the step.
    """
    networks = recorded(gan, "Generator", "Discriminator")
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, *_, **__: torch.optim.SGD(parameters, lr=1.0))

    def train(*arguments):
        options = ["--n_epochs", "1", "--batch_size", "54", "--lr", "1", *arguments]
        run = gan.train(gan.parse_args([*small, *options]))
        return *networks, checkpoint(run)

    return train


def test_noise_on_what_the_discriminator_sees(one_step):
    """On real images and on fakes, for each pixel, with the deviation asked for, drawn independently."""
    _, D, _ = one_step("--noise", "0.2")
    one_step("--noise", "0")
    fake, real, same_fake, plain_fake, plain_real, _ = [inputs[0] for inputs in D.inputs]
    assert torch.equal(fake, same_fake)
    on_fakes, on_reals = fake - plain_fake, real - plain_real
    for noise in (on_fakes, on_reals):
        assert noise.mean().abs() < 0.01
        assert noise.std().item() == pytest.approx(0.2, rel=0.03)
    assert (on_fakes * on_reals).mean().abs() < 0.01 * 0.2  # independent draws


def test_a_step_is_that_of_the_textbook(one_step):
    """G and then D follow the gradients of the non-saturating loss, worked out here once more."""
    recorded_G, recorded_D, state = one_step("--noise", "0")
    ((z,),) = recorded_G.inputs
    _, (real,), _ = recorded_D.inputs
    G, D = recorded_G.before, recorded_D.before
    fake = G(z)
    g_loss = -D(fake).sigmoid().log().mean()
    d_loss = -(D(real).sigmoid().log().mean() + (1 - D(fake.detach()).sigmoid()).log().mean()) / 2
    assert state["log"][-1]["g_loss"] == pytest.approx(g_loss.item(), rel=1e-5)
    assert state["log"][-1]["d_loss"] == pytest.approx(d_loss.item(), rel=1e-5)
    for network, loss, saved in ((G, g_loss, state["G"]), (D, d_loss, state["D"])):
        names, weights = zip(*network.named_parameters())
        for name, weight, gradient in zip(names, weights, torch.autograd.grad(loss, weights)):
            torch.testing.assert_close(
                saved[name], (weight - gradient).detach(), msg=name, rtol=1e-4, atol=1e-6
            )


def test_no_loss_is_infinite_when_the_discriminator_is_sure(gan, one_step, monkeypatch):
    """What the logarithm of a sigmoid could not do: here D's logits are about 1000 and more."""
    forward = gan.Discriminator.forward
    monkeypatch.setattr(gan.Discriminator, "forward", lambda D, images: -1e4 - forward(D, images))
    _, _, state = one_step()
    assert state["log"][-1]["g_loss"] == pytest.approx(1e4, rel=0.01)


def test_what_the_networks_see(one_step):
    """Real images in [-1, 1], each once, and z from a standard normal distribution."""
    G, D, _ = one_step("--noise", "0", "--latent_dim", "100")
    (z,) = G.inputs[0]
    assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
    (real,) = D.inputs[1]
    assert len(real.flatten(1).unique(dim=0)) == 54
    assert -1 <= real.min() < -0.9 and 0.5 < real.max() <= 1


# ---------------------------------------------------------------- the script


def test_a_size_that_cannot_be_halved(gan, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(gan, "--arch", "conv", "--img_size", 30, says=["--img_size 30", "multiple of 4"])
    assert not list(tmp_path.iterdir())


def test_conv_trains_as_wide_as_asked(gan, small):
    run = gan.train(gan.parse_args([*small, "--arch", "conv", "--hidden_dim", "6", "--n_epochs", "1"]))
    assert gan.load(run)(torch.randn(2, 4)).shape == (2, 3, 16, 16)
    assert checkpoint(run)["D"]["features.0.weight"].shape == (6, 3, 4, 4)


def test_generate(gan, small, command):
    run = gan.train(gan.parse_args([*small, "--n_epochs", "1"]))
    assert command(gan, "--resume", run, "--generate", 7) == (0, [])
    assert len(list((run / "generated").glob("*.png"))) == 7
    assert command(gan, "--resume", run, "--generate", 2, "--seed", 5) == (0, [])
    G = gan.load(run)
    torch.manual_seed(5)
    wanted = (G(torch.randn(1, 4))[0] + 1) / 2
    found = pil_to_tensor(Image.open(run / "generated-2" / "000000.png")) / 255
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.003)


def test_it_learns_the_digits(gan, tmp_path):
    """After an epoch on the built-in digits its samples differ, and have as much ink as digits have."""
    options = [
        "--dataset",
        "digits",
        "--n_epochs",
        "1",
        "--img_size",
        "16",
        "--out_dir",
        str(tmp_path / "run"),
    ]
    opt = gan.parse_args(options)
    G = gan.load(gan.train(opt))
    images = (G(torch.randn(200, 100, generator=torch.Generator().manual_seed(1))) + 1) / 2
    real = gan.load_data(opt)[0] / 255
    assert images.std(0).mean() > 0.05
    assert images.mean().item() == pytest.approx(real.mean().item(), rel=0.3)
