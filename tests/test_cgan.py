"""cgan.py: the networks, the training step, the labels, and what --generate writes."""

import pytest
import torch
from conftest import checkpoint
from PIL import Image
from torch import nn
from torch.nn.functional import leaky_relu, relu
from torchvision.transforms.v2.functional import pil_to_tensor

CONDITIONING = ["projection", "concat"]


def networks(cgan, arch="mlp", img_size=16, channels=1, conditioning="projection", n_classes=3):
    torch.manual_seed(0)
    G = cgan.Generator(arch, img_size, channels, latent_dim=4, hidden_dim=8, n_classes=n_classes)
    D = cgan.Discriminator(arch, conditioning, img_size, channels, hidden_dim=8, n_classes=n_classes)
    return G, D


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("arch", ["mlp", "conv"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("img_size", [8, 28, 48])
@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_shapes_and_ranges(cgan, arch, channels, img_size, conditioning):
    G, D = networks(cgan, arch, img_size, channels, conditioning)
    labels = torch.tensor([0, 1, 2, 2, 0])
    images = G(torch.randn(5, 4), labels)
    assert images.shape == (5, channels, img_size, img_size)
    assert -1 <= images.min() and images.max() <= 1
    scores, class_logits = D(images, labels)
    assert scores.shape == (5, 1) and class_logits.shape == (5, 3)


@pytest.mark.parametrize("arch", ["mlp", "conv"])
@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_both_networks_use_the_label(cgan, arch, conditioning):
    G, D = networks(cgan, arch, conditioning=conditioning)
    G.eval()
    z = torch.randn(1, 4).expand(2, 4)
    images = G(z, torch.tensor([0, 1]))
    assert not torch.allclose(images[0], images[1])
    scores, _ = D(images[:1].expand(2, -1, -1, -1), torch.tensor([0, 1]))
    assert not torch.allclose(scores[0], scores[1])


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def of_kind(network, *kinds):
    return [layer for layer in network.modules() if isinstance(layer, kinds)]


def test_the_mlp_generator_by_hand(cgan):
    """Linear layers, batch norm on all but the first and the last, leaky ReLU of 0.2, tanh."""
    G, _ = networks(cgan)
    z = torch.randn(5, 4)
    labels = torch.tensor([0, 1, 2, 2, 0])
    h = torch.cat([z, G.embed.weight[labels]], dim=1)
    first, second, third, fourth, last = of_kind(G, nn.Linear)
    h = leaky_relu(linear(first, h), 0.2)
    for layer in (second, third, fourth):
        h = linear(layer, h)
        h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
        h = leaky_relu(h, 0.2)
    wanted = linear(last, h).tanh().view(5, 1, 16, 16)
    torch.testing.assert_close(G(z, labels), wanted, rtol=1e-3, atol=1e-4)


def test_the_mlp_discriminator_by_hand(cgan):
    """The score w.h(x) + b + e(y).h(x), and class logits linear in h(x)."""
    _, D = networks(cgan)
    x = torch.randn(5, 1, 16, 16)
    labels = torch.tensor([0, 1, 2, 2, 0])
    h = x.flatten(1)
    for layer in of_kind(D.features, nn.Linear):
        h = leaky_relu(linear(layer, h), 0.2)
    wanted = linear(D.score, h)[:, 0] + torch.stack([h[i] @ D.embed.weight[y] for i, y in enumerate(labels)])
    scores, class_logits = D(x, labels)
    torch.testing.assert_close(scores[:, 0], wanted)
    torch.testing.assert_close(class_logits, linear(D.classify, h))


@pytest.mark.parametrize("img_size, dims", [(28, [8, 16]), (32, [8, 16, 32]), (48, [8, 16, 32])])
def test_the_conv_networks_by_hand(cgan, img_size, dims):
    """DCGAN: batch norm in G but on the output, in D but on the input; ReLU in G, leaky ReLU in D. The
    side of the images is halved down to 4 to 7, and the channels are doubled. At its end, G averages the
    pixels over 2x2.
    """
    G, D = networks(cgan, "conv", img_size)
    side = img_size // 2 ** len(dims)
    labels = torch.tensor([0, 1, 2, 2, 0])
    z = torch.randn(5, 4)
    (first,) = of_kind(G, nn.Linear)
    h = linear(first, torch.cat([z, G.embed.weight[labels]], dim=1)).view(5, dims[-1], side, side)
    norms, layers = of_kind(G, nn.BatchNorm2d), of_kind(G, nn.ConvTranspose2d)
    assert len(norms) == len(layers)
    for norm, layer in zip(norms, layers):
        h = relu(nn.functional.batch_norm(h, None, None, norm.weight, norm.bias, training=True))
        padding = 0 if layer is layers[-1] else 1
        h = nn.functional.conv_transpose2d(h, layer.weight, layer.bias, stride=2, padding=padding)
    means = (h[..., 1:, 1:] + h[..., 1:, :-1] + h[..., :-1, 1:] + h[..., :-1, :-1]) / 4
    images = G(z, labels)
    torch.testing.assert_close(images, means.tanh(), rtol=1e-3, atol=1e-4)

    first, *more = of_kind(D, nn.Conv2d)
    assert [layer.out_channels for layer in (first, *more)] == dims
    h = leaky_relu(nn.functional.conv2d(images, first.weight, first.bias, stride=2, padding=1), 0.2)
    for norm, layer in zip(of_kind(D, nn.BatchNorm2d), more, strict=True):
        h = nn.functional.conv2d(h, layer.weight, layer.bias, stride=2, padding=1)
        h = nn.functional.batch_norm(h, None, None, norm.weight, norm.bias, training=True)
        h = leaky_relu(h, 0.2)
    h = h.flatten(1)
    wanted = linear(D.score, h)[:, 0] + (h * D.embed.weight[labels]).sum(1)
    torch.testing.assert_close(D(images, labels)[0][:, 0], wanted, rtol=1e-3, atol=1e-4)


def test_concat_gives_the_label_as_a_channel(cgan):
    _, D = networks(cgan, conditioning="concat")
    seen = []
    D.features.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 1, 16, 16)
    D(x, torch.tensor([2, 0]))
    label_channel = D.embed.weight[[2, 0]].view(2, 1, 16, 16)
    assert torch.equal(seen[0], torch.cat([x, label_channel], dim=1))


# ---------------------------------------------------------------- the training step


@pytest.fixture
def one_step(cgan, small, recorded, monkeypatch):
    """Trains for one step with SGD of rate 1: gives both networks as recorded, and the checkpoint after
    the step.
    """
    networks = recorded(cgan, "Generator", "Discriminator")
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, *_, **__: torch.optim.SGD(parameters, lr=1.0))

    def train(*arguments):
        options = ["--n_epochs", "1", "--batch_size", "54", "--lr", "1", *arguments]
        run = cgan.train(cgan.parse_args([*small, *options]))
        return *networks, checkpoint(run)

    return train


@pytest.mark.parametrize("arch, lr", [("mlp", 4e-4), ("conv", 1.6e-3)])
def test_the_network_decides_about_the_learning_rate(cgan, arch, lr):
    assert cgan.parse_args(["--arch", arch]).lr == lr
    assert cgan.parse_args(["--arch", arch, "--lr", "0.1"]).lr == 0.1


def test_the_label_stays_a_small_part_of_what_the_generator_sees(cgan):
    """However many classes there are: with as many numbers as z has, all z gave the same image."""
    for n_classes in (1, 3, 1000):
        G, _ = networks(cgan, n_classes=n_classes)
        assert of_kind(G, nn.Linear)[0].in_features == 4 + 10


@pytest.mark.parametrize("arch, channels, noise", [("conv", 1, 0.3), ("conv", 3, 0.1), ("mlp", 1, 0.1)])
def test_the_data_decides_about_the_noise(one_step, arch, channels, noise):
    *_, state = one_step("--arch", arch, "--channels", str(channels))
    assert state["options"]["noise"] == noise


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


@pytest.mark.parametrize("class_weight", [0.0, 0.7])
@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_a_step_is_that_of_the_textbook(one_step, conditioning, class_weight):
    """G and then D follow the gradients of the least squares losses, worked out here once more, and of the
    cross-entropy of the labels of fakes and of real images.
    """
    options = ["--noise", "0", "--conditioning", conditioning, "--class_weight", str(class_weight)]
    recorded_G, recorded_D, state = one_step(*options)
    ((z, labels),) = recorded_G.inputs
    _, (real, real_labels), _ = recorded_D.inputs
    assert torch.equal(labels, real_labels)  # so each class is as frequent in fakes as in real images
    G, D = recorded_G.before, recorded_D.before

    fake = G(z, labels)
    scores, class_logits = D(fake, labels)
    g_loss = nn.functional.mse_loss(scores, torch.ones(54, 1))
    g_loss = g_loss + class_weight * nn.functional.cross_entropy(class_logits, labels)
    scores, class_logits = D(real, labels)
    d_loss = 0.5 * nn.functional.mse_loss(scores, torch.ones(54, 1))
    d_loss = d_loss + class_weight * nn.functional.cross_entropy(class_logits, labels)
    scores, _ = D(fake.detach(), labels)
    d_loss = d_loss + 0.5 * nn.functional.mse_loss(scores, torch.zeros(54, 1))
    assert state["log"][-1]["g_loss"] == pytest.approx(g_loss.item(), rel=1e-5)
    assert state["log"][-1]["d_loss"] == pytest.approx(d_loss.item(), rel=1e-5)
    for network, loss, saved in ((G, g_loss, state["G"]), (D, d_loss, state["D"])):
        names, weights = zip(*network.named_parameters())
        for name, weight, gradient in zip(
            names, weights, torch.autograd.grad(loss, weights, materialize_grads=True)
        ):
            torch.testing.assert_close(saved[name], (weight - gradient).detach(), rtol=1e-3, atol=1e-4)


def test_what_the_networks_see(one_step):
    """Real images in [-1, 1], each once, under its own label, and z from a standard normal distribution."""
    G, D, _ = one_step("--noise", "0", "--latent_dim", "100")
    z, _ = G.inputs[0]
    assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
    real, labels = D.inputs[1]
    assert len(real.flatten(1).unique(dim=0)) == 54
    assert -1 <= real.min() < -0.9 and 0.5 < real.max() <= 1
    assert torch.equal(real.mean(dim=(2, 3)).argmax(dim=1), 2 - labels)  # blue is class 0 and channel 2


def test_the_rate_falls(cgan, small, monkeypatch):
    """It is --lr for --lr_hold steps, then falls as 1 / sqrt(step), in both optimisers."""
    rates = []
    step = torch.optim.Adam.step

    def recording_step(optimizer, *arguments):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", recording_step)
    cgan.train(cgan.parse_args([*small, "--n_epochs", "2", "--lr", "0.01", "--lr_hold", "4"]))
    wanted = [0.01] * 4 + [0.01 * (4 / n) ** 0.5 for n in range(5, 13)]
    assert rates[::2] == rates[1::2] == pytest.approx(wanted)


def test_n_classes_is_checked(cgan, small, refused, tmp_path):
    refused(cgan, *small, "--n_classes", 4, says=["--n_classes 4", "3 classes"])
    assert not (tmp_path / "runs").exists()
    cgan.train(cgan.parse_args([*small, "--n_classes", "3", "--n_epochs", "1"]))


# ---------------------------------------------------------------- pictures


def paint_the_label(G, z, labels):
    """In place of a generator's forward: images whose grey level says the label."""
    return (labels / 3 * 2 - 1)[:, None, None, None].expand(-1, 3, 16, 16)


@pytest.fixture
def painted(cgan, small, monkeypatch):
    """A run whose generator paints its label."""
    run = cgan.train(cgan.parse_args([*small, "--n_epochs", "1"]))
    monkeypatch.setattr(cgan.Generator, "forward", paint_the_label)
    return run


def test_column_k_of_the_grid_is_class_k(cgan, small, monkeypatch):
    grids = []

    def keep_grid(run, name, images, n_columns):
        grids.append((images, n_columns))

    monkeypatch.setattr(cgan.Run, "save_grid", keep_grid)
    averaged_forward = cgan.Generator.forward

    def forward(G, z, labels):
        return averaged_forward(G, z, labels) if G.training else paint_the_label(G, z, labels)

    monkeypatch.setattr(cgan.Generator, "forward", forward)
    cgan.train(cgan.parse_args([*small, "--n_epochs", "1"]))
    images, n_columns = grids[0]
    assert n_columns == 3 and images.shape == (30, 3, 16, 16)
    for k in range(3):
        assert torch.allclose(images[k::3], torch.tensor(k / 3), atol=1e-6)


def test_generate_spreads_over_the_classes(cgan, painted, command):
    assert command(cgan, "--resume", painted, "--generate", 8) == (0, [])
    assert command(cgan, "--resume", painted, "--generate", 5, "--labels", "red", "blue") == (0, [])
    counts = []
    for folder in ("generated", "generated-2"):
        counts.append({sub.name: len(list(sub.glob("*.png"))) for sub in (painted / folder).iterdir()})
    assert counts == [{"blue": 3, "green": 3, "red": 2}, {"red": 3, "blue": 2}]


def test_generated_images_are_of_the_class_asked_for(cgan, painted, command):
    assert command(cgan, "--resume", painted, "--generate", 6) == (0, [])
    for k, name in enumerate(["blue", "green", "red"]):
        for file in (painted / "generated" / name).iterdir():
            assert Image.open(file).getpixel((3, 3)) == (k * 85,) * 3


def test_generated_images_are_those_of_load(cgan, small, command):
    run = cgan.train(cgan.parse_args([*small, "--n_epochs", "1"]))
    assert command(cgan, "--resume", run, "--generate", 1, "--labels", "green", "--seed", 5) == (0, [])
    G = cgan.load(run)
    torch.manual_seed(5)
    wanted = (G(torch.randn(1, 4), torch.tensor([1]))[0] + 1) / 2
    found = pil_to_tensor(Image.open(run / "generated/green/000000.png")) / 255
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.003)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--arch", "conv", "--img_size", "30"], "--img_size 30"),
        (["--labels", "3"], "--labels needs --resume"),
        (["--noise", "-1"], "argument --noise"),
        (["--conditioning", "none"], "argument --conditioning"),
    ],
)
def test_bad_options(cgan, refused, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    refused(cgan, *arguments, says=[says])
    assert not list(tmp_path.iterdir())


def test_labels_outside_the_classes(cgan, painted, refused):
    refused(cgan, "--resume", painted, "--labels", "red", says=["--labels needs --generate"])
    refused(
        cgan, "--resume", painted, "--generate", 3, "--labels", 0, says=["--labels 0", "blue, green, red"]
    )
    assert not (painted / "generated").exists()


def test_it_learns_the_digits(cgan, tmp_path):
    """After an epoch on the built-in digits the classes differ, and so do the samples of one."""
    options = [
        "--dataset",
        "digits",
        "--n_epochs",
        "1",
        "--img_size",
        "16",
        "--batch_size",
        "128",
        "--out_dir",
        str(tmp_path / "run"),
    ]
    G = cgan.load(cgan.train(cgan.parse_args(options)))
    labels = torch.arange(10).repeat_interleave(20)
    images = (G(torch.randn(200, 100, generator=torch.Generator().manual_seed(1)), labels) + 1) / 2
    assert images.isfinite().all() and images.std(0).mean() > 0.01
    means = images.view(10, 20, -1).mean(1)
    assert torch.cdist(means, means).fill_diagonal_(9).min() > 0.5, "two classes look the same"
