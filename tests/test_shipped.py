"""The weights that ship give the numbers that the reports and the README state."""

import json
import shutil
from itertools import islice

import pytest
import torch
from running import ROOT

import utils
from models import inference
from models.lab import data, report, stages
from models.lab.checkpoints import fingerprint
from models.lab.device import choose_precision
from models.lab.rivals import find_rivals

ON_CPU, ON_GPU = (
    {model: ROOT / "results" / f"{model}_{device}.json" for model in report.SHIPPED}
    for device in ("cpu", "cuda")
)
CPU = torch.device("cpu")


def load_test_images(model):
    return data.Loader(utils.get_dataset(model, ROOT / "data")[1], 500, CPU)


def run(network, loader):
    """Return the logits of all images; with a policy network, the policies too."""
    found = [network(inputs) for inputs, _ in loader]
    if isinstance(found[0], tuple):
        return [torch.cat(parts) for parts in zip(*found, strict=True)]
    return torch.cat(found)


def accuracy(logits, loader):
    return (logits.argmax(1) == loader.dataset.labels).float().mean().item()


@pytest.fixture(scope="module", params=ON_CPU.values(), ids=ON_CPU)
def shipped(request):
    """A report, its networks, the test images, BlockDrop's logits and policies."""
    found = json.loads(request.param.read_text(encoding="utf-8"))
    if found["blocks"] > 20 and not request.config.getoption("--long"):
        pytest.skip("takes minutes: pytest --long")
    if found["model"].endswith("_C10") and not (ROOT / "data/cifar-10-batches-py/test_batch").is_file():
        pytest.skip("CIFAR-10 is not in data/: run a notebook on C10 once to download it")
    rnet, agent = utils.build_model(found["model"])
    utils.load_checkpoint(ROOT / found["checkpoint"], rnet, agent)
    loader = load_test_images(found["model"])
    return found, rnet, agent, loader, *run(inference.prepare(rnet, agent), loader)


def test_shipped_weights_give_the_reports_numbers(shipped, request):
    found, rnet, agent, loader, logits, policies = shipped
    sole, _ = utils.build_model(found["model"])
    alone = stages.load(ROOT / found["sole_checkpoint"], sole)
    scores = {"sole": run(inference.prepare(sole), loader), "blockdrop": logits}
    scores["one_policy"] = run(inference.prepare(rnet, policy=torch.tensor(found["one_policy"])), loader)
    few = 5 / len(logits)  # a tie may fall differently on another machine
    on_gpu = json.loads(ON_GPU[found["model"]].read_text(encoding="utf-8"))
    for name, expected in found["networks"].items():
        assert accuracy(scores[name], loader) == pytest.approx(expected["accuracy"], abs=few)
        assert on_gpu["networks"][name]["accuracy"] == pytest.approx(expected["accuracy"], abs=few)
    pair = stages.load(ROOT / found["checkpoint"])
    rivals = find_rivals(found["model"], pair, alone, ROOT / "cv")
    assert found["rivals"].keys() <= rivals.keys() == on_gpu["rivals"].keys()  # measured there last
    if found["model"].endswith("_C10") and not request.config.getoption("--long"):
        rivals = {}  # they take a minute
    for name, rival in rivals.items():
        its_loader = load_test_images(rival.model)
        its_logits = run(inference.prepare(rival.rnet, policy=rival.policy), its_loader)
        assert accuracy(its_logits, its_loader) == pytest.approx(on_gpu["rivals"][name]["accuracy"], abs=few)
    expected, flops = found["networks"]["blockdrop"], utils.count_flops(rnet, policies, agent).mean().item()
    assert policies.sum(1).mean().item() == pytest.approx(expected["blocks"], abs=0.02)
    assert len(policies.unique(dim=0)) == pytest.approx(expected["policies"], abs=2)
    assert flops == pytest.approx(expected["flops"], rel=0.002)
    origin = stages.sole_entry(pair.lineage, found["model"])
    assert origin["weights"] == fingerprint(sole)


@torch.inference_mode()
def test_dropped_blocks_not_computed_give_the_masked_logits(shipped, request):
    _, rnet, _, loader, logits, policies = shipped
    rnet.eval().to(memory_format=torch.channels_last)
    batches = zip(loader, policies.split(500), strict=True)
    most = None if request.config.getoption("--long") else 4  # batches: of SYN all, of CIFAR-10 a fifth
    expected = torch.cat([rnet(inputs, policy) for (inputs, _), policy in islice(batches, most)])
    logits = logits[: len(expected)]
    assert (logits - expected).abs().max() < 1e-3
    top = expected.topk(2).values
    ties = top[:, 0] - top[:, 1] < 2e-3
    assert ((logits.argmax(1) == expected.argmax(1)) | ties).all()


def test_bf16_keeps_the_accuracy(shipped):
    _, rnet, agent, loader, expected, _ = shipped
    if choose_precision("auto", CPU) != "bf16":
        pytest.skip("this CPU has no bf16 instructions: too slow")
    logits, _ = run(inference.prepare(rnet, agent, "bf16"), loader)
    assert accuracy(logits, loader) == pytest.approx(accuracy(expected, loader), abs=0.002)


def test_the_readmes_table_is_that_of_the_reports(tmp_path, monkeypatch):
    """Without the times: whoever runs the inference notebook measures other ones."""
    (tmp_path / "results").mkdir()
    for path in (ROOT / "README.md", *ON_CPU.values(), *ON_GPU.values()):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    report.main()
    made, readme = ((root / "README.md").read_text(encoding="utf-8") for root in (tmp_path, ROOT))
    for row in made.splitlines():
        assert row.rpartition(" | ")[0] in readme, "run python -m models.lab.report"
    assert (tmp_path / "results" / "accuracy_time.png").is_file()
    other = tmp_path / "results" / ON_GPU["R20_SYN"].name
    for content in (ON_GPU["R32_C10"].read_bytes(), b"{"):
        other.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{other} is not the report of R20_SYN: run blockdrop_inf"):
            report.main()
