"""pixelcnn.py: its networks are those of the papers and sum to 1; drawing; runs on images and on codes."""

import csv
import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkpoint, make_folder
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor


@pytest.fixture
def pixelcnn():
    import pixelcnn

    return pixelcnn


ARCHES = ["pixelcnn", "gated"]
EVERY = torch.tensor(list(itertools.product((0, 1), repeat=16))).view(
    -1, 1, 4, 4
)  # all binary images of 4 x 4


def network(pixelcnn, arch, n_values=2, size=4, hidden_dim=4, n_layers=2, n_classes=0):
    torch.manual_seed(0)
    kind = {"pixelcnn": pixelcnn.MaskedPixelCNN, "gated": pixelcnn.GatedPixelCNN}[arch]
    return kind(n_values, size, hidden_dim, n_layers, n_classes)


def trained_network(pixelcnn, arch, n_values=2, size=4, n_layers=2, n_classes=0):
    """A small network in float64 that has taken some training steps, so that nothing is as it began."""
    model = network(pixelcnn, arch, n_values, size, n_layers=n_layers, n_classes=n_classes).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(20):
        x = torch.randint(n_values, (16, 1, size, size))
        x[:, :, 1:] = x[:, :, :1]  # columns
        labels = torch.arange(16) % n_classes if n_classes else None
        loss = -model.log_prob(x, labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def probabilities(model, label=None):
    """p(x | label) of all binary images of 4 x 4."""
    p = []
    for part in EVERY.split(4096):
        labels = None if label is None else torch.full((len(part),), label)
        p.append(model.log_prob(part, labels).double().exp())
    return torch.cat(p)


def which_it_sees(model, x, i, j):
    """Whether a change of each position's embedding changes the logits of position (i, j)."""
    embedded = []

    def keep(module, args, output):
        output.requires_grad_().retain_grad()
        embedded.append(output)

    handle = model.embed.register_forward_hook(keep)
    model(x, None)[0, :, i, j].sum().backward()
    handle.remove()
    seen = torch.zeros(x.shape[2:])
    for e in embedded:  # gated embeds for each of its stacks
        seen += e.grad[0].abs().sum(-1)
    return seen > 0


# ---------------------------------------------------------------- the networks


@pytest.mark.parametrize("n_classes", [0, 3])
@pytest.mark.parametrize("arch", ARCHES)
def test_the_probabilities_of_all_images_add_up(pixelcnn, arch, n_classes):
    model = trained_network(pixelcnn, arch, n_layers=1, n_classes=n_classes).float()
    p = probabilities(model, 0 if n_classes else None)
    assert p.sum().item() == pytest.approx(1, abs=1e-4)
    assert p.max() > 3 / len(EVERY)  # it has learnt something
    if n_classes:
        labels = torch.tensor([0, 1, 2])
        assert len(model.log_prob(EVERY[:1].expand(3, -1, -1, -1), labels).unique()) == 3


@pytest.mark.parametrize("arch", ARCHES)
def test_no_position_sees_a_later_one(pixelcnn, arch):
    size = 12
    model = trained_network(pixelcnn, arch, n_values=5, size=size, n_layers=3)
    x = torch.randint(5, (1, 1, size, size))
    row = torch.arange(size)[:, None]
    column = torch.arange(size)
    for i, j in [(0, 0), (0, 5), (5, 0), (7, 3), (8, 8), (9, 11), (11, 11)]:
        seen = which_it_sees(model, x, i, j)
        before = torch.arange(size**2).view(size, size) < i * size + j
        assert not (seen & ~before).any()
        near = before & (row >= i - 3) & (abs(column - j) <= 3)  # what the first layer reaches
        assert (seen | ~near).all()
        far = (row < i - 6) | (abs(column - j) > 6)  # each of the 3 layers reaches one position further
        assert not (seen & far).any()


@pytest.mark.parametrize("arch", ARCHES)
def test_the_blind_spot(pixelcnn, arch):
    """With enough layers all that came before is seen; but by pixelcnn not what is far to the right."""
    model = trained_network(pixelcnn, arch, n_values=3, size=12, n_layers=9)
    seen = which_it_sees(model, torch.randint(3, (1, 1, 12, 12)), 11, 2)
    assert seen[8:11, :6].all()
    assert seen[10, 6:].any() == (arch == "gated")
    assert seen[:11].all() == (arch == "gated")


def test_a_masked_convolution(pixelcnn):
    torch.manual_seed(0)
    conv = pixelcnn.MaskedConv(2, 3, 3, n_seen=5)
    weight = conv.weight.clone()
    weight[:, :, 1, 2] = 0
    weight[:, :, 2] = 0
    x = torch.randn(4, 2, 6, 6)
    torch.testing.assert_close(conv(x), F.conv2d(x, weight, conv.bias, padding=1))


def out_by_hand(model, h):
    _, first, _, second = model.out
    return F.conv2d(F.conv2d(h.relu(), first.weight, first.bias).relu(), second.weight, second.bias)


def randomize(model):
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)


def test_pixelcnn_is_that_of_the_paper(pixelcnn):
    """arXiv:1601.06759, figure 5, by hand; and the biases of the position and the label."""
    model = network(pixelcnn, "pixelcnn", n_values=3, size=5, n_layers=2, n_classes=2)
    randomize(model)
    x = torch.randint(3, (6, 1, 5, 5))
    labels = torch.arange(6) % 2
    h = model.first(model.embed.weight[x[:, 0]].permute(0, 3, 1, 2)) + model.position_bias
    h = h + model.label_bias[labels].view(6, 4, 1, 1)
    for block in model.blocks:
        _, down, _, masked, _, up = block
        f = h.relu()
        f = F.conv2d(f, down.weight, down.bias).relu()
        f = masked(f).relu()
        h = h + F.conv2d(f, up.weight, up.bias)
    torch.testing.assert_close(model(x, labels), out_by_hand(model, h))


def test_gated_is_that_of_the_paper(pixelcnn):
    """arXiv:1606.05328, figure 2 and equation 4, by hand; and the bias of the position."""
    model = network(pixelcnn, "gated", n_values=3, size=5, n_layers=2, n_classes=2)
    randomize(model)
    x = torch.randint(3, (6, 1, 5, 5))
    labels = torch.arange(6) % 2
    e = model.embed.weight[x[:, 0]].permute(0, 3, 1, 2)
    v = F.conv2d(F.pad(e, (3, 3, 3, 0)), model.first_vertical.weight, model.first_vertical.bias)[:, :, :5]
    v = v + model.position_bias
    h = F.conv2d(F.pad(e, (3, 0)), model.first_horizontal.weight, model.first_horizontal.bias)[:, :, :, :5]
    for layer in model.layers:
        both = F.conv2d(F.pad(v, (1, 1, 1, 0)), layer.vertical.weight, layer.vertical.bias)
        both = both + layer.label_bias[labels].view(6, 8, 1, 1)
        v = both[:, :4].tanh() * both[:, 4:].sigmoid()
        two = F.conv2d(F.pad(h, (1, 0)), layer.horizontal.weight, layer.horizontal.bias)
        two = two + F.conv2d(both, layer.to_horizontal.weight, layer.to_horizontal.bias)
        new = two[:, :4].tanh() * two[:, 4:].sigmoid()
        h = h + F.conv2d(new, layer.residual.weight, layer.residual.bias)
    torch.testing.assert_close(model(x, labels), out_by_hand(model, h))


@pytest.mark.parametrize("arch", ARCHES)
def test_everything_is_learnt(pixelcnn, arch):
    """The embeddings, the biases of positions and, in every layer, those of both labels."""
    model = network(pixelcnn, arch, n_values=3, hidden_dim=16, n_layers=3, n_classes=2)
    x = torch.randint(3, (20, 1, 4, 4))
    model.log_prob(x, torch.arange(20) % 2).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.any(), name
        if "label" in name:
            assert p.grad.flatten(0, -2).any(dim=1).all(), name


@pytest.mark.parametrize("arch", ARCHES)
def test_log_prob_is_the_sum_of_the_conditionals(pixelcnn, arch):
    """Of each position given those before it, one at a time, with the later ones set to something else."""
    model = trained_network(pixelcnn, arch, n_values=6)
    x = torch.randint(6, (3, 1, 4, 4))
    total = torch.zeros(3, dtype=torch.float64)
    for i, j in itertools.product(range(4), repeat=2):
        before = (torch.arange(16) < 4 * i + j).view(4, 4)
        logits = model(torch.where(before, x, torch.randint(6, x.shape)), None)[:, :, i, j]
        total += torch.distributions.Categorical(logits=logits).log_prob(x[:, 0, i, j])
    torch.testing.assert_close(model.log_prob(x, None).double(), total, rtol=1e-5, atol=1e-5)


def test_the_test(pixelcnn):
    model = trained_network(pixelcnn, "gated")
    x = EVERY[::300]  # 219, so that the last part is a smaller one
    row = pixelcnn.test(model, x, torch.zeros(len(x)))
    nats = -model.log_prob(x, None).mean().item()
    assert row["test_nats"] == pytest.approx(nats, rel=1e-5)
    assert row["test_bits_per_dim"] == pytest.approx(nats / math.log(2) / 16, rel=1e-5)


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize("arch", ARCHES)
def test_what_is_drawn_follows_the_probabilities(pixelcnn, arch):
    model = trained_network(pixelcnn, arch, n_layers=1, n_classes=2).float()
    torch.manual_seed(0)
    x = model.sample(torch.ones(10_000, dtype=torch.long))
    assert x.shape == (10_000, 1, 4, 4)
    number = (x.flatten(1) * 2 ** torch.arange(15, -1, -1)).sum(1)  # its place in EVERY
    drawn = number.bincount(minlength=len(EVERY)) / 10_000
    p = probabilities(model, 1).float()
    top = p.topk(10).indices
    torch.testing.assert_close(drawn[top], p[top], atol=0.005, rtol=0.15)


@pytest.mark.parametrize("arch", ARCHES)
def test_drawing_row_by_row_equals_the_full_pass(pixelcnn, arch):
    model = trained_network(pixelcnn, arch, n_values=7, size=8, n_classes=2)
    labels = torch.tensor([0, 1, 1])
    x = torch.randint(7, (3, 1, 8, 8))
    for i in range(8):
        drawn, above = model.start_row(x[:, :, : i + 1], labels)
        torch.testing.assert_close(model(drawn, labels, above)[:, :, -1], model(x, labels)[:, :, i])

    torch.manual_seed(5)
    by_rows = model.sample(labels)
    torch.manual_seed(5)
    x = torch.zeros(3, 1, 8, 8, dtype=torch.long)
    for i, j in itertools.product(range(8), repeat=2):
        logits = model(x, labels)[:, :, i, j].float()
        x[:, :, i, j] = torch.multinomial(logits.softmax(1), 1)
    assert torch.equal(by_rows, x)
    assert len(x.unique()) > 3


@pytest.mark.parametrize("arch", ARCHES)
def test_weights_that_are_not_finite_draw_nothing(pixelcnn, arch):
    model = network(pixelcnn, arch)
    model.position_bias.data[:, :, 3, 3] = math.nan
    with pytest.raises(pixelcnn.InputError):
        model.sample(torch.zeros(2, dtype=torch.long))


# ---------------------------------------------------------------- the script, on images

TINY = ["--hidden_dim", "8", "--n_layers", "1", "--batch_size", "8", "--device", "cpu", "--n_epochs", "1"]


@pytest.fixture
def small(images, tmp_path, monkeypatch):
    """Options of a short training, 6 steps, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return ["--dataset", str(images), "--img_size", "8", "--sample_interval", "4", *TINY]


@pytest.fixture
def steps(pixelcnn, monkeypatch):
    """The values of every training step and of every test, each in a list."""
    seen = {"train": [], "test": []}
    log_prob = pixelcnn.PixelCNN.log_prob

    def record(model, x, labels=None):
        seen["train" if model.training else "test"].append(x.clone())
        return log_prob(model, x, labels)

    monkeypatch.setattr(pixelcnn.PixelCNN, "log_prob", record)
    return seen


def train(pixelcnn, *arguments):
    return pixelcnn.train(pixelcnn.parse_args([*map(str, arguments)]))


def log(run):
    """The rows of a run's log, in numbers."""
    rows = csv.DictReader((run / "log.csv").read_text().splitlines())
    return [{name: float(value) for name, value in row.items()} for row in rows]


def grey_images(pixelcnn, folder):
    opt = pixelcnn.parse_args(["--dataset", str(folder), "--img_size", "8"])
    return pixelcnn.load_data(opt)[:2]


@pytest.mark.parametrize("arch", ARCHES)
def test_one_step(pixelcnn, small, monkeypatch, arch):
    """By hand: gradient descent on -log p(x) per image, and its average, which moves from where it began."""

    def sgd(parameters, lr, betas, fused):
        return torch.optim.SGD(parameters, lr)

    monkeypatch.setattr(torch.optim, "Adam", sgd)
    options = [*small, "--batch_size", "40", "--lr", "0.01", "--seed", "3", "--arch", arch, "--conditional"]
    run = train(pixelcnn, *options)
    opt = pixelcnn.Namespace(**checkpoint(run)["options"])
    images, labels = grey_images(pixelcnn, opt.dataset)
    is_train = torch.arange(54) % 10 != 0
    images, labels = images[is_train], labels[is_train]
    pixelcnn.seed(3, "epoch", 0)
    chosen = next(iter(pixelcnn.make_loader(torch.arange(48).byte(), labels, 40)))[0].long()
    torch.manual_seed(3)
    before = pixelcnn.new_model(opt)
    model = pixelcnn.new_model(opt)
    model.load_state_dict(before.state_dict())
    (-model.log_prob(images[chosen].long(), labels[chosen]).mean()).backward()
    state = checkpoint(run)
    assert state["step"] == 1
    for name, p in model.named_parameters():
        old = before.get_parameter(name)
        new = p.detach() - 0.01 * p.grad
        torch.testing.assert_close(state["model"][name], new, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(state["model_avg"][name], old + 0.9 * (new - old), atol=1e-5, rtol=1e-4)


def test_binary_pixels_are_drawn_anew_but_not_in_the_test(pixelcnn, small, steps):
    images, _ = grey_images(pixelcnn, small[1])
    train(pixelcnn, *small, "--n_epochs", "2", "--binarize")
    one, two = torch.cat(steps["train"][:6]), torch.cat(steps["train"][6:])
    assert one.shape == two.shape == (48, 1, 8, 8)
    assert set(one.unique().tolist()) == {0, 1}
    assert sorted(one.flatten(1).tolist()) != sorted(two.flatten(1).tolist())
    share = images[torch.arange(54) % 10 != 0].float().mean() / 255
    assert one.float().mean().item() == pytest.approx(share.item(), abs=0.03)
    train(pixelcnn, *small, "--seed", "1", "--binarize")
    assert len(steps["test"]) == 5  # after 4, 8 and 12 steps; after 4 and 6
    for x in steps["test"]:
        assert torch.equal(x, steps["test"][0])
        assert set(x.unique().tolist()) == {0, 1}


def test_every_tenth_image_of_a_folder_is_for_the_test(pixelcnn, small, steps):
    """And only for it; the averaged model is tested. Colours are read as grey levels."""
    run = train(pixelcnn, *small, "--lr", "0.01")
    images, labels = grey_images(pixelcnn, small[1])
    is_test = torch.arange(54) % 10 == 0
    assert sorted(torch.cat(steps["train"]).tolist()) == sorted(images[~is_test].tolist())
    model = pixelcnn.load(run)
    assert model.n_values == 256
    nats = -model.log_prob(images[is_test].long(), None).mean().item()
    assert [row["step"] for row in log(run)] == [4, 6]
    assert log(run)[-1]["test_nats"] == pytest.approx(nats, rel=1e-4)
    images = model.images(images[is_test].long())
    torch.testing.assert_close(images, grey_images(pixelcnn, small[1])[0][is_test] / 255)


def test_it_learns_what_a_label_means(pixelcnn, small):
    """The classes differ in brightness: an image is likeliest given its own."""
    options = ["--binarize", "--conditional", "--lr", "0.02", "--sample_interval", "1000", "--n_epochs", "15"]
    run = train(pixelcnn, *small, *options)
    model = pixelcnn.load(run)
    images, labels = grey_images(pixelcnn, small[1])
    torch.manual_seed(0)
    x = (images / 255).bernoulli().long()
    log_p = torch.stack([model.log_prob(x, torch.full((len(x),), k)) for k in range(3)])
    assert (log_p.argmax(0) == labels).float().mean() > 0.75  # 1/3 by chance


def cells(file, n_columns, size=8):
    """The images of a grid, row by row."""
    grid = pil_to_tensor(Image.open(file))[0, 2:, 2:]
    return [list(row.split(size + 2, dim=1)[:n_columns]) for row in grid.split(size + 2)]


@pytest.fixture
def shades(pixelcnn, monkeypatch):
    """Each image is drawn in one shade: its class number times 100. Returns how many were drawn at once."""
    at_once = []

    def sample(model, labels):
        at_once.append(len(labels))
        return (100 * labels).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone()

    monkeypatch.setattr(pixelcnn.PixelCNN, "sample", sample)
    return at_once


def test_column_k_of_a_grid_is_class_k(pixelcnn, small, shades):
    run = train(pixelcnn, *small, "--conditional")
    row = [int(cell[3, 3]) for cell in cells(run / "images/sample_00000006.png", 10)[1]]
    assert row == [0, 100, 200, 0, 100, 200, 0, 100, 200, 0]


def test_generate_draws_100_at_once(pixelcnn, small, command, shades):
    run = train(pixelcnn, *small, "--conditional")
    shades.clear()
    assert command(pixelcnn, "--resume", run, "--generate", 150) == (0, [])
    assert shades == [100, 50]
    files = sorted(run.glob("generated/*/*.png"), key=lambda file: file.name)
    assert [file.name for file in files] == [f"{i:06}.png" for i in range(150)]
    assert [file.parent.name for file in files] == ["blue", "green", "red"] * 50
    assert [Image.open(file).getpixel((3, 3))[0] for file in files] == [0, 100, 200] * 50


def test_grids_are_drawn_with_the_same_random_numbers_each_time(pixelcnn, small):
    """So that what differs between them is what the network has learnt."""
    run = train(pixelcnn, *small, "--lr", "1e-9", "--conditional")
    grids = sorted((run / "images").iterdir())
    assert [file.name for file in grids] == ["sample_00000004.png", "sample_00000006.png"]
    assert grids[0].read_bytes() == grids[1].read_bytes()


def test_a_folder_without_sub_folders(pixelcnn, tmp_path, monkeypatch, command, refused):
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "f", classes=["x"], mode="L") / "x"
    run = train(pixelcnn, "--dataset", folder, "--img_size", 5, *TINY)
    assert pixelcnn.load(run).sample(torch.zeros(2, dtype=torch.long)).shape == (2, 1, 5, 5)
    assert command(pixelcnn, "--resume", run, "--generate", 3) == (0, [])
    assert sorted(file.name for file in (run / "generated").iterdir()) == [f"{i:06}.png" for i in range(3)]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--arch", "plusplus"], ["--arch"]),
        (["--hidden_dim", "1"], ["--hidden_dim", "at least 2"]),
        (["--n_layers", "0"], ["--n_layers", "at least 1"]),
        (["--ema", "1"], ["--ema", "less than 1"]),
    ],
)
def test_bad_options(pixelcnn, refused, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    refused(pixelcnn, *arguments, says=says)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the script, on codes


class Decoder(torch.nn.Module):
    """Code k is an even shade of red, 2 x 2 pixels of k / 999."""

    def forward(self, codes):
        red = (codes / 999)[:, None]
        image = torch.cat([red, torch.zeros_like(red), torch.zeros_like(red)], dim=1)
        return image.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


@pytest.fixture(scope="session")
def codes_of_vqvae(tmp_path_factory):
    """What a run of vqvae.py leaves for pixelcnn.py: 48 images as 4 x 4 of 1000 codes, which are 7 or 700."""
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


def test_it_learns_from_the_codes(pixelcnn, codes, steps):
    """From those to train with; and it is tested with those for the test."""
    run = train(pixelcnn, "--dataset", codes, *TINY, "--n_epochs", "10", "--lr", "0.02")
    with np.load(codes / "codes.npz") as arrays:
        x = torch.from_numpy(arrays["codes"].astype(int))[:, None]
        tests = torch.from_numpy(arrays["test_codes"].astype(int))[:, None]
    assert sorted(torch.cat(steps["train"][:6]).tolist()) == sorted(x.tolist())
    assert all(torch.equal(seen, tests) for seen in steps["test"])
    model = pixelcnn.load(run)
    assert model.n_values == 1000
    nats = -model.log_prob(tests, None).mean().item()
    assert log(run)[-1]["test_nats"] == pytest.approx(nats, rel=1e-4)
    assert nats < 16 * math.log(3)  # it knows that each code is one of two, not of 1000


def test_codes_in_images_out(pixelcnn, codes, command, refused):
    """A run has its own copy of the decoder: it draws where there is no run of vqvae.py."""
    run = train(pixelcnn, "--dataset", codes, "--conditional", *TINY, "--n_epochs", "10", "--lr", "0.02")
    assert Image.open(run / "images/sample_00000060.png").size == (10 * 10 + 2, 3 * 10 + 2)
    shutil.move(codes, "away")
    shutil.copytree(run, "elsewhere")
    assert command(pixelcnn, "--resume", "elsewhere", "--generate", 6) == (0, [])
    for i, name in enumerate(["blue", "green", "red"] * 2):
        picture = pil_to_tensor(Image.open(f"elsewhere/generated/{name}/{i:06}.png"))
        assert picture.shape == (3, 8, 8)
        assert (picture[0].unique().tolist() == [2, 179]) or len(picture[0].unique()) > 2
        assert not picture[1:].any()
    Path("elsewhere/decoder.pt2").unlink()
    refused(pixelcnn, "--resume", "elsewhere", "--generate", 6, says=["elsewhere/decoder.pt2"])


def test_a_run_on_codes_goes_on(pixelcnn, codes, command, refused):
    """Only with the same codes, wherever they are now."""
    run = train(pixelcnn, "--dataset", codes, *TINY)
    shutil.move(codes, "away")
    (run / "decoder.pt2").unlink()
    refused(pixelcnn, "--resume", run, "--n_epochs", 2, says=["codes.npz", "runs/vqvae"])
    assert command(pixelcnn, "--resume", run, "--n_epochs", 2, "--dataset", "away") == (0, [])
    assert checkpoint(run)["step"] == 12
    assert (run / "decoder.pt2").read_bytes() == Path("away/decoder.pt2").read_bytes()
    arrays = dict(np.load("away/codes.npz"))
    arrays["test_codes"][0, 0, 0] += 1
    np.savez_compressed("away/codes.npz", **arrays)
    refused(pixelcnn, "--resume", run, "--n_epochs", 3, says=["not started with the codes"])


def test_bad_codes(pixelcnn, codes, small, images, refused):
    refused(pixelcnn, "--dataset", codes, "--binarize", *TINY, says=["--binarize"])
    of_images = train(pixelcnn, *small)
    refused(
        pixelcnn,
        "--resume",
        of_images,
        "--dataset",
        codes,
        "--n_epochs",
        2,
        says=["not started with the codes"],
    )
    of_codes = train(pixelcnn, "--dataset", codes, *TINY)
    refused(pixelcnn, "--resume", of_codes, "--dataset", images, "--n_epochs", 2, says=["codes.npz"])
    (codes / "decoder.pt2").unlink()
    refused(pixelcnn, "--dataset", codes, *TINY, says=["decoder.pt2"])
    (codes / "codes.npz").write_bytes(b"no zip")
    refused(pixelcnn, "--dataset", codes, *TINY, says=["codes.npz", "cannot be read"])
    (codes / "codes.npz").unlink()  # as that of a run which has not ended
    refused(pixelcnn, "--dataset", codes, *TINY, says=["codes.npz", "No such file"])
    assert len(list(Path("runs").iterdir())) == 4


def test_the_codes_of_vqvae(pixelcnn, images, tmp_path, monkeypatch):
    """A run of vqvae.py itself."""
    import vqvae

    monkeypatch.chdir(tmp_path)
    sizes = ["--hidden_dim", "8", "--residual_dim", "4", "--latent_dim", "4", "--n_embeddings", "16"]
    options = [
        "--dataset",
        str(images),
        "--img_size",
        "16",
        "--batch_size",
        "8",
        "--n_epochs",
        "1",
        "--device",
        "cpu",
    ]
    codes = vqvae.train(vqvae.parse_args([*options, *sizes]))
    model = pixelcnn.load(train(pixelcnn, "--dataset", codes, *TINY))
    x = model.sample(torch.zeros(3, dtype=torch.long))
    decoded = vqvae.load(codes).decode(x[:, 0])
    torch.testing.assert_close(model.images(x), decoded.clamp(0, 1))


def test_a_run_in_a_folder_named_as_a_data_set(pixelcnn, tmp_path, monkeypatch):
    """It hides the data set from no one, itself included."""
    monkeypatch.chdir(tmp_path)
    draw_digits = pixelcnn.draw_digits
    monkeypatch.setattr(pixelcnn, "draw_digits", lambda n: [part[:20] for part in draw_digits(n)])
    run = train(pixelcnn, "--dataset", "digits", "--out_dir", "digits", "--img_size", 4, *TINY)
    assert train(pixelcnn, "--resume", run, "--n_epochs", 2) == run
