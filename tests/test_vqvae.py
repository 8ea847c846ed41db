"""vqvae.py: the quantisation and its gradients by hand, the codebook's updates, and the file of codes."""

import argparse
import csv
import importlib
import math

import numpy as np
import pytest
import torch
from conftest import make_folder
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor


@pytest.fixture
def vqvae():
    import vqvae

    return vqvae


OPT = argparse.Namespace(codebook="ema", decay=0.9, commitment=0.25, restart=False, batch_size=8)


def tiny(vqvae, n_embeddings=5, latent_dim=3, dims=(1, 4, 8)):
    torch.manual_seed(0)
    return vqvae.VQVAE(n_embeddings, latent_dim, list(dims), 4)


def options(**changes):
    return argparse.Namespace(**vars(OPT) | changes)


# ---------------------------------------------------------------- quantisation


def test_the_nearest_code(vqvae):
    model = tiny(vqvae, 3, 2)
    model.codebook.data = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    z = torch.tensor([[0.9, 0.1], [1.1, 0.1], [0.5, 1.6], [100.0, 99.0]])  # the last is nearest to none by angle
    grid = z.view(1, 2, 2, 2).movedim(-1, 1)
    assert model.nearest(grid).tolist() == [[[0, 1], [2, 2]]]
    e = model.decoder.embed(model.nearest(grid))
    assert e.shape == grid.shape and e[0, :, 1, 0].tolist() == [0, 3]


def test_the_nearest_of_many(vqvae):
    model = tiny(vqvae, 50, 7)
    z = torch.randn(4, 7, 3, 5)
    distances = torch.cdist(z.movedim(1, -1).flatten(0, 2), model.codebook)
    assert torch.equal(model.nearest(z).flatten(), distances.argmin(1))


@pytest.mark.parametrize("downsample", [2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(vqvae, downsample, channels):
    opt = vqvae.parse_args(["--hidden_dim", "8", "--downsample", str(downsample), "--channels", str(channels)])
    model, x = vqvae.new_model(opt), torch.rand(2, channels, 32, 32)
    codes = model.encode(x)
    assert codes.shape == (2, 32 // downsample, 32 // downsample) and not codes.is_floating_point()
    images = model.decode(codes)
    assert images.shape == x.shape and 0 <= images.min() and images.max() <= 1
    assert model.codebook.shape == (512, 64)


def test_parameter_counts_worked_out_by_hand(vqvae):
    """Section 4.1 as DeepMind's example has it: two strided convolutions, a 3x3 one, two residual blocks."""
    conv = lambda a, b, side: a * b * side**2 + b  # noqa: E731
    model = vqvae.new_model(vqvae.parse_args(["--channels", "3"]))
    count = lambda part: sum(p.numel() for p in part.parameters())  # noqa: E731
    blocks = 2 * (conv(128, 32, 3) + conv(32, 128, 1))
    down = conv(3, 64, 4) + conv(64, 128, 4) + conv(128, 128, 3) + blocks + conv(128, 64, 1)
    assert count(model.encoder) == down
    assert count(model.decoder) == 512 * 64 + conv(64, 128, 3) + blocks + conv(128, 64, 4) + conv(64, 3, 4)


# ---------------------------------------------------------------- the step


@pytest.mark.parametrize("codebook", ["ema", "loss"])
@pytest.mark.parametrize("commitment", [0.0, 0.25])
def test_the_step_follows_the_objective(vqvae, codebook, commitment):
    """The encoder's gradient is that of the decoder's input, straight through, and the commitment's; the codes' that
    of the second term; the decoder's that of the error."""
    model, x, variance = tiny(vqvae), torch.rand(6, 1, 8, 8), torch.tensor(0.3)
    model.codebook.requires_grad_(codebook == "loss")
    z = model.encoder(x)
    codes = model.nearest(z)
    e = F.embedding(codes, model.codebook).permute(0, 3, 1, 2).detach().requires_grad_()
    error = (model.decoder(e) - x).square().mean() / variance
    encoder, decoder = list(model.encoder.parameters()), list(model.decoder.layers.parameters())
    at_e, *of_decoder = torch.autograd.grad(error, [e, *decoder])
    at_z = at_e + commitment * 2 * (z - e).detach() / z.numel()
    of_encoder = torch.autograd.grad(z, encoder, at_z)
    wanted = [(p - 0.1 * g).detach() for p, g in zip(encoder + decoder, [*of_encoder, *of_decoder])]
    of_codes = torch.zeros(5, 3)
    for code, difference in zip(codes.flatten(), (e - z).detach().movedim(1, -1).flatten(0, 2)):
        of_codes[code] += 2 * difference / z.numel()
    before = model.codebook.detach().clone()

    given = options(codebook=codebook, commitment=commitment, decay=1.0)  # so that the moving means stay
    terms = vqvae.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), x, variance, given)
    torch.testing.assert_close(encoder + decoder, wanted)
    torch.testing.assert_close(model.codebook.detach(), before - 0.1 * of_codes if codebook == "loss" else before)
    torch.testing.assert_close(terms["error"], error.detach())
    torch.testing.assert_close(terms["commitment"], (z - e).square().mean().detach())


def test_the_moving_means_by_hand(vqvae):
    """Appendix A.1: N and m are moving means of the uses and of the sum of z, e = m / N; a code not used stays."""
    model, N, m = tiny(vqvae, 3, 2), torch.zeros(3), torch.zeros(3, 2)
    start = model.codebook.detach().clone()
    for step in range(3):
        z, codes = torch.randn(6, 2), torch.tensor([0, 1, 0, 0, 1, 0]) if step < 2 else torch.tensor([1, 1, 1, 0, 1, 1])
        vqvae.update_codebook(model, z, codes, OPT)
        for k in range(3):
            N[k] = 0.9 * N[k] + 0.1 * (codes == k).sum()
            m[k] = 0.9 * m[k] + 0.1 * z[codes == k].sum(0)
        torch.testing.assert_close(model.counts, N)
        torch.testing.assert_close(model.codebook[:2].detach(), m[:2] / N[:2, None])
        assert torch.equal(model.codebook[2], start[2])


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_the_first_codes_are_outputs_of_the_encoder(vqvae, codebook):
    model, z = tiny(vqvae), torch.randn(40, 3)
    vqvae.update_codebook(model, z, torch.zeros(40, dtype=torch.long), options(codebook=codebook, restart=True))
    assert all((row == z).all(1).any() for row in model.codebook) and len(model.codebook.unique(dim=0)) > 1
    # 40 uses, 8 a code; the mean begins at 0, and a tenth of 8 is the least a code is given
    torch.testing.assert_close(model.counts, torch.tensor([4.0, 0.8, 0.8, 0.8, 0.8]))


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_a_restart(vqvae, codebook):
    """A code that is hardly used is set to a vector of the batch, its count too; the others are not."""
    z, codes = torch.randn(40, 3), torch.arange(40) % 4
    for restart in (False, True):
        model = tiny(vqvae)
        model.counts.copy_(torch.tensor([8.0, 8.0, 8.0, 8.0, 0.01]))
        before = model.codebook.detach().clone()
        vqvae.update_codebook(model, z, codes, options(codebook=codebook, restart=restart, decay=0.5))
        if restart:
            assert (model.codebook[4] == z).all(1).any() and model.counts[4] == pytest.approx(0.8)
        else:
            assert torch.equal(model.codebook[4], before[4]) and model.counts[4] < 0.01
        for k in range(4):
            new = before[k] if codebook == "loss" else (4 * before[k] + 5 * z[codes == k].mean(0)) / 9
            torch.testing.assert_close(model.codebook[k].detach(), new)
            assert model.counts[k] == 9


def test_options_reach_the_step(vqvae, small, monkeypatch):
    seen, step = [], vqvae.train_step
    monkeypatch.setattr(vqvae, "train_step", lambda *args: (seen.append(args), step(*args))[1])
    arguments = ["--codebook", "loss", "--decay", "0.5", "--commitment", "2", "--no-restart", "--n_epochs", "1"]
    vqvae.train(vqvae.parse_args([*small, *arguments]))
    opt = seen[0][-1]
    assert (opt.codebook, opt.decay, opt.commitment, opt.restart) == ("loss", 0.5, 2.0, False)
    model, optimizer = seen[0][:2]
    assert any(p is model.codebook for group in optimizer.param_groups for p in group["params"])
    assert model.codebook.requires_grad
    vqvae.train(vqvae.parse_args([*small, "--n_epochs", "1"]))
    assert not seen[-1][0].codebook.requires_grad  # or Adam would move what follows the means


def test_each_code_follows_the_vectors_that_chose_it(vqvae):
    """In a whole step: of each image and position its own."""
    model, x = tiny(vqvae), torch.rand(4, 1, 8, 8)
    model.codebook.requires_grad_(False)
    z = model.encoder(x).detach()
    model.codebook.data = z.movedim(1, -1).flatten(0, 2)[[0, 3, 6, 9, 12]].clone()
    codes = model.encode(x)
    assert len(codes.unique()) > 2
    means = [torch.stack([z[n, :, i, j] for n, i, j in (codes == k).nonzero()]).mean(0) for k in codes.unique()]
    vqvae.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), x, torch.tensor(1.0), OPT)
    torch.testing.assert_close(model.codebook[codes.unique()], torch.stack(means))


# ---------------------------------------------------------------- what is reported


def test_the_test(vqvae):
    """By hand: 6 images whose codes are known."""
    model = tiny(vqvae, 4)
    uses = torch.tensor([[0, 0], [0, 1], [0, 1], [2, 0], [0, 0], [1, 1]])[:, None].float()
    model.encode = lambda x: uses[: len(x)].long()
    model.decode = lambda codes: torch.full((len(codes), 1, 4, 8), 0.5)
    model.counts.copy_(torch.tensor([5.0, 3.0, 1.0, 1.0]))
    images = torch.full((6, 1, 4, 8), 255, dtype=torch.uint8)
    row = vqvae.test(model, images, torch.tensor(0.1), OPT)
    share = [7 / 12, 4 / 12, 1 / 12]
    assert row["test_mse"] == pytest.approx(0.25) and row["test_error"] == pytest.approx(2.5)
    assert row["test_perplexity"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in share)))
    assert row["test_used"] == 3
    bits = -sum(p * math.log2(q) for p, q in zip(share, [0.5, 0.3, 0.1]))
    assert row["test_bits_per_dim"] == pytest.approx(bits * 2 / 32, rel=0.02)  # 2 codes an image of 32 pixels
    model.counts[0] = 0.0  # not used of late, and yet not impossible
    assert row["test_bits_per_dim"] < vqvae.test(model, images, torch.tensor(0.1), OPT)["test_bits_per_dim"] < 1


def test_codes_are_drawn_by_their_frequencies(vqvae):
    model = tiny(vqvae, 4)
    model.counts.copy_(torch.tensor([10.0, 0.0, 60.0, 30.0]))
    torch.manual_seed(0)
    codes = model.draw(torch.rand(50, 20, 20))
    assert codes.shape == (50, 20, 20)
    share = codes.flatten().bincount(minlength=4) / codes.numel()
    torch.testing.assert_close(share, torch.tensor([0.1, 0.0, 0.6, 0.3]), atol=0.01, rtol=0)
    assert model.draw(torch.tensor([[[0.0, 1.0]]])).tolist() == [[[0, 3]]]


def test_the_log(vqvae, small):
    run = vqvae.train(vqvae.parse_args([*small, "--n_epochs", "1"]))
    (row,) = csv.DictReader((run / "log.csv").read_text().splitlines())
    names = {"error", "commitment", "test_mse", "test_error", "test_perplexity", "test_used", "test_bits_per_dim"}
    assert names <= set(row) and int(row["test_used"]) <= 16
    opt = vqvae.parse_args(["--resume", str(run)])
    images = vqvae.load_data(opt)[0] / 255
    kept = [i for i in range(54) if i % 10]
    assert float(row["test_mse"]) / float(row["test_error"]) == pytest.approx(images[kept].var().item(), rel=1e-4)
    model = vqvae.load(run)
    mse = (model.decode(model.encode(images[::10])) - images[::10]).square().mean().item()
    assert float(row["test_mse"]) == pytest.approx(mse, rel=1e-4)


# ---------------------------------------------------------------- codes and images


def read(file):
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def test_the_file_of_codes(vqvae, small, images):
    """The images' codes in their order: what they decode to are the reconstructions."""
    run = vqvae.train(vqvae.parse_args([*small, "--n_epochs", "1"]))
    arrays, model = read(run / "codes.npz"), vqvae.load(run)
    assert set(arrays) == {
        *("codes", "labels", "test_codes", "test_labels"),
        *("classes", "n_embeddings", "batches_done"),
    }
    assert arrays["classes"].tolist() == ["blue", "green", "red"]
    assert arrays["n_embeddings"] == 16 and arrays["batches_done"] == 6
    every, labels = vqvae.load_data(vqvae.parse_args(["--resume", str(run)]))
    for name, rows in (("", [i for i in range(54) if i % 10]), ("test_", list(range(0, 54, 10)))):
        codes = arrays[f"{name}codes"]
        assert codes.shape == (len(rows), 4, 4) and codes.dtype == np.uint8
        assert torch.equal(torch.from_numpy(arrays[f"{name}labels"]), labels[rows])
        codes = torch.from_numpy(codes).long()
        assert torch.equal(codes, model.encode(every[rows] / 255)) and len(codes.unique()) > 1
        shown = pil_to_tensor(Image.open(run / "images/recon_000006.png")) / 255
        if name:  # the second row of the last reconstructions
            assert shown.shape == (3, 2 * 18 + 2, 6 * 18 + 2)
            for k, image in enumerate(model.decode(codes)):
                cell = shown[:, 20:36, k * 18 + 2 : k * 18 + 18]
                torch.testing.assert_close(cell, image, atol=0.003, rtol=0)


def test_codes_in_the_smallest_type(vqvae, tmp_path):
    for n_embeddings, kind in ((256, np.uint8), (257, np.uint16)):
        opt = argparse.Namespace(n_embeddings=n_embeddings, classes=["a"], batch_size=8)
        part = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)
        vqvae.write_codes(tmp_path, tiny(vqvae, n_embeddings), opt, 0, part, part)
        assert read(tmp_path / "codes.npz")["codes"].dtype == kind


def test_the_codes_are_written_again_in_one_piece(vqvae, small, command, refused, monkeypatch):
    run = vqvae.train(vqvae.parse_args([*small, "--n_epochs", "0"]))
    before = (run / "codes.npz").read_bytes()
    assert command(vqvae, "--resume", run, "--n_epochs", 1) == (0, [])
    after = (run / "codes.npz").read_bytes()
    assert after != before and read(run / "codes.npz")["batches_done"] == 6
    (run / "codes.npz").unlink()
    assert command(vqvae, "--resume", run, "--n_epochs", 0) == (0, [])
    assert (run / "codes.npz").read_bytes() == after

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    refused(vqvae, "--resume", run, "--n_epochs", 0, says=["No space left"])
    assert (run / "codes.npz").read_bytes() == after


def test_encode_and_decode(vqvae, small, images, command, tmp_path):
    run = vqvae.train(vqvae.parse_args([*small, "--n_epochs", "1"]))
    other = make_folder(tmp_path / "other", classes=["cat", "dog"], per_class=3)
    assert command(vqvae, "--resume", run, "--encode", other) == (0, [])
    assert command(vqvae, "--resume", run, "--encode", images) == (0, [])
    arrays = read(run / "encoded" / "codes.npz")
    assert arrays["codes"].shape == (6, 4, 4) and arrays["labels"].tolist() == [0, 0, 0, 1, 1, 1]
    assert arrays["classes"].tolist() == ["cat", "dog"] and len(arrays["test_codes"]) == len(arrays["test_labels"]) == 0
    everything = read(run / "encoded-2" / "codes.npz")
    assert (everything["codes"][::10] == read(run / "codes.npz")["test_codes"]).all()

    assert command(vqvae, "--resume", run, "--decode", run / "encoded" / "codes.npz") == (0, [])
    files = sorted((run / "decoded").rglob("*.png"))
    assert [str(f.relative_to(run / "decoded")) for f in files] == [
        *(f"cat/{i:06}.png" for i in range(3)),
        *(f"dog/{i:06}.png" for i in range(3, 6)),
    ]
    wanted = vqvae.load(run).decode(torch.from_numpy(arrays["codes"]).long())
    for file, image in zip(files, wanted):
        torch.testing.assert_close(pil_to_tensor(Image.open(file)) / 255, image, atol=0.003, rtol=0)

    np.savez(tmp_path / "bare.npz", codes=arrays["codes"])
    assert command(vqvae, "--resume", run, "--decode", tmp_path / "bare.npz") == (0, [])
    assert len(list((run / "decoded-2").glob("*.png"))) == 6


@pytest.mark.parametrize(
    "arrays, says",
    [
        (dict(codes=np.full((2, 4, 4), 16)), ["16", "below 16"]),
        (dict(codes=np.full((2, 4, 4), -1)), ["-1"]),
        (dict(codes=np.zeros((2, 4, 5), int)), ["(2, 4, 5)", "(N, 4, 4)"]),
        (dict(codes=np.zeros((4, 4), int)), ["(4, 4)"]),
        (dict(codes=np.zeros((2, 4, 4))), ["float64"]),
        (dict(codes=np.zeros((2, 4, 4), int), labels=np.array([0, 3]), classes=np.array(["a", "b"])), ["3"]),
        (dict(codes=np.zeros((2, 4, 4), int), labels=np.array([0]), classes=np.array(["a"])), ["labels"]),
        (dict(codes=np.array([None, "x"])), ["pickle"]),
        (dict(other=np.zeros(3)), ["codes"]),
    ],
)
def test_bad_codes(vqvae, small, refused, tmp_path, arrays, says):
    run = vqvae.train(vqvae.parse_args([*small, "--n_epochs", "0"]))
    np.savez(tmp_path / "bad.npz", **arrays)
    refused(vqvae, "--resume", run, "--decode", tmp_path / "bad.npz", says=["--decode", "bad.npz", *says])
    assert not (run / "decoded").exists()


def test_no_file_of_codes(vqvae, small, refused, tmp_path):
    run = vqvae.train(vqvae.parse_args([*small, "--n_epochs", "0"]))
    (tmp_path / "text.npz").write_text("hello")
    for name in ("nosuch.npz", "text.npz", ""):
        refused(vqvae, "--resume", run, "--decode", tmp_path / name, says=["--decode", name])
    for name in ("nosuch", str(run), ""):
        refused(vqvae, "--resume", run, "--encode", name, says=[name])
    assert not list(run.glob("encoded*")) and not list(run.glob("decoded*"))


def test_samples_are_codes_by_their_frequencies(vqvae, small, capsys, monkeypatch):
    """Of the averaged model: in the grids, and with --generate."""
    drawn, draw = [], vqvae.VQVAE.draw

    def draw_the_fifth(model, u):
        assert not model.training and 0 <= u.min() and u.max() < 1
        drawn.append(draw(model, u))
        return torch.full_like(drawn[-1], 5)

    monkeypatch.setattr(vqvae.VQVAE, "draw", draw_the_fifth)
    run = vqvae.train(vqvae.parse_args([*small, "--n_epochs", "1"]))
    assert len(drawn) == 3 and all(codes.shape == (100, 4, 4) for codes in drawn)
    capsys.readouterr()
    vqvae.generate(vqvae.parse_args(["--resume", str(run), "--generate", "3"]))
    assert len(drawn) == 6 and not torch.equal(drawn[4], drawn[5])
    hint = capsys.readouterr().out.split("python ")[1].split()
    assert hint[0] == "pixelcnn.py" and importlib.import_module("pixelcnn").parse_args(hint[1:]).dataset == str(run)
    wanted = vqvae.load(run).decode(torch.full((1, 4, 4), 5))[0]
    files = list((run / "generated").glob("*.png"))
    assert len(files) == 3
    for picture in (*map(Image.open, files), Image.open(run / "images/sample_000006.png").crop((2, 2, 18, 18))):
        torch.testing.assert_close(pil_to_tensor(picture) / 255, wanted, atol=0.003, rtol=0)


def test_folders_that_names_of_classes_make_are_inside(vqvae, small, command, tmp_path):
    run = vqvae.train(vqvae.parse_args([*small, "--n_epochs", "0"]))
    classes = np.array(["../../../escaped", "a/b"])
    np.savez(tmp_path / "bad.npz", codes=np.zeros((2, 4, 4), int), labels=np.arange(2), classes=classes)
    assert command(vqvae, "--resume", run, "--decode", tmp_path / "bad.npz") == (0, [])
    names = sorted(str(file.relative_to(run / "decoded")) for file in (run / "decoded").rglob("*.png"))
    assert names == ["b/000001.png", "escaped/000000.png"]


def test_images_of_one_colour(vqvae, small, tmp_path):
    """Their pixels have no variance."""
    folder = tmp_path / "f" / "black"
    folder.mkdir(parents=True)
    for i in range(30):
        Image.new("RGB", (4, 4)).save(folder / f"{i}.png")
    vqvae.train(vqvae.parse_args([*small, "--dataset", str(tmp_path / "f"), "--n_epochs", "1"]))


def test_the_variance_is_that_of_all_images(vqvae, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(vqvae, "train_step", lambda *args: seen.append(args[3]) or {})
    monkeypatch.setattr(vqvae, "test", lambda *args: {})
    options = ["--dataset", "digits", "--img_size", "8", "--hidden_dim", "4", "--n_epochs", "1", "--batch_size", "5000"]
    options += ["--n_embeddings", "8", "--latent_dim", "4"]
    opt = vqvae.parse_args([*options, "--out_dir", str(tmp_path / "run")])
    vqvae.train(opt)
    torch.testing.assert_close(seen[0], (vqvae.load_data(opt)[0] / 255).var())


def test_one_image_is_not_enough(vqvae, small, refused, tmp_path):
    folder = make_folder(tmp_path / "f", classes=["only"], per_class=1)
    refused(vqvae, *small, "--dataset", folder, says=["--batch_size"])


def test_the_reconstructions_are_of_all_classes(vqvae, tmp_path, monkeypatch):
    """The digits come in order, 0 to 9 and again."""
    shown, save_grid = [], vqvae.save_grid
    monkeypatch.setattr(vqvae, "save_grid", lambda *args: (shown.append(args), save_grid(*args)))
    options = ["--dataset", "digits", "--img_size", "8", "--hidden_dim", "4", "--n_epochs", "0"]
    opt = vqvae.parse_args([*options, "--out_dir", str(tmp_path / "run")])
    vqvae.train(opt)
    images, labels = vqvae.load_data(opt, train=False)
    classes = [labels[(images / 255 == x).flatten(1).all(1)][0].item() for x in shown[1][1][:10]]
    assert len(set(classes)) > 5


def test_pictures(vqvae, small):
    run = vqvae.train(vqvae.parse_args([*small, "--n_epochs", "1"]))
    assert Image.open(run / "images/sample_000006.png").size == (10 * 18 + 2, 10 * 18 + 2)
    assert (run / "recon.gif").exists() and (run / "training.gif").exists()
    sheet, model = pil_to_tensor(Image.open(run / "codebook.png")) / 255, vqvae.load(run)
    side = (sheet.shape[2] - 2) // 16  # all 16 codes in a row, four times as large
    patch = model.decode(torch.full((1, 1, 1), 5))[0].repeat_interleave(4, 1).repeat_interleave(4, 2)
    cell = sheet[:, 2:side, 5 * side + 2 : 6 * side]
    torch.testing.assert_close(cell, patch, atol=0.003, rtol=0)


# ---------------------------------------------------------------- the script


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--img_size", "30"], ["--img_size 30", "--downsample 4"]),
        (["--img_size", "20", "--downsample", "8"], ["--img_size 20", "--downsample 8"]),
        (["--downsample", "3"], ["--downsample"]),
        (["--decay", "1"], ["--decay"]),
        (["--commitment", "-1"], ["--commitment"]),
        (["--commitment", "nan"], ["--commitment"]),
        (["--n_embeddings", "0"], ["--n_embeddings"]),
        (["--hidden_dim", "1"], ["--hidden_dim"]),
        (["--residual_dim", "0"], ["--residual_dim"]),
        (["--codebook", "kmeans"], ["--codebook"]),
        (["--encode", "x"], ["--encode", "--resume"]),
        (["--decode", "x"], ["--decode", "--resume"]),
    ],
)
def test_bad_options(vqvae, refused, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    refused(vqvae, *arguments, says=says)
    assert not list(tmp_path.iterdir())


def test_it_learns_the_digits_and_uses_its_codes(vqvae, tmp_path):
    arguments = ["--dataset", "digits", "--n_epochs", "2", "--hidden_dim", "16", "--n_embeddings", "32"]
    arguments += ["--latent_dim", "8", "--img_size", "16", "--residual_dim", "8", "--lr", "3e-3"]
    rows = []
    for restart in ("--restart", "--no-restart"):
        run = vqvae.train(vqvae.parse_args([*arguments, restart, "--out_dir", str(tmp_path / restart)]))
        rows += list(csv.DictReader((run / "log.csv").read_text().splitlines()))[1:]
    used, error = ([float(row[name]) for row in rows] for name in ("test_used", "test_error"))
    assert used[0] >= 30 and used[1] < used[0] and error[0] < 0.5 and error[0] < error[1]
