"""The toolbox: model names, weights that can't be had, FLOPs, times, machines."""

import time
import urllib.error

import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import utils
from models.lab import statistics, timing
from models.lab.checkpoints import fingerprint


@pytest.mark.parametrize("model", ["R33_C10", "R2_C10", "R32", "R32_MNIST", "R34_ImgNet", "r32_C10", "", 32])
def test_other_names_are_refused(model):
    with pytest.raises(ValueError, match=r"expected R<depth>_<dataset>"):
        utils.build_model(model)


def test_weights_come_from_cv_dir_else_from_those_that_ship(tmp_path, at_root):
    shipped, _ = utils.get_model("R8_SYN", "cpu", tmp_path)
    assert fingerprint(shipped) == fingerprint(utils.get_model("R8_SYN", "cpu")[0])
    with pytest.raises(FileNotFoundError, match=r"run rnet_sole\.ipynb with model = 'R44_C10' first"):
        utils.get_model("R44_C10", "cpu", tmp_path)


@pytest.mark.parametrize("content", [None, b"garbage"])
def test_imagenet_weights_that_are_damaged_or_cant_be_fetched(monkeypatch, tmp_path, content):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    message = r"ResNet101 weights could not be fetched .* put that file into"
    if content is not None:
        path = tmp_path / "hub" / "checkpoints" / "resnet101-63fe2227.pth"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        message = r"resnet101-63fe2227\.pth is damaged: delete it"
    with pytest.raises(RuntimeError, match=message):
        utils.get_model("R101_ImgNet", "cpu", tmp_path)


def test_imagenet_starts_from_torchvisions_weights(monkeypatch, tmp_path):
    sources = {name: torchvision.models.get_model(name, weights=None) for name in ("resnet50", "resnet18")}
    monkeypatch.setattr(
        torchvision.models.WeightsEnum,
        "get_state_dict",
        lambda weights, **_: sources[str(weights).split("_")[0].lower()].state_dict(),
    )
    rnet, agent = utils.get_model("R50_ImgNet", "cpu", tmp_path)
    resnet18 = sources["resnet18"]
    assert torch.equal(rnet.fc.weight, sources["resnet50"].fc.weight)
    assert torch.equal(agent.features.ds[3][0].weight, resnet18.layer4[0].downsample[0].weight)
    assert torch.equal(agent.features.blocks[2][0].conv2.weight, resnet18.layer3[0].conv2.weight)


def test_flops_agree_with_pytorchs_counter_and_the_original():
    rnet, agent = utils.build_model("R50_ImgNet")
    policy, image = torch.arange(16) % 2, torch.rand(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        agent.eval()(image)
        rnet.eval().forward_single(image, policy)
    assert utils.count_flops(rnet, policy[None], agent, 64).item() == counter.get_total_flops()
    assert f"{utils.count_flops(utils.build_model('R110_C10')[0]).item():.1E}" == "5.1E+08"


@pytest.mark.parametrize(
    ("values", "expected"), [([0, 1, 4], 2), ([0, 1, 1.5], 4), ([2, 3, 4], 0), ([0, 3, 1], 2 / 3)]
)
def test_break_even_is_where_the_line_through_the_times_first_reaches_the_sole_resnets(values, expected):
    of = zip((0, 1, 4, "sole"), (*values, 2), strict=True)
    times = {name: dict.fromkeys(("seconds", "low", "high"), value) for name, value in of}
    assert statistics.break_even([0, 1, 4], times) == pytest.approx([expected] * 3)


def test_rank_correlation_is_the_correlation_of_ranks():
    """Ties share their mean rank: here 1.5, 1.5, 3, 4 and 1, 3, 3, 3."""
    expected = torch.corrcoef(torch.tensor([[1.5, 1.5, 3, 4], [1, 3, 3, 3]]))[0, 1].item()
    found = statistics.rank_correlation(torch.tensor([-5, -5, 0, 9]), torch.tensor([0.0, 7, 7, 7]))
    assert found == pytest.approx(expected)


def test_the_interval_of_a_rank_correlation_is_that_of_fishers_transform():
    """Of r = 0.5 in 7 pairs: tanh(0.549 ± 1.96 * sqrt(1.125 / 4))."""
    found = statistics.correlation_interval(torch.arange(7), torch.tensor([0, 1, 3, 6, 5, 4, 2]))
    assert found == pytest.approx([-0.454, 0.920], abs=0.001)


def test_measuring_finds_the_time_of_a_nap_and_keeps_its_budget():
    naps, start = {"short": lambda: time.sleep(0.01), "long": lambda: time.sleep(0.03)}, time.perf_counter()
    times = timing.measure(naps, "cpu", seconds=0.2, parts=2)
    assert time.perf_counter() - start < 0.8
    for name, least in (("short", 0.005), ("long", 0.015)):
        assert least <= times[name]["low"] <= times[name]["seconds"] <= times[name]["high"] < 0.1
        assert times[name]["rounds"] >= 3


def test_a_machine_is_known_by_more_than_its_name():
    here = timing.machine_record("cpu")
    assert timing.same_machine(here, dict(here), here | {"calibration": 1.1 * here["calibration"]})
    for other in ({"threads": 99}, {"instructions": "sse"}, {"calibration": 2 * here["calibration"]}):
        assert not timing.same_machine(here, here | other)
    assert not timing.same_machine({"name": "AMD EPYC"}, {"name": "AMD EPYC"})  # of older files


@pytest.mark.parametrize(
    ("others", "high", "said"),
    [(0, 1.0, ""), (99, 1.0, "other programs kept 99"), (0, 2.0, "differ by a factor of 2.0")],
)
def test_a_busy_machine_is_said(others, high, said):
    times = [{"seconds": 1.0, "mean": 1.0, "low": 1.0, "high": high}]
    words = timing.busy_words(others, torch.device("cpu"), times)
    assert said in words and bool(said) == ("stop other programs" in words)
