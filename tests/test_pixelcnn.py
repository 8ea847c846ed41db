"""pixelcnn.py: it is a distribution, no position sees a later one, and what is drawn follows the probabilities."""

import csv
import itertools
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL, SMALLER, make_folder
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor


@pytest.fixture
def pixelcnn():
    import pixelcnn

    return pixelcnn


ARCHES = ["pixelcnn", "gated", "plusplus"]
EVERY = torch.tensor(list(itertools.product((0, 1), repeat=16))).view(-1, 1, 4, 4)  # all binary images of 4x4


def tiny(pixelcnn, arch, n_values=2, size=4, n_layers=2, n_classes=0, steps=20, channels=1, likelihood="softmax"):
    """A small network in float64 that has taken some training steps, so that nothing is as it began."""
    torch.manual_seed(0)
    model = pixelcnn.PixelCNN(arch, likelihood, n_values, channels, size, 4, n_layers, 0.0, n_classes).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(steps):
        x = torch.randint(n_values, (16, channels, size, size))
        x[:, :, 1:] = x[:, :, :1]  # columns
        pixelcnn.train_step(model, optimizer, x, torch.arange(16) % n_classes if n_classes else None)
    model.conditional = n_classes > 0
    return model.eval().requires_grad_(False)


def probabilities(model, k):
    """Of all binary images of 4x4, given class k."""
    parts = EVERY.split(1024)
    labels = [torch.full((len(part),), k) if model.conditional else None for part in parts]
    return torch.cat([model.log_prob(part, y).double().exp() for part, y in zip(parts, labels)])


# ---------------------------------------------------------------- the probability


@pytest.mark.parametrize(
    "arch, n_classes", [("pixelcnn", 0), ("pixelcnn", 3), ("gated", 0), ("gated", 3), ("plusplus", 3)]
)
def test_the_probabilities_of_all_images_add_up(pixelcnn, arch, n_classes):
    model = tiny(pixelcnn, arch, n_layers=1 if arch == "plusplus" else 2, n_classes=n_classes).float()
    found = [probabilities(model, k) for k in range(2 if n_classes and arch != "plusplus" else 1)]  # it takes longer
    for p in found:
        assert p.sum().item() == pytest.approx(1, abs=1e-4)
        assert p.max() > 3 / len(EVERY)  # it has learnt something
    assert len(found) == 1 or not torch.equal(*found)


@pytest.mark.parametrize("arch", ARCHES)
def test_no_position_sees_a_later_one(pixelcnn, arch):
    """Gradients of a position's features in the vectors of all: none from itself or from later ones."""
    size = 12
    model = tiny(pixelcnn, arch, n_values=5, size=size, n_layers=3 if arch != "plusplus" else 1)
    e = model.embed(torch.randint(5, (1, size, size))).movedim(-1, 1).requires_grad_()
    out = model.stack(e, None)
    for i, j in [(0, 0), (0, 5), (5, 0), (6, 4), (7, 3), (8, 8), (9, 11), (10, 10), (11, 11)]:
        seen = torch.autograd.grad(out[0, :, i, j].sum(), e, retain_graph=True)[0].abs().sum((0, 1)) > 0
        before = torch.arange(size**2).view(size, size) < i * size + j
        assert not (seen & ~before).any()
        rows, columns = torch.arange(size)[:, None], torch.arange(size)
        near = before & (rows >= i - 3) & (abs(columns - j) <= 3)  # what the first filter reaches
        assert (seen | ~near).all()
        if arch == "pixelcnn":  # what is up and to the right, further than that and one a layer a row, is never seen
            assert not (seen & before & (columns - j > 3 + (i - rows).clamp(max=3))).any()
        elif arch == "gated":  # each of the 3 layers reaches one position further
            assert not (seen & ((rows < i - 6) | (abs(columns - j) > 6))).any()


def test_the_sizes_of_plusplus(pixelcnn):
    """As many blocks on the whole, half and quarter size, down and up; what goes up sees what came down."""
    seen, given = [], []
    stack = pixelcnn.PixelCNN("plusplus", "softmax", 3, 1, 16, 8, 2, 0.5, 0).stack
    for block in stack.modules():
        if isinstance(block, pixelcnn.PlusPlusBlock):
            block.register_forward_hook(lambda block, args, out: seen.append(out))
            block.register_forward_pre_hook(lambda block, args: given.append(args))
    stack(torch.randn(2, 3, 16, 16), None)
    sizes = [n for n in (16, 16, 8, 8, 4, 4, 4, 4, 8, 8, 16, 16) for _ in "ud"]
    assert [out.shape[2:] for out in seen] == [(n, n) for n in sizes]
    xs, cuts, *_ = zip(*given)
    assert all(x is out for x, out in zip(xs[2:], seen))  # each of the two streams is one chain
    for k in range(0, 12, 2):  # u and ul, going down and, in reverse, up
        (u, ul), up = seen[k : k + 2], 22 - k
        assert cuts[k] is None and cuts[k + 1] is u and cuts[up] is u
        assert torch.equal(cuts[up + 1], torch.cat([seen[up], ul], 1))
    assert all(m.p == 0.5 for m in stack.modules() if isinstance(m, torch.nn.Dropout))
    for m in stack.modules():
        if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            assert torch.nn.utils.parametrize.is_parametrized(m, "weight")
            outputs = m.weight if isinstance(m, torch.nn.Conv2d) else m.weight.transpose(0, 1)
            torch.testing.assert_close(outputs.flatten(1).norm(dim=1), torch.ones(len(outputs)))


@pytest.mark.parametrize("arch", ["pixelcnn", "gated"])
def test_the_mixtures_last_filter_and_whole_channels(pixelcnn, arch):
    """A 1x1 filter of the ELU, in any arch; dropout, but in plusplus, leaves out whole channels."""
    torch.manual_seed(0)
    model, h = pixelcnn.PixelCNN(arch, "logistic", 256, 3, 8, 6, 1, 0.5, 0), torch.randn(2, 6, 5, 5)
    wanted = torch.nn.functional.conv2d(torch.nn.functional.elu(h), model.out[1].weight, model.out[1].bias)
    torch.testing.assert_close(model.out(h), wanted)
    kept = model.stack.dropout(torch.ones(4, 6, 5, 5)).flatten(2)
    assert (kept == kept[:, :, :1]).all() and {*kept.unique().tolist()} == {0, 2}


def test_a_block_of_plusplus(pixelcnn):
    """By hand: x + a sigmoid(b), with ELUs of x and -x, dropout before the second filter, and the label after it."""
    torch.manual_seed(0)
    block = pixelcnn.PlusPlusBlock(2, 3, "", 4, 0.5, 2).eval()
    block.label.data.normal_()
    x, more, seen = torch.randn(5, 4, 8, 8), torch.randn(5, 3, 8, 8), []
    block.second.register_forward_pre_hook(lambda m, args: seen.append(args[0]))

    def both(x):
        return torch.cat([torch.nn.functional.elu(x), torch.nn.functional.elu(-x)], 1)

    def conv(m, x):  # it sees one row above and one column to the left
        return torch.nn.functional.conv2d(torch.nn.functional.pad(x, (1, 0, 1, 0)), m.weight, m.bias)

    h = conv(block.first, both(x)) + torch.nn.functional.conv2d(both(more), block.more.weight, block.more.bias)
    a, b = (conv(block.second, both(h)) + block.label[1][:, None, None]).chunk(2, 1)
    torch.testing.assert_close(block(x, more, torch.ones(5, dtype=int), None), x + a * b.sigmoid())
    block.train()(x, more, torch.ones(5, dtype=int), None)
    torch.testing.assert_close(seen[1][seen[1] != 0], 2 * seen[0][seen[1] != 0])
    assert 0.4 < (seen[1] == 0).float().mean() < 0.6


def test_the_masks(pixelcnn):
    for own in (False, True):
        mask = pixelcnn.MaskedConv(1, 1, 3, own).mask
        assert mask.tolist() == [[1, 1, 1], [1, own, 0], [0, 0, 0]]


@pytest.mark.parametrize("arch", ARCHES)
def test_everything_is_learnt(pixelcnn, arch):
    """The vectors of the values, the biases of the positions and, in every layer, both halves of the labels'."""
    torch.manual_seed(0)
    model = pixelcnn.PixelCNN(arch, "softmax", 3, 1, 4, 16, 3, 0.0, 2)
    x = torch.randint(3, (20, 1, 4, 4))
    pixelcnn.train_step(model, torch.optim.SGD(model.parameters(), 0.1), x, torch.arange(20) % 2)
    for name, p in model.named_parameters():
        first, second = p.grad.flatten(1).chunk(2, 1) if p[0].numel() > 1 else (p.grad, p.grad)
        assert first.any() and second.any(), name
    labels = [name for name, p in model.named_parameters() if "label" in name and p.shape[0] == 2]
    assert len(labels) == (36 if arch == "plusplus" else 3)


def test_dropout_reaches_the_network(pixelcnn, small):
    for arch, given, wanted in (("gated", ["--dropout", "0.4"], 0.4), ("plusplus", [], 0.5), ("pixelcnn", [], 0)):
        run = pixelcnn.train(
            pixelcnn.parse_args([*small, "--n_epochs", "0", "--img_size", "4", "--arch", arch, *given])
        )
        stack = pixelcnn.load(run).stack
        drops = [m.p for m in stack.modules() if isinstance(m, (torch.nn.Dropout, torch.nn.Dropout2d))]
        assert drops and set(drops) == {wanted}


def test_the_blind_spot(pixelcnn):
    """With enough layers, all that came before is seen, but for pixelcnn the upper right."""
    for arch, sees in (("pixelcnn", False), ("gated", True), ("plusplus", True)):
        model = tiny(pixelcnn, arch, n_values=3, size=12, n_layers=2 if arch == "plusplus" else 9, steps=1)
        e = model.embed(torch.randint(3, (1, 12, 12))).movedim(-1, 1).requires_grad_()
        out = model.stack(e, None)
        seen = torch.autograd.grad(out[0, :, 11, 2].sum(), e)[0].abs().sum((0, 1)) > 0
        assert seen[10, 7:].any() == sees and seen[8].any()
        assert seen[:11].all() == sees


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("likelihood, n_values, channels", [("softmax", 6, 1), ("logistic", 256, 3)])
def test_log_prob_is_the_sum_of_the_conditionals(pixelcnn, arch, likelihood, n_values, channels):
    """Of each position given those before it, computed one at a time with the later ones set to something else."""
    model = tiny(pixelcnn, arch, n_values, channels=channels, likelihood=likelihood)
    x = torch.randint(n_values, (3, channels, 4, 4))
    total = torch.zeros(3, dtype=torch.float64)
    for i, j in itertools.product(range(4), repeat=2):
        other = torch.randint(n_values, x.shape)
        keep = (torch.arange(16) < 4 * i + j).view(4, 4)
        out, value = model(torch.where(keep, x, other))[:, :, i, j], x[:, :, i, j]
        if likelihood == "logistic":
            total += pixelcnn.logistic_log_prob(out, value)
        else:
            total += out.log_softmax(1)[torch.arange(3), value[:, 0]]
    torch.testing.assert_close(model.log_prob(x).double(), total, rtol=1e-5, atol=1e-5)


def test_grey_levels_in_0_to_1_are_refused(pixelcnn):
    """They would all be the value 0."""
    for likelihood in ("softmax", "logistic"):
        model = tiny(pixelcnn, "gated", 256, likelihood=likelihood, steps=0)
        with pytest.raises(TypeError, match="0 to 255"):
            model.log_prob(torch.rand(2, 1, 4, 4))
        with pytest.raises(TypeError, match="0 to 255"):
            model.sample(2, given=torch.rand(2, 1, 4, 4), rows=2)


def test_the_test(pixelcnn):
    model = tiny(pixelcnn, "gated")
    x = EVERY[::60]
    row = pixelcnn.test(model, x, torch.zeros(len(x)))
    nats = -model.log_prob(x).mean().item()
    assert row["test_nats"] == pytest.approx(nats, rel=1e-5)
    assert row["test_bits_per_dim"] == pytest.approx(nats / math.log(2) / 16, rel=1e-5)


# ---------------------------------------------------------------- the mixture of logistics


def mixtures(n, channels, seed=0, extreme=1.0):
    """Parameters of n mixtures of 5, float64: means all over [-1, 1] and beyond, scales from sharp to flat."""
    torch.manual_seed(seed)
    size = 1 + 2 * channels + channels * (channels - 1) // 2
    out = torch.randn(n, 5, size, dtype=torch.float64)
    out[:, :, 1 + channels : 1 + 2 * channels] = out[:, :, 1 + channels : 1 + 2 * channels] * 2 - 3  # of scales
    return (extreme * out).flatten(1)


def by_distributions(out, x):
    """p(x) of values x (N, C) as differences of cumulative distribution functions."""
    n, c = x.shape
    out = out.view(n, 5, -1)
    share = out[:, :, 0].softmax(1)
    scaled, p = x.double() / 127.5 - 1, share
    for k in range(c):
        mean, log_scale = out[:, :, 1 + k], out[:, :, 1 + c + k].clamp(-7, 7)
        if k == 1:
            mean = mean + out[:, :, 1 + 2 * c].tanh() * scaled[:, :1]
        if k == 2:
            mean = mean + out[:, :, 8].tanh() * scaled[:, :1] + out[:, :, 9].tanh() * scaled[:, 1:2]
        logistic = torch.distributions.TransformedDistribution(
            torch.distributions.Uniform(torch.zeros_like(mean), torch.ones_like(mean)),
            [
                torch.distributions.SigmoidTransform().inv,
                torch.distributions.AffineTransform(mean, log_scale.exp()),
            ],
            validate_args=False,
        )
        value, edge = scaled[:, k : k + 1], 1 / 255
        low = torch.where(x[:, k : k + 1] == 0, 0.0, logistic.cdf(value - edge))
        p = p * (torch.where(x[:, k : k + 1] == 255, 1.0, logistic.cdf(value + edge)) - low)
    return p.sum(1)


def test_grey_probabilities_add_up(pixelcnn):
    out = mixtures(50, 1)
    x = torch.arange(256).repeat(50)[:, None]
    p = pixelcnn.logistic_log_prob(out.repeat_interleave(256, 0), x).exp().view(50, 256)
    torch.testing.assert_close(p.sum(1), torch.ones(50, dtype=torch.float64))
    assert p.max() > 0.5 and p.min() < 1e-6


def test_colour_probabilities_add_up(pixelcnn):
    """Over blue to those of red and green, and these over green to those of red alone."""
    out = mixtures(20, 3)
    red, green = torch.randint(256, (2, 20))
    parts = out.view(20, 5, 10)
    of_two = parts[:, :, [0, 1, 2, 4, 5, 7]].flatten(1)
    x = torch.stack([red, green], 1).repeat_interleave(256, 0)
    x = torch.cat([x, torch.arange(256).repeat(20)[:, None]], 1)
    p = pixelcnn.logistic_log_prob(out.repeat_interleave(256, 0), x).exp().view(20, 256)
    wanted = by_distributions(of_two, torch.stack([red, green], 1))
    torch.testing.assert_close(p.sum(1), wanted)
    assert not torch.allclose(p.sum(1), by_distributions(of_two, torch.stack([red, 255 - green], 1)))


@pytest.mark.parametrize("channels", [1, 3])
def test_it_is_a_difference_of_logistic_distribution_functions(pixelcnn, channels):
    out = mixtures(3000, channels, seed=1)
    x = torch.randint(256, (3000, channels))
    x[:900:3], x[1:900:3] = 0, 255  # the lowest and highest values have the tails
    p = pixelcnn.logistic_log_prob(out, x).exp()
    torch.testing.assert_close(p, by_distributions(out, x), rtol=1e-6, atol=1e-13)
    assert p.max() > 0.1


@pytest.mark.parametrize("channels", [1, 3])
def test_log_probabilities_and_gradients_stay_finite(pixelcnn, channels):
    for extreme in (1, 30, 1000):
        out = mixtures(3000, channels, extreme=extreme).float().requires_grad_()
        x = torch.randint(256, (3000, channels))
        x[:1000], x[1000:2000] = 0, 255
        log_p = pixelcnn.logistic_log_prob(out, x)
        (gradient,) = torch.autograd.grad(log_p.sum(), out)
        assert log_p.isfinite().all() and (log_p <= 1e-5).all() and gradient.isfinite().all() and gradient.any()


def test_no_colour_is_drawn_too_often_in_bfloat16(pixelcnn):
    """A uniform number of 8 bits is 0, whose logistic is -inf, once in some hundred."""
    torch.manual_seed(0)
    model = pixelcnn.PixelCNN("gated", "logistic", 256, 3, 4, 4, 1, 0.0, 0).bfloat16()
    model.out[-1].parametrizations.weight.original0.data.zero_()
    model.out[-1].bias.data = torch.tensor([0.0, 0.5, 0.5, 0.5, -5, -5, -5, 0, 0, 0] * 10).bfloat16()
    assert model.sample(200).min() > 100


def test_drawn_colours_follow_the_probabilities(pixelcnn):
    """A few narrow logistics, so that few colours are likely, and each channel depends on those before."""
    torch.manual_seed(0)
    out = torch.zeros(1, 5, 10)
    out[0, :, 0] = torch.tensor([0.0, 1.0, 0.5, -1.0, 0.0])
    out[0, :, 1:4] = torch.randn(5, 3) * 0.7
    out[0, 0, 1:4] = 1.5  # brighter than white
    out[0, :, 4:7] = -6.2
    out[0, :, 7:] = torch.randn(5, 3)
    out = out.flatten(1)
    x = pixelcnn.logistic_draw(out.expand(200_000, -1), 3)
    assert x.shape == (200_000, 3) and x.dtype == torch.int64 and x.min() >= 0 and x.max() == 255
    colours, counts = x.unique(dim=0, return_counts=True)
    top = counts.topk(30).indices
    wanted = pixelcnn.logistic_log_prob(out.expand(30, -1), colours[top]).exp()
    torch.testing.assert_close(counts[top] / 200_000, wanted, rtol=0.1, atol=0)
    found = pixelcnn.logistic_log_prob(out.expand(len(colours), -1), colours).exp()
    assert 0.97 < found.sum() <= 1.0001  # nothing that is likely is missing
    cold = pixelcnn.logistic_draw(out.expand(1000, -1), 3, temperature=0.001)
    assert len(cold.unique(dim=0)) == 1


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize("arch", ["pixelcnn", "gated"])
def test_what_is_drawn_follows_the_probabilities(pixelcnn, arch):
    torch.manual_seed(0)
    model = tiny(pixelcnn, arch, n_classes=2).float()
    labels = torch.ones(1000, dtype=torch.long)
    x = torch.cat([model.sample(1000, labels) for _ in range(20)])
    assert x.shape == (20_000, 1, 4, 4)
    drawn = (x.flatten(1) * 2 ** torch.arange(15, -1, -1)).sum(1).bincount(minlength=len(EVERY)) / 20_000
    wanted = probabilities(model, 1).float()
    top = wanted.topk(20).indices
    torch.testing.assert_close(drawn[top], wanted[top], atol=0.005, rtol=0.15)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("likelihood, n_values, channels", [("softmax", 7, 1), ("logistic", 256, 3)])
def test_rows_are_enough(pixelcnn, arch, likelihood, n_values, channels):
    """Draw for draw the same as with the whole picture, so that plusplus follows its probabilities, too."""
    model = tiny(pixelcnn, arch, n_values, 8, 1, 2, channels=channels, likelihood=likelihood)
    labels = torch.tensor([0, 1, 1])
    torch.manual_seed(5)
    by_rows = model.sample(3, labels, temperature=0.9)
    torch.manual_seed(5)
    x = torch.zeros(3, channels, 8, 8, dtype=torch.long)
    for i, j in itertools.product(range(8), repeat=2):
        out = model(x, labels)[:, :, i, j]
        if likelihood == "logistic":
            x[:, :, i, j] = pixelcnn.logistic_draw(out.float(), 3, 0.9)
        else:
            x[:, 0, i, j] = torch.distributions.Categorical(logits=out / 0.9).sample()
    assert torch.equal(by_rows, x) and len(x.unique()) > 3
    nats = model.log_prob(x, labels)
    assert torch.equal(nats, model.log_prob(x, labels))  # drawing leaves nothing behind


def test_weight_norm_is_computed_once_for_a_drawing(pixelcnn, monkeypatch):
    calls, norm = [], torch.nn.utils.parametrizations._WeightNorm.forward
    monkeypatch.setattr(
        torch.nn.utils.parametrizations._WeightNorm, "forward", lambda *args: (calls.append(1), norm(*args))[1]
    )
    model = tiny(pixelcnn, "plusplus", n_layers=1, steps=0)
    filters = sum(hasattr(m, "parametrizations") for m in model.modules())
    calls.clear()
    model.sample(2)
    assert len(calls) == filters > 20


@pytest.mark.parametrize("arch", ARCHES)
def test_completion_keeps_what_is_given(pixelcnn, arch):
    model = tiny(pixelcnn, arch, n_values=7, size=8, n_layers=1)
    given = torch.randint(7, (20, 1, 8, 8))
    before = given.clone()
    x = model.sample(20, given=given, rows=2)
    assert torch.equal(given, before) and torch.equal(x[:, :, :2], given[:, :, :2])
    assert not torch.equal(x[:, :, 2:], given[:, :, 2:])
    assert torch.equal(model.sample(5, given=given[:1], rows=2)[:, :, :2], given[:1, :, :2].expand(5, -1, -1, -1))


def test_the_default_size_of_plusplus(pixelcnn):
    opt = pixelcnn.parse_args(["--arch", "plusplus"])
    assert (opt.n_layers, opt.dropout) == (1, 0.5)
    opt = pixelcnn.parse_args(["--arch", "plusplus", "--n_layers", "2", "--dropout", "0"])
    assert (opt.n_layers, opt.dropout) == (2, 0)


def test_a_low_temperature_draws_what_is_likeliest(pixelcnn):
    model = tiny(pixelcnn, "gated")
    cold, warm = (model.sample(200, temperature=t) for t in (0.001, 1.0))
    assert len(cold.unique(dim=0)) == 1 < len(warm.unique(dim=0))
    assert cold[0, 0, 0, 0] == model(cold)[0, :, 0, 0].argmax()


# ---------------------------------------------------------------- the script, on images


def test_binary_pixels_are_drawn_anew_but_not_in_the_test(pixelcnn, small, monkeypatch):
    seen, tested, step, test = [], [], pixelcnn.train_step, pixelcnn.test
    monkeypatch.setattr(pixelcnn, "train_step", lambda *args: (seen.append(args[2]), step(*args))[1])
    monkeypatch.setattr(pixelcnn, "test", lambda *args: (tested.append(args[1]), test(*args))[1])
    for k in "12":
        torch.seed()  # as in another process
        pixelcnn.train(pixelcnn.parse_args([*small, "--n_epochs", k, "--seed", k, "--binarize"]))
    assert all(set(x.unique().tolist()) == {0, 1} for x in seen) and seen[0].shape == (8, 1, 8, 8)
    assert all(torch.equal(x, tested[0]) for x in tested) and set(tested[0].unique().tolist()) == {0, 1}
    one, two = (torch.cat(seen[k : k + 6]).flatten(1).tolist() for k in (6, 12))
    assert sorted(one) != sorted(two)


def test_grey_levels_are_256_values(pixelcnn, small):
    run = pixelcnn.train(pixelcnn.parse_args([*small, "--n_epochs", "1"]))
    model = pixelcnn.load(run)
    assert model.embed.num_embeddings == 256 and model.decoder is None
    x = model.sample(3)
    assert x.max() > 100 and x.min() >= 0  # an untrained one draws any of them


def last_row(run):
    rows = csv.DictReader((run / "log.csv").read_text().splitlines())
    return {name: float(value) for name, value in list(rows)[-1].items()}


def test_every_tenth_image_of_a_folder_is_for_the_test(pixelcnn, small, monkeypatch):
    """And only for it; the averaged model is tested."""
    seen, step = [], pixelcnn.train_step
    monkeypatch.setattr(pixelcnn, "train_step", lambda *args: (seen.extend(args[2].tolist()), step(*args))[1])
    run = pixelcnn.train(pixelcnn.parse_args([*small, "--n_epochs", "1", "--lr", "0.01"]))
    images = pixelcnn.load_data(pixelcnn.parse_args(["--resume", str(run)]))[0].long()
    assert sorted(seen) == sorted(image for i, image in enumerate(images.tolist()) if i % 10)
    nats = -pixelcnn.load(run).log_prob(images[::10]).mean().item()
    assert last_row(run)["test_nats"] == pytest.approx(nats, rel=1e-4)


def test_it_learns_what_a_label_means(pixelcnn, small):
    """The classes differ in brightness: an image is likeliest given its own."""
    options = ["--binarize", "--conditional", "--lr", "0.02", "--sample_interval", "1000"]
    run = pixelcnn.train(pixelcnn.parse_args([*small, *options, "--n_epochs", "15"]))
    model = pixelcnn.load(run)
    images, labels = pixelcnn.load_data(pixelcnn.parse_args(["--resume", str(run)]))
    torch.manual_seed(0)
    x = (images / 255).bernoulli().long()
    found = torch.stack([model.log_prob(x, torch.full((len(x),), k)) for k in range(3)]).argmax(0)
    assert (found == labels).float().mean() > 0.75  # 1/3 by chance


def test_completion_is_of_the_average_and_of_the_right_class(pixelcnn, small, monkeypatch):
    calls, sample = [], pixelcnn.PixelCNN.sample
    monkeypatch.setattr(
        pixelcnn.PixelCNN, "sample", lambda *args, **k: (calls.append((args, k)), sample(*args, **k))[1]
    )
    run = pixelcnn.train(pixelcnn.parse_args([*small, "--n_epochs", "1", "--conditional"]))
    model, n, labels, given, rows = calls[-1][0]
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["model_avg"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert (n, rows) == (48, 4) and labels.tolist() == torch.arange(3).repeat_interleave(16).tolist()
    pixelcnn.generate(pixelcnn.parse_args(["--resume", str(run), "--generate", "2", "--temperature", "0.5"]))
    assert calls[-1][1] == dict(temperature=0.5)


def test_completion_picture(pixelcnn, small):
    """The first of each row of 8 is a test image; the upper halves of the others are its."""
    run = pixelcnn.train(pixelcnn.parse_args([*small, "--n_epochs", "1"]))
    grid = pil_to_tensor(Image.open(run / "completion.png"))[0]
    cells = [[grid[2 + 10 * r : 10 + 10 * r, 2 + 10 * c : 10 + 10 * c] for c in range(8)] for r in range(6)]
    opt = pixelcnn.parse_args(["--resume", str(run)])
    tests = pixelcnn.load_data(opt)[0][::10]
    for row, image in zip(cells, tests, strict=True):
        assert (row[0].int() - image[0].int()).abs().max() <= 1
        for cell in row[1:]:
            assert torch.equal(cell[:4], row[0][:4]) and not torch.equal(cell[4:], row[0][4:])


def test_which_likelihood_by_the_data(pixelcnn, small):
    for arguments, likelihood, channels, n_out in [
        (["--arch", "pixelcnn"], "softmax", 1, 256),
        (["--arch", "plusplus"], "logistic", 1, 30),  # ten logistics: each a logit, a mean and a scale
        (["--arch", "plusplus", "--binarize"], "bernoulli", 1, 2),
        (["--likelihood", "logistic"], "logistic", 1, 30),
        (["--channels", "3", "--arch", "plusplus", "--conditional"], "logistic", 3, 100),
        (["--channels", "3"], "logistic", 3, 100),
    ]:
        options = [*small, "--n_epochs", "0", "--batch_size", "48", "--img_size", "4", *arguments]
        run = pixelcnn.train(pixelcnn.parse_args(options))
        model = pixelcnn.load(run)
        assert model.options["n_layers"] == 1 and model.out[-1].out_channels == n_out
        assert model.options["likelihood"] == likelihood and model.logistic == (likelihood == "logistic")
        x = model.sample(2, torch.tensor([0, 1]))
        assert x.shape == (2, channels, 4, 4) and Image.open(run / "completion.png").size == (50, 38)
        assert model.log_prob(x, torch.tensor([0, 1])).isfinite().all()
        assert pixelcnn.parse_args(["--resume", str(run), "--n_epochs", "2"]).likelihood == likelihood


def test_colour_needs_the_logistic_likelihood(pixelcnn, small, refused, tmp_path):
    arguments = (*small[:-2], "--n_epochs", 1, "--channels", 3, "--likelihood", "softmax")
    refused(pixelcnn, *arguments, says=["colour", "--channels 1", "--likelihood logistic"])
    refused(pixelcnn, *small[:-2], "--n_epochs", 1, "--channels", 3, "--binarize", says=["colour", "--channels 1"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arch", ARCHES)
def test_it_learns_colours(pixelcnn, arch):
    """Of a pixel, green goes with red, and blue against it: a value then costs less than one of its own would."""
    torch.manual_seed(0)
    model = pixelcnn.PixelCNN(arch, "logistic", 256, 3, 4, 8, 1, 0.0, 0)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(70):
        red = torch.randint(256, (16, 1, 4, 4))
        x = torch.cat([red, (red + torch.randint(-4, 5, red.shape)).clamp(0, 255), 255 - red], 1)
        loss = pixelcnn.train_step(model, optimizer, x, None)["nats"]
    assert loss / 48 / math.log(2) < 6.5  # 8 of red, 3 of green and none of blue would be 3.7, without the others 8
    drawn = model.sample(50).float() - 127.5
    assert torch.corrcoef(drawn.movedim(1, 0).flatten(1))[0, 1:].tolist() == pytest.approx([1, -1], abs=0.2)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--likelihood", "bernoulli"], ["--binarize", "bernoulli"]),
        (["--likelihood", "softmax", "--binarize"], ["--binarize", "bernoulli"]),
        (["--likelihood", "poisson"], ["--likelihood"]),
        (["--hidden_dim", "1"], ["--hidden_dim"]),
        (["--n_layers", "0"], ["--n_layers"]),
        (["--binarize", "--likelihood", "logistic"], ["--binarize", "bernoulli"]),
        (["--dropout", "1"], ["--dropout"]),
        (["--temperature", "0"], ["--temperature"]),
        (["--temperature", "0.5"], ["--temperature", "--generate"]),
        (["--labels", "1"], ["--labels", "--conditional"]),
    ],
)
def test_bad_options(pixelcnn, refused, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    refused(pixelcnn, *arguments, says=says)
    assert not list(tmp_path.iterdir())


def test_labels_are_those_asked_for(pixelcnn, small, command, refused, monkeypatch):
    monkeypatch.setattr(
        pixelcnn.PixelCNN,
        "sample",
        lambda model, n, labels, *args, **k: (
            (100 * labels if labels is not None else torch.zeros(n))[:, None, None, None].expand(n, 1, 8, 8).clone()
        ),
    )
    run = pixelcnn.train(pixelcnn.parse_args([*small, "--n_epochs", "0", "--conditional"]))
    assert command(pixelcnn, "--resume", run, "--generate", 5, "--labels", 2, 0) == (0, [])
    shades = {
        sub.name: {Image.open(f).getpixel((3, 3))[0] for f in sub.iterdir()} for sub in (run / "generated").iterdir()
    }
    assert shades == {"blue": {0}, "red": {200}}
    grid = Image.open(run / "images/sample_000000.png")
    assert [grid.getpixel((6 + 10 * k, 6))[0] for k in range(3)] == [0, 100, 200]
    refused(pixelcnn, "--resume", run, "--generate", 5, "--labels", 3, says=["--labels 3"])


# ---------------------------------------------------------------- the script, on codes


@pytest.fixture
def codes(images, tmp_path, monkeypatch):
    """A small run of vqvae.py, in an empty folder."""
    import vqvae

    monkeypatch.chdir(tmp_path)
    return vqvae.train(vqvae.parse_args(["--dataset", str(images), *SMALL, *SMALLER["vqvae"], "--n_epochs", "1"]))


PRIOR = ["--batch_size", "8", "--hidden_dim", "8", "--n_layers", "1", "--n_epochs", "2"]


def test_codes_in_images_out(pixelcnn, codes, command, refused, tmp_path):
    """The prior has its own copy of the decoder: it draws where there is no run of vqvae.py."""
    import vqvae

    run = pixelcnn.train(pixelcnn.parse_args(["--dataset", str(codes), "--conditional", *PRIOR]))
    shutil.copytree(run, tmp_path / "elsewhere")
    decoder = vqvae.load(codes)
    shutil.move(codes, tmp_path / "away")
    assert command(pixelcnn, "--resume", "elsewhere", "--generate", 6) == (0, [])
    with np.load("elsewhere/generated/codes.npz") as file:
        drawn, labels = file["codes"], file["labels"]
        assert drawn.shape == (6, 4, 4) and labels.tolist() == [0, 1, 2] * 2
    for i, (square, name) in enumerate(zip(drawn, ["blue", "green", "red"] * 2)):
        picture = pil_to_tensor(Image.open(f"elsewhere/generated/{name}/{i:06}.png")) / 255
        wanted = decoder.decode(torch.from_numpy(square.astype(np.int64))[None])[0]
        torch.testing.assert_close(picture, wanted, atol=0.003, rtol=0)
    assert command(vqvae, "--resume", "away", "--decode", "elsewhere/generated/codes.npz") == (0, [])
    refused(
        pixelcnn, "--resume", "elsewhere", "--n_epochs", 3, says=["runs/vqvae: FileNotFoundError", "python vqvae.py"]
    )


def test_it_learns_from_the_codes(pixelcnn, codes):
    """Those to train with for training, those to test with for the test; better than each by its own frequency."""
    with np.load(codes / "codes.npz") as file:
        x, tests = (torch.from_numpy(file[name].astype(np.int64)) for name in ("codes", "test_codes"))
    run = pixelcnn.train(pixelcnn.parse_args(["--dataset", str(codes), *PRIOR, "--n_epochs", "20", "--lr", "0.01"]))
    model = pixelcnn.load(run)
    assert model.size == 4 and model.embed.num_embeddings == 16
    nats = -model.log_prob(tests[:, None]).mean().item()
    assert last_row(run)["test_nats"] == pytest.approx(nats, rel=1e-4)
    share = (x.flatten().bincount(minlength=16) + 1).double()
    alone = -(share / share.sum()).log()[tests].sum((1, 2)).mean().item()
    assert nats < alone


def test_codes_of_another_checkpoint(pixelcnn, codes, refused, command, tmp_path):
    import vqvae

    before = (codes / "codes.npz").read_bytes()
    run = pixelcnn.train(pixelcnn.parse_args(["--dataset", str(codes), *PRIOR]))
    assert command(vqvae, "--resume", codes, "--n_epochs", 2) == (0, [])
    refused(pixelcnn, "--resume", run, "--n_epochs", 3, says=["codes have changed"])
    (codes / "codes.npz").write_bytes(before)
    says = [f"{codes}: ", f"python vqvae.py --resume {codes} --n_epochs 0"]
    refused(pixelcnn, "--dataset", codes, *PRIOR, says=says)
    (codes / "codes.npz").unlink()
    refused(pixelcnn, "--dataset", codes, *PRIOR, says=says)
    assert command(vqvae, "--resume", codes, "--n_epochs", 0) == (0, [])
    refused(pixelcnn, "--dataset", codes, "--binarize", *PRIOR, says=["--likelihood softmax"])
    refused(pixelcnn, "--dataset", codes, "--likelihood", "logistic", *PRIOR, says=["--likelihood softmax"])
    refused(pixelcnn, "--dataset", codes, "--n_classes", 4, *PRIOR, says=["--n_classes"])
    refused(pixelcnn, "--dataset", run, *PRIOR, says=["pixelcnn.py, 12 batches", "vqvae.py"])


def test_sides_that_plusplus_cannot_take(pixelcnn, images, refused, tmp_path, monkeypatch):
    """Of codes their own counts, and --img_size is not looked at."""
    import vqvae

    monkeypatch.chdir(tmp_path)
    refused(
        pixelcnn, "--dataset", images, "--arch", "plusplus", "--img_size", 30, says=["side 30:", "of 4", "--img_size"]
    )
    assert not (tmp_path / "runs").exists()
    options = ["--dataset", str(images), *SMALL, *SMALLER["vqvae"], "--img_size", "12", "--n_epochs", "0"]
    codes = vqvae.train(vqvae.parse_args(options))
    refused(pixelcnn, "--dataset", codes, "--arch", "plusplus", "--img_size", 32, *PRIOR, says=["side 3:", "vqvae.py"])


@pytest.mark.parametrize("arch", ["gated", "plusplus"])
def test_a_resumed_prior_is_exact(pixelcnn, codes, arch):
    """With dropout and --amp, in plusplus."""
    options = ["--dataset", str(codes), *PRIOR, "--arch", arch, "--conditional", *["--amp"] * (arch == "plusplus")]
    whole = pixelcnn.train(pixelcnn.parse_args(options))
    part = pixelcnn.train(pixelcnn.parse_args([*options, "--n_epochs", "1"]))
    pixelcnn.train(pixelcnn.parse_args(["--resume", str(part), "--n_epochs", "2"]))
    one, two = (pixelcnn.load(run).state_dict() for run in (whole, part))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_images_of_another_size(pixelcnn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "f", mode="L")
    options = ["--dataset", str(folder), "--channels", "1", "--img_size", "5", *PRIOR, "--n_epochs", "1"]
    run = pixelcnn.train(pixelcnn.parse_args(options))
    assert pixelcnn.load(run).sample(2).shape == (2, 1, 5, 5)
