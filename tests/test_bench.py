"""The bench_ scripts: measures of bench_quality.py with a known answer, and what bench_crash.py compares."""

import copy

import bench_crash
import bench_quality
import numpy as np
import pytest
import torch
from PIL import Image


def whitened(n: int, dim: int) -> torch.Tensor:
    """Points (n, dim) whose mean is 0 and whose covariance is the identity, exactly."""
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(0)).double()
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T


def test_frechet_distance_of_gaussians():
    x = whitened(500, 4)
    mean = torch.tensor([1.0, -2, 0, 3]).double()
    scale = torch.tensor([1.0, 2, 3, 0.5]).double()
    # For diagonal covariances: the squared distances of means and of standard deviations.
    expected = 1 + 4 + 9 + 0 + 1 + 4 + 0.25
    assert bench_quality.frechet(x, x * scale + mean) == pytest.approx(expected)
    assert bench_quality.frechet(x, x) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_covariances_that_do_not_commute():
    x = whitened(500, 2)
    a = torch.tensor([[2.0, 1], [1, 2]]).double()
    b = torch.tensor([[3.0, 0], [0, 1]]).double()
    # tr((A B)^(1/2)) of 2x2 matrices is sqrt(tr(A B) + 2 sqrt(det(A B))): here A B = [[6, 1], [3, 2]].
    expected = 4 + 4 - 2 * (8 + 2 * 9**0.5) ** 0.5
    found = bench_quality.frechet(x @ torch.linalg.cholesky(a).T, x @ torch.linalg.cholesky(b).T)
    assert found == pytest.approx(expected)


def test_share_of_points_covered():
    real = torch.arange(10.0)[:, None]  # on a line: the third neighbour is at most 3 away, inside 2
    assert bench_quality.covered(real, torch.tensor([[-2.9], [11.9], [4.5], [12.1]]), k=3) == 0.75
    assert bench_quality.covered(real, torch.tensor([[-2.9], [-1.9], [4.5], [12.1]]), k=2) == 0.5
    assert bench_quality.covered(real, real) == 1


def test_precision_and_recall_of_lost_classes():
    """Pictures of two classes of four: all look real, and half of what is real is missing."""
    random = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0], [0, 100], [100, 0], [100, 100]])
    real = (centres[:, None] + torch.rand(4, 200, 2, generator=random)).flatten(0, 1)
    fake = real[:400]
    assert bench_quality.covered(real, fake) == 1
    assert bench_quality.covered(fake, real) == 0.5


def test_nearest_is_measured_in_pixels_from_0_to_1():
    train = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    train[2] = 255
    images = torch.stack([train[0], train[2], train[0]])
    images[2, 0, 0, 0] = 51
    assert bench_quality.nearest(images, train) == pytest.approx(0.2 / 3, abs=1e-6)


def test_codes_cost_what_their_frequency_in_training_says():
    codes = np.array([[0, 0], [0, 1]])  # each once more: 4, 2, 1 and 1 of 8
    test_codes = np.array([[0, 0], [1, 1], [2, 2]])
    used, perplexity, bits = bench_quality.measure_codes(codes, test_codes, 4)
    assert used == 3
    assert perplexity == pytest.approx(3)
    assert bits == pytest.approx((2 * 1 + 2 * 2 + 2 * 3) / 3)


def test_rows_are_spread_over_the_whole():
    x = torch.arange(10)
    assert bench_quality.spread(x, 4).tolist() == [0, 2, 5, 7]
    assert bench_quality.spread(x, 20).tolist() == list(range(10))


@pytest.mark.parametrize(
    "new_model, shape, n",
    [
        (bench_quality.digit_classifier, (1, 28, 28), 128),
        (bench_quality.colour_classifier, (3, 32, 32), 256),
    ],
)
def test_features_come_before_the_last_layer(new_model, shape, n):
    model = new_model().eval()
    images = torch.randint(256, (2, *shape), dtype=torch.uint8)
    features = bench_quality.apply(model.features, images)
    assert features.shape == (2, n)
    assert (features >= 0).all()
    assert torch.equal(bench_quality.apply(model, images), model.last(features))


def test_a_classifier_learns():
    """Squares that are brighter on the left or on the right, which cannot be mirrored."""
    labels = torch.arange(64) % 2
    images = torch.zeros(64, 1, 28, 28, dtype=torch.uint8)
    images[labels == 0, :, :, :14] = 255
    images[labels == 1, :, :, 14:] = 255
    model = bench_quality.train_classifier(bench_quality.digit_classifier, images, labels, 12, 16)
    assert bench_quality.accuracy(model, images, labels) == 1
    model = bench_quality.train_classifier(bench_quality.digit_classifier, images, labels, 12, 16, flip=True)
    assert bench_quality.accuracy(model, images, labels) < 0.9


def test_pictures_are_read_with_their_classes(tmp_path, monkeypatch):
    for i in range(10):
        name = ["cat", "dog"][i % 2]
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (3, 3), (10, 20, 30 * (i % 2))).save(tmp_path / name / f"{i}.png")
    with pytest.raises(SystemExit, match="10 images are too few"):
        bench_quality.read_folder(tmp_path, 3, 4)
    monkeypatch.setattr(bench_quality, "FEWEST", 10)
    images, names = bench_quality.read_folder(tmp_path, 3, 4)
    labels = bench_quality.to_labels(names, ["ant", "cat", "dog"], tmp_path)
    assert images.shape == (10, 3, 4, 4)
    assert labels.tolist() == [1] * 5 + [2] * 5
    assert images[0, :, 0, 0].tolist() == [10, 20, 0]
    assert images[9, :, 3, 3].tolist() == [10, 20, 30]
    with pytest.raises(SystemExit, match="dog; the classes are ant, cat"):
        bench_quality.to_labels(names, ["ant", "cat"], tmp_path)


def test_the_images_of_a_run_on_codes_are_those_of_the_codes(tmp_path):
    for name, options in {
        "vqvae": {"dataset": "cifar10", "channels": 3},
        "pixelcnn": {"dataset": str(tmp_path / "vqvae"), "channels": 1},
    }.items():
        (tmp_path / name).mkdir()
        torch.save({"options": options}, tmp_path / name / "checkpoint.pt")
    assert bench_quality.find_options(tmp_path / "pixelcnn") == {"dataset": "cifar10", "channels": 3}


STATE = {
    "step": 7,
    "seconds": 1.5,
    "options": {"lr": 0.1, "out_dir": "a", "resume": None},
    "log": [{"step": 5, "seconds": 1.0, "loss": 0.25}],
    "G": {"weight": torch.arange(3.0)},
    "optimizer": {
        "state": {0: {"exp_avg": torch.ones(2)}},
        "param_groups": [{"lr": 0.1, "betas": (0.5, 0.9)}],
    },
}


def test_only_seconds_and_names_may_differ_between_runs():
    other = copy.deepcopy(STATE)
    other["seconds"] = 2.5
    other["log"][0]["seconds"] = 3.0
    other["options"] |= {"out_dir": "b", "resume": "b"}
    assert bench_crash.differences(STATE, other) == []


def test_every_other_difference_is_named():
    other = copy.deepcopy(STATE)
    other["step"] = 8
    other["options"]["lr"] = 0.2
    other["log"][0]["loss"] += 1e-12
    other["G"]["weight"][1] += 1e-6
    other["optimizer"]["state"][0]["exp_avg"] = torch.ones(2, 1)
    other["optimizer"]["param_groups"][0]["betas"] = (0.5, 0.99)
    assert bench_crash.differences(STATE, other, "run") == [
        "run.step",
        "run.options.lr",
        "run.log.0.loss",
        "run.G.weight",
        "run.optimizer.state.0.exp_avg",
        "run.optimizer.param_groups.0.betas.1",
    ]
    other = copy.deepcopy(STATE)
    other["log"].append({})
    del other["G"]["weight"]
    assert bench_crash.differences(STATE, other, "run") == ["run.log: length", "run.G: keys"]
