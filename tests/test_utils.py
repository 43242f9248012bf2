"""The toolbox: names, data, statistics, FLOPs, settings that can't be."""

import hashlib
import math
import time
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import utils
from models import data, names, syn


@pytest.mark.parametrize(
    ("model", "layers", "classes"),
    [
        ("R8_SYN", (1, 1, 1), 10),
        ("R32_C10", (5, 5, 5), 10),
        ("R110_C100", (18, 18, 18), 100),
        ("R101_ImgNet", (3, 4, 23, 3), 1000),
    ],
)
def test_model_names(model, layers, classes):
    name = utils.parse_model(model)
    assert (name.layer_config, name.num_classes) == (layers, classes)


@pytest.mark.parametrize("model", ["R33_C10", "R2_C10", "R32", "R32_MNIST", "R34_ImgNet", "r32_C10", "", 32])
def test_other_names_are_refused(model):
    with pytest.raises(ValueError, match=r"expected R<depth>_<dataset>"):
        utils.build_model(model)


def test_missing_weights_say_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run rnet_sole\.ipynb with model = 'R44_C10' first"):
        utils.get_model("R44_C10", "cpu", tmp_path)


def test_imagenet_weights_without_a_network(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"ResNet101 weights could not be fetched .* put that file into"):
        utils.get_model("R101_ImgNet", "cpu")


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04"])
def test_imagenet_weights_that_are_damaged(monkeypatch, tmp_path, content):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "resnet101-63fe2227.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"resnet101-63fe2227\.pth is damaged: delete it"):
        utils.get_model("R101_ImgNet", "cpu")


# ------------------------------------------------------------------------------------------ data


@pytest.fixture(scope="module")
def drawing():
    start = time.process_time()
    drawing = syn.draw(1000, seed=0)
    assert time.process_time() - start < 10  # 12,000 images in 20 s would allow 1.7
    return drawing


def test_syn_is_the_same_bytes_every_time(drawing):
    digest = hashlib.sha256(drawing.images.tobytes() + drawing.labels.tobytes()).hexdigest()
    assert digest[:16] == "d028250d72179d62"
    assert drawing.images.shape == (1000, 3, 32, 32) and drawing.images.dtype == np.uint8


def test_syn_is_balanced_and_difficulty_uniform(drawing):
    assert np.bincount(drawing.labels).tolist() == [100] * 10
    assert drawing.difficulty.min() >= 0 and drawing.difficulty.max() <= 1
    assert abs(drawing.difficulty.mean() - 0.5) < 0.05


def test_syn_gets_noisier_with_difficulty(drawing):
    rough = np.abs(np.diff(drawing.images.astype(float), axis=3)).mean((1, 2, 3))
    assert np.corrcoef(rough, drawing.difficulty)[0, 1] > 0.8


def test_cifar_is_normalized_for_r32_alone(cifar10):
    for model, normalized in (("R32_C10", True), ("R110_C10", False)):
        train, test = utils.get_dataset(model, cifar10)
        assert (len(train), len(test)) == (50_000, 10_000)
        image, label = test[0]
        plain = test.images[0] / 255
        if normalized:
            plain = (plain - test.mean[0]) / test.std[0]
            assert test.mean.flatten()[0].item() == pytest.approx(125.3 / 255)
        torch.testing.assert_close(image, plain)
        assert test.classes[label] == "cat"


def images(n=12, **options):
    torch.manual_seed(0)
    pixels = torch.randint(1, 256, (n, 3, 32, 32), dtype=torch.uint8)
    return utils.Images(pixels, torch.arange(n) % 10, list("abcdefghij"), **options)


def test_augmentation_is_a_crop_of_the_padded_image_perhaps_flipped():
    data = images(augment=True)
    inputs, labels = data.read(torch.arange(12))
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    padded = torch.nn.functional.pad(data.images, [4] * 4) / 255
    flips = 0
    for image, whole in zip(inputs, padded, strict=True):
        crops = whole.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)  # (9, 9, 3, 32, 32)
        plain = (crops == image).all(-1).all(-1).all(-1).any()
        flipped = (crops == image.flip(2)).all(-1).all(-1).all(-1).any()
        assert plain or flipped
        flips += bool(flipped)
    assert 0 < flips < 12
    assert labels.tolist() == data.labels.tolist()


def test_first_epochs_see_small_crops():
    assert [data.crop_share(epoch, 4, 0.5) for epoch in range(4)] == [0.75, 0.75, 1, 1]
    assert data.crop_share(0, 1, 0.9) == 1  # the last epoch sees whole images
    assert data.crop_share(0, 9, 0) == 1
    assert [data.share_of(100, 0.29), data.share_of(15, 0.5)] == [29, 7]


def test_random_crops_are_somewhere_in_the_image():
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    images = (8 * rows + columns).float().expand(2, 3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    places = set()
    for _ in range(200):
        crop = data.random_crop(images, 0.75, generator)
        top, left = divmod(int(crop[0, 0, 0, 0]), 8)
        assert torch.equal(crop, images[:, :, top : top + 6, left : left + 6])
        assert crop.is_contiguous(memory_format=torch.channels_last)
        places.add((top, left))
    assert len(places) == 9


def test_loader_shows_every_image_once_in_a_new_order():
    loader = utils.Loader(images(25), 8, "cpu", shuffle=True)
    passes = [torch.cat([inputs.flatten(1).sum(1) for inputs, _ in loader]) for _ in range(2)]
    assert len(loader) == 4 and not torch.equal(*passes)
    torch.testing.assert_close(passes[0].sort()[0], passes[1].sort()[0])
    with pytest.raises(ValueError, match="batch_size is 0"):
        utils.Loader(images(), 0, "cpu")


def test_processes_share_every_batch(monkeypatch):
    """Two processes together read the images, augmented, that one reads."""

    def passed(rank, processes):
        monkeypatch.setattr(data, "rank", lambda: rank)
        monkeypatch.setattr(data, "num_processes", lambda: processes)
        loader = utils.Loader(images(20, augment=True), 8, "cpu", shuffle=True)
        loader.generator.manual_seed(1)
        return [inputs for inputs, _ in loader]

    first, second, whole = passed(0, 2), passed(1, 2), passed(0, 1)
    for a, b, both in zip(first, second, whole, strict=True):
        assert torch.equal(both[::2], a) and torch.equal(both[1::2], b)
    with pytest.raises(ValueError, match="8, which 3 processes can't share evenly: choose a multiple of 3"):
        passed(0, 3)
    with pytest.raises(ValueError, match="the last batch of 20 images has 4, too few for 8 processes"):
        passed(0, 8)


def test_image_files(tmp_path):
    Image.new("RGB", (50, 40), (10, 20, 30)).save(tmp_path / "a.png")
    dataset = images(3)
    pixels, inputs = utils.pixels_and_input(dataset, tmp_path / "a.png")
    assert pixels.shape == (32, 32, 3) and pixels[5, 5].tolist() == [10, 20, 30]
    assert inputs.shape == (3, 32, 32)
    pixels, inputs = utils.pixels_and_input(dataset, 1)
    torch.testing.assert_close(inputs, dataset[1][0])
    assert torch.equal(pixels.permute(2, 0, 1), dataset.images[1])
    with pytest.raises(FileNotFoundError, match=r"no image file .*b\.png"):
        utils.pixels_and_input(dataset, tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"c\.png can't be read as an image"):
        utils.pixels_and_input(dataset, tmp_path / "c.png")


def test_rank_correlation():
    x = torch.arange(10.0)
    assert utils.rank_correlation(x, x**3) == pytest.approx(1)
    assert utils.rank_correlation(x, -x) == pytest.approx(-1)
    assert math.isnan(utils.rank_correlation(x, torch.ones(10)))


def test_held_out_images_are_always_the_same_and_not_augmented():
    data = images(50, augment=True)
    train, val = utils.hold_out(data, data, 0.2)
    torch.manual_seed(99)
    _, again = utils.hold_out(data, data, 0.2)
    assert (len(train), len(val)) == (40, 10) and train.augment and not val.augment
    assert torch.equal(val.images, again.images)
    with pytest.raises(ValueError, match=r"holdout is 1\.5"):
        utils.hold_out(data, data, 1.5)
    with pytest.raises(ValueError, match="leaves one part empty"):
        utils.hold_out(data, data, 0.001)


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """A stand-in with 2 classes."""
    monkeypatch.setitem(names.NUM_CLASSES, "ImgNet", 2)
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (300, 260), (40 * i, 90, 120)).save(folder / f"{i}.jpg")
    return tmp_path


def test_imagenet_folders(imagenet):
    train, test = utils.get_dataset("R50_ImgNet", imagenet)
    train, val = utils.hold_out(train, test, 0.25)
    batches = list(utils.Loader(train, 4, "cpu", shuffle=True, workers=2))
    assert [x.shape for x, _ in batches] == [(4, 3, 224, 224), (2, 3, 224, 224)]
    assert len(val) == 2 and torch.equal(val[0][0], val[0][0])  # not augmented
    _, few = utils.get_dataset("R50_ImgNet", imagenet, max_images=2)
    assert [label for _, label in few] == [0, 1]
    _, most = utils.get_dataset("R50_ImgNet", imagenet, max_images=6)
    assert [label for _, label in most.samples] == [0, 0, 0, 1, 1, 1]
    pixels, inputs = utils.pixels_and_input(few, 1)
    assert pixels.shape == (224, 224, 3) and torch.equal(inputs, few[1][0])


def test_imagenet_without_train(imagenet):
    (imagenet / "train").rename(imagenet / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"no folder .*train: ImageNet is expected as"):
        utils.get_dataset("R50_ImgNet", imagenet)


def test_imagenet_without_images(imagenet):
    for path in (imagenet / "val").glob("*/*.jpg"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"cat, dog.*expected a folder of images per class in .*val"):
        utils.get_dataset("R50_ImgNet", imagenet)


def test_imagenet_with_other_classes(imagenet, monkeypatch):
    (imagenet / "val" / "dog").rename(imagenet / "val" / "fox")
    with pytest.raises(ValueError, match="don't have the same class folders"):
        utils.get_dataset("R50_ImgNet", imagenet)
    monkeypatch.setitem(names.NUM_CLASSES, "ImgNet", 1000)
    with pytest.raises(ValueError, match=r"has 2 class folders, expected ImageNet's 1000"):
        utils.get_dataset("R50_ImgNet", imagenet)


def test_imagenet_model_starts_from_torchvisions_weights(monkeypatch, tmp_path):
    sources = {}

    def fetched(weights, **options):
        assert options["weights_only"]
        name = str(weights).split("_")[0].lower()
        sources[name] = torchvision.models.get_model(name, weights=None)
        return sources[name].state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fetched)
    rnet, agent = utils.get_model("R50_ImgNet", "cpu", tmp_path)
    assert torch.equal(rnet.fc.weight, sources["resnet50"].fc.weight)
    assert torch.equal(agent.features.conv1.weight, sources["resnet18"].conv1.weight)


def test_bad_settings():
    for value in (0, 2.5, True, "3"):
        with pytest.raises(ValueError, match=r"epochs is .*, expected a whole number, 1 or more"):
            utils.check("epochs", value, 1, whole=True)
    with pytest.raises(ValueError, match=r"alpha is 1, expected a number, 0\.51 or more and below 1"):
        utils.check("alpha", 1, 0.51, 1)
    with pytest.raises(ValueError, match="penalty is -inf, expected a number, below 0"):
        utils.check_settings({"penalty": -math.inf})
    with pytest.raises(ValueError, match=r"warmup is 0\.1 of 10 steps"):
        utils.one_cycle(None, 0.1, 10, 0.1)
    with pytest.raises(ValueError, match="max_images is 0"):
        utils.get_dataset("R8_SYN", max_images=0)
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        utils.choose_precision("fp8", torch.device("cpu"))
    with pytest.raises(RuntimeError, match="device 'toaster' can't be used here"):
        utils.choose_device("toaster")
    with pytest.raises(RuntimeError, match="device 'None' can't be used here"):
        utils.choose_device(None)


def test_without_a_compiler(monkeypatch):
    def fails(function):
        raise RuntimeError("no compiler\nmore of it")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(RuntimeError, match=r"or set compiled to False \(no compiler\)$"):
        utils.compile_calls(torch.nn.ReLU(), torch.device("cpu"))


# ------------------------------------------------------------------------------------ statistics


def test_flops_of_resnet110_are_the_originals():
    rnet, _ = utils.build_model("R110_C10")
    assert f"{utils.count_flops(rnet).item():.1E}" == "5.1E+08"


@pytest.mark.parametrize(("model", "size"), [("R20_SYN", 32), ("R50_ImgNet", 64)])
def test_flops_agree_with_pytorchs_counter(model, size):
    rnet, agent = utils.build_model(model)
    torch.manual_seed(0)
    policies = torch.randint(2, (3, rnet.num_blocks)).float()
    counted = utils.count_flops(rnet, policies, agent, size)
    image = torch.rand(1, 3, size, size)
    for policy, flops in zip(policies, counted, strict=True):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            agent.eval()(image)
            rnet.eval().forward_single(image, policy)
        assert flops.item() == counter.get_total_flops()


def test_measuring_finds_the_time_of_a_nap():
    naps = {"short": lambda: time.sleep(0.01), "long": lambda: time.sleep(0.03)}
    times = utils.measure(naps, "cpu", seconds=0.3)
    for name, least in (("short", 0.01), ("long", 0.03)):
        assert least <= times[name].low <= times[name].median <= times[name].high < 0.2


def test_peak_memory_sees_what_is_gone_again():
    used_before = [torch.ones(2**18) for _ in range(100)]  # free memory that the process keeps
    del used_before
    peak = utils.peak_memory(lambda: torch.ones(2**24).sum(), "cpu")  # 64 MiB
    if math.isnan(peak):
        pytest.skip("the peak is known on Linux with the GNU C library only")
    assert 0.8 * 2**26 < peak < 1.5 * 2**26


@pytest.mark.parametrize(
    ("number", "text"),
    [(4.2, "4.20"), (0.9781, "0.978"), (123.4, "123"), (999.7, "1,000"), (12345.6, "12,346"), (0.0, "0.00")],
)
def test_three_digits(number, text):
    assert utils.three_digits(number) == text


def test_seeds():
    def numbers(*seed):
        utils.seed_everything(*seed)
        return torch.rand(3).tolist()

    assert numbers(1, 2) == numbers(1, 2)
    assert len({tuple(numbers(*seed)) for seed in [(1,), (1, 2), (2, 1), (2,), (12,)]}) == 5


def test_fingerprints_tell_weights_apart():
    rnet, agent = utils.build_model("R8_SYN")
    before = utils.fingerprint(rnet, agent)
    assert before == utils.fingerprint(rnet, agent)
    rnet.fc.bias.data[0] += 1e-3
    assert before != utils.fingerprint(rnet, agent)


def test_file_names_are_the_originals():
    stats = (0.936, 0.195, 16.93, 3.7, {"01", "10"})
    assert utils.policy_filename(2000, *stats) == "ckpt_E_2000_A_0.936_R_1.95E-01_S_16.93_#_2.t7"
