"""Several processes train as one does: the exported notebooks under torchrun, on CPUs."""

import os
import shutil
import subprocess
import sys

import nbconvert
import papermill
import pytest
import torch
from conftest import ROOT

import utils

SMALL = {"model": "R8_SYN", "device": "cpu", "precision": "fp32", "max_images": 320, "batch_size": 32}
SOLE = SMALL | {"epochs": 3, "small_crops": 0.5}
BLOCKDROP = SMALL | {
    "max_epochs_stochastic_depth": 1,
    "max_epochs_training": 2,
    "max_epochs_finetuning": 3,
    "cl_pace": 2,
    "penalty": -1,  # a harder one makes a larger loss, and a noisier one
    "penalty_finetuning": -1,
    "lr": 1e-4,
    "lr_finetuning": 1e-5,
    "alpha_finetuning": 0.95,
    "temperature": 1,
    "temperature_finetuning": 1,
    "warmup_rnet": 0.3,
    "averaging": 0.67,
}
REPORT = """
with open(f"weights-{os.environ.get('RANK', 0)}.txt", "w") as file:
    file.write(utils.fingerprint(*(globals()[name] for name in ("rnet", "agent") if name in globals())))
"""
# The last process dies in the second epoch.
DIES = """
def dies(self, *args):
    if self.epoch == 1 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        os._exit(3)
    return mean_loss(self, *args)

mean_loss, utils.TrainingRun.mean_loss = utils.TrainingRun.mean_loss, dies
"""
# The second of two processes raises an error, while the first waits for it.
RAISES = """
import torch
import utils

utils.join_processes(torch.device("cpu"))
if torch.distributed.get_rank() == 1:
    raise ValueError("on purpose")
torch.distributed.barrier()
"""
# A finetuning in little. Batch norm in eval mode: only the gradients' average can make a difference. The
# last batch has three images, which two processes share unevenly.
STEPS = """
import sys
import torch
import torch.nn.functional as F
import utils
from models.distributed import gathered, num_processes, rank
from models.policy import greedy_policy

utils.join_processes(torch.device("cpu"))
trainset, _ = utils.get_dataset("R8_SYN", sys.argv[1], 83)
loader = utils.Loader(trainset, 16, "cpu", shuffle=True)
utils.seed_everything(1)
rnet, agent = utils.build_model("R8_SYN")
rnet_parallel, agent_parallel = utils.parallel(rnet.eval()), utils.parallel(agent.eval())
optimizer = torch.optim.SGD([*rnet.parameters(), *agent.parameters()], 0.01)
run = utils.TrainingRun(f"run{num_processes()}", {"seed": 1}, {"resnet": rnet, "agent": agent}, {}, 1, "")
losses, policies, rewards, matches = [], [], [], []
for epoch in run:
    drawn = gathered(torch.rand(1))
    for inputs, targets in run.batches(loader):
        probs = agent_parallel(inputs)[0]
        policy = greedy_policy(probs)
        first = torch.full((len(inputs),), rank()) if num_processes() > 1 else torch.arange(len(inputs)) % 2
        policy[:, 0] = first  # a block that the first process's images drop, and the second one's keep
        logits = rnet_parallel(inputs, policy, True)
        advantage = targets / 9 - 0.5
        loss = F.cross_entropy(logits, targets) - (probs.log() * advantage[:, None]).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach() * len(targets))
        policies.append(policy)
        rewards.append(targets.float())
        matches.append(logits.argmax(1) == targets)
    *stats, policy_set = utils.performance_stats(policies, rewards, matches)
    state = {"resnet": rnet.state_dict(), "agent": agent.state_dict(), "loss": run.mean_loss(losses, loader)}
    utils.save_checkpoint("steps.t7", state | {"stats": stats, "set": sorted(policy_set), "drawn": drawn})
"""


def launch(script, folder, processes, *more):
    """Run a script under torchrun; return its exit status and what it printed, errors included."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", str(processes), script, *more],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout


def export(name, folder, settings):
    """Write a notebook as a script, as the README says."""
    settings = settings | {"cv_dir": str(folder / "cv"), "data_dir": str(ROOT / "data")}
    notebook = papermill.execute_notebook(
        ROOT / f"{name}.ipynb", folder / "out.ipynb", settings, prepare_only=True, progress_bar=False
    )
    script, _ = nbconvert.PythonExporter().from_notebook_node(notebook)
    return script


def train(name, folder, settings, processes):
    """Train a notebook by so many processes; return what it printed."""
    (folder / "out.py").write_text("import os\n" + export(name, folder, settings) + REPORT)
    status, printed = launch("out.py", folder, processes)
    assert status == 0 and "Warning" not in printed, printed
    return printed


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Both training notebooks, trained by one process and by two."""
    folders = {n: tmp_path_factory.mktemp(f"by_{n}") for n in (1, 2)}
    for processes, folder in folders.items():
        train("rnet_sole", folder, SOLE, processes)
        weights = [file.read_text() for file in folder.glob("weights-*")]
        assert len(weights) == processes and len(set(weights)) == 1
    for processes, folder in folders.items():
        printed = train("blockdrop_training", folder, BLOCKDROP, processes)
        weights = [file.read_text() for file in folder.glob("weights-*")]
        assert len(weights) == processes and len(set(weights)) == 1
        assert printed.count("TS - ") == 2  # one process prints
    return folders


def history(folder, stage):
    return utils.read_checkpoint(folder / "cv" / stage / "R8_SYN" / "last.t7")["history"]


def test_two_processes_train_as_one_does(folders):
    """Batch norm sees half the batch, and policies are sampled otherwise: close, and not the same."""
    for stage, tolerances in (
        ("trained_rnet", {"loss": 0.1}),
        ("stochastic_depth", {"loss": 0.1}),
        ("trained_policy", {"loss": 0.1, "val_probs": 0.05}),
        ("finetuned", {"loss": 0.2, "val_probs": 0.05}),
    ):
        one, two = (history(folders[n], stage) for n in (1, 2))
        for name, tolerance in tolerances.items():
            expected, found = (torch.tensor([row[name] for row in rows]) for rows in (one, two))
            assert (found - expected).abs().max() < tolerance, f"{stage}, {name}"


def test_gradients_and_statistics_are_the_whole_batchs(tmp_path):
    """Without batch norm's statistics, two processes take the steps of one."""
    (tmp_path / "steps.py").write_text(STEPS)
    found = []
    for processes in (1, 2):
        status, printed = launch("steps.py", tmp_path, processes, str(ROOT / "data"))
        assert status == 0, printed
        found.append(utils.read_checkpoint(tmp_path / "steps.t7"))
    one, two = found
    for name in ("loss", "stats", "resnet", "agent"):
        torch.testing.assert_close(two[name], one[name])
    assert two["set"] == one["set"]
    assert len(two["drawn"].unique()) == 2  # each draws policies of its own


def test_an_error_ends_the_run_and_is_told(tmp_path):
    (tmp_path / "raises.py").write_text(RAISES)
    status, printed = launch("raises.py", tmp_path, 2)
    assert status != 0 and "ValueError: on purpose" in printed


def test_an_error_that_all_have_is_told_once(tmp_path):
    (tmp_path / "out.py").write_text(export("rnet_sole", tmp_path, SOLE | {"batch_size": 33}))
    status, printed = launch("out.py", tmp_path, 2)
    sentence = "ValueError: batch_size is 33, which 2 processes can't share evenly"
    assert status != 0 and printed.count(sentence) == 1


def die(name, folder, settings, processes):
    """Train a notebook by so many processes until the last one dies; return what they printed."""
    script = export(name, folder, settings)
    (folder / "out.py").write_text(
        "import os\n" + script.replace("import utils\n", "import utils\n" + DIES, 1)
    )
    status, printed = launch("out.py", folder, processes)
    assert status != 0
    return printed


def test_a_death_ends_the_run_and_fewer_processes_go_on(tmp_path):
    printed = die("rnet_sole", tmp_path, SOLE, 2)
    assert "Epoch: 0 - " in printed and "Epoch: 1 - " not in printed
    assert "1 epochs done, 2 to go" in train("rnet_sole", tmp_path, SOLE, 1)
    two, one = utils.read_checkpoint(tmp_path / "cv/trained_rnet/R8_SYN/last.t7")["machine"].split("; ")
    assert two == f"2 x {one}"


def test_finetuning_goes_on_with_more_processes(folders, tmp_path):
    shutil.copytree(folders[1] / "cv" / "trained_rnet", tmp_path / "cv" / "trained_rnet")
    settings = BLOCKDROP | {"max_epochs_stochastic_depth": 0, "max_epochs_training": 1, "cl_pace": 3}
    die("blockdrop_training", tmp_path, settings, 1)
    assert "1 epochs done, 2 to go" in train("blockdrop_training", tmp_path, settings, 2)
    assert len(history(tmp_path, "finetuned")) == 3
    assert len({file.read_text() for file in tmp_path.glob("weights-*")}) == 1
