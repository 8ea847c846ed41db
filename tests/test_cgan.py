"""cgan.py: the networks, the losses and the steps of the conditional GAN."""

import copy
import math
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.utils import make_grid


def networks(cgan, arch="mlp", img_size=16, channels=1, conditioning="projection"):
    torch.manual_seed(0)
    return cgan.Generator(4, 3, img_size, channels, arch), cgan.Discriminator(3, img_size, channels, arch, conditioning)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("arch", ["mlp", "conv"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("img_size", [8, 24, 32])
@pytest.mark.parametrize("conditioning", ["projection", "concat"])
def test_shapes_and_ranges(cgan, arch, channels, img_size, conditioning):
    G, D = networks(cgan, arch, img_size, channels, conditioning)
    labels = torch.tensor([0, 1, 2, 2, 0])
    images = G(torch.randn(5, 4), labels)
    assert images.shape == (5, channels, img_size, img_size)
    assert -1 <= images.min() and images.max() <= 1
    assert D(images, labels).shape == (5, 1)


@pytest.mark.parametrize("arch", ["mlp", "conv"])
@pytest.mark.parametrize("conditioning", ["projection", "concat"])
def test_both_networks_use_the_label(cgan, arch, conditioning):
    G, D = (network.eval() for network in networks(cgan, arch, conditioning=conditioning))
    z = torch.randn(1, 4).expand(2, 4)
    images = G(z, torch.tensor([0, 1]))
    assert not torch.allclose(images[0], images[1])
    scores = D(images[:1].expand(2, -1, -1, -1), torch.tensor([0, 1]))
    assert not torch.allclose(scores[0], scores[1])


def test_the_mlp_has_the_parameters_of_the_recipe(cgan):
    G, D = cgan.Generator(100, 10, 32, 1), cgan.Discriminator(10, 32, 1, "mlp", "concat")
    sizes = [110, 128, 256, 512, 1024, 1024]
    linear = sum(a * b + b for a, b in zip(sizes, sizes[1:]))
    assert sum(p.numel() for p in G.parameters()) == linear + 2 * (256 + 512 + 1024) + 100
    assert sum(p.numel() for p in D.parameters()) == 1034 * 512 + 512 + 2 * (512 * 512 + 512) + 513 + 100
    projection = cgan.Discriminator(10, 32, 1, "mlp", "projection")
    assert sum(p.numel() for p in projection.parameters()) == 1024 * 512 + 512 + 2 * (512 * 512 + 512) + 513 + 10 * 512
    assert all(m.eps == 1e-5 for m in G.modules() if isinstance(m, nn.BatchNorm1d))


def test_noise_on_what_the_discriminator_sees(cgan):
    """In training alone, new for each pass and each pixel, of the deviation asked for."""
    seen = []
    D = cgan.Discriminator(3, 64, 1, "mlp", "projection", noise=0.2)
    D.features.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images, labels = torch.zeros(20, 1, 64, 64), torch.zeros(20, dtype=torch.long)
    for training in (True, True, False):
        D.train(training)(images, labels)
    assert not torch.equal(seen[0], seen[1]) and seen[0].mean().abs() < 0.01
    assert seen[0].std().item() == pytest.approx(0.2, rel=0.02)
    assert not seen[2].any()
    given = {(): 0.1, ("--arch", "conv"): 0.3, ("--arch", "conv", "--noise", "0"): 0.0, ("--noise", "0.3"): 0.3}
    assert all(cgan.parse_args(list(argv)).noise == noise for argv, noise in given.items())


def test_projection_by_hand(cgan):
    """D(x, y) = w.h(x) + b + e(y).h(x)."""
    _, D = networks(cgan)
    x, labels = torch.randn(5, 1, 16, 16), torch.tensor([0, 1, 2, 2, 0])
    h = D.features(x.flatten(1))
    wanted = (
        h @ D.score.weight[0] + D.score.bias + torch.stack([h[i] @ D.embed.weight[y] for i, y in enumerate(labels)])
    )
    torch.testing.assert_close(D(x, labels)[:, 0], wanted)


class Fixed(nn.Module):
    """A network of one weight with a known answer."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x, labels):
        return self.weight * x * labels[:, None]


def test_losses_by_hand(cgan):
    """With G(z, y) = 2zy and D(x, y) = 3xy every number can be worked out."""
    G, D = Fixed(2.0), Fixed(3.0)
    z, labels, real = torch.tensor([[0.5], [1.0]]), torch.tensor([1, 2]), torch.tensor([[1.0], [0.5]])
    g_loss, scores = cgan.generator_step(G, D, torch.optim.SGD(G.parameters(), lr=0.1), z, labels)
    assert scores.flatten().tolist() == [3.0, 24.0]  # 3 * (2 * 0.5 * 1) * 1 and 3 * (2 * 1 * 2) * 2
    assert g_loss.item() == ((3 - 1) ** 2 + (24 - 1) ** 2) / 2
    # dL/dw = mean(2 (score - 1) * score / w)
    assert G.weight.item() == pytest.approx(2 - 0.1 * ((2 * 2 * 1.5) + (2 * 23 * 12)) / 2)
    d_loss = cgan.discriminator_step(D, torch.optim.SGD(D.parameters(), lr=0.1), real, labels, labels, scores)
    assert d_loss.item() == ((3 - 1) ** 2 + (3 - 1) ** 2) / 4 + (3**2 + 24**2) / 4
    D, shown = Fixed(3.0), torch.tensor([2, 2])  # real images score 3 * 1 * 2 and 3 * 0.5 * 2; the first is no 2
    d_loss = cgan.discriminator_step(D, torch.optim.SGD(D.parameters(), lr=0.1), real, labels, shown, D(z, labels))
    assert d_loss.item() == (6**2 + (3 - 1) ** 2) / 4 + (1.5**2 + 6**2) / 4
    # of fakes 3 * 0.5 * 1 and 3 * 1 * 2; dL/dw = mean((score - target) * score / w)
    assert D.weight.item() == pytest.approx(3 - 0.1 * (6 * 2 + 2 * 1 + 1.5 * 0.5 + 6 * 2) / 2)


def test_images_shown_under_wrong_labels(cgan, images, tmp_path, monkeypatch):
    """The first so many of a batch, under labels drawn from all classes, of which some are right by chance."""
    seen, asked, step, g_step = [], [], cgan.discriminator_step, cgan.generator_step
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cgan, "discriminator_step", lambda *args: (seen.append(args[3:5]), step(*args))[1])
    monkeypatch.setattr(cgan, "generator_step", lambda *args: (asked.append(args[4]), g_step(*args))[1])
    argv = ["--dataset", str(images), "--img_size", "8", "--batch_size", "10", "--n_epochs", "10", "--device", "cpu"]
    for share, n in (("0", 0), ("0.38", 4), ("0.42", 4)):
        seen.clear()
        cgan.train(cgan.parse_args([*argv, "--mislabel", share]))
        labels, shown = (torch.stack(part) for part in zip(*seen))
        wrong = (labels != shown).float().mean(0)
        assert (wrong[:n] > 0.4).all() and (wrong[:n] < 0.95).all() and not wrong[n:].any()  # 2 in 3 of 3 classes
        for drawn in (torch.stack(asked), shown[:, :n]):  # from all classes, alike
            assert not n or (drawn.flatten().bincount(minlength=3) / drawn.numel() > 0.2).all()
    monkeypatch.setattr(cgan, "WORLD", 2)  # processes share the rows
    monkeypatch.setattr(cgan, "dist", MagicMock())
    for rank, n in ((0, 2), (1, 1)):
        seen.clear()
        monkeypatch.setattr(cgan, "RANK", rank)
        cgan.train(cgan.parse_args([*argv, "--mislabel", "0.3"]))
        wrong = torch.stack([labels != shown for labels, shown in seen]).any(0)
        assert wrong.tolist() == [True] * n + [False] * (5 - n)
    given = {(): 0, ("--arch", "conv"): 0.05, ("--arch", "conv", "--mislabel", "0"): 0, ("--mislabel", "0.3"): 0.3}
    assert all(cgan.parse_args(list(argv)).mislabel == share for argv, share in given.items())


@pytest.mark.parametrize("arch", ["mlp", "conv"])
def test_each_step_trains_one_network_alone(cgan, arch):
    G, D = networks(cgan, arch)
    opt_G, opt_D = adam(G), adam(D)
    z, labels, real = torch.randn(6, 4), torch.arange(6) % 3, torch.rand(6, 1, 16, 16) * 2 - 1
    for p in D.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = copy.deepcopy(D.state_dict()), copy.deepcopy(G.state_dict())
    _, scores = cgan.generator_step(G, D, opt_G, z, labels)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), D.state_dict().values()))
    assert all((p.grad == 7).all() for p in D.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before[1].values(), G.state_dict().values()))

    before, gradients = copy.deepcopy(G.state_dict()), [p.grad.clone() for p in G.parameters()]
    weights = [p.clone() for p in D.parameters()]
    cgan.discriminator_step(D, opt_D, real, labels, labels, scores)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), G.state_dict().values()))
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, G.parameters()))
    assert any(not torch.equal(a, p) for a, p in zip(weights, D.parameters()))


def test_one_pass_over_the_fakes_gives_the_gradients_of_two(cgan):
    """The textbook step scores the detached fakes once more; D, without noise, is the same in training."""
    G, D = networks(cgan)
    z, labels, real = torch.randn(6, 4), torch.arange(6) % 3, torch.rand(6, 1, 16, 16) * 2 - 1
    fake = G(z, labels)
    loss = (
        nn.functional.mse_loss(D(real, labels), torch.ones(6, 1))
        + nn.functional.mse_loss(D(fake.detach(), labels), torch.zeros(6, 1))
    ) / 2
    wanted = torch.autograd.grad(loss, list(D.parameters()))
    _, scores = cgan.generator_step(G, D, adam(G), z, labels)
    cgan.discriminator_step(D, adam(D), real, labels, labels, scores)
    for a, p in zip(wanted, D.parameters()):
        torch.testing.assert_close(a, p.grad)


def test_average_of_the_generator(cgan):
    G, _ = networks(cgan)
    G_avg = copy.deepcopy(G)
    start = G.net[0].weight.clone()
    with torch.no_grad():
        G.net[0].weight += 1
    cgan.average(G_avg, G, 0.999, step=1)  # early: (1 + 1) / (10 + 1) is kept
    torch.testing.assert_close(G_avg.net[0].weight, start + 9 / 11)
    cgan.average(G_avg, G, 0.999, step=10**6)
    torch.testing.assert_close(G_avg.net[0].weight, start + 1 - 2 / 11 * 0.999)
    cgan.average(G_avg, G, 0, step=10**6)  # off: the generator as it is
    assert all(torch.equal(a, b) for a, b in zip(G_avg.state_dict().values(), G.state_dict().values()))
    with torch.no_grad():  # what batch norm has seen is averaged, too
        before = G_avg.net[3].running_mean.clone()
        G.net[3].running_mean += 1
    cgan.average(G_avg, G, 0.9, step=10**6)
    torch.testing.assert_close(G_avg.net[3].running_mean, before + 0.1)


def test_column_k_of_the_grid_is_class_k(cgan, small, monkeypatch):
    """A generator that paints its label shows which cell has which."""
    pictures = []
    monkeypatch.setattr(cgan, "save_grid", lambda run, images, columns: pictures.append((images, columns)))
    monkeypatch.setattr(
        cgan.Generator, "forward", lambda G, z, y: (y / 3 * 2 - 1)[:, None, None, None].expand(-1, 3, 16, 16)
    )
    cgan.train(cgan.parse_args([*small, "--n_epochs", "0"]))
    images, columns = pictures[0]
    grid = make_grid(images, nrow=columns, padding=0)
    assert grid.shape == (3, 10 * 16, 3 * 16)
    for k in range(3):
        assert torch.allclose(grid[:, :, k * 16 : k * 16 + 16], torch.tensor(k / 3), atol=1e-6)


def test_generate_spreads_over_the_classes(cgan, small, command):
    run = cgan.train(cgan.parse_args([*small, "--n_epochs", "1"]))
    assert command(cgan, "--resume", run, "--generate", 8) == (0, [])

    def count(folder):
        return {sub.name: len(list(sub.glob("*.png"))) for sub in sorted((run / folder).iterdir())}

    assert count("generated") == {"blue": 3, "green": 3, "red": 2}
    assert command(cgan, "--resume", run, "--generate", 5, "--labels", 2, 0) == (0, [])
    assert count("generated-2") == {"blue": 3, "red": 2}
    assert count("generated") == {"blue": 3, "green": 3, "red": 2}


def test_generated_images_are_of_the_class_asked_for(cgan, small, command, monkeypatch):
    """A generator that paints its label shows what lies in which sub-folder."""
    monkeypatch.setattr(
        cgan.Generator, "forward", lambda G, z, y: (y / 3 * 2 - 1)[:, None, None, None].expand(-1, 3, 16, 16)
    )
    run = cgan.train(cgan.parse_args([*small, "--n_epochs", "0"]))
    assert command(cgan, "--resume", run, "--generate", 6) == (0, [])
    for k, name in enumerate(["blue", "green", "red"]):
        for file in (run / "generated" / name).iterdir():
            assert Image.open(file).getpixel((3, 3)) == (k * 85,) * 3


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--arch", "conv", "--img_size", "20"], "--img_size 20"),
        (["--labels", "3"], "--labels goes with --generate"),
        (["--labels", "-1"], "argument --labels"),
        (["--noise", "-1"], "argument --noise"),
    ],
)
def test_bad_options(cgan, refused, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    refused(cgan, *arguments, says=[says])
    assert not list(tmp_path.iterdir())


def test_labels_outside_the_classes(cgan, small, refused):
    run = cgan.train(cgan.parse_args([*small, "--n_epochs", "0"]))
    refused(cgan, "--resume", run, "--generate", 3, "--labels", 3, says=["--labels 3: the classes are 0 to 2"])
    assert not (run / "generated").exists()


def test_it_learns_the_digits(cgan, tmp_path):
    """After an epoch on the built-in digits the classes differ, and so do the samples of one."""
    options = ["--dataset", "digits", "--n_epochs", "1", "--img_size", "16", "--out_dir", str(tmp_path / "run")]
    run = cgan.train(cgan.parse_args(options))
    G = cgan.load(run)
    labels = torch.arange(10).repeat_interleave(20)
    images = (G(torch.randn(200, 100, generator=torch.Generator().manual_seed(1)), labels) + 1) / 2
    assert math.isfinite(images.sum()) and images.std(0).mean() > 0.01
    means = images.view(10, 20, -1).mean(1)
    assert torch.cdist(means, means).fill_diagonal_(9).min() > 0.5, "two classes look the same"
