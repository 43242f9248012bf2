"""The weights that ship give the numbers that the README states."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import utils
from models.policy import greedy_policy


def readme_results():
    """The README's results: model -> (sole accuracy %, BlockDrop accuracy %, blocks, policies)."""
    rows = re.findall(
        r"^\| `(R\d+_\w+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) of \d+ \| (\d+) \|",
        (ROOT / "README.md").read_text(),
        re.MULTILINE,
    )
    return {model: tuple(map(float, figures)) for model, *figures in rows}


def shipped(folder, prefix):
    """The checkpoint in a folder that git tracks; others may be newer, from the user's own runs."""
    listed = subprocess.run(
        ["git", "ls-files", f"cv/{folder}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (path,) = [line for line in listed.stdout.splitlines() if Path(line).name.startswith(prefix)]
    return ROOT / path


def test_the_readme_has_results():
    assert "R20_SYN" in readme_results()


@pytest.mark.parametrize("model", readme_results())
@torch.inference_mode()
def test_shipped_weights_give_the_readmes_numbers(model, at_root, request):
    if model.endswith("_C10"):
        request.getfixturevalue("cifar10")
    _, testset = utils.get_dataset(model)
    sole, _ = utils.build_model(model)
    utils.load_checkpoint(shipped(f"trained_rnet/{model}", "pk_"), sole)
    rnet, agent = utils.build_model(model)
    utils.load_checkpoint(shipped(f"finetuned/{model}", "ckpt_"), rnet, agent)
    for network in (sole, rnet, agent):
        network.eval().to(memory_format=torch.channels_last)
    sole_matches, matches, policies = [], [], []
    for inputs, targets in utils.Loader(testset, 500, "cpu"):
        policy = greedy_policy(agent(inputs)[0])
        policies.append(policy)
        matches.append(rnet(inputs, policy).argmax(1) == targets)
        sole_matches.append(sole.forward_full(inputs).argmax(1) == targets)
    _, accuracy, blocks, distinct = readme_results()[model]
    image = 100 / len(testset)  # a tie may fall differently on another machine
    assert 100 * torch.cat(sole_matches).float().mean() == pytest.approx(
        readme_results()[model][0], abs=5 * image + 0.005
    )
    assert 100 * torch.cat(matches).float().mean() == pytest.approx(accuracy, abs=5 * image + 0.005)
    policies = torch.cat(policies)
    assert policies.sum(1).mean() == pytest.approx(blocks, abs=0.02)
    assert len(policies.unique(dim=0)) == pytest.approx(distinct, abs=2)
