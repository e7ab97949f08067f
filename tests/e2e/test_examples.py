"""The examples: readers of small and of damaged files in every layout, the models, and the demo from its command line to its files."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import data
import models
import numpy as np
import plots
import pytest
import torch
import torch.nn.functional as F
import train
import trainer
from helpers.sampling import all_but
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
SETS = {
    "mnist": ("MNIST/raw", "train", "t10k", 10, 0),
    "fashion-mnist": ("FashionMNIST/raw", "train", "t10k", 10, 0),
    "emnist-letters": ("EMNIST/raw", "emnist-letters-train", "emnist-letters-test", 26, 1),
}


# --- readers ---


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.astype(np.uint8).tobytes()


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


def write_set(root: Path, name: str, *, direct: bool = False, end: str = ".gz") -> dict[str, np.ndarray]:
    """Write a small data set in the layout of `name`; return its arrays by file stem."""
    folder, train_stem, test_stem, classes, first = SETS[name]
    rng = np.random.default_rng(0)
    written = {}
    for stem, count in ((train_stem, 60), (test_stem, 30)):
        arrays = {IMAGES: rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), LABELS: first + np.arange(count, dtype=np.uint8) % classes}
        for kind, array in arrays.items():
            put((root if direct else root / folder) / f"{stem}-{kind}{end}", idx(array))
            written[f"{stem}-{kind}"] = array
    return written


@pytest.mark.parametrize(("direct", "end"), [(False, ".gz"), (True, ".gz"), (False, ""), (True, "")])
@pytest.mark.parametrize("name", SETS)
def test_idx_sets(tmp_path: Path, name: str, direct: bool, end: str) -> None:
    _, train_stem, test_stem, classes, first = SETS[name]
    written = write_set(tmp_path, name, direct=direct, end=end)
    found = data.load(name, tmp_path)
    assert (found.name, found.classes, found.shape) == (name, classes, (1, 28, 28))
    raw = torch.from_numpy(written[f"{train_stem}-{IMAGES}"]).double()
    for stem, x, y in ((train_stem, found.train_x, found.train_y), (test_stem, found.test_x, found.test_y)):
        images = torch.from_numpy(written[f"{stem}-{IMAGES}"]).double()
        if name == "emnist-letters":
            images = images.transpose(1, 2)
        # both parts by the mean and deviation of the training part
        torch.testing.assert_close(x.double(), ((images - raw.mean()) / raw.std(correction=0))[:, None], rtol=0, atol=1e-5)
        assert y.tolist() == (written[f"{stem}-{LABELS}"] - first).tolist()
        assert (x.dtype, y.dtype, x.is_contiguous()) == (torch.float32, torch.int64, True)


def test_constant_images_stay_finite(tmp_path: Path) -> None:
    write_set(tmp_path, "mnist")
    put(tmp_path / "MNIST/raw/train-images-idx3-ubyte.gz", idx(np.full((60, 28, 28), 7)))
    found = data.load("mnist", tmp_path)
    assert found.train_x.eq(0).all() and found.test_x.isfinite().all()


def test_digits() -> None:
    found, again = data.load("digits"), data.load("digits")
    assert (found.shape, found.classes, len(found.train_x), len(found.test_x)) == ((1, 8, 8), 10, 1437, 360)
    assert torch.equal(found.train_x, again.train_x) and torch.equal(found.test_y, again.test_y)
    shares = [y.bincount(minlength=10) / len(y) for y in (found.train_y, found.test_y)]
    torch.testing.assert_close(*shares, rtol=0, atol=2 / 360)  # stratified
    torch.testing.assert_close(torch.std_mean(found.train_x, correction=0), (torch.tensor(1.0), torch.tensor(0.0)), rtol=0, atol=1e-5)


TRAIN_IMAGES, TRAIN_LABELS = f"train-{IMAGES}.gz", f"train-{LABELS}.gz"
DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": (TRAIN_LABELS, Path.unlink, "mnist lacks train-labels-idx1-ubyte.gz .*Try torchvision.datasets.MNIST"),
    "no gzip": (TRAIN_IMAGES, lambda p: p.write_bytes(b"<html>404</html>"), "16 bytes.* is no whole gzip file: Not a gzipped file"),
    "half a gzip": (TRAIN_IMAGES, lambda p: p.write_bytes(p.read_bytes()[:5000]), "5000 bytes.* is no whole gzip file"),
    "corrupt gzip": (TRAIN_IMAGES, lambda p: p.write_bytes(p.read_bytes()[:2000] + bytes(300) + p.read_bytes()[2300:]), "is no whole gzip file"),
    "empty": (TRAIN_IMAGES, lambda p: put(p, b""), r"starts with the bytes \(none\); an IDX file of 3 dimensions starts with 00 00 08 03"),
    "not IDX": (TRAIN_IMAGES, lambda p: put(p, b"PK\3\4" + bytes(99)), "starts with the bytes 50 4b 03 04"),
    "floats": (TRAIN_IMAGES, lambda p: put(p, b"\0\0\x0d\3" + bytes(99)), "starts with the bytes 00 00 0d 03"),
    "images for labels": (TRAIN_LABELS, lambda p: put(p, idx(np.zeros((60, 28, 28)))), "images and labels are exchanged"),
    "half a header": (TRAIN_IMAGES, lambda p: put(p, idx(np.zeros((1, 28, 28)))[:9]), "ends within its header, after 9 of 16 bytes"),
    "truncated": (TRAIN_IMAGES, lambda p: put(p, idx(np.zeros((60, 28, 28)))[:-1]), "is truncated: 47055 bytes found, 47056 expected for the 60 entries"),
    "too long": (TRAIN_IMAGES, lambda p: put(p, idx(np.zeros((60, 28, 28))) + b"x"), "is too long: 47057 bytes found, 47056 expected"),
    "other size": (TRAIN_IMAGES, lambda p: put(p, idx(np.zeros((60, 32, 32)))), "holds entries of 32 x 32; 28 x 28 is expected"),
    "no image": (TRAIN_IMAGES, lambda p: put(p, idx(np.zeros((0, 28, 28)))), "holds no image"),
    "count": (TRAIN_LABELS, lambda p: put(p, idx(np.zeros(59))), "holds 60 images and .* 59 labels"),
    "label": (TRAIN_LABELS, lambda p: put(p, idx(np.arange(60) % 12)), "holds labels from 0 to 11; 0 to 9 are expected"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_idx(tmp_path: Path, damage: str) -> None:
    write_set(tmp_path, "mnist")
    file, harm, message = DAMAGES[damage]
    harm(tmp_path / "MNIST/raw" / file)
    with pytest.raises(data.DataError, match=message) as caught:
        data.load("mnist", tmp_path)
    assert file.removesuffix(".gz") in str(caught.value) and "\n" not in str(caught.value)


def test_emnist_labels_count_from_one(tmp_path: Path) -> None:
    write_set(tmp_path, "emnist-letters")
    put(tmp_path / "EMNIST/raw/emnist-letters-train-labels-idx1-ubyte.gz", idx(np.arange(60) % 26))
    with pytest.raises(data.DataError, match="holds labels from 0 to 25; 1 to 26 are expected"):
        data.load("emnist-letters", tmp_path)


CIFAR_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 at its true size, because only a file's length shows its format. Image i of a file has class (file + i) % 10."""
    root = tmp_path_factory.mktemp("cifar")
    (root / "cifar-10-batches-bin").mkdir()
    table = np.zeros((10_000, 3073), np.uint8)
    for number, file in enumerate(CIFAR_FILES):
        table[:, 0] = (np.arange(10_000) + number) % 10
        table[:, 1:1025], table[:, 1025:2049], table[0, 2049] = number, np.arange(10_000)[:, None] % 200, 255  # red, green, first blue pixel
        table.tofile(root / "cifar-10-batches-bin" / file)
    return root


@pytest.mark.slow
def test_cifar10(cifar: Path) -> None:
    found = data.load("cifar10", cifar)
    assert (found.shape, found.classes, len(found.train_x), len(found.test_x)) == ((3, 32, 32), 10, 50_000, 10_000)
    assert found.train_y[10_000:10_003].tolist() == [1, 2, 3] and found.test_y[:3].tolist() == [5, 6, 7]
    red, green = torch.arange(5.0), torch.arange(200.0)
    torch.testing.assert_close(found.train_x[::10_000, 0, 5, 7], (red - 2) / red.std(correction=0))
    torch.testing.assert_close(found.test_x[:200, 1, 31, 0], (green - green.mean()) / green.std(correction=0))
    assert found.train_x[0, 2].argmax() == 0


def test_damaged_cifar10(cifar: Path, tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"lacks data_batch_1\.bin, .*test_batch\.bin in .*Try unpacking cifar-10-binary.tar.gz"):
        data.load("cifar10", tmp_path)
    for file in CIFAR_FILES:
        (tmp_path / file).symlink_to(cifar / "cifar-10-batches-bin" / file)
    for file in ("data_batch_2.bin", "data_batch_4.bin"):
        (tmp_path / file).unlink()
    with pytest.raises(data.DataError, match=rf"cifar10 lacks data_batch_2\.bin, data_batch_4\.bin in {tmp_path};"):  # the rest was found there
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [(bytes(3 * 3073), "9219 bytes found, 6146 expected"), (bytes(3073), "3073 bytes found"), (b"", "0 bytes found")]
)
def test_wrong_size_cifar10(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(data.DataError, match=f"data_batch_1.bin has the wrong size: {message}"):
        data.read_cifar10(put(tmp_path / "data_batch_1.bin", content), records=2)


@pytest.mark.parametrize(
    ("name", "directory", "message"),
    [
        ("fashon-mnist", None, "'fashon-mnist' is unknown; valid are digits, mnist, .* Did you mean 'fashion-mnist'?"),
        ("mnist", None, "mnist is read from files; name the directory"),
        ("mnist", "nowhere", "nowhere is no directory"),
        ("digits", "somewhere", "digits comes with scikit-learn and reads no directory"),
    ],
)
def test_load_errors(name: str, directory: str | None, message: str) -> None:
    with pytest.raises(data.DataError, match=message):
        data.load(name, directory)


# --- models ---


@pytest.mark.parametrize(
    ("name", "in_shape", "width"),
    [
        ("mlp", (1, 8, 8), 32),
        ("mlp", (3, 32, 32), 16),
        ("cnn", (1, 8, 8), 4),
        ("cnn", (1, 28, 28), 2),
        ("wrn-10-2", (3, 32, 32), 4),
        ("wrn-16-1", (1, 8, 8), 2),
        ("resnet-14", (1, 28, 28), 4),
        ("resnet-20", (3, 32, 32), 2),
        ("vgg-11", (3, 32, 32), 4),
        ("vgg-19", (1, 32, 32), 2),
    ],
)
def test_models_train(name: str, in_shape: tuple[int, int, int], width: int) -> None:
    net = models.build(name, in_shape, 7, width)
    x, y = torch.randn(16, *in_shape), torch.arange(16) % 7
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    before = [p.detach().clone() for p in net.parameters()]
    logits = net(x)
    assert logits.shape == (16, 7)
    F.cross_entropy(logits, y).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())
    assert all(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_sizes_of_the_papers() -> None:
    with torch.device("meta"):  # no memory, no initialisation
        sizes = {name: count(models.build(name, (3, 32, 32), 10)) for name in ("wrn-28-10", "wrn-16-4", "resnet-20", "resnet-56", "vgg-16")}
        digits = models.build("mlp", (1, 8, 8), 10)
    assert {n: round(s / 1e6, 2) for n, s in sizes.items()} == {"wrn-28-10": 36.48, "wrn-16-4": 2.75, "resnet-20": 0.27, "resnet-56": 0.85, "vgg-16": 14.72}
    assert [tuple(p.shape) for p in digits.parameters() if p.dim() == 2] == [(2048, 64), (2048, 2048), (2048, 2048), (10, 2048)]


@pytest.mark.parametrize(
    ("name", "uncounted"),
    [("wrn-16-2", 1), ("wrn-28-4", 1), ("resnet-14", 0), ("resnet-56", 0), ("vgg-13", -2)],  # wrn counts shortcuts, not the head; vgg had three linear layers
)
def test_depth_counts_layers(name: str, uncounted: int) -> None:
    net = models.build(name, (3, 32, 32), 10, 2)
    assert sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in net.modules()) == int(name.split("-")[1]) + uncounted


@pytest.mark.parametrize(
    ("name", "in_shape", "width", "message"),
    [
        ("resnet20", (3, 32, 32), None, "model 'resnet20' is unknown; valid are mlp, cnn, wrn-D-K .* Did you mean 'resnet-20'?"),
        ("transformer", (3, 32, 32), None, "model 'transformer' is unknown; valid are"),
        ("wrn-12-2", (3, 32, 32), None, r"wrn-12-2: got depth 12 .* D = 6n \+ 4"),
        ("wrn-4-2", (3, 32, 32), None, "wrn-4-2: got depth 4"),
        ("wrn-10-0", (3, 32, 32), None, "widening factor 0"),
        ("resnet-18", (3, 32, 32), None, r"resnet-18: got depth 18; resnet-N takes N = 6n \+ 2"),
        ("vgg-12", (3, 32, 32), None, "vgg-12: got depth 12; valid are vgg-11, vgg-13, vgg-16, vgg-19"),
        ("vgg-11", (1, 28, 28), None, "vgg-11: images of 28x28 are too small; .* at least 32x32"),
        ("cnn", (1, 3, 3), None, "cnn: images of 3x3 are too small"),
        ("mlp", (1, 8, 8), 0, "width: got 0; at least 1"),
    ],
)
def test_model_errors(name: str, in_shape: tuple[int, int, int], width: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.build(name, in_shape, 10, width)


# --- the demo ---


@pytest.mark.slow
@pytest.mark.exhaustive
def test_minimal(tmp_path: Path) -> None:
    """The script, with fewer steps and smaller layers, runs as a user would run it, and prints how many rows were kept and both times."""
    text = (ROOT / "examples" / "minimal.py").read_text()
    assert len(text.splitlines()) <= 30 and "steps: int = 150" in text
    path = tmp_path / "minimal.py"
    path.write_text(text.replace("steps: int = 150", "steps: int = 30").replace("1024", "512"))
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=500, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"whole backward pass +30 .* on average", done.stdout) and re.search(
        r"Inductor [\d.]+ ms, approx [\d.]+ ms, [\d.]+ times as fast", done.stdout
    )


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.distributed
def test_train_ddp(tmp_path: Path) -> None:
    """Two processes train, go on from the checkpoint, and exchange fewer bytes where they are told to."""

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "examples" / "train_ddp.py"]
        more = ["--width", "64", "--checkpoint", tmp_path / "run.pt", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=900, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert re.findall(r"epoch (\d)", run("--epochs", "1")) == ["1"]
    assert re.findall(r"epoch (\d)", run("--epochs", "2", "--resume")) == ["2"]
    sent, whole = map(float, re.search(r"exchanged per step: ([\d.]+) MB of ([\d.]+) MB", run("--epochs", "1", "--reduce")).groups())
    assert sent < 0.6 * whole


@pytest.fixture(scope="module")
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The demo's command on small data, with the number of seeds asked for: its output, and its folder. With two seeds it runs as a user runs it, with one
    in this process, which saves importing torch and the plots' libraries once more."""
    out = tmp_path_factory.mktemp("demo") / "new" / "out"
    arguments = "--epochs 8 --limit 300 --batch-size 128 --width 64 --lr 0.01 --policy always --ratio 0.5 --json"
    command = [*arguments.split(), "--seeds", str(request.param), "--out", str(out)]
    if request.param == 1:
        result = CliRunner().invoke(train.app, command)
        assert result.exit_code == 0, result.output
        return result.stdout, out
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, ROOT / "examples" / "train.py", *command], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, out


@pytest.mark.slow
@pytest.mark.parametrize("demo", all_but([1], [1, 2]), ids="{} seeds".format, indirect=True)
def test_demo_rows(demo: tuple[str, Path]) -> None:
    _, out = demo
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert len(rows) >= 2 and [(r["run"], r["seed"]) for r in rows] == [(run, seed) for seed in range(len(rows) // 2) for run in ("exact", "approx")]
    for r in rows:
        assert (r["dataset"], r["model"], r["width"], r["limit"], r["steps"]) == ("digits", "mlp", 64, 300, 16)
        assert r["options"] == ({"ratio": 0.5, "policy": "always"} if r["run"] == "approx" else {})
        assert 0 < r["step_s_p10"] <= r["step_s_p50"] <= r["step_s_p90"] and r["train_s"] > 0 and r["first_step_s"] > 0
        assert r["peak_bytes"] > 50 * 2**20  # a process with torch in it
        assert [p[0] for p in r["curve"]] == [*range(2, 17, 2)] and r["curve"][-1][3] == r["test_accuracy"]
        assert r["test_accuracy"] > 0.3 and r["curve"][-1][2] < r["curve"][0][2]  # chance is 0.1
    # an exact training step has 6 FLOPs per weight and sample, less the gradient with respect to the images
    exact = 128 * (6 * (64 * 64 * 3 + 64 * 10) - 2 * 64 * 64)
    assert all(r["flops_per_step"] == exact for r in rows if r["run"] == "exact")
    assert all(0.4 * exact < r["flops_per_step"] < exact for r in rows if r["run"] == "approx")


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("demo", [2], ids=["2 seeds"], indirect=True)
def test_demo_output(demo: tuple[str, Path]) -> None:
    shown, out = demo
    assert (out / "train.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for text in (
        "mlp (width 64) on digits, 300 training images, batches of 128; 8 epochs, 16 steps per run",
        "approx: ratio 0.5, policy always",
        "Sequential: FORWARD PASS SAMPLED in",
        "Speed-up:",
        "A difference below the spread over the 2 seeds",
        "The last 44 of an epoch's 300 samples",
        "train.png",
        "train.jsonl",
    ):
        assert text in shown
    lines = {line.split("│")[1].strip(): line for line in shown.splitlines() if line.startswith("│")}
    assert set(lines) == {"exact", "approx"} and "±" in lines["approx"] and "1.00x" in lines["exact"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ratio 1.5", "error: ratio: got 1.5; a number in (0, 1] is expected"),
        ("--method topq", "error: method: got 'topq'; valid are topk,"),
        ("--group some", "error: group: got 'some'; 'auto' or an integer"),
        ("--sampling sideways", "error: sampling: got 'sideways'; valid are forward, backward, blackbox"),
        ("--dataset mnits", "error: data set 'mnits' is unknown"),
        ("--dataset cifar10", "error: cifar10 is read from files; name the directory"),
        ("--dataset mnist --data {tmp}", "error: mnist lacks train-images-idx3-ubyte.gz"),
        ("--data {tmp}", "error: digits comes with scikit-learn"),
        ("--model mpl", "error: model 'mpl' is unknown"),
        ("--model vgg-16", "error: vgg-16: images of 8x8 are too small"),
        ("--batch-size 1000 --epochs 1", "error: --epochs 1, --batch-size 1000 and 1437 training samples make 1 steps; at least 2 are needed"),
        ("--limit 100", "100 training samples make 0 steps"),
        ("--device tpu", "error: --device: got 'tpu'; auto, cpu, cuda or cuda:N is expected"),
        ("--out {tmp}/file/below", "error: [Errno 20] Not a directory"),
        ("--epochs 0", "--epochs"),
    ],
)
def test_demo_errors(tmp_path: Path, arguments: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(train.app, [a.format(tmp=tmp_path) for a in arguments.split()])
    assert done.exit_code == 2, done.output
    assert message in done.stderr and "Traceback" not in done.output
    assert not done.stderr.startswith("error:") or done.stderr.count("\n") == 1


@pytest.mark.slow
def test_lost_process(tmp_path: Path) -> None:
    settings = trainer.Settings("digits", None, "mlp", 16, 1, 128, 1e-3, 256, "cpu", {})
    worker = trainer.Worker("exact", 0, settings, tmp_path, lambda news: None)
    try:
        worker.until_ready()
        os.kill(worker.process.pid or 0, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="the exact run with seed 0 ended with exit code -9 before it was done"):
            worker.epoch()
    finally:
        worker.end()
    assert not worker.process.is_alive()


def test_conclusions_say_what_was_measured() -> None:
    def run(name: str, seed: int, accuracy: float, step_s: float) -> trainer.Run:
        return trainer.Run(name, seed, 1.0 + step_s, (step_s,) * 9 + (3 * step_s,) * 3, 2**20, (trainer.Point(13, 1.0, 0.1, accuracy),))

    runs = [run("exact", 0, 0.96, 0.1), run("exact", 1, 0.98, 0.1), run("approx", 0, 0.95, 0.2), run("approx", 1, 0.95, 0.2)]
    exact, approx = plots.summarise("exact", runs, plots.StepFlops(10, 5, 0)), plots.summarise("approx", runs, plots.StepFlops(10, 5, 0))
    assert exact.accuracy == pytest.approx(97) and exact.spread == pytest.approx(2**0.5) and approx.spread == 0
    assert (exact.step_s, exact.train_s, exact.compile_s) == pytest.approx((0.1, 1.8, 1.0))
    text = "\n".join(plots.conclusions(exact, approx, 2))
    assert "Speed-up: 0.50x per step (medians), 0.61x for training and compiling together." in text  # slower, and said so
    assert "approx less exact: -2.00 points" in text and "below the spread over the 2 seeds" in text
    assert "Step times vary 3.0-fold" in text


@pytest.mark.slow
def test_same_seed_same_start() -> None:
    """With the same seed both runs have the same weights and batches, whatever the backend, so that they can be compared."""
    settings = trainer.Settings("digits", None, "mlp", 16, 1, 128, 0.0, 256, "cpu", {"policy": "always", "ratio": 1.0})
    news: list[trainer.Point | None] = []
    first, second = (trainer.train_once(name, 3, settings, lambda: None, news.append) for name in ("exact", "approx"))
    # at ratio 1 approx is Inductor to the bit, and at a learning rate of 0 any other seed would give another loss
    assert first.curve[0].loss == second.curve[0].loss and first.accuracy == second.accuracy
    other = trainer.train_once("approx", 4, settings, lambda: None, news.append)
    assert other.curve[0].loss != first.curve[0].loss
    assert [n is None for n in news] == [True, True, False] * 3


def test_flops_of_an_adaptive_run_count_the_rows_kept() -> None:
    flops = plots.StepFlops(exact=30, approx=30, on_rows=20)
    point = (trainer.Point(1, 1.0, 0.1, 0.9),)
    assert flops.of(trainer.Run("exact", 0, 1.0, (1.0,), 1, point)) == 30
    assert flops.of(trainer.Run("approx", 0, 1.0, (1.0,), 1, point, kept=0.25)) == 15
