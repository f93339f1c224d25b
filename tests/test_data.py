"""The built-in task, reading and downloading CIFAR-100, and what a hostile file cannot do."""

import hashlib
import http.server
import io
import math
import os
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
from conftest import Call, cifar_split, pickled
from PIL import Image

from lab import data
from lab.cli import UserError
from lab.data import CIFAR100, REGIONS, Bearing, BearingCorner, batch_indices


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """The bytes of a small archive laid out as the official one, which data.py takes for it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, n in (("train", 50), ("test", 20)):
            raw = pickled(cifar_split(n, seed=n))
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    monkeypatch.setattr(data, "CIFAR100_MD5", hashlib.md5(buffer.getvalue()).hexdigest())
    return buffer.getvalue()


@pytest.fixture
def serve(monkeypatch):
    """serve(content) makes data.py download that from a server on this machine; returns the list of requests."""
    servers = []

    def start(content, announced=None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path)
                self.send_response(200 if content is not None else 404)
                self.send_header("Content-Length", str(announced or len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *_):
                pass

        requests, server = [], http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(data, "CIFAR100_URL", f"http://127.0.0.1:{server.server_port}/cifar-100-python.tar.gz")
        return requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_downloads_once_and_reads_what_was_packed(archive, serve, tmp_path):
    requests, root = serve(archive), tmp_path / "new" / "data"
    for _ in range(2):
        cifar = CIFAR100(root, batch_size=10).load()
    assert requests == ["/cifar-100-python.tar.gz"]
    test = cifar_split(20, seed=20)
    assert np.array_equal(cifar.test_images.flatten(1).numpy(), test[b"data"])
    assert cifar.test_labels.tolist() == test[b"fine_labels"]
    train = cifar_split(50, seed=50)
    assert sorted(cifar.labels.tolist()) == sorted(train[b"fine_labels"])
    assert {i.numpy().tobytes() for i in cifar.images} == {i.tobytes() for i in train[b"data"]}
    assert sorted(os.listdir(root)) == ["cifar-100-python", "cifar-100-python.tar.gz"]


def test_takes_an_archive_that_is_there_already(archive, serve, tmp_path):
    requests = serve(b"not asked for")
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(archive)
    assert len(CIFAR100(tmp_path, batch_size=10).load().images) == 50
    assert not requests


@pytest.mark.parametrize(
    "content, announced, says",
    [
        (lambda raw: None, None, "404"),
        (lambda raw: raw[:-100], None, "truncated or altered"),
        (lambda raw: raw[:-100], 10**6, "truncated or altered|cannot download"),
        (lambda raw: raw[:500] + b"!" + raw[501:], None, "truncated or altered"),
    ],
    ids=["missing", "short", "cut off", "altered"],
)
def test_a_failed_download_says_why_and_leaves_nothing(archive, serve, tmp_path, content, announced, says):
    serve(content(archive), announced)
    with pytest.raises(UserError, match=says) as error:
        CIFAR100(tmp_path, batch_size=10).load()
    assert "run again" in str(error.value) and "\n" not in str(error.value)
    assert not os.listdir(tmp_path)


def test_a_damaged_archive_of_the_users_is_told_and_left_alone(archive, tmp_path):
    path = tmp_path / "cifar-100-python.tar.gz"
    path.write_bytes(archive[:-1])
    with pytest.raises(UserError, match="delete it and run again"):
        CIFAR100(tmp_path, batch_size=10).load()
    assert path.read_bytes() == archive[:-1]


def test_an_archive_cannot_write_outside_its_folder(archive, serve, tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(archive)) as good, tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for file in good:
            tar.addfile(file, good.extractfile(file))
        tar.addfile(tarfile.TarInfo("cifar-100-python/../../../evil"))
    monkeypatch.setattr(data, "CIFAR100_MD5", hashlib.md5(buffer.getvalue()).hexdigest())
    serve(buffer.getvalue())
    root = tmp_path / "a" / "b"
    CIFAR100(root, batch_size=10).load()
    assert not list(tmp_path.rglob("evil")) and sorted(os.listdir(root / "cifar-100-python")) == ["test", "train"]


@pytest.mark.parametrize(
    "hostile",
    [
        lambda: pickle.dumps(Call(os.mkdir, "harm"), protocol=2),
        lambda: pickle.dumps(Call(eval, "__import__('os').mkdir('harm')"), protocol=2),
        lambda: pickle.dumps({b"data": Call(os.mkdir, "harm")}, protocol=4),
        lambda: b"cos\nmkdir\n(S'harm'\ntR.",
        lambda: b"(S'harm'\nios\nmkdir\n.",
        lambda: b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        lambda: b"cnumpy\nfromfile\n.",
        lambda: b"cnumpy.core.multiarray\nfromfile\n.",
    ],
)
def test_a_pickle_that_would_run_code_is_refused(hostile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").write_bytes(hostile())
    with pytest.raises(UserError, match="it asks for"):
        data.read_cifar100(tmp_path / "train")
    assert os.listdir(tmp_path) == ["train"]
    if b"mkdir" in hostile():
        pickle.loads(hostile())  # it would have
        assert (tmp_path / "harm").is_dir()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"not a pickle",
        pickled(cifar_split(5))[:-50],
        pickled({**cifar_split(5), b"fine_labels": [0] * 4}),
        pickled({**cifar_split(5), b"fine_labels": [100] * 5}),
        pickled({**cifar_split(5), b"data": np.zeros((5, 3072), np.float32)}),
        pickled({**cifar_split(5), b"data": np.zeros((5, 99), np.uint8)}),
        pickled({b"data": np.zeros((5, 3072), np.uint8)}),
        pickled([np.zeros(1)]),
        None,
    ],
)
def test_a_damaged_file_is_told(raw, tmp_path):
    if raw is not None:
        (tmp_path / "test").write_bytes(raw)
    with pytest.raises(UserError, match=r"cannot read .*delete .* and run again"):
        data.read_cifar100(tmp_path / "test")


@pytest.fixture
def cifar(archive, tmp_path):
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(archive)
    return lambda **options: CIFAR100(tmp_path, **{"batch_size": 20} | options).load()


def test_batches_are_normalised_and_decided_by_seed_and_step(cifar):
    a, b = cifar(seed=1), cifar(seed=1)
    torch.manual_seed(0)
    images, labels = a.train_batch(3)
    torch.manual_seed(0)
    again = b.train_batch(3)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert images.shape == (20, 3, 32, 32) and images.dtype == torch.float32
    assert not torch.equal(labels, cifar(seed=2).train_batch(3)[1])
    (test, labels), *rest = a.test_batches(batch_size=12)
    mean, std = torch.tensor([[0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]]).view(2, 3, 1, 1)  # R, G, B
    torch.testing.assert_close(test, (a.test_images[:12] / 255 - mean) / std)
    assert [len(labels) for _, labels in rest] == [8]


def test_a_fraction_is_the_same_part_for_every_seed_and_lies_within_a_larger_one(cifar):
    def images(**options):
        return {i.numpy().tobytes() for i in cifar(**options).images}

    assert len(images(fraction=0.2)) == 10
    assert images(fraction=0.2) == images(fraction=0.2, seed=5)
    assert images(fraction=0.2) < images(fraction=0.6) < images()


@pytest.mark.parametrize("n, batch_size", [(10, 4), (10, 10), (3, 8), (7, 1)])
def test_every_pass_sees_every_image_once_in_a_new_order(n, batch_size):
    steps = 6 * n // math.gcd(n, batch_size)
    stream = np.concatenate([batch_indices(s, batch_size, n, seed=0) for s in range(steps)])
    passes = stream[: len(stream) // n * n].reshape(-1, n)
    assert (np.sort(passes, axis=1) == np.arange(n)).all()
    assert len({tuple(p) for p in passes}) > 1
    assert not np.array_equal(stream, np.concatenate([batch_indices(s, batch_size, n, 1) for s in range(steps)]))


def test_augmented_batches_are_of_the_same_images_and_decided_by_the_generator(cifar):
    plain, augmented, mixed = (cifar(augment=augment) for augment in ("none", "3", "mix"))
    images, labels = plain.train_batch(0)
    assert torch.equal(images, plain.normalise(plain.images[torch.from_numpy(batch_indices(0, 20, 50, 0))]))
    for task in augmented, mixed:
        torch.manual_seed(0)
        a, targets = task.train_batch(0)
        torch.manual_seed(0)
        assert torch.equal(a, task.train_batch(0)[0])
        assert a.shape == images.shape and a.dtype == torch.float32 and not torch.equal(a, images)
        low, high = (plain.normalise(torch.full((3, 1, 1), level)) for level in (0, 255))
        assert (a > low - 1e-5).all() and (a < high + 1e-5).all()
        assert a.std() > 0.3  # noise between 0 and 255 stays far from a constant
        if task is augmented:
            assert torch.equal(targets, labels)
        else:
            assert targets.shape == (20, 100) and (targets[torch.arange(20), labels] > 0).all()
            torch.testing.assert_close(targets.sum(dim=1), torch.ones(20))


@pytest.mark.parametrize("img_size", [24, 48])
def test_test_images_of_another_size_are_pillows_bicubic_ones(cifar, img_size):
    task = cifar()
    task.test_images = 64 + task.test_images // 2  # Pillow clips after each axis: nothing to clip here
    images, labels = task.test_set(img_size)
    assert torch.equal(labels, task.test_labels) and images.dtype == torch.uint8
    for ours, original in zip(images, task.test_images, strict=True):
        pillows = Image.fromarray(original.permute(1, 2, 0).numpy()).resize((img_size, img_size), Image.BICUBIC)
        difference = ours.permute(1, 2, 0).int() - torch.from_numpy(np.array(pillows)).int()
        assert difference.abs().max() <= 1


def squares(image):
    """The centres (y, x) of the red and of the blue square in an image (3, S, S) of bytes."""
    image = image.permute(1, 2, 0).numpy().astype(int)
    return [np.argwhere((image == colour).all(-1)).mean(0) for colour in ([255, 0, 0], [0, 0, 255])]


@pytest.mark.parametrize("img_size", [32, 48])
def test_bearing_is_labelled_by_the_direction_from_red_to_blue(img_size):
    images, labels = Bearing(batch_size=64).draw(500, "cpu", torch.Generator().manual_seed(1), img_size)
    assert images.shape == (500, 3, img_size, img_size)
    for image, label in zip(images, labels.tolist(), strict=True):
        (ry, rx), (by, bx) = squares(image)
        degrees = math.degrees(math.atan2(by - ry, bx - rx)) % 360
        assert abs((degrees - 45 * label + 180) % 360 - 180) < 22.5
    assert torch.bincount(labels, minlength=8).min() > 30


@pytest.mark.parametrize("region", REGIONS)
def test_bearings_squares_fill_the_region_and_nothing_else(region):
    corner = BearingCorner(batch_size=500)
    images, _ = corner.test_set(region=region)
    cells = {tuple(int(c) // 4 for c in square) for image in images for square in squares(image)}
    top, left, side = REGIONS[region]
    assert cells == {(y, x) for y in range(top, top + side) for x in range(left, left + side)}
    if region == corner.region:
        assert torch.equal(images, corner.test_set()[0])


def test_bearings_test_set_is_fixed_and_its_training_images_are_new_each_time():
    a, b = Bearing(batch_size=64, seed=0), Bearing(batch_size=64, seed=1)
    assert torch.equal(a.test_set()[0], b.test_set()[0]) and len(a.test_set()[0]) == a.test_size
    assert not torch.equal(a.train_batch(0)[0], a.train_batch(0)[0])
    torch.manual_seed(0)
    images, _ = a.train_batch(0)
    torch.manual_seed(0)
    assert torch.equal(images, b.train_batch(7)[0])
    assert images.shape == (64, 3, 32, 32) and abs(images.mean()) < 0.1 and abs(images.std() - 1) < 0.1
    with pytest.raises(UserError, match="leave --fraction out"):
        Bearing(batch_size=64, fraction=0.5)
    with pytest.raises(UserError, match="leave --augment out"):
        Bearing(batch_size=64, augment="3")
    for img_size in 30, 4:  # no whole cells; one cell for two squares
        with pytest.raises(UserError, match="cells of 4 pixels"):
            a.test_set(img_size=img_size)


@pytest.mark.parametrize("fraction", [0.2, 1.0])
def test_images_keep_their_labels(cifar, fraction):
    packed = cifar_split(50, seed=50)
    label = {i.tobytes(): n for i, n in zip(packed[b"data"], packed[b"fine_labels"], strict=True)}
    task = cifar(fraction=fraction)
    images, labels = task.train_batch(1)
    images = (images * task.scale + task.shift).round().byte()
    assert [label[i.numpy().tobytes()] for i in images] == labels.tolist()


@pytest.mark.parametrize("img_size", [24, 48])
def test_resized_test_images_clip_and_do_not_wrap(cifar, img_size):
    task = cifar()
    task.test_images[..., :16], task.test_images[..., 16:] = 0, 255
    row = task.test_set(img_size)[0][0, 0, 0].int()  # bicubic overshoots at an edge
    assert (row.diff() >= 0).all() and row[0] == 0 and row[-1] == 255


def test_regions_are_quarters():
    assert REGIONS == {"everywhere": (0, 0, 8), "upper left": (0, 0, 4), "lower right": (4, 4, 4)}
