"""Several processes train as one does: the exported notebooks under torchrun, on CPUs."""

import os

import nbconvert
import papermill
import pytest
import torch
from running import ROOT, run_cells, run_python, step_functions
from test_networks import networks

import utils
from models.lab.checkpoints import read_checkpoint, save_checkpoint
from models.lab.data import Loader
from models.lab.distributed import gathered, join_processes, num_processes, rank
from models.lab.timing import same_machine
from models.lab.training import Training

FEW = {"model": "R8_SYN", "device": "cpu", "precision": "fp32", "max_images": 320,
       "data_dir": str(ROOT / "data")}  # fmt: skip
SMALL = FEW | {"batch_size": 32}
SOLE = SMALL | {"epochs": 3, "small_crops": 0.5}
BLOCKDROP = SMALL | {
    "max_epochs_stochastic_depth": 1, "max_epochs_training": 2, "max_epochs_finetuning": 3, "curriculum": 2,
    "averaging": 0.67, "lr_policy": [1e-4, 1e-5], "alpha": 0.95, "temperature": 1,
    "penalty": -1,  # a harder one makes a larger loss, and a noisier one
}  # fmt: skip
SAMPLING = {"penalty": -1, "alpha": 0.9, "temperature": 1, "beta": 0}
REPORT = """
import os
from models.lab.checkpoints import fingerprint
stages = [value for value in list(globals().values()) if isinstance(value, Training)]
with open(f"weights-{os.environ['RANK']}.txt", "w") as file:
    file.write(fingerprint(*(network for stage in stages for network in stage.networks.values())))
"""
# The second process fails in the second epoch, while the first waits for it.
FAILS = """
import os
from models.lab.training import Training
def fails(self, *args):
    if self.epoch == 1 and os.environ["RANK"] == "1":
        raise ValueError("on purpose")
    return mean_loss(self, *args)
mean_loss, Training.mean_loss = Training.mean_loss, fails
"""


def launch(script, folder):
    """Run a script by two processes; return its exit status and what it printed, errors included."""
    (folder / "script.py").write_text(script)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "MPLBACKEND": "agg"}
    return run_python(*torchrun, "script.py", cwd=folder, **environment)


def export(name, folder, settings):
    """Return a notebook as a script, exported as the README says."""
    settings = settings | {"cv_dir": str(folder / "cv")}
    notebook = papermill.execute_notebook(
        ROOT / f"{name}.ipynb", folder / "out.ipynb", settings, prepare_only=True, progress_bar=False
    )
    script, _ = nbconvert.PythonExporter().from_notebook_node(notebook)
    return script


def test_two_processes_train_as_one_does(at_root, tmp_path):
    """Batch norm sees half the batch, and policies are sampled otherwise: close, and not the same."""
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    for name, settings in (("rnet_sole", SOLE), ("blockdrop_training", BLOCKDROP)):
        run_cells(name, settings | {"cv_dir": str(one / "cv")})
        status, printed = launch(export(name, two, settings) + REPORT, two)
        assert status == 0 and "Warning" not in printed, printed
        first, second = [file.read_text() for file in two.glob("weights-*")]
        assert first == second  # both processes end every stage with the same weights
    assert printed.count("TS - ") == 2  # one process prints
    for stage, figure, tolerance in (
        ("trained_rnet", "loss", 0.1), ("stochastic_depth", "loss", 0.1),
        ("trained_policy", "val_probs", 0.05), ("finetuned", "val_probs", 0.05),
        ("trained_policy", "loss", 0.5), ("finetuned", "loss", 0.5),  # 288 sampled policies: a noisy loss
    ):  # fmt: skip
        paths = (folder / "cv" / stage / "R8_SYN" / "last.t7" for folder in (one, two))
        histories = (read_checkpoint(path)["history"] for path in paths)
        expected, found = (torch.tensor([row[figure] for row in history]) for history in histories)
        assert (found - expected).abs().max() < tolerance, f"{stage}, {figure}"


def not_greedy(explored):
    """Stand for sampling: the first process's images drop the first block, and the second one's keep it."""
    policy = (explored < 0.5).float()
    policy[:, 0] = rank() if num_processes() > 1 else torch.arange(len(policy)) % 2
    return policy


def finetune_a_little():
    """Leave losses and weights in steps.t7; two processes share the last batch, three images, unevenly."""
    join_processes(torch.device("cpu"))
    steps = step_functions("blockdrop_training", sample=not_greedy)
    loader = Loader(utils.get_dataset("R8_SYN", ROOT / "data", 83)[0], 16, "cpu", shuffle=True)
    rnet, agent = networks()  # batch norm in eval mode: only the gradients' average can make a difference
    optimizers = steps.sgd(rnet, 0.1, 6)[0], torch.optim.SGD(agent.parameters(), 0.01)
    pair, batch_settings = {"resnet": rnet, "agent": agent}, ("fp32", True, SAMPLING)
    training = Training("finetuning", f"run{num_processes()}", {"seed": 1}, pair, {}, 1, "")
    for _ in training:
        drawn, losses, outcomes = gathered(torch.rand(1)), [], []
        for images, labels in training.batches(loader, losses):
            loss, outcome = steps.finetuning_step(rnet, agent, optimizers, images, labels, *batch_settings)
            losses.append(loss * len(labels))
            outcomes.append(outcome)
        *stats, policies = utils.performance_stats(*zip(*outcomes, strict=True))
        found = {"loss": training.mean_loss(losses, loader), "stats": stats, "policies": sorted(policies)}
        found |= {name: network.state_dict() for name, network in pair.items()}
        save_checkpoint("steps.t7", found | {"drawn": drawn})


def test_gradients_and_statistics_are_the_whole_batchs(tmp_path, monkeypatch):
    """Without batch norm's statistics, two processes take the steps of one."""
    monkeypatch.chdir(tmp_path)
    finetune_a_little()
    one = read_checkpoint("steps.t7")
    status, printed = launch("from test_distributed import finetune_a_little; finetune_a_little()", tmp_path)
    assert status == 0, printed
    two = read_checkpoint("steps.t7")
    for name in ("loss", "stats", "resnet", "agent"):
        torch.testing.assert_close(two[name], one[name])
    assert two["policies"] == one["policies"]
    assert len(two["drawn"].unique()) == 2  # each draws policies of its own


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("rnet_sole", SOLE | {"batch_size": 33}, "ValueError: 2 processes can't share batches of 33 images"),
        ("blockdrop_inference", FEW, "RuntimeError: this notebook runs in one process: start it without"),
    ],
)
def test_an_error_that_all_have_is_reported_once(tmp_path, name, settings, message):
    status, printed = launch(export(name, tmp_path, settings), tmp_path)
    assert status != 0 and printed.count(message) == 1


def find_different_runs():
    """The first process has trained an epoch in a folder of its own."""
    folder = f"run{os.environ['RANK']}"
    if folder == "run0":
        training = Training("sole", folder, {"seed": 1}, {"resnet": networks()[0]}, {}, 2, "")
        next(iter(training))
        training.end_epoch(loss=0.0)
    join_processes(torch.device("cpu"))
    Training("sole", folder, {"seed": 1}, {"resnet": networks()[0]}, {}, 2, "")


def test_machines_that_do_not_share_a_folder_say_so(tmp_path):
    status, printed = launch("import test_distributed as t; t.find_different_runs()", tmp_path)
    assert status != 0 and "processes find different runs in run0: let all share one cv_dir" in printed


def test_an_error_of_one_ends_the_run_and_one_process_goes_on(at_root, tmp_path, capsys):
    status, printed = launch(FAILS + export("rnet_sole", tmp_path, SOLE), tmp_path)
    assert status != 0 and "ValueError: on purpose" in printed
    assert "Epoch: 0 - " in printed and "Epoch: 1 - " not in printed
    run_cells("rnet_sole", SOLE | {"cv_dir": str(tmp_path / "cv")})
    assert "1 epochs done, 2 to go" in capsys.readouterr().out
    two, one = read_checkpoint(tmp_path / "cv/trained_rnet/R8_SYN/last.t7")["lineage"][-1]["machine"]
    assert two["processes"] == 2 and "processes" not in one
    assert same_machine(two, two) and not same_machine(two, one)
