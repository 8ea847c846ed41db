"""pixelcnnpp.py: the mixture of logistics, the network and drawing; runs on images and on codes."""

import csv
import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkpoint
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor


@pytest.fixture
def pixelcnnpp():
    import pixelcnnpp

    return pixelcnnpp


# ---------------------------------------------------------------- the mixture of logistics


def mixtures(n, channels, seed=0):
    """The network's output for n pixels: means all over [-1, 1] and beyond, scales from sharp to flat."""
    torch.manual_seed(seed)
    out = torch.randn(n, 10, {1: 3, 3: 10}[channels], dtype=torch.float64)
    out[:, :, 1 + channels : 1 + 2 * channels] *= 2
    out[:, :, 1 + channels : 1 + 2 * channels] -= 3
    return out.flatten(1)


def by_distributions(out, x):
    """p(x) of pixels x (N, C), C being 1, 2 or 3, as differences of cumulative distribution functions."""
    n, channels = x.shape
    out = out.view(n, 10, -1)
    p = out[:, :, 0].softmax(1)
    scaled = x.double() / 127.5 - 1
    for c in range(channels):
        mean = out[:, :, 1 + c]
        scale = out[:, :, 1 + channels + c].clamp(-7, 7).exp()
        if c == 1:
            mean = mean + out[:, :, 1 + 2 * channels].tanh() * scaled[:, :1]
        if c == 2:
            mean = mean + out[:, :, 8].tanh() * scaled[:, :1] + out[:, :, 9].tanh() * scaled[:, 1:2]
        logistic = torch.distributions.TransformedDistribution(
            torch.distributions.Uniform(torch.zeros_like(mean), torch.ones_like(mean)),
            [torch.distributions.SigmoidTransform().inv, torch.distributions.AffineTransform(mean, scale)],
            validate_args=False,
        )
        value = x[:, c : c + 1]
        below = torch.where(value == 0, 0.0, logistic.cdf(scaled[:, c : c + 1] - 1 / 255))
        up_to = torch.where(value == 255, 1.0, logistic.cdf(scaled[:, c : c + 1] + 1 / 255))
        p = p * (up_to - below)
    return p.sum(1)


def test_grey_probabilities_add_up(pixelcnnpp):
    out = mixtures(50, 1).repeat_interleave(256, 0)
    x = torch.arange(256).repeat(50)[:, None]
    p = pixelcnnpp.mixture_log_prob(out, x).exp().view(50, 256)
    torch.testing.assert_close(p.sum(1), torch.ones(50, dtype=torch.float64))
    assert p.max() > 0.5
    assert p.min() < 1e-6


def test_colour_probabilities_add_up(pixelcnnpp):
    """Over blue they add up to those of red and green."""
    out = mixtures(20, 3)
    red, green = torch.randint(256, (2, 20))
    x = torch.stack([red, green], 1).repeat_interleave(256, 0)
    x = torch.cat([x, torch.arange(256).repeat(20)[:, None]], 1)
    p = pixelcnnpp.mixture_log_prob(out.repeat_interleave(256, 0), x).exp().view(20, 256)
    of_two = out.view(20, 10, 10)[:, :, [0, 1, 2, 4, 5, 7]].flatten(1)
    torch.testing.assert_close(p.sum(1), by_distributions(of_two, torch.stack([red, green], 1)))


@pytest.mark.parametrize("channels", [1, 3])
def test_it_is_a_difference_of_distribution_functions(pixelcnnpp, channels):
    out = mixtures(3000, channels, seed=1)
    x = torch.randint(256, (3000, channels))
    x[:900:3] = 0  # the lowest and the highest value have the tails
    x[1:900:3] = 255
    p = pixelcnnpp.mixture_log_prob(out, x).exp()
    torch.testing.assert_close(p, by_distributions(out, x), rtol=1e-6, atol=1e-13)
    assert p.max() > 0.1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [1, 30, 1000])
def test_log_probabilities_and_gradients_are_finite(pixelcnnpp, channels, factor):
    out = (factor * mixtures(3000, channels)).float().requires_grad_()
    x = torch.randint(256, (3000, channels))
    x[:1000] = 0
    x[1000:2000] = 255
    log_p = pixelcnnpp.mixture_log_prob(out, x)
    (gradient,) = torch.autograd.grad(log_p.sum(), out)
    assert log_p.isfinite().all()
    assert (log_p <= 1e-5).all()
    assert gradient.isfinite().all()
    assert gradient.any()


def test_drawn_colours_follow_the_probabilities(pixelcnnpp):
    """A few narrow logistics, so that few colours are likely, and each channel depends on those before."""
    torch.manual_seed(0)
    out = torch.zeros(1, 10, 10)
    out[0, :, 0] = torch.tensor([0.0, 1.0, 0.5, -1.0] + [-9.0] * 6)
    out[0, :, 1:4] = torch.randn(10, 3) * 0.7
    out[0, 0, 1:4] = 1.5  # brighter than white
    out[0, :, 4:7] = -6.2
    out[0, :, 7:] = torch.randn(10, 3)
    out = out.flatten(1)
    x = pixelcnnpp.draw_from_mixture(out.expand(50_000, -1), 3)
    assert x.shape == (50_000, 3)
    assert x.dtype == torch.int64
    assert x.min() >= 0
    assert x.max() == 255
    colours, counts = x.unique(dim=0, return_counts=True)
    p = pixelcnnpp.mixture_log_prob(out.expand(len(colours), -1), colours).exp()
    top = counts.topk(20).indices
    torch.testing.assert_close(counts[top] / 50_000, p[top], rtol=0.2, atol=0)
    assert 0.97 < p.sum() <= 1.0001  # nothing that is likely is missing


# ---------------------------------------------------------------- the network


def network(
    pixelcnnpp, softmax=True, n_values=2, channels=1, size=4, dim=4, n_layers=1, dropout=0.0, n_classes=0
):
    torch.manual_seed(0)
    return pixelcnnpp.PixelCNNpp(softmax, n_values, channels, size, dim, n_layers, dropout, n_classes)


def trained_network(pixelcnnpp, *arguments, **options):
    """A small network in float64 that has taken some training steps, so that nothing is as it began."""
    model = network(pixelcnnpp, *arguments, **options).double()
    n_classes = options.get("n_classes", 0)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(10):
        x = torch.randint(model.n_values, (16, model.channels, model.size, model.size))
        x[:, :, 1:] = x[:, :, :1]  # columns
        labels = torch.arange(16) % n_classes if n_classes else None
        loss = -model.log_prob(x, labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def test_the_probabilities_of_all_continuations_add_up(pixelcnnpp):
    """Of two rows of a black and white image of 4 x 4, divided by the probability of these rows."""
    model = trained_network(pixelcnnpp)
    lower_half = torch.tensor(list(itertools.product((0, 1), repeat=8))).view(256, 1, 2, 4)
    for _ in range(3):
        upper_half = torch.randint(2, (1, 1, 2, 4)).expand(256, -1, -1, -1)
        x = torch.cat([upper_half, lower_half], 2)
        logits = model(x[:1], None)[0, :, :2].permute(1, 2, 0)
        log_p_of_rows = torch.distributions.Categorical(logits=logits).log_prob(x[0, 0, :2]).sum()
        p = (model.log_prob(x, None).double() - log_p_of_rows).exp()
        assert p.sum().item() == pytest.approx(1, abs=1e-4)
        assert p.max() > 3 / 256  # it has learnt something


@pytest.mark.parametrize("n_layers", [1, 2])
def test_no_position_sees_a_later_one(pixelcnnpp, n_layers):
    """And with two blocks on each size it sees all before it: there is no blind spot."""
    size = 12
    model = trained_network(pixelcnnpp, n_values=5, size=size, n_layers=n_layers)
    embedded = []

    def keep(module, args, output):
        embedded.append(output.requires_grad_())

    model.embed.register_forward_hook(keep)
    out = model(torch.randint(5, (1, 1, size, size)), None)
    row = torch.arange(size)[:, None]
    column = torch.arange(size)
    for i, j in [(0, 0), (0, 5), (5, 0), (6, 4), (7, 3), (8, 8), (10, 10), (11, 2)]:
        (gradient,) = torch.autograd.grad(out[0, :, i, j].sum(), embedded, retain_graph=True)
        seen = gradient[0].abs().sum(-1) > 0
        before = torch.arange(size**2).view(size, size) < i * size + j
        assert not (seen & ~before).any()
        near = before & (row >= i - 3) & (abs(column - j) <= 3)  # what the first filters reach
        assert (seen | ~near).all()
        if n_layers == 2 and (i, j) == (11, 2):
            assert seen[:11].all()


def test_the_sizes_and_the_short_cuts(pixelcnnpp):
    """As many blocks on the whole, half and quarter size; what goes up sees what came down (figure 2)."""
    model = network(pixelcnnpp, n_values=3, size=16, dim=8, n_layers=2, dropout=0.5)
    inputs = []
    outputs = []

    def note(block, args, output):
        inputs.append(args)
        outputs.append(output)

    for block in model.modules():
        if isinstance(block, pixelcnnpp.GatedBlock):
            block.register_forward_hook(note)
            assert block.dropout.p == 0.5
    model(torch.randint(3, (2, 1, 16, 16)), None)
    sizes = [16, 16, 8, 8, 4, 4, 4, 4, 8, 8, 16, 16]
    assert [out.shape[2:] for out in outputs] == [(n, n) for n in sizes for _ in "ab"]
    x = [args[0] for args in inputs]
    other = [args[1] for args in inputs]
    assert all(a is b for a, b in zip(x[2:], outputs))  # each of the two streams is one chain
    for k in range(0, 12, 2):  # u and ul, going down and, in reverse order, up
        u, ul = outputs[k : k + 2]
        up = 22 - k
        assert other[k] is None
        assert other[k + 1] is u
        assert other[up] is u
        assert torch.equal(other[up + 1], torch.cat([outputs[up], ul], 1))


def test_weights_start_with_norm_1(pixelcnnpp):
    model = network(pixelcnnpp, n_values=3, n_layers=2)
    n_convs = 0
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            is_conv = isinstance(module, torch.nn.Conv2d)
            outputs = module.weight if is_conv else module.weight.transpose(0, 1)
            torch.testing.assert_close(outputs.flatten(1).norm(dim=1), torch.ones(len(outputs)))
            assert torch.nn.utils.parametrize.is_parametrized(module, "weight")
            n_convs += 1
    assert n_convs == 2 + 24 * 2 + 18 + 8 + 1  # first, two per block, for others, to resize, last


def concat_elu(x):
    return torch.cat([F.elu(x), F.elu(-x)], 1)


def shifted(conv, x):
    """A filter by hand: 2 high it also sees the row above; 2 wide what is left, 3 wide what is right, too."""
    _, conv = conv
    right = {2: 0, 3: 1}[conv.weight.shape[3]]
    return F.conv2d(F.pad(x, (1, right, 1, 0)), conv.weight, conv.bias, conv.stride)


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("resize", ["", "halve", "double"])
def test_a_block_by_hand(pixelcnnpp, width, resize):
    """x + a sigmoid(b), with ELUs of x and -x, dropout before the second filter, and the label after it."""
    torch.manual_seed(0)
    block = pixelcnnpp.GatedBlock(width, resize, 3, dim=4, dropout=0.5, n_classes=2).eval()
    block.label_bias.data.normal_()
    size = {"": 8, "halve": 4, "double": 16}[resize]
    x, other, labels = torch.randn(5, 4, 8, 8), torch.randn(5, 3, size, size), torch.tensor([0, 1, 1, 0, 1])
    inputs = []

    def keep(module, args):
        inputs.append(args[0])

    block.second.register_forward_pre_hook(keep)
    same_size = x
    if resize == "halve":
        same_size = shifted(block.resize, x)
    if resize == "double":
        same_size = F.conv_transpose2d(x, block.resize.weight, block.resize.bias, stride=2)
    h = shifted(block.first, concat_elu(same_size))
    h = h + F.conv2d(concat_elu(other), block.other.weight, block.other.bias)
    a, b = (shifted(block.second, concat_elu(h)) + block.label_bias[labels][:, :, None, None]).chunk(2, 1)
    torch.testing.assert_close(block(x, other, labels), same_size + a * b.sigmoid())
    block.train()(x, other, labels)
    kept = inputs[1] != 0
    torch.testing.assert_close(inputs[1][kept], 2 * inputs[0][kept])
    assert 0.4 < kept.float().mean() < 0.6


@pytest.mark.parametrize("softmax, n_values, channels", [(True, 7, 1), (False, 256, 1), (False, 256, 3)])
def test_the_first_and_the_last_filters_by_hand(pixelcnnpp, softmax, n_values, channels):
    model = trained_network(pixelcnnpp, softmax, n_values, channels, size=8)
    x = torch.randint(n_values, (3, channels, 8, 8))
    inputs = model.embed.weight[x[:, 0]].permute(0, 3, 1, 2) if softmax else x / 127.5 - 1
    inputs = inputs.double()
    first = []
    last = []

    def keep_first(module, args):
        first.append(args[0])

    def keep_last(module, args):
        last.append(args[0])

    model.down[0][0].register_forward_pre_hook(keep_first)
    model.down[0][1].register_forward_pre_hook(keep_first)
    model.out.register_forward_pre_hook(keep_last)
    out = model(x, None)
    _, conv = model.first_u
    u = F.conv2d(F.pad(inputs, (3, 3, 3, 0)), conv.weight, conv.bias)[:, :, :8] + model.position_bias
    torch.testing.assert_close(first[0], u, rtol=1e-5, atol=1e-5)
    _, conv = model.first_ul
    ul = u + F.conv2d(F.pad(inputs, (3, 0)), conv.weight, conv.bias)[:, :, :, :8]
    torch.testing.assert_close(first[1], ul, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, F.conv2d(F.elu(last[0]), model.out[1].weight, model.out[1].bias))


def test_everything_is_learnt(pixelcnnpp):
    """The embeddings, the biases of positions and, in every block, those of both labels."""
    model = network(pixelcnnpp, n_values=3, dim=16, n_layers=2, n_classes=2)
    x = torch.randint(3, (20, 1, 4, 4))
    model.log_prob(x, torch.arange(20) % 2).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.any(), name
        if "label" in name:
            assert p.grad[:, :16].any(1).all(), name
            assert p.grad[:, 16:].any(1).all(), name
    assert sum("label" in name for name, _ in model.named_parameters()) == 24


@pytest.mark.parametrize("softmax, n_values, channels", [(True, 6, 1), (False, 256, 3)])
def test_log_prob_is_the_sum_of_the_conditionals(pixelcnnpp, softmax, n_values, channels):
    """Of each position given those before it, one at a time, with the later ones set to something else."""
    model = trained_network(pixelcnnpp, softmax, n_values, channels)
    x = torch.randint(n_values, (3, channels, 4, 4))
    total = torch.zeros(3, dtype=torch.float64)
    for i, j in itertools.product(range(4), repeat=2):
        before = (torch.arange(16) < 4 * i + j).view(4, 4)
        out = model(torch.where(before, x, torch.randint(n_values, x.shape)), None)[:, :, i, j]
        if softmax:
            total += torch.distributions.Categorical(logits=out).log_prob(x[:, 0, i, j])
        else:
            total += by_distributions(out, x[:, :, i, j]).log()
    torch.testing.assert_close(model.log_prob(x, None).double(), total, rtol=1e-5, atol=1e-5)


def test_grey_levels_from_0_to_1_are_refused(pixelcnnpp):
    """They would be nearly black."""
    for model in (network(pixelcnnpp, False, 256, 1), network(pixelcnnpp, False, 256, 3)):
        with pytest.raises(TypeError, match="0 to 255"):
            model.log_prob(torch.rand(2, model.channels, 4, 4), None)


def test_it_learns_colours(pixelcnnpp):
    """Green goes with red, and blue against it: a pixel then costs less than three values of their own."""
    model = network(pixelcnnpp, False, 256, 3, dim=8)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(40):
        red = torch.randint(256, (16, 1, 4, 4))
        x = torch.cat([red, (red + torch.randint(-4, 5, red.shape)).clamp(0, 255), 255 - red], 1)
        loss = -model.log_prob(x, None).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss / 48 / math.log(2) < 6.5  # 8 bits without the other channels; at best about 3.7
    drawn = model.sample(torch.zeros(30, dtype=torch.long)).float() - 127.5
    assert torch.corrcoef(drawn.movedim(1, 0).flatten(1))[0, 1:].tolist() == pytest.approx([1, -1], abs=0.2)


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize("softmax, n_values, channels", [(True, 7, 1), (False, 256, 3)])
def test_the_rows_so_far_are_enough(pixelcnnpp, softmax, n_values, channels):
    """Draw for draw the same as with the whole picture."""
    model = trained_network(pixelcnnpp, softmax, n_values, channels, size=8, n_classes=2)
    labels = torch.tensor([0, 1, 1])
    torch.manual_seed(5)
    drawn = model.sample(labels)
    torch.manual_seed(5)
    x = torch.zeros(3, channels, 8, 8, dtype=torch.long)
    for i, j in itertools.product(range(8), repeat=2):
        out = model(x, labels)[:, :, i, j].float()
        if softmax:
            x[:, 0, i, j] = torch.distributions.Categorical(logits=out).sample()
        else:
            x[:, :, i, j] = pixelcnnpp.draw_from_mixture(out, 3)
    assert torch.equal(drawn, x)
    assert len(x.unique()) > 3
    assert torch.equal(model.log_prob(x, labels), model.log_prob(x, labels))


@pytest.mark.parametrize("softmax, n_values, channels", [(True, 7, 1), (False, 256, 3)])
def test_weights_that_are_not_finite_draw_nothing(pixelcnnpp, softmax, n_values, channels):
    model = network(pixelcnnpp, softmax, n_values, channels)
    model.position_bias.data[:, :, 3, 3] = math.nan
    with pytest.raises(pixelcnnpp.InputError, match="finite"):
        model.sample(torch.zeros(2, dtype=torch.long))
    model = network(pixelcnnpp, softmax, n_values, channels)
    model.out[1].bias.data[1] = math.nan  # of the mixture: a mean alone
    with pytest.raises(pixelcnnpp.InputError, match="finite"):
        model.sample(torch.zeros(2, dtype=torch.long))


def test_bfloat16_draws_no_value_too_often(pixelcnnpp):
    """A uniform random number of 8 bits is 0, whose logistic is minus infinity, once in some hundred."""
    model = network(pixelcnnpp, False, 256, 3).bfloat16()
    model.out[1].parametrizations.weight.original0.data.zero_()
    model.out[1].bias.data = torch.tensor([0.0, 0.5, 0.5, 0.5, -5, -5, -5, 0, 0, 0] * 10).bfloat16()
    assert model.sample(torch.zeros(200, dtype=torch.long)).min() > 100


# ---------------------------------------------------------------- the script, on images

TINY = ["--hidden_dim", "4", "--batch_size", "8", "--device", "cpu", "--n_epochs", "1"]


@pytest.fixture
def small(images, tmp_path, monkeypatch):
    """Options of a short training, 6 steps, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return ["--dataset", str(images), "--img_size", "4", *TINY]


@pytest.fixture
def steps(pixelcnnpp, monkeypatch):
    """The values of every training step and of every test, each in a list."""
    seen = {"train": [], "test": []}
    log_prob = pixelcnnpp.PixelCNNpp.log_prob

    def record(model, x, labels=None):
        seen["train" if model.training else "test"].append(x.clone())
        return log_prob(model, x, labels)

    monkeypatch.setattr(pixelcnnpp.PixelCNNpp, "log_prob", record)
    return seen


def train(pixelcnnpp, *arguments):
    return pixelcnnpp.train(pixelcnnpp.parse_args([*map(str, arguments)]))


def log(run):
    """The rows of a run's log, in numbers."""
    rows = csv.DictReader((run / "log.csv").read_text().splitlines())
    return [{name: float(value) for name, value in row.items()} for row in rows]


def read(pixelcnnpp, folder):
    """The images of a folder and their labels."""
    return pixelcnnpp.load_data(pixelcnnpp.parse_args(["--dataset", str(folder), "--img_size", "4"]))[:2]


def test_one_step(pixelcnnpp, small, monkeypatch):
    """By hand: gradient descent on -log p(x) per image, and its average, which moves from where it began."""

    def sgd(parameters, lr, betas, fused):
        return torch.optim.SGD(parameters, lr)

    monkeypatch.setattr(torch.optim, "Adam", sgd)
    options = ["--batch_size", "40", "--lr", "0.01", "--seed", "3", "--conditional", "--dropout", "0"]
    state = checkpoint(train(pixelcnnpp, *small, *options))
    images, labels = read(pixelcnnpp, small[1])
    is_train = torch.arange(54) % 10 != 0
    images, labels = images[is_train], labels[is_train]
    pixelcnnpp.seed(3, "epoch", 0)
    chosen = next(iter(pixelcnnpp.make_loader(torch.arange(48).byte(), labels, 40)))[0].long()
    torch.manual_seed(3)
    before = pixelcnnpp.PixelCNNpp(False, 256, 3, 4, 4, 1, 0.0, 3)
    model = pixelcnnpp.PixelCNNpp(False, 256, 3, 4, 4, 1, 0.0, 3)
    model.load_state_dict(before.state_dict())
    (-model.log_prob(images[chosen].long(), labels[chosen]).mean()).backward()
    assert state["step"] == 1
    for name, p in model.named_parameters():
        old = before.get_parameter(name)
        new = p.detach() - 0.01 * p.grad
        torch.testing.assert_close(state["model"][name], new, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(state["model_avg"][name], old + 0.9 * (new - old), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "arguments, channels, softmax, n_out",
    [
        ([], 3, False, 100),  # ten logistics: each a logit, three means, three log-scales, three coefficients
        (["--channels", "1"], 1, False, 30),
        (["--binarize"], 1, True, 2),
    ],
)
def test_the_data_decides(pixelcnnpp, small, arguments, channels, softmax, n_out):
    run = train(pixelcnnpp, *small, "--batch_size", "48", *arguments)
    model = pixelcnnpp.load(run)
    assert (model.channels, model.softmax, model.out[1].out_channels) == (channels, softmax, n_out)
    x = model.sample(torch.zeros(2, dtype=torch.long))
    assert x.shape == (2, channels, 4, 4)
    assert model.log_prob(x, None).isfinite().all()
    assert model.images(x).max() <= 1
    assert Image.open(run / "images/sample_00000001.png").size == (10 * 6 + 2, 3 * 6 + 2)
    assert pixelcnnpp.parse_args(["--resume", str(run)]).channels == channels


def test_the_default_sizes(pixelcnnpp, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opt = pixelcnnpp.parse_args([])
    assert (opt.hidden_dim, opt.n_layers, opt.dropout, opt.batch_size) == (32, 1, 0.5, 16)
    opt = pixelcnnpp.parse_args(["--n_layers", "2", "--dropout", "0.3", "--binarize"])
    opt.classes = ["all"]
    opt.n_values = 2
    model = pixelcnnpp.new_model(opt)
    assert len(model.down) == len(model.up) == 6
    assert model.up[5][1].dropout.p == 0.3


def test_binary_pixels_are_drawn_anew_but_not_in_the_test(pixelcnnpp, small, steps):
    options = [*small, "--batch_size", "24", "--binarize"]
    train(pixelcnnpp, *options, "--n_epochs", "2", "--sample_interval", "2")
    one, two = torch.cat(steps["train"][:2]), torch.cat(steps["train"][2:])
    assert one.shape == two.shape == (48, 1, 4, 4)
    assert set(one.unique().tolist()) == {0, 1}
    assert sorted(one.flatten(1).tolist()) != sorted(two.flatten(1).tolist())
    train(pixelcnnpp, *options, "--seed", "1")
    assert len(steps["test"]) == 3  # after 2 and 4 steps; after 2
    for x in steps["test"]:
        assert torch.equal(x, steps["test"][0])
        assert set(x.unique().tolist()) == {0, 1}


def test_every_tenth_image_of_a_folder_is_for_the_test(pixelcnnpp, small, steps):
    """And only for it; the averaged model is tested."""
    run = train(pixelcnnpp, *small, "--batch_size", "16", "--lr", "0.01", "--sample_interval", "2")
    images, _ = read(pixelcnnpp, small[1])
    is_test = torch.arange(54) % 10 == 0
    assert sorted(torch.cat(steps["train"]).tolist()) == sorted(images[~is_test].tolist())
    model = pixelcnnpp.load(run)
    nats = -model.log_prob(images[is_test].long(), None).mean().item()
    assert [row["step"] for row in log(run)] == [2, 3]
    assert log(run)[-1]["test_nats"] == pytest.approx(nats, rel=1e-4)
    assert log(run)[-1]["test_bits_per_dim"] == pytest.approx(nats / math.log(2) / 48, rel=1e-4)
    assert torch.equal(model.images(images.long()), images / 255)


@pytest.fixture
def shades(pixelcnnpp, monkeypatch):
    """Instead of drawing, paint the label; gives how many images each drawing had."""
    numbers = []

    def sample(model, labels):
        numbers.append(len(labels))
        return (100 * labels)[:, None, None, None].expand(-1, 3, 4, 4).clone()

    monkeypatch.setattr(pixelcnnpp.PixelCNNpp, "sample", sample)
    return numbers


def test_each_class_has_its_column_and_its_folder(pixelcnnpp, small, command, shades):
    run = train(pixelcnnpp, *small, "--batch_size", "48", "--conditional")
    grid = Image.open(run / "images/sample_00000001.png")
    assert [grid.getpixel((4 + 6 * k, 4))[0] for k in range(4)] == [0, 100, 200, 0]
    shades.clear()
    assert command(pixelcnnpp, "--resume", run, "--generate", 105) == (0, [])
    assert shades == [100, 5]
    for name, shade in [("blue", 0), ("green", 100), ("red", 200)]:
        files = list(run.glob(f"generated/{name}/*.png"))
        assert len(files) == 35
        for file in files:
            assert Image.open(file).getpixel((3, 3)) == (shade,) * 3


def test_it_learns_what_a_label_means(pixelcnnpp, small):
    """The classes differ in colour: an image is likeliest given its own."""
    options = ["--conditional", "--lr", "0.03", "--n_epochs", "3", "--dropout", "0"]
    model = pixelcnnpp.load(train(pixelcnnpp, *small, *options))
    images, labels = read(pixelcnnpp, small[1])
    log_p = [model.log_prob(images.long(), torch.full((len(images),), k)) for k in range(3)]
    assert (torch.stack(log_p).argmax(0) == labels).float().mean() > 0.75  # 1/3 by chance


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--likelihood", "logistic"], ["--likelihood"]),
        (["--hidden_dim", "1"], ["--hidden_dim", "at least 2"]),
        (["--n_layers", "0"], ["--n_layers", "at least 1"]),
        (["--dropout", "1"], ["--dropout", "less than 1"]),
        (["--binarize", "--channels", "3"], ["--binarize", "--channels 3"]),
    ],
)
def test_bad_options(pixelcnnpp, refused, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    refused(pixelcnnpp, *arguments, says=says)
    assert not list(tmp_path.iterdir())


def test_sides_that_it_cannot_take(pixelcnnpp, small, refused):
    refused(pixelcnnpp, *small, "--img_size", "6", says=["6 is no", "multiple of 4"])
    assert not Path("runs").exists()


def test_a_diverged_training_says_so(pixelcnnpp, small, refused):
    refused(pixelcnnpp, *small, "--lr", "1e8", "--sample_interval", "1", says=["finite", "lower --lr"])


# ---------------------------------------------------------------- the script, on codes


class Decoder(torch.nn.Module):
    """Code k is an even shade of red, 2 x 2 pixels of k / 999."""

    def forward(self, codes):
        red = (codes / 999)[:, None]
        image = torch.cat([red, torch.zeros_like(red), torch.zeros_like(red)], dim=1)
        return image.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


@pytest.fixture(scope="session")
def codes_of_vqvae(tmp_path_factory):
    """What a run of vqvae.py leaves: 48 images, and 6 for the test, of 4 x 4 codes 7 or 700, of 1000."""
    folder = tmp_path_factory.mktemp("runs") / "vqvae"
    folder.mkdir()
    random = np.random.default_rng(0)
    codes = random.choice(np.array([7, 700], dtype=np.uint16), (54, 4, 4))
    labels = np.arange(54) % 3
    np.savez_compressed(
        folder / "codes.npz",
        codes=codes[:48],
        labels=labels[:48],
        test_codes=codes[48:],
        test_labels=labels[48:],
        classes=np.array(["blue", "green", "red"]),
        n_embeddings=1000,
    )
    example = (torch.zeros(2, 4, 4, dtype=torch.long),)
    program = torch.export.export(Decoder(), example, dynamic_shapes=({0: torch.export.Dim("N", max=9999)},))
    torch.export.save(program, folder / "decoder.pt2")
    (folder / "checkpoint.pt").touch()  # which is how a run is told from a folder of images
    return folder


@pytest.fixture
def codes(codes_of_vqvae, tmp_path, monkeypatch):
    """A copy of it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(codes_of_vqvae, Path("runs/vqvae"))


def test_it_learns_from_the_codes(pixelcnnpp, codes, steps):
    """From those to train with; and it is tested with those for the test."""
    run = train(pixelcnnpp, "--dataset", codes, *TINY, "--n_epochs", "3", "--lr", "0.05", "--dropout", "0")
    with np.load(codes / "codes.npz") as arrays:
        x = torch.from_numpy(arrays["codes"].astype(int))[:, None]
        tests = torch.from_numpy(arrays["test_codes"].astype(int))[:, None]
    assert sorted(torch.cat(steps["train"][:6]).tolist()) == sorted(x.tolist())
    assert all(torch.equal(seen, tests) for seen in steps["test"])
    model = pixelcnnpp.load(run)
    assert (model.softmax, model.n_values, model.size) == (True, 1000, 4)
    nats = -model.log_prob(tests, None).mean().item()
    assert log(run)[-1]["test_nats"] == pytest.approx(nats, rel=1e-4)
    assert nats < 16 * math.log(3)  # it knows that each code is one of two, not of 1000


def test_codes_in_images_out(pixelcnnpp, codes, command, refused):
    """A run has its own copy of the decoder: it draws where there is no run of vqvae.py."""
    run = train(pixelcnnpp, "--dataset", codes, "--conditional", *TINY, "--batch_size", "48")
    assert Image.open(run / "images/sample_00000001.png").size == (10 * 10 + 2, 3 * 10 + 2)
    shutil.move(codes, "away")
    shutil.copytree(run, "elsewhere")
    assert command(pixelcnnpp, "--resume", "elsewhere", "--generate", 6) == (0, [])
    for i, name in enumerate(["blue", "green", "red"] * 2):
        picture = pil_to_tensor(Image.open(f"elsewhere/generated/{name}/{i:06}.png"))
        assert picture.shape == (3, 8, 8)
        assert picture[0].any()
        assert not picture[1:].any()
    refused(pixelcnnpp, "--resume", run, "--n_epochs", 2, says=["codes.npz", "runs/vqvae"])
    assert command(pixelcnnpp, "--resume", run, "--n_epochs", 2, "--dataset", "away") == (0, [])
    assert checkpoint(run)["step"] == 2


def test_bad_codes(pixelcnnpp, codes, refused):
    run = train(pixelcnnpp, "--dataset", codes, *TINY, "--batch_size", "48")
    refused(pixelcnnpp, "--dataset", codes, "--binarize", *TINY, says=["--binarize"])
    arrays = dict(np.load(codes / "codes.npz"))
    arrays["test_codes"][0, 0, 0] += 1
    np.savez_compressed(codes / "codes.npz", **arrays)
    refused(pixelcnnpp, "--resume", run, "--n_epochs", 2, says=["not started with the codes"])
    arrays["codes"] = arrays["codes"][:, :3, :3]
    arrays["test_codes"] = arrays["test_codes"][:, :3, :3]
    np.savez_compressed(codes / "codes.npz", **arrays)
    refused(pixelcnnpp, "--dataset", codes, *TINY, says=["3 is no", "multiple of 4"])
    (codes / "codes.npz").write_bytes(b"no zip")
    refused(pixelcnnpp, "--dataset", codes, *TINY, says=["codes.npz", "cannot be read"])
    (codes / "codes.npz").unlink()  # as that of a run which has not ended
    refused(pixelcnnpp, "--dataset", codes, *TINY, says=["codes.npz", "No such file"])
    assert len(list(Path("runs").iterdir())) == 2
