"""Stages: trained, interrupted, resumed, skipped; what they start from and what they cost."""

import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from running import step_functions
from test_data import random_images
from test_networks import networks
from torch.optim.swa_utils import AveragedModel

from models.lab import stages
from models.lab.checkpoints import CheckpointError, fingerprint, read_checkpoint, save_checkpoint
from models.lab.data import Loader
from models.lab.stages import TORCHVISION
from models.lab.training import Training, first_averaged_epoch, one_cycle, take_average

EPOCHS, LINE = 4, "Loss: {loss:.3f}"
sole = step_functions("rnet_sole")


def train(folder, fault=(None, None), resume=True, seed=5, lr=0.1, start=None, before=print):
    """Train a little R8; return it and its training. `fault`: bad "loss" or "weight", and in which epoch."""
    rnet, _ = networks(seed=seed)
    loader = Loader(random_images(40, augment=True), 10, "cpu", shuffle=True)
    optimizer = torch.optim.SGD(rnet.parameters(), lr, momentum=0.9)
    scheduler = one_cycle(optimizer, lr, EPOCHS * len(loader), 0.3)
    progress = {"optimizer": optimizer, "scheduler": scheduler}
    settings = {"model": "R8_SYN", "seed": seed, "lr": lr}
    training = Training("sole", folder, settings, {"resnet": rnet}, progress, EPOCHS, LINE, start, resume)
    for epoch in training:
        before(epoch)
        losses = []
        for step, (inputs, targets) in enumerate(training.batches(loader, losses)):
            loss, _ = sole.sole_step(rnet.train(), optimizer, F.dropout(inputs, 0.1), targets, "fp32")
            scheduler.step()
            bad = fault == ("loss", epoch) and step == 2
            losses.append(loss * (float("nan") if bad else len(targets)))
        if fault == ("weight", epoch):
            rnet.fc.bias.data[3] = float("inf")
        training.end_epoch(loss=training.mean_loss(losses, loader))
    return rnet, training


def test_a_state_of_a_captured_step_on_cuda_goes_on_on_the_cpu(tmp_path):
    for _ in range(2):
        network = torch.nn.Linear(1, 1)
        optimizer = torch.optim.Adam(network.parameters(), 0.1)
        training = Training("sole", tmp_path, {"seed": 1}, {"resnet": network}, {"o": optimizer}, 2, LINE)
        next(iter(training))
        before = network.weight.item()
        network(torch.ones(1, 1)).backward()
        optimizer.step()
        assert before - network.weight.item() == pytest.approx(0.1, rel=1e-4)
        training.end_epoch(loss=0.0)
        state = read_checkpoint(tmp_path / "last.t7")
        state["o"]["param_groups"][0] |= {"capturable": True, "lr": torch.tensor(0.1)}
        save_checkpoint(tmp_path / "last.t7", state)


def test_an_epoch_whose_end_was_interrupted_is_trained_again(tmp_path, monkeypatch):
    network = torch.nn.Linear(1, 1)
    before = network.weight.item()
    training = Training("sole", tmp_path, {"seed": 1}, {"resnet": network}, {}, 2, LINE)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training, "_state", Mock(side_effect=KeyboardInterrupt))
        next(iter(training))
        network.weight.data += 1
        training.end_epoch(loss=0.0)
    assert next(iter(training)) == 0 and training.history == [] and network.weight.item() == before


def test_a_finished_run_of_other_settings_is_replaced_once_it_is_saved(tmp_path, capsys):
    _, training = train(tmp_path)
    with pytest.raises(ValueError, match=r"finished but unsaved run of other settings \(seed 5 -> 6\)"):
        train(tmp_path, seed=6)
    training.save("final.t7")
    _, training = train(tmp_path, seed=6)
    assert "seed 5 -> 6" in capsys.readouterr().out and len(training.history) == EPOCHS
    assert read_checkpoint(tmp_path / "last.t7")["lineage"][-1]["settings"]["seed"] == 6


def test_a_saved_file_is_not_replaced_by_other_weights_of_the_same_name(tmp_path):
    for seed, name in ((5, "final.t7"), (6, "final_2.t7"), (6, "final_2.t7"), (7, "final_3.t7")):
        assert train(tmp_path, seed=seed)[1].save("final.t7").path.name == name


@pytest.mark.parametrize(
    ("other", "changed"), [({"lr": 0.2}, "lr 0.1 -> 0.2"), ({"start": TORCHVISION}, "starting weights")]
)
def test_an_unfinished_run_of_other_settings_is_not_lost(tmp_path, other, changed):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, before=Mock(side_effect=[None, None, KeyboardInterrupt]))
    with pytest.raises(ValueError, match=rf"an unfinished run .*\({changed}.*resume = False"):
        train(tmp_path, **other)
    _, training = train(tmp_path, **other, resume=False)
    assert len(training.history) == EPOCHS


@pytest.mark.parametrize("change", [{}, {"lineage": []}, {"lineage": [3]}, {"lineage": [{}]}])
def test_a_foreign_state_is_refused(tmp_path, change):
    state = {"history": [], "lineage": [{"settings": {"epochs": EPOCHS}}]}  # without an optimizer's
    save_checkpoint(tmp_path / "last.t7", state | change)
    with pytest.raises(CheckpointError, match=r"last\.t7 is of another kind of run: move it away"):
        train(tmp_path)


@pytest.mark.parametrize(("what", "epoch"), [("loss", 1), ("weight", 0), ("weight", 2)])
def test_numbers_that_are_not_finite_stop_the_run_and_are_not_saved(tmp_path, what, epoch):
    problem = {"loss": "from step 2 of epoch 1 on", "weight": f"after epoch {epoch}"}[what]
    with pytest.raises(RuntimeError, match=rf"the (loss|resnet's fc\.bias) is not finite {problem}: lower"):
        train(tmp_path, (what, epoch))
    assert (tmp_path / "last.t7").exists() == (epoch > 0)
    assert epoch == 0 or len(read_checkpoint(tmp_path / "last.t7")["history"]) == epoch


def test_a_loss_that_is_not_finite_is_noticed_within_100_steps(tmp_path):
    training = Training("sole", tmp_path, {"seed": 1}, {"resnet": networks()[0]}, {}, 1, LINE)
    loader, losses = Loader(random_images(300), 1, "cpu"), []
    with pytest.raises(RuntimeError, match="not finite from step 130 of epoch 0 on: lower"):
        for _ in training:
            for _ in training.batches(loader, losses):
                losses.append(torch.tensor(float("nan") if len(losses) == 130 else 1.0))
    assert len(losses) == 200
    with pytest.raises(RuntimeError, match=r"only 0 of 1 epochs are done in .*: run the training's cell"):
        training.save("final.t7")


def test_a_folder_is_in_use_while_it_is_trained_in(tmp_path):
    looked, other = [], FileLock(tmp_path / ".lock")  # as another process's

    def look(epoch):
        with pytest.raises(Timeout):
            other.acquire(timeout=0)
        looked.append(epoch)

    with other, pytest.raises(RuntimeError, match=rf"another process is training in {tmp_path}: wait for it"):
        train(tmp_path)
    (tmp_path / ".left.tmp").touch()
    train(tmp_path, before=look)
    other.acquire(timeout=0)
    assert looked == list(range(EPOCHS)) and not (tmp_path / ".left.tmp").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can't be mounted here: it takes Linux, and root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # an interrupted run has files open


def test_a_disk_that_fills_up_ends_the_training_and_keeps_its_last_epoch(small_disk, tmp_path):
    expected, _ = train(tmp_path / "whole")
    ballast = small_disk / "ballast"

    def fill(epoch):
        if epoch == 2:
            ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free))

    with pytest.raises(RuntimeError, match=r"could not write .*last\.t7 \(.*No space left.*free some space"):
        train(small_disk / "run", before=fill)
    assert len(read_checkpoint(small_disk / "run" / "last.t7")["history"]) == 2
    ballast.unlink()
    resumed, _ = train(small_disk / "run")
    assert fingerprint(resumed) == fingerprint(expected)


@pytest.mark.parametrize("steps", [0, 1, 5, 100])
def test_the_learning_rate_rises_and_falls_in_trainings_of_any_length(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1)
    scheduler, rates = one_cycle(optimizer, 0.5, steps, warmup=0.15), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert all(0 <= rate <= 0.5 for rate in rates)
    assert steps < 100 or (rates.index(max(rates)) == 14 and max(rates) == 0.5 and rates[-1] < 1e-3)


def test_the_averaged_epochs_are_the_last_ones():
    assert [first_averaged_epoch(*of) for of in ((15, 0.5), (100, 0.29), (4, 0), (0, 0.5))] == [8, 71, 4, 0]


def test_weights_are_averaged_and_batch_norm_learns_the_means_statistics():
    rnet, loader = networks()[0].train(), Loader(random_images(40), 10, "cpu")
    averaged, seen, means = AveragedModel(rnet), [], []
    for _ in range(2):
        torch.nn.init.normal_(rnet.conv1.weight)
        averaged.update_parameters(rnet)
        seen.append(rnet.conv1.weight.clone())
    dropped, policy = averaged.module.blocks[0][0].bn1, torch.tensor([[0.0, 1, 1]])
    dropped.running_mean.fill_(3)
    rnet.bn1.register_forward_pre_hook(lambda _, x: means.append(x[0].mean((0, 2, 3))))
    with rnet.register_forward_pre_hook(lambda _, x: (*x, policy.expand(len(*x), 3), True)):
        take_average(averaged, rnet, loader, "fp32")
    torch.testing.assert_close(rnet.conv1.weight, sum(seen) / 2)
    torch.testing.assert_close(rnet.bn1.running_mean, torch.stack(means).mean(0))
    assert len(means) == 4 and rnet.bn1.momentum == 0.1 and rnet.training
    assert (rnet.blocks[0][0].bn1.running_mean == 3).all()  # as before: no image keeps the block


R14, POLICY = "trained_rnet/R14_SYN/pk_1.t7", "trained_policy/R20_SYN/ckpt_1.t7"
WEIGHTS = {"resnet": {"fc.weight": torch.zeros(1)}, "agent": {"logit.weight": torch.zeros(1)}}


def entry(stage, seconds, model="R20_SYN", **settings):
    """Return a stage's entry in a lineage."""
    settings = {"model": model} | settings
    return {"stage": stage, "seconds": seconds, "machine": [], "weights": None, "settings": settings}


@pytest.fixture
def cv(tmp_path, monkeypatch):
    """A folder of checkpoints, next to the one that ships."""
    monkeypatch.setattr(stages, "SHIPPED", tmp_path / "shipped")
    for path, *holds in (("cv/trained_rnet/R20_SYN/pk_1.t7", "resnet"), (f"cv/{R14}", "resnet"),
                         ("shipped/trained_rnet/R8_SYN/pk_1.t7", "resnet"),
                         (f"cv/{POLICY}", "agent", "resnet")):  # fmt: skip
        save_checkpoint(tmp_path / path, {name: WEIGHTS[name] for name in holds})
    return tmp_path / "cv"


@pytest.mark.parametrize(
    ("model", "start_from", "trains_policy", "expected", "layers"),
    [
        ("R20_SYN", "auto", True, "cv/trained_rnet/R20_SYN", "shipped/trained_rnet/R8_SYN"),
        ("R20_SYN", None, True, "cv/trained_rnet/R20_SYN", None),
        ("R20_SYN", R14, True, "cv/trained_rnet/R20_SYN", "cv/trained_rnet/R14_SYN"),
        *(("R20_SYN", POLICY, trains, "cv/trained_policy/R20_SYN", None) for trains in (True, False)),
        *(("R20_SYN", start, False, "cv/trained_policy/R20_SYN", None) for start in ("auto", None)),
        ("R8_SYN", "auto", True, "shipped/trained_rnet/R8_SYN", None),
        ("R50_ImgNet", "auto", True, None, None),  # torchvision's weights
    ],
)
def test_where_training_starts(cv, model, start_from, trains_policy, expected, layers):
    start_from = start_from if start_from in ("auto", None) else cv / start_from
    found = stages.starting_point(model, start_from, trains_policy, cv, None)
    for stage, folder in zip(found, (expected, layers), strict=True):
        path = stage.path if stage else None
        assert path.resolve().parent == cv.parent / folder if folder else path is None


def test_where_training_cannot_start(cv):
    with pytest.raises(ValueError, match="a ResNet: finetuning alone needs a policy's file"):
        stages.starting_point("R20_SYN", cv / R14, False, cv, None)
    with pytest.raises(FileNotFoundError, match=r"no ckpt_\*\.t7 in .*R14_SYN: train a policy first, with"):
        stages.starting_point("R14_SYN", "auto", False, cv, None)


def test_a_file_of_both_networks_needs_no_sole_resnet(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "SHIPPED", tmp_path)
    rnet, agent = networks("R26_SYN")
    path = save_checkpoint(tmp_path / "ckpt_1.t7", {"resnet": rnet.state_dict(), "agent": agent.state_dict()})
    networks_of = step_functions("blockdrop_training").networks_of
    found = networks_of(stages.load(path), None, "R26_SYN", torch.device("cpu"), tmp_path, 0)
    assert fingerprint(*found) == fingerprint(rnet, agent)


def test_costs_are_sums_over_the_lineage():
    sole, eight = entry("sole", 100.0), entry("sole", 5.0, "R8_SYN")
    policy = [sole, entry("stochastic depth", 20.0), eight, entry("policy training", 10.0)]
    for finetuned, costs in (([], 0), ([1.0, 2.0], 3), ([None], None)):
        lineage = [*policy, *(entry("finetuning", seconds) for seconds in finetuned)]
        expected = {"sole": 100, "policy training": 35, "finetuning": costs}
        assert stages.costs(lineage, "R20_SYN") == expected


def test_held_out_images_that_were_trained_on_are_said(tmp_path, capsys):
    state = {"resnet": WEIGHTS["resnet"], "lineage": [entry("sole", 1.0, max_images=300)]}
    save_checkpoint(tmp_path / "trained_rnet" / "R20_SYN" / "pk_1.t7", state)
    for max_images, said in ((300, False), (None, True)):
        stages.starting_point("R20_SYN", None, True, tmp_path, max_images)
        assert ("may have seen images held out now" in capsys.readouterr().out) == said
