"""What reports are made of: rivals and what is said of them, statistics, times, machines."""

import itertools
import time

import pytest
import torch
from test_training import entry

import utils
from models.lab import report, rivals, stages, statistics, timing
from models.lab.checkpoints import save_checkpoint


def sole(cv_dir, model, max_images=None):
    """Save an untrained sole ResNet as one that was trained; return its stage."""
    rnet, _ = utils.build_model(model)
    state = {"resnet": rnet.state_dict(), "lineage": [entry("sole", 1.0, model, max_images=max_images)]}
    return stages.load(save_checkpoint(cv_dir / "trained_rnet" / model / "pk_E_1_A_0.100.t7", state))


def test_what_does_not_compare_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "SHIPPED", tmp_path / "nothing")
    alone = sole(tmp_path, "R32_SYN")
    for model, max_images in (("R8_SYN", None), ("R14_SYN", 100), ("R8_C10", None), ("R38_SYN", None)):
        sole(tmp_path, model, max_images)
    damaged = tmp_path / "trained_rnet" / "R20_SYN" / "pk_1.t7"
    damaged.parent.mkdir()
    damaged.write_bytes(b"no checkpoint")
    rnet, agent = utils.build_model("R32_SYN")
    policy = (torch.arange(15) % 2).float()
    rivals.always(agent, policy)
    weights, folder = {"resnet": rnet.state_dict(), "agent": agent.state_dict()}, tmp_path / "one_policy"
    stages_before = {"most_used": ["stochastic depth"], "every_block": ["finetuning"], "equal_flops": []}
    for kind, names in stages_before.items():
        path = folder / kind / "finetuned" / "R32_SYN" / "ckpt_1.t7"
        save_checkpoint(path, weights | {"lineage": [entry(name, 1.0, "R32_SYN") for name in names]})
    found = rivals.find_rivals("R32_SYN", stages.load(path), alone, tmp_path)
    assert list(found) == ["R8_SYN", "equal FLOPs, finetuned"]
    assert found["R8_SYN"].policy is None and torch.equal(found["equal FLOPs, finetuned"].policy, policy)
    assert torch.equal((agent.eval()(torch.rand(2, 3, 32, 32))[0] >= 0.5).float(), policy.expand(2, -1))
    said = capsys.readouterr().out.splitlines()
    assert "R14_SYN/pk_E_1_A_0.100.t7 was trained on other images" in said[0] and str(damaged) in said[1]
    assert "most_used/finetuned/R32_SYN/ckpt_1.t7 started from other weights" in said[2]
    assert "every_block/finetuned/R32_SYN/ckpt_1.t7 was finetuned with other settings" in said[3]
    assert len(said) == 4


def test_policies_are_chosen_by_use_and_by_flops():
    rnet, agent = utils.build_model("R8_SYN")
    policies = torch.tensor([[1, 0, 1]] * 3 + [[1, 0, 0]] * 2 + [[0, 1, 1]]).float()
    assert rivals.choose("most_used", "R8_SYN", policies, 0).tolist() == [1, 0, 1]
    flops = utils.count_flops(rnet, policies, agent).mean().item()  # the policy network is a whole ResNet-8
    assert rivals.choose("equal_flops", "R8_SYN", policies, flops).tolist() == [1, 1, 1]
    one_block = utils.count_flops(rnet, torch.tensor([[1.0, 0, 0]])).item()
    assert rivals.choose("equal_flops", "R8_SYN", policies, one_block).tolist() == [1, 0, 0]


def test_headroom_is_the_oracle_against_the_best_policy():
    right = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 0]]).float()
    found = statistics.headroom(right)
    assert found["best_one"] == 0.5 and found["oracle"] == 0.75 and 0.5 <= found["chance"] <= 0.75
    assert "could bring 25.00 points at most" in report.headroom_words({"headroom": found})


@pytest.mark.parametrize(
    ("better_by", "said"),
    [
        ({"R8_SYN": (3, 1), "R14_SYN": (1, 1)}, "at most two standard errors behind BlockDrop is R14_SYN"),
        ({"R8_SYN": (3, 1)}, "Every smaller sole ResNet (R8_SYN) is more than two standard errors behind"),
        ({}, "There is no smaller sole ResNet"),
    ],
)
def test_the_verdict_names_the_smallest_close_one(better_by, said):
    numbers = {
        "rivals": {
            n: {"finetuned": False, "better_by": b, "seconds": 60, "same_machine": False}
            for n, b in better_by.items()
        },
        "times": {"1": {name: {"seconds": 1} for name in ("blockdrop", *better_by)}},
        "large_batch": 1, "training": {"sole": 100, "extra": 50},
    }  # fmt: skip
    words = report._smaller_words(numbers)
    assert said in words and ("not all on the same machine" in words) == ("R14_SYN" in better_by)


@pytest.mark.parametrize(("here", "said"), [(True, "2.00 million"), (False, "about 2.00 million")])
def test_break_even_in_images_is_rough_where_the_training_ran_elsewhere(here, said):
    numbers = {
        "saved": {"1": [1, 0.5, 2]}, "break_even_images": {"1": [2e6, 1e6, 4e6]}, "training": {"here": here},
    }  # fmt: skip
    assert report.images_words(numbers, "1") == f"{said} (1.00 to 4.00)"


def test_a_damaged_sweep_is_left_out(tmp_path, capsys):
    (tmp_path / "penalties").mkdir()
    for content in ("", "[]", "{}", '{"runs": [1'):
        (tmp_path / "penalties" / "R8_SYN.json").write_text(content)
        assert report.penalty_sweep(tmp_path, "R8_SYN") == []
        assert capsys.readouterr().out.startswith("Left out")


def test_cpus_and_gpus_are_told_apart():
    cpu, old, gpu = {"instructions": "avx2"}, {}, {"instructions": "9.0"}
    assert timing.same_kind(cpu, old) and timing.same_kind(gpu, gpu)
    assert not timing.same_kind(cpu, gpu) and not timing.same_kind(gpu, old)


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


@pytest.mark.parametrize(("later", "rounds"), [([1.0], 10), ([1.0, 1.05], 24), ([1.0, 2.0], 68)])
def test_rounds_end_once_the_medians_are_known(later, rounds, monkeypatch):
    """By a clock of our own: 10 rounds where all take the same, at most what the budget allows."""
    seconds, now = itertools.chain([9.0], itertools.cycle(later)), 0.0

    def work():
        nonlocal now
        now += next(seconds)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    assert timing.measure({"work": work}, "cpu", seconds=100)["work"]["rounds"] == rounds


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
