"""The weights that ship give the numbers that the reports and the README state."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import utils
from models import inference, report
from models.policy import greedy_policy


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


if not shutil.which("git") or not (ROOT / ".git").exists():
    pytest.skip("what ships is known from git alone", allow_module_level=True)


def committed(path):
    """What git holds of a file: a run of one's own may have written another since."""
    return git("show", f"HEAD:{path}")


def shipped(folder, prefix):
    """The checkpoint in a folder that git tracks; others may be newer, from one's own runs."""
    (path,) = [
        line for line in git("ls-files", f"cv/{folder}").splitlines() if Path(line).name.startswith(prefix)
    ]
    return ROOT / path


REPORTS = {
    Path(path).stem: json.loads(committed(path))
    for path in git("ls-files", ":(glob)results/*.json").splitlines()
}


@pytest.fixture(scope="module", params=REPORTS)
def measured(request):
    """A report, and what the shipped weights give on the test set by the plain forward passes."""
    found = REPORTS[request.param]
    model = found["model"]
    if model.endswith("_C10"):
        request.getfixturevalue("cifar10")
    _, testset = utils.get_dataset(model, ROOT / "data")
    sole, _ = utils.build_model(model)
    utils.load_checkpoint(shipped(f"trained_rnet/{model}", "pk_"), sole)
    rnet, agent = utils.build_model(model)
    utils.load_checkpoint(shipped(f"finetuned/{model}", "ckpt_"), rnet, agent)
    for network in (sole, rnet, agent):
        network.eval().to(memory_format=torch.channels_last)
    labels, alone, logits, policies = [], [], [], []
    with torch.inference_mode():
        for inputs, targets in utils.Loader(testset, 500, "cpu"):
            policy = greedy_policy(agent(inputs)[0])
            policies.append(policy)
            labels.append(targets)
            logits.append(rnet(inputs, policy))
            alone.append(sole.forward_full(inputs))
    return found, rnet, agent, testset, *map(torch.cat, (labels, alone, logits, policies))


def test_shipped_weights_give_the_reports_numbers(measured):
    found, _, _, testset, labels, alone, logits, policies = measured
    few = 5 / len(testset)  # a tie may fall differently on another machine
    for side, scores in (("sole", alone), ("blockdrop", logits)):
        accuracy = (scores.argmax(1) == labels).float().mean().item()
        assert accuracy == pytest.approx(found[side]["accuracy"], abs=few)
    assert policies.sum(1).mean().item() == pytest.approx(found["blockdrop"]["blocks kept"], abs=0.02)
    assert len(policies.unique(dim=0)) == pytest.approx(found["blockdrop"]["distinct policies"], abs=2)


def test_conditional_is_masked_on_every_test_image(measured):
    _, rnet, _, testset, _, _, expected, policies = measured
    net = inference.prepare(rnet)
    batches = zip(utils.Loader(testset, 500, "cpu"), policies.split(500), strict=True)
    logits = torch.cat([net(inputs, policy) for (inputs, _), policy in batches])
    assert (logits - expected).abs().max() < 1e-3
    top = expected.topk(2).values
    ties = top[:, 0] - top[:, 1] < 2e-3
    assert ((logits.argmax(1) == expected.argmax(1)) | ties).all()


def test_bf16_keeps_the_accuracy(measured):
    _, rnet, agent, testset, labels, _, expected, _ = measured
    if utils.choose_precision("auto", torch.device("cpu")) != "bf16":
        pytest.skip("this CPU has no bf16 instructions: too slow")
    net = inference.prepare(rnet, agent, "bf16")
    logits = torch.cat([net(inputs)[0] for inputs, _ in utils.Loader(testset, 500, "cpu")])
    accuracy, before = ((x.argmax(1) == labels).float().mean().item() for x in (logits, expected))
    assert accuracy == pytest.approx(before, abs=0.002)


def test_the_readme_shows_the_reports():
    readme = committed("README.md")
    assert REPORTS and report.with_results(readme, list(REPORTS.values())) == readme, (
        "the README's results are not those of results/: run python -m models.report"
    )
