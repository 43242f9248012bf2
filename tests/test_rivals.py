"""BlockDrop's rivals: which are found, which policies they run, and what the report says of them."""

import pytest
import torch

import utils
from models.lab import report, rivals, stages
from models.lab.checkpoints import save_checkpoint
from models.lab.statistics import headroom


def sole(cv_dir, model, **settings):
    """Save an untrained sole ResNet as one that was trained; return its stage."""
    entry = {"stage": "sole", "seconds": 1.0, "machine": [], "weights": None,
             "settings": {"model": model, "max_images": None} | settings}  # fmt: skip
    rnet, _ = utils.build_model(model)
    path = cv_dir / "trained_rnet" / model / "pk_E_1_A_0.100.t7"
    return stages.load(
        save_checkpoint(path, {"resnet": rnet.state_dict(), "history": [], "lineage": [entry]})
    )


def test_what_does_not_compare_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "SHIPPED", tmp_path / "nothing")
    alone = sole(tmp_path, "R32_SYN")
    for model, settings in (
        ("R8_SYN", {}),
        ("R14_SYN", {"max_images": 100}),
        ("R8_C10", {}),
        ("R38_SYN", {}),
    ):
        sole(tmp_path, model, **settings)
    damaged = tmp_path / "trained_rnet" / "R20_SYN" / "pk_1.t7"
    damaged.parent.mkdir()
    damaged.write_bytes(b"no checkpoint")
    rnet, agent = utils.build_model("R32_SYN")
    policy = (torch.arange(15) % 2).float()
    rivals.always(agent, policy)
    path = tmp_path / "one_policy" / "equal_flops" / "finetuned" / "R32_SYN" / "ckpt_1.t7"
    save_checkpoint(path, {"resnet": rnet.state_dict(), "agent": agent.state_dict()})
    found = rivals.find_rivals("R32_SYN", alone, tmp_path)
    assert list(found) == ["R8_SYN", "equal FLOPs, finetuned"]
    assert found["R8_SYN"].policy is None and torch.equal(found["equal FLOPs, finetuned"].policy, policy)
    assert torch.equal((agent.eval()(torch.rand(2, 3, 32, 32))[0] >= 0.5).float(), policy.expand(2, -1))
    said = capsys.readouterr().out.splitlines()
    assert "R14_SYN/pk_E_1_A_0.100.t7 was trained on other images" in said[0] and str(damaged) in said[1]


def test_policies_are_chosen_by_use_and_by_flops():
    rnet, agent = utils.build_model("R8_SYN")
    policies = torch.tensor([[1, 0, 1]] * 3 + [[1, 0, 0]] * 2 + [[0, 1, 1]]).float()
    assert rivals.choose("most_used", "R8_SYN", policies, 0, 32).tolist() == [1, 0, 1]
    flops = utils.count_flops(rnet, policies, agent).mean().item()  # the policy network is a whole ResNet-8
    assert rivals.choose("equal_flops", "R8_SYN", policies, flops, 32).tolist() == [1, 1, 1]
    one_block = utils.count_flops(rnet, torch.tensor([[1.0, 0, 0]])).item()
    assert rivals.choose("equal_flops", "R8_SYN", policies, one_block, 32).tolist() == [1, 0, 0]


def test_headroom_is_the_oracle_against_the_best_policy():
    right = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 0]]).float()
    found = headroom(right)
    assert found["best_one"] == 0.5 and found["oracle"] == 0.75 and 0.5 <= found["chance"] <= 0.75
    assert "could bring 25.00 points at most" in report.headroom_words({"headroom": found})


@pytest.mark.parametrize(
    ("better_by", "said"),
    [
        ({"R8_SYN": (3, 1), "R14_SYN": (1, 1)}, "R14_SYN is the smallest sole ResNet that is as accurate"),
        ({"R8_SYN": (3, 1)}, "No smaller sole ResNet (R8_SYN) is as accurate"),
        ({}, "There is no smaller sole ResNet"),
    ],
)
def test_the_verdict_names_the_smallest_as_accurate(better_by, said):
    numbers = {
        "rivals": {n: {"finetuned": False, "better_by": b, "seconds": 60} for n, b in better_by.items()},
        "times": {"1": {name: {"seconds": 1} for name in ("blockdrop", *better_by)}},
        "large_batch": 1, "training": {"sole": 100, "extra": 50},
    }  # fmt: skip
    assert said in report._smaller_words(numbers)
