"""gan.py: the networks, the losses and the steps of the GAN and DCGAN."""

import copy

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor


@pytest.fixture
def gan():
    import gan

    return gan


def networks(gan, arch="mlp", img_size=16, channels=1):
    torch.manual_seed(0)
    return gan.Generator(4, img_size, channels, arch), gan.Discriminator(img_size, channels, arch)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("arch", ["mlp", "conv"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("img_size", [8, 24, 32])
def test_shapes_and_ranges(gan, arch, channels, img_size):
    G, D = networks(gan, arch, img_size, channels)
    images = G(torch.randn(5, 4))
    assert images.shape == (5, channels, img_size, img_size)
    assert -1 <= images.min() and images.max() <= 1
    assert D(images).shape == (5, 1)


def test_the_mlp_has_the_parameters_of_the_recipe(gan):
    G, D = gan.Generator(100, 28, 1), gan.Discriminator(28, 1)
    sizes = [100, 128, 256, 512, 1024, 784]
    linear = sum(a * b + b for a, b in zip(sizes, sizes[1:]))
    assert sum(p.numel() for p in G.parameters()) == linear + 2 * (256 + 512 + 1024)
    assert sum(p.numel() for p in D.parameters()) == 785 * 512 + 513 * 256 + 258 * 256 + 257


def test_the_discriminator_sees_how_much_a_batch_varies(gan):
    """One more feature: the mean of all features' deviations in the batch; without it, an image is judged alone."""
    torch.manual_seed(0)
    D, seen = gan.Discriminator(16, 1), []
    D.last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.rand(6, 1, 16, 16, requires_grad=True)
    h, logits = D.features(images), D(images)
    deviation = (h - h.mean(0)).square().mean(0).sqrt().mean()
    torch.testing.assert_close(seen[0], torch.cat([h, deviation.expand(6, 1)], 1))
    assert torch.autograd.grad(seen[0][0, -1], images, retain_graph=True)[0].abs().sum() > 0  # it teaches G
    assert not torch.allclose(D(images[:2]), logits[:2])
    D(images[:1])
    assert seen[-1][0, -1] == 0  # a batch of one
    D = gan.Discriminator(16, 1, spread=False)
    torch.testing.assert_close(D(images[:2]), D(images)[:2])


def test_equal_images_give_finite_gradients(gan):
    """The slope of a deviation of 0, where all fakes are the same, is taken as 0."""
    D, images = gan.Discriminator(16, 1), torch.zeros(4, 1, 16, 16, requires_grad=True)
    D(images).sum().backward()
    assert images.grad.isfinite().all()


def test_dcgan_starts_as_the_paper_says(gan, small):
    """All weights from a normal distribution of deviation 0.02, in training."""
    run = gan.train(gan.parse_args([*small, "--n_epochs", "0", "--arch", "conv", "--img_size", "32"]))
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    for network in (state["G"], state["D"], state["G_avg"]):
        weights = [value for value in network.values() if value.ndim > 1]
        assert len(weights) == 4
        for weight in weights:
            assert weight.numel() < 1000 or abs(weight.std() - 0.02) < 0.002 and abs(weight.mean()) < 0.002
    G, D = networks(gan, "conv", 32, 3)
    kinds = [type(module).__name__ for module in D.features]
    assert kinds.index("BatchNorm2d") > kinds.index("LeakyReLU"), "no batch norm on the discriminator's input layer"
    kinds = [type(module).__name__ for module in G]
    assert kinds.count("BatchNorm2d") == 3 and kinds[-2:] == ["ConvTranspose2d", "Tanh"]


class Fixed(nn.Module):
    """A network of one weight with a known answer."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x):
        return self.weight * x


def test_losses_by_hand(gan):
    """-log sigmoid(a) = log(1 + exp(-a)) for G, and for D the mean of that over real images and fakes."""
    G, D = Fixed(2.0), Fixed(3.0)
    z, real = torch.tensor([[0.5], [-0.1]]), torch.tensor([[0.2], [0.3]])
    fakes, reals = torch.tensor([3.0, -0.6]), torch.tensor([0.6, 0.9])
    g_loss, logits = gan.generator_step(G, D, torch.optim.SGD(G.parameters(), lr=0.1), z)
    torch.testing.assert_close(logits.flatten(), fakes)
    torch.testing.assert_close(g_loss, (1 + torch.exp(-fakes)).log().mean())
    slope = (-(1 - fakes.sigmoid()) * fakes / 2).mean()  # d/dw of -log sigmoid(3 w z), at w = 2
    torch.testing.assert_close(G.weight.detach(), 2 - 0.1 * slope)
    d_loss = gan.discriminator_step(D, torch.optim.SGD(D.parameters(), lr=0.1), real, logits)
    wanted = ((1 + torch.exp(-reals)).log().mean() + (1 + torch.exp(fakes)).log().mean()) / 2
    torch.testing.assert_close(d_loss, wanted)
    slope = (-(1 - reals.sigmoid()) * reals + fakes.sigmoid() * fakes).mean() / 2 / 3  # d/dw at w = 3, fakes' too
    torch.testing.assert_close(D.weight.detach(), 3 - 0.1 * slope)


def test_no_loss_is_infinite_when_the_discriminator_is_sure(gan):
    """What a cross-entropy of sigmoids cannot do."""
    G, D = Fixed(1.0), Fixed(1000.0)
    g_loss, logits = gan.generator_step(G, D, torch.optim.SGD(G.parameters(), lr=0.1), torch.tensor([[-1.0]]))
    assert g_loss == 1000 and G.weight.grad == 1000


@pytest.mark.parametrize("arch", ["mlp", "conv"])
def test_each_step_trains_one_network_alone(gan, arch):
    G, D = networks(gan, arch)
    z, real = torch.randn(6, 4), torch.rand(6, 1, 16, 16) * 2 - 1
    for p in D.parameters():
        p.grad = torch.full_like(p, 7.0)
    weights_D, weights_G = (copy.deepcopy(list(network.parameters())) for network in (D, G))
    _, logits = gan.generator_step(G, D, adam(G), z)
    assert all(torch.equal(a, b) and (b.grad == 7).all() for a, b in zip(weights_D, D.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(weights_G, G.parameters()))

    before, gradients = copy.deepcopy(G.state_dict()), [p.grad.clone() for p in G.parameters()]
    gan.discriminator_step(D, adam(D), real, logits)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), G.state_dict().values()))
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, G.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(weights_D, D.parameters()))


def test_noise_on_what_the_discriminator_sees(gan):
    """In training alone, new for each pass and each pixel, of the deviation asked for."""
    D = gan.Discriminator(64, 1, noise=0.2, spread=False)
    D.features = D.last = nn.Identity()
    images = torch.zeros(20, 1, 64, 64)
    one, two = D(images), D(images)
    assert not torch.equal(one, two) and one.mean().abs() < 0.01
    assert one.std().item() == pytest.approx(0.2, rel=0.02)
    assert torch.equal(D.eval()(images), images)


def test_size_and_noise_go_with_the_arch(gan, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of = lambda *arguments: (gan.parse_args(arguments).img_size, gan.parse_args(arguments).noise)  # noqa: E731
    assert of("--arch", "conv") == (32, 0.4) and of() == (28, 0)
    assert of("--arch", "conv", "--noise", "0") == (32, 0) and of("--noise", "0.1", "--img_size", "32") == (32, 0.1)
    refused(gan, "--arch", "conv", "--img_size", 28, says=["--img_size 28", "8"])


def test_average_of_the_generator(gan):
    G, _ = networks(gan)
    G_avg = copy.deepcopy(G)
    start = G[0].weight.clone(), G[3].running_mean.clone()
    with torch.no_grad():
        G[0].weight += 1
        G[3].running_mean += 1  # what batch norm has seen is averaged, too
    gan.average(G_avg, G, 0.9, step=10**6)
    torch.testing.assert_close(G_avg[0].weight, start[0] + 0.1)
    torch.testing.assert_close(G_avg[3].running_mean, start[1] + 0.1)
    gan.average(G_avg, G, 0.9, step=0)  # early: 1 / 10 is kept
    torch.testing.assert_close(G_avg[0].weight, start[0] + 0.1 + 0.9 * 0.9)


def test_generate(gan, small, command):
    run = gan.train(gan.parse_args([*small, "--n_epochs", "1"]))
    assert command(gan, "--resume", run, "--generate", 7) == (0, [])
    assert len(list((run / "generated").glob("*.png"))) == 7
    assert command(gan, "--resume", run, "--generate", 2, "--seed", 5) == (0, [])
    one, two = ((run / folder / "000000.png").read_bytes() for folder in ("generated", "generated-2"))
    assert one != two
    G = gan.load(run)
    torch.manual_seed(5)
    wanted = (G(torch.randn(1, 4))[0] + 1) / 2
    found = to_tensor(Image.open(run / "generated-2" / "000000.png"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.003)
