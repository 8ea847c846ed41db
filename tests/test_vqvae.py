"""vqvae.py: networks, quantisation, gradients and codebook by hand, the metrics, and the files it leaves."""

import csv
import importlib
import math
import shlex
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, SMALLER, checkpoint, make_folder
from PIL import Image
from torch.distributions import Categorical
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

import vqvae


def tiny(n_embeddings=5, latent_dim=3, downsample=4) -> vqvae.VQVAE:
    torch.manual_seed(0)
    return vqvae.VQVAE(1, n_embeddings, latent_dim, hidden_dim=8, residual_dim=4, downsample=downsample)


def options(*arguments):
    """Options as --codebook ema --no-restart has them, unless `arguments` say otherwise."""
    return vqvae.parse_args(["--no-restart", "--decay", "0.9", *arguments])


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A run of 6 steps, to be read only. Every tenth of the 54 images is held out."""
    folder = tmp_path_factory.mktemp("vqvae") / "run"
    arguments = ["--dataset", str(images), *SMALL, *SMALLER["vqvae"], "--n_epochs", "1"]
    return vqvae.train(vqvae.parse_args([*arguments, "--out_dir", str(folder)]))


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def no_codes(monkeypatch):
    """Trainings of this test write no codes, which takes most of the time of a short one."""
    monkeypatch.setattr(vqvae, "write_codes", lambda folder, **arrays: None)


def read_image(file) -> torch.Tensor:
    return pil_to_tensor(Image.open(file)) / 255


# ---------------------------------------------------------------- networks


def test_the_nearest_code():
    model = tiny(3, 2)
    model.codebook.data = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    z = torch.tensor([[0.9, 0.1], [1.1, 0.1], [0.5, 1.6], [100.0, 99.0]])
    square = z.view(1, 2, 2, 2).movedim(-1, 1)
    codes = model.nearest(square)
    assert codes.tolist() == [[[0, 1], [2, 2]]]
    e = model.embed(codes)
    assert e.shape == square.shape
    assert e[0, :, 0, 1].tolist() == [2, 0]
    assert e[0, :, 1, 0].tolist() == [0, 3]


def test_the_nearest_of_many():
    model = tiny(50, 7)
    z = torch.randn(4, 7, 3, 5)
    distances = torch.cdist(z.movedim(1, -1).flatten(0, 2), model.codebook)
    assert torch.equal(model.nearest(z).flatten(), distances.argmin(1))


@pytest.mark.parametrize("downsample", [2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(downsample, channels):
    opt = options("--hidden_dim", "8", "--downsample", str(downsample), "--channels", str(channels))
    model = vqvae.new_model(opt)
    assert model.codebook.shape == (512, 64)
    x = torch.rand(2, channels, 32, 32)
    codes = model.encode(x)
    assert codes.shape == (2, 32 // downsample, 32 // downsample)
    assert codes.dtype == torch.int64
    images = model.decode(codes)
    assert images.shape == x.shape
    assert images.min() >= 0 and images.max() <= 1


def test_decoded_images_are_clamped():
    model = tiny()
    model.decoder[-1].weight.data *= 1000
    images = model.decode(torch.arange(5).view(5, 1, 1))
    assert images.min() == 0 and images.max() == 1


def test_parameter_counts_worked_out_by_hand():
    """Section 4.1 of the paper, as DeepMind's example has it."""

    def conv(n_in, n_out, side):
        return n_in * n_out * side**2 + n_out

    def count(network):
        return sum(p.numel() for p in network.parameters())

    model = vqvae.new_model(options("--channels", "3"))
    blocks = 2 * (conv(128, 32, 3) + conv(32, 128, 1))
    down = conv(3, 64, 4) + conv(64, 128, 4) + conv(128, 128, 3)
    assert count(model.encoder) == down + blocks + conv(128, 64, 1)
    up = conv(128, 64, 4) + conv(64, 3, 4)
    assert count(model.decoder) == conv(64, 128, 3) + blocks + up


@pytest.mark.parametrize("downsample", [2, 4, 8])
def test_the_networks_by_hand(downsample):
    """With every ReLU where the paper has one: in and between residual blocks, and between convolutions."""
    model = tiny(downsample=downsample)
    n_halvings = int(math.log2(downsample))

    def convolutions(network):
        kinds = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)
        return [(m.weight, m.bias) for m in network.modules() if isinstance(m, kinds)]

    def residual(x, first, second):
        h = F.conv2d(F.relu(x), *first, padding=1)
        return x + F.conv2d(F.relu(h), *second)

    images = torch.rand(3, 1, 16, 16)
    *halve, conv, a1, a2, b1, b2, last = convolutions(model.encoder)
    assert len(halve) == n_halvings
    h = images
    for weight, bias in halve:
        h = F.relu(F.conv2d(h, weight, bias, stride=2, padding=1))
    h = F.conv2d(h, *conv, padding=1)
    h = residual(residual(h, a1, a2), b1, b2)
    torch.testing.assert_close(model.encoder(images), F.conv2d(F.relu(h), *last))

    e = torch.randn(3, 3, 16 // downsample, 16 // downsample)
    conv, a1, a2, b1, b2, *double = convolutions(model.decoder)
    assert len(double) == n_halvings
    h = F.conv2d(e, *conv, padding=1)
    h = residual(residual(h, a1, a2), b1, b2)
    for weight, bias in double:
        h = F.conv_transpose2d(F.relu(h), weight, bias, stride=2, padding=1)
    torch.testing.assert_close(model.decoder(e), h)


def test_codes_are_drawn_by_their_frequencies():
    model = tiny(4)
    model.counts.copy_(torch.tensor([10.0, 0.0, 60.0, 30.0]))
    torch.manual_seed(0)
    codes = model.frequencies().sample((50, 20, 20))
    assert codes.shape == (50, 20, 20)
    share = codes.flatten().bincount(minlength=4) / codes.numel()
    torch.testing.assert_close(share, torch.tensor([0.1, 0.0, 0.6, 0.3]), atol=0.01, rtol=0)
    assert model.frequencies().log_prob(torch.tensor(1)).isfinite()
    assert tiny().frequencies().sample((2, 3, 3)).shape == (2, 3, 3)  # before any training, too


# ---------------------------------------------------------------- training


def sgd(parameters, lr, betas, fused):
    """Stands in for Adam where a step is followed by hand."""
    return torch.optim.SGD(parameters, 0.1)


def train_one_step(monkeypatch, out_dir, *arguments):
    """One step on all of 36 random images (and 4 held out), with SGD.

    Returns the options, the model before the step, the images in [0, 1], and the checkpoint after it.
    """
    torch.manual_seed(1)
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    monkeypatch.setattr(vqvae, "load_data", lambda opt: (images, torch.zeros(40, dtype=torch.long), ["all"]))
    monkeypatch.setattr(torch.optim, "Adam", sgd)
    size = ["--n_embeddings", "5", "--latent_dim", "3", "--hidden_dim", "8", "--residual_dim", "4"]
    rest = ["--img_size", "8", "--channels", "1", "--batch_size", "36", "--n_epochs", "1", "--device", "cpu"]
    opt = vqvae.parse_args(["--dataset", "x", *size, *rest, "--out_dir", str(out_dir), *arguments])

    new_model = vqvae.new_model

    def new_model_with_near_codes(opt):
        model = new_model(opt)
        z = model.encoder(images / 255)
        model.codebook.data = z.detach().movedim(1, -1).flatten(0, 2)[:10:2].clone()
        return model

    monkeypatch.setattr(vqvae, "new_model", new_model_with_near_codes)
    torch.manual_seed(opt.seed)
    before = vqvae.new_model(opt)
    state = checkpoint(vqvae.train(opt))
    assert state["step"] == 1
    is_test = torch.arange(40) % 10 == 0
    return opt, before, images[~is_test] / 255, state


@pytest.mark.parametrize("codebook", ["ema", "loss"])
@pytest.mark.parametrize("commitment", [0.0, 0.25])
def test_the_step_follows_the_objective(monkeypatch, no_codes, tmp_path, codebook, commitment):
    """By hand. The encoder's gradient is that of the decoder's input, straight through, and that of the
    commitment loss; the codebook's that of the codebook loss, or none; the decoder's that of the error."""
    arguments = ["--codebook", codebook, "--commitment", str(commitment), "--no-restart", "--decay", "0"]
    opt, model, x, state = train_one_step(monkeypatch, tmp_path / "run", *arguments)
    z = model.encoder(x)
    codes = model.nearest(z)
    assert len(codes.unique()) > 2
    e = F.embedding(codes, model.codebook).permute(0, 3, 1, 2).detach().requires_grad_()
    error = (model.decoder(e) - x).square().mean() / x.var()
    encoder = dict(model.encoder.named_parameters(prefix="encoder"))
    decoder = dict(model.decoder.named_parameters(prefix="decoder"))
    at_e, *of_decoder = torch.autograd.grad(error, [e, *decoder.values()])
    at_z = at_e + commitment * 2 * (z - e).detach() / z.numel()
    of_encoder = torch.autograd.grad(z, list(encoder.values()), at_z)
    parameters = encoder | decoder
    for (name, p), gradient in zip(parameters.items(), [*of_encoder, *of_decoder]):
        torch.testing.assert_close(state["model"][name], (p - 0.1 * gradient).detach(), rtol=1e-4, atol=1e-6)
        assert not torch.equal(state["model"][name], p)

    vectors = z.detach().movedim(1, -1).flatten(0, 2)
    wanted = model.codebook.detach().clone()
    for k in codes.unique():
        chosen = vectors[codes.flatten() == k]
        if codebook == "loss":
            wanted[k] -= 0.1 * 2 * (wanted[k] - chosen).sum(0) / z.numel()
        else:
            wanted[k] = chosen.mean(0)  # a moving average that forgets all
    torch.testing.assert_close(state["model"]["codebook"], wanted)
    assert state["log"][0]["error"] == pytest.approx(error.item(), rel=1e-4)
    assert state["log"][0]["commitment"] == pytest.approx((z - e).square().mean().item(), rel=1e-4)


def test_ema_alone_moves_the_codebook(monkeypatch, no_codes, tmp_path):
    """Without --codebook loss, the optimiser does not."""

    def update_codebook(model, z, codes, opt):
        pass

    monkeypatch.setattr(vqvae, "update_codebook", update_codebook)
    opt, model, x, state = train_one_step(monkeypatch, tmp_path / "run", "--codebook", "ema")
    assert torch.equal(state["model"]["codebook"], model.codebook)


def test_the_first_step_restarts_every_code(monkeypatch, no_codes, tmp_path):
    _, model, x, state = train_one_step(monkeypatch, tmp_path / "run")
    z = model.encoder(x).detach().movedim(1, -1).flatten(0, 2)
    for vector in state["model"]["codebook"]:
        assert (vector - z).abs().amax(1).min() < 1e-6


def test_the_moving_averages_by_hand():
    """Appendix A.1: N and m are moving averages of the uses and of the sum of z, e = m / N. A code that is
    not used stays."""
    model = tiny(3, 2)
    N = torch.zeros(3)
    m = torch.zeros(3, 2)
    start = model.codebook.detach().clone()
    for codes in ([0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 1, 0], [1, 1, 1, 0, 1, 1]):
        codes = torch.tensor(codes)
        z = torch.randn(6, 2)
        vqvae.update_codebook(model, z.view(2, 3, 1, 2).movedim(-1, 1), codes.view(2, 3, 1), options())
        for k in range(3):
            N[k] = 0.9 * N[k] + 0.1 * (codes == k).sum()
            m[k] = 0.9 * m[k] + 0.1 * z[codes == k].sum(0)
        torch.testing.assert_close(model.counts, N)
        torch.testing.assert_close(model.codebook[:2].detach(), m[:2] / N[:2, None])
        assert torch.equal(model.codebook[2], start[2])


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_the_first_codes_are_outputs_of_the_encoder(codebook):
    model = tiny()
    z = torch.randn(40, 3)
    opt = options("--codebook", codebook, "--restart")
    vqvae.update_codebook(model, z[:, :, None, None], torch.zeros(40, 1, 1, dtype=torch.long), opt)
    assert all((vector == z).all(1).any() for vector in model.codebook)
    assert len(model.codebook.unique(dim=0)) > 1
    # 40 uses are 8 per code, of which a tenth is given to each new code, also to the one that all z chose.
    torch.testing.assert_close(model.counts, torch.full((5,), 0.8))


@pytest.mark.parametrize("codebook", ["ema", "loss"])
@pytest.mark.parametrize("restart", [True, False])
def test_a_restart(codebook, restart):
    """A code that is hardly used is set to a z of the batch, and its count, too; the others are not."""
    z = torch.randn(40, 3)
    codes = torch.arange(40) % 4
    model = tiny()
    model.counts.copy_(torch.tensor([8.0, 8.0, 8.0, 8.0, 0.01]))
    before = model.codebook.detach().clone()
    opt = options("--codebook", codebook, "--decay", "0.5", "--restart" if restart else "--no-restart")
    vqvae.update_codebook(model, z[:, :, None, None], codes[:, None, None], opt)
    if restart:
        assert (model.codebook[4] == z).all(1).any()
        assert model.counts[4] == pytest.approx(0.8)
    else:
        assert torch.equal(model.codebook[4], before[4])
        assert model.counts[4] < 0.01
    for k in range(4):
        new = before[k] if codebook == "loss" else (4 * before[k] + 5 * z[codes == k].mean(0)) / 9
        torch.testing.assert_close(model.codebook[k].detach(), new)
        assert model.counts[k] == 9


def test_all_processes_keep_the_same_codebook(monkeypatch):
    """Uses and sums are those of all processes; restarts take the z of the first."""

    def all_reduce(tensor):  # as if a second process had the same
        tensor *= 2

    def broadcast(tensor, source):
        assert source == 0
        tensor.fill_(7.0)

    monkeypatch.setattr(vqvae, "WORLD", 2)
    monkeypatch.setattr(vqvae.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(vqvae.dist, "broadcast", broadcast)
    model = tiny()
    model.counts.copy_(torch.tensor([8.0, 8.0, 8.0, 8.0, 0.01]))
    before = model.codebook.detach().clone()
    z = torch.randn(40, 3)
    codes = torch.arange(40) % 4
    vqvae.update_codebook(
        model, z[:, :, None, None], codes[:, None, None], options("--decay", "0.5", "--restart")
    )
    torch.testing.assert_close(model.counts, torch.tensor([14.0, 14.0, 14.0, 14.0, 1.6]))
    wanted = (4 * before[0] + 10 * z[codes == 0].mean(0)) / 14
    torch.testing.assert_close(model.codebook[0].detach(), wanted)
    assert model.codebook[4].tolist() == [7.0, 7.0, 7.0]


def test_other_processes_write_nothing(monkeypatch, small, tmp_path):
    monkeypatch.setattr(vqvae, "RANK", 1)
    vqvae.train(vqvae.parse_args([*small, "--n_epochs", "1", "--out_dir", str(tmp_path / "run")]))
    assert not list(tmp_path.rglob("*.*"))


def test_images_of_one_colour(small, no_codes, tmp_path):
    """Their pixels have no variance. And there are no sub-folders: all are of one class."""
    folder = tmp_path / "f"
    folder.mkdir()
    for i in range(30):
        Image.new("RGB", (4, 4)).save(folder / f"{i}.png")
    run = vqvae.train(vqvae.parse_args([*small, "--dataset", str(folder), "--n_epochs", "1"]))
    state = checkpoint(run)
    assert state["options"]["classes"] == ["all"]
    assert math.isfinite(state["log"][-1]["error"])
    vqvae.generate(vqvae.parse_args(["--resume", str(run), "--generate", "2"]))
    assert len(list(run.glob("generated/*.png"))) == 2


def test_one_image_is_not_enough(small, refused, tmp_path):
    folder = make_folder(tmp_path / "f", classes=["only"], per_class=1)
    refused(vqvae, *small, "--dataset", folder, says=["--batch_size"])


def test_it_learns_and_uses_its_codes(no_codes, monkeypatch, tmp_path):
    """Squares of 4 x 4 grey levels: with restarts, most codes are used, and the error is lower."""
    random = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (1000, 1, 4, 4), generator=random)
    images = levels.repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8)
    labels = torch.zeros(1000, dtype=torch.long)
    monkeypatch.setattr(vqvae, "load_data", lambda opt: (images, labels, ["all"]))
    arguments = ["--dataset", "x", "--batch_size", "50", "--n_epochs", "6", "--lr", "3e-3", "--ema", "0.9"]
    arguments += ["--n_embeddings", "32", "--latent_dim", "8", "--hidden_dim", "16", "--residual_dim", "8"]
    arguments += ["--img_size", "16", "--device", "cpu"]
    last_rows = {}
    for restart in ("--restart", "--no-restart"):
        run = vqvae.train(vqvae.parse_args([*arguments, restart, "--out_dir", str(tmp_path / restart)]))
        last_rows[restart] = checkpoint(run)["log"][-1]
    assert last_rows["--restart"]["test_used"] > 15 > last_rows["--no-restart"]["test_used"]
    assert last_rows["--restart"]["test_error"] < 0.5 < last_rows["--no-restart"]["test_error"]


# ---------------------------------------------------------------- metrics


def test_the_metrics_by_hand():
    """6 images whose codes are known: 7 times the code 0, 4 times 1, once 2."""
    model = tiny(4)
    codes = torch.tensor([[0, 0], [0, 1], [0, 1], [2, 0], [0, 0], [1, 1]])[:, None]
    levels = torch.tensor([0, 0, 51, 102, 255, 255], dtype=torch.uint8)
    images = levels.view(6, 1, 1, 1).expand(6, 1, 4, 8)

    def encode(x):
        seen.extend((x[:, 0, 0, 0] * 255).round().tolist())
        return codes[len(seen) - len(x) : len(seen)]

    def decode(codes):
        return torch.full((len(codes), 1, 4, 8), 0.4)

    seen = []
    model.encode = encode
    model.decode = decode
    model.counts.copy_(torch.tensor([5.0, 3.0, 1.0, 1.0]))
    opt = options("--batch_size", "4", "--n_embeddings", "4")
    row = vqvae.measure(model, images, torch.tensor(0.1), opt)
    assert seen == levels.tolist()
    mse = (0.16 + 0.16 + 0.04 + 0.0 + 0.36 + 0.36) / 6
    assert row["test_mse"] == pytest.approx(mse)
    assert row["test_error"] == pytest.approx(mse / 0.1)
    share = [7 / 12, 4 / 12, 1 / 12]
    assert row["test_perplexity"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in share)))
    assert row["test_used"] == 3
    bits = -sum(p * math.log2(q) for p, q in zip(share, [0.5, 0.3, 0.1]))
    assert row["test_code_bits"] == pytest.approx(bits * 2, rel=1e-3)  # an image is 2 codes
    seen.clear()
    model.counts[0] = 0.0  # not used of late, and yet not impossible
    unlikely = vqvae.measure(model, images, torch.tensor(0.1), opt)
    assert row["test_code_bits"] < unlikely["test_code_bits"] < 32


def test_the_log(finished):
    """Tests of the averaged model on the images held out, every 4 steps and at the last."""
    rows = list(csv.DictReader((finished / "log.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [4, 6]
    images = vqvae.load_data(vqvae.parse_args(["--resume", str(finished)]))[0]
    is_test = torch.arange(54) % 10 == 0
    variance = (images[~is_test] / 255).var()
    opt = vqvae.parse_args(["--resume", str(finished)])
    wanted = vqvae.measure(vqvae.load(finished), images[is_test], variance, opt)
    for name, value in wanted.items():
        assert float(rows[-1][name]) == pytest.approx(float(value), rel=1e-4), name
    assert {"error", "commitment"} <= set(rows[-1])


# ---------------------------------------------------------------- files


def test_load_gives_the_averaged_model(finished):
    model = vqvae.load(finished)
    state = checkpoint(finished)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["model_avg"][name])
    assert not torch.equal(model.codebook, state["model"]["codebook"])
    assert not model.training
    assert model.options.classes == ["blue", "green", "red"]


def test_the_file_of_codes(finished):
    """The codes of the images, in their order."""
    with np.load(finished / "codes.npz", allow_pickle=False) as file:
        arrays = dict(file)
    names = {"codes", "labels", "test_codes", "test_labels", "classes", "n_embeddings"}
    assert set(arrays) == names
    assert arrays["classes"].tolist() == ["blue", "green", "red"]
    assert arrays["n_embeddings"] == 16
    images, labels, _ = vqvae.load_data(vqvae.parse_args(["--resume", str(finished)]))
    model = vqvae.load(finished)
    is_test = torch.arange(54) % 10 == 0
    for name, rows in (("codes", ~is_test), ("test_codes", is_test)):
        assert arrays[name].dtype == np.uint8
        assert arrays[name].shape == (rows.sum(), 4, 4)
        codes = torch.from_numpy(arrays[name]).long()
        assert torch.equal(codes, model.encode(images[rows] / 255))
        assert len(codes.unique()) > 1
        assert arrays[name.replace("codes", "labels")].tolist() == labels[rows].tolist()


def test_codes_in_the_smallest_type():
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    for n_embeddings, kind in ((256, np.uint8), (257, np.uint16)):
        opt = options("--n_embeddings", str(n_embeddings))
        assert vqvae.encode_all(tiny(n_embeddings), images, opt).dtype == kind


def test_the_decoder_needs_no_script(finished):
    """Any number of codes become the images that the model makes of them, on any device."""
    with np.load(finished / "codes.npz") as file:
        codes = torch.from_numpy(file["codes"]).long()
    decoder = torch.export.load(finished / "decoder.pt2").module()
    model = vqvae.load(finished)
    for n in (1, 2, 7, 48):
        images = decoder(codes[:n])
        assert images.shape == (n, 3, 16, 16)
        torch.testing.assert_close(images, model.decode(codes[:n]))
        assert images.min() >= 0 and images.max() <= 1
    assert not any(name.startswith("encoder") for name in decoder.state_dict())
    assert decoder.to("meta")(codes.to("meta")).shape == (48, 3, 16, 16)  # no device is written down in it


def test_files_of_a_finished_run_are_made_again(run):
    """Without a warning."""
    before = torch.export.load(run / "decoder.pt2").module()
    with np.load(run / "codes.npz") as file:
        codes = file["codes"]
    for name in ("codes.npz", "decoder.pt2"):
        (run / name).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vqvae.train(vqvae.parse_args(["--resume", str(run)]))
    with np.load(run / "codes.npz") as file:
        assert (file["codes"] == codes).all()
    after = torch.export.load(run / "decoder.pt2").module()
    codes = torch.from_numpy(codes).long()
    assert torch.equal(before(codes), after(codes))


def test_a_full_disk_leaves_the_old_codes(run, refused, monkeypatch):
    before = (run / "codes.npz").read_bytes()

    write_bytes = Path.write_bytes

    def full(file, content):
        if "codes" in file.name:
            write_bytes(file, content[:10])
            raise OSError(28, "No space left on device")
        write_bytes(file, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(vqvae, "--resume", run, says=["codes.npz", "No space left"])
    assert (run / "codes.npz").read_bytes() == before
    assert not list(run.glob(".*"))


def test_pictures_of_reconstructions(finished):
    """The images held out, and below them what their codes decode to."""
    images = vqvae.load_data(vqvae.parse_args(["--resume", str(finished)]))[0][::10] / 255
    model = vqvae.load(finished)
    picture = read_image(finished / "images/recon_00000006.png")
    assert picture.shape == (3, 2 * 18 + 2, 6 * 18 + 2)
    for k, (image, reconstruction) in enumerate(zip(images, model.decode(model.encode(images)))):
        columns = slice(k * 18 + 2, k * 18 + 18)
        torch.testing.assert_close(picture[:, 2:18, columns], image, atol=0.003, rtol=0)
        torch.testing.assert_close(picture[:, 20:36, columns], reconstruction, atol=0.003, rtol=0)


def test_reconstructions_are_of_all_classes(small, no_codes, monkeypatch):
    """The images of a folder are sorted by class; at most ten are shown."""
    grids = {}

    def save_grid(run, name, images, n_columns):
        grids[name] = images[:n_columns]

    labels = torch.arange(400) // 100
    images = (labels * 50).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    monkeypatch.setattr(vqvae, "load_data", lambda opt: (images, labels, ["a", "b", "c", "d"]))
    monkeypatch.setattr(vqvae.Run, "save_grid", save_grid)
    vqvae.train(vqvae.parse_args([*small, "--n_epochs", "1", "--batch_size", "360"]))
    assert len(grids["recon"]) <= 10
    assert set((grids["recon"][:, 0, 0, 0] * 255).round().tolist()) == {0, 50, 100, 150}


# ---------------------------------------------------------------- samples


def test_samples_are_drawn_by_frequency(small, no_codes, monkeypatch):
    """By that of the averaged model: in the grids, and with --generate."""

    def always_5(model):
        assert not model.training
        return Categorical(torch.eye(16)[5])

    monkeypatch.setattr(vqvae.VQVAE, "frequencies", always_5)
    run = vqvae.train(vqvae.parse_args([*small, "--n_epochs", "1"]))
    vqvae.generate(vqvae.parse_args(["--resume", str(run), "--generate", "2"]))
    wanted = vqvae.load(run).decode(torch.full((1, 4, 4), 5))[0]
    grid = read_image(run / "images/sample_00000006.png")
    torch.testing.assert_close(grid[:, 2:18, 2:18], wanted, atol=0.003, rtol=0)
    for i in range(2):
        image = read_image(run / f"generated/{i:06}.png")
        torch.testing.assert_close(image, wanted, atol=0.003, rtol=0)


def test_generate(run, command, capsys):
    """Images that differ, the same again for the same seed; and a hint at what draws better ones."""

    def generate(*arguments):
        folder = vqvae.generate(vqvae.parse_args(["--resume", str(run), "--generate", "3", *arguments]))
        return [read_image(folder / f"{i:06}.png") for i in range(3)]

    first = generate()
    hint = shlex.split(capsys.readouterr().out.split("python ")[1].splitlines()[0])
    assert hint == ["pixelcnnpp.py", "--dataset", str(run)]
    importlib.import_module("pixelcnnpp").parse_args(hint[1:])
    assert not torch.equal(first[0], first[1])
    again = generate()
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], generate("--seed", "1")[0])


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--img_size", "30"], ["--img_size 30", "--downsample 4"]),
        (["--img_size", "20", "--downsample", "8"], ["--img_size 20", "--downsample 8"]),
        (["--downsample", "3"], ["--downsample", "invalid choice"]),
        (["--decay", "1"], ["--decay", "less than 1"]),
        (["--commitment", "-1"], ["--commitment", "at least 0"]),
        (["--commitment", "nan"], ["--commitment", "at least 0"]),
        (["--n_embeddings", "0"], ["--n_embeddings", "at least 1"]),
        (["--hidden_dim", "1"], ["--hidden_dim", "at least 2"]),
        (["--residual_dim", "0"], ["--residual_dim", "at least 1"]),
        (["--codebook", "kmeans"], ["--codebook", "invalid choice"]),
        (["--generate", "3"], ["--generate", "--resume"]),
    ],
)
def test_bad_options(refused, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    refused(vqvae, *arguments, says=says)
    assert not list(tmp_path.iterdir())
