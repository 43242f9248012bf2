"""Training runs: killed and resumed, they end where an uninterrupted one ends."""

import contextlib
import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

import utils
from models.training import TrainingRun

EPOCHS = 4
LINE = "Epoch: {epoch} - Loss: {loss:.3f}"


class Killed(Exception):
    """Stands for a kill in the middle of an epoch."""


# Holds a lock until it is killed.
HOLDER = """
import sys, time, filelock
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(100)
"""


# Tells whether a lock is free.
TRY = """
import sys, filelock
try:
    filelock.FileLock(sys.argv[1]).acquire(timeout=0)
    print("free")
except filelock.Timeout:
    print("in use")
"""


def training(
    folder, kill_at=None, not_finite_at=None, resume=True, seed=5, lr=0.1, before_epoch=print, averaging=0
):
    """Train a little R8; stop in the middle of epoch `kill_at`. Returns network and run."""
    torch.manual_seed(0)
    pixels = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    loader = utils.Loader(
        utils.Images(pixels, torch.arange(40) % 10, list("abcdefghij"), augment=True), 10, "cpu", shuffle=True
    )
    utils.seed_everything(seed)
    rnet, _ = utils.build_model("R8_SYN")
    optimizer = torch.optim.SGD(rnet.parameters(), lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=EPOCHS * len(loader))
    progress = {"optimizer": optimizer, "scheduler": scheduler}
    settings = {"seed": seed, "lr": lr} | ({"averaging": averaging} if averaging else {})
    run = utils.TrainingRun(
        folder, settings, {"resnet": rnet}, progress, EPOCHS, LINE, resume, averaging=averaging
    )
    for epoch in run:
        before_epoch(epoch)
        losses = []
        for step, (inputs, targets) in enumerate(run.batches(loader)):
            loss = F.cross_entropy(rnet.forward_full(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not run.in_average:
                scheduler.step()
            if epoch == kill_at and step == 2:
                raise Killed
            bad = epoch == not_finite_at and step == 2
            losses.append(loss.detach() * (float("nan") if bad else len(targets)))
        run.take_average(loader, rnet.forward_full)
        run.end_epoch(epoch, loss=run.mean_loss(losses, loader))
    return rnet, run


def test_a_checkpoint_tells_the_machines_that_its_epochs_ran_on(tmp_path, monkeypatch):
    def on(name, **kill):
        monkeypatch.setattr("models.training.machine_name", lambda device: name)
        return training(tmp_path, **kill)[1]

    with pytest.raises(Killed):
        on("one", kill_at=1)
    assert on("another").state()["machine"] == "one; another"
    assert on("a third").state()["machine"] == "one; another"  # nothing was left to train


def weights(rnet):
    return torch.cat([value.flatten().double() for value in rnet.state_dict().values()])


def test_the_last_epochs_weights_are_averaged(tmp_path, monkeypatch):
    """Their mean, at one learning rate; batch norm has the mean statistics of one pass with it."""
    epochs, take_average, means = [], TrainingRun.take_average, []

    def recorded(self, loader, forward):
        rnet = self.networks["resnet"]
        rate = self.progress["optimizer"].param_groups[0]["lr"]
        epochs.append((rate, [weight.detach().clone() for weight in rnet.parameters()]))
        if self.epoch == EPOCHS - 1:
            rnet.blocks[0][0].bn1.register_forward_pre_hook(lambda _, x: means.append(x[0].mean((0, 2, 3))))
        take_average(self, loader, forward)

    monkeypatch.setattr(TrainingRun, "take_average", recorded)
    rnet, run = training(tmp_path, averaging=0.5)
    rates, weights_after = zip(*epochs, strict=True)
    assert rates[0] != rates[1] == rates[2] == rates[3] > 0
    for weight, *last in zip(rnet.parameters(), *weights_after[2:], strict=True):
        torch.testing.assert_close(weight, sum(last) / 2)
    torch.testing.assert_close(rnet.blocks[0][0].bn1.running_mean, torch.stack(means).mean(0))
    assert len(means) == 4 and run.num_averaged == 2 and rnet.bn1.momentum == 0.1


def test_a_block_that_no_image_keeps_has_its_statistics_still(tmp_path):
    rnet, run = training(tmp_path / "before")
    run.num_averaged, run.progress["averaged"] = 1, AveragedModel(rnet)
    before, policy = copy.deepcopy(rnet.blocks[0][0].bn1.state_dict()), torch.tensor([[0.0, 1, 1]])
    loader = utils.Loader(
        utils.Images(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), list("abcd")), 2, "cpu"
    )
    run.take_average(loader, lambda inputs: rnet(inputs, policy.expand(len(inputs), 3), True))
    after = rnet.blocks[0][0].bn1
    assert torch.equal(after.running_mean, before["running_mean"]) and after.num_batches_tracked == 0
    assert rnet.bn1.num_batches_tracked == 2


def test_a_run_without_averaging_gives_way_to_one_with_it(tmp_path, capsys):
    _, run = training(tmp_path)
    run.save("final.t7")
    training(tmp_path, averaging=0.5)
    assert "Settings changed since the last run (averaging None -> 0.5)" in capsys.readouterr().out


def test_an_averaged_run_resumes_to_the_bit(tmp_path):
    expected, _ = training(tmp_path / "whole", averaging=0.5)
    for kill_at in (1, 3):
        with pytest.raises(Killed):
            training(tmp_path / "killed", kill_at, averaging=0.5)
    for _ in range(2):  # the second time nothing is left to train
        found, _ = training(tmp_path / "killed", averaging=0.5)
        assert torch.equal(weights(found), weights(expected))


def test_resumed_is_uninterrupted_to_the_bit(tmp_path, capsys):
    expected, run = training(tmp_path / "whole")
    for kill_at in (0, 2, 3):
        with pytest.raises(Killed):
            training(tmp_path / "killed", kill_at)
    resumed, resumed_run = training(tmp_path / "killed")
    assert torch.equal(weights(expected), weights(resumed))
    losses = [row["loss"] for row in run.history]
    assert losses == [row["loss"] for row in resumed_run.history]
    assert "3 epochs done, 1 to go" in capsys.readouterr().out


def test_a_finished_run_has_nothing_left(tmp_path):
    first, run = training(tmp_path)
    again, rerun = training(tmp_path)
    assert torch.equal(weights(first), weights(again)) and rerun.seconds == run.seconds


def test_a_finished_run_of_other_settings_is_replaced_once_it_is_saved(tmp_path, capsys):
    _, run = training(tmp_path)
    with pytest.raises(ValueError, match=r"finished but unsaved run of other settings \(seed 5 -> 6\)"):
        training(tmp_path, seed=6)
    run.save("final.t7")
    _, run = training(tmp_path, seed=6)
    assert "seed 5 -> 6" in capsys.readouterr().out and len(run.history) == EPOCHS
    assert utils.read_checkpoint(tmp_path / "last.t7")["settings"]["seed"] == 6


def test_an_unfinished_run_of_other_settings_is_not_lost(tmp_path):
    with pytest.raises(Killed):
        training(tmp_path, kill_at=2)
    with pytest.raises(ValueError, match=r"other settings \(lr 0.1 -> 0.2\).*resume = False"):
        training(tmp_path, lr=0.2)
    _, run = training(tmp_path, lr=0.2, resume=False)
    assert len(run.history) == EPOCHS


def test_a_foreign_state_is_refused(tmp_path):
    utils.save_checkpoint(tmp_path / "last.t7", {"epoch": 3})
    with pytest.raises(utils.CheckpointError, match=r"last\.t7 is not the state of a run like this one"):
        training(tmp_path)


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run" / ".lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match=r"another process is training in .*run: wait for it"):
            training(tmp_path / "run")
    finally:
        holder.kill()
        holder.wait()
    training(tmp_path / "run")


def test_a_folder_is_in_use_until_the_final_checkpoint_is_written(tmp_path):
    def try_to_hold():
        return subprocess.run(
            [sys.executable, "-c", TRY, str(tmp_path / ".lock")], capture_output=True, text=True, check=True
        ).stdout.strip()

    training(tmp_path)
    _, run = training(tmp_path)  # nothing is left to train, all the same
    assert try_to_hold() == "in use"
    (tmp_path / ".left.tmp").touch()
    assert utils.read_checkpoint(run.save("final.t7", acc=0.5))["acc"] == 0.5
    assert try_to_hold() == "free" and not (tmp_path / ".left.tmp").exists()


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


def test_an_unfinished_run_is_not_saved_as_a_finished_one(tmp_path, monkeypatch):
    runs = []

    def recorded(*args, **more):
        runs.append(TrainingRun(*args, **more))
        return runs[-1]

    monkeypatch.setattr(utils, "TrainingRun", recorded)
    with pytest.raises(Killed):
        training(tmp_path, kill_at=2)
    with pytest.raises(RuntimeError, match="only 2 of 4 epochs are done"):
        runs[0].save("final.t7")
    assert not (tmp_path / "final.t7").exists()


def test_a_disk_that_fills_up_ends_the_training_and_keeps_its_last_epoch(small_disk, tmp_path):
    expected, _ = training(tmp_path / "whole")
    ballast = small_disk / "ballast"

    def fill(epoch):
        if epoch == 2:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    with pytest.raises(RuntimeError, match=r"could not write .*last\.t7 \(.*No space left.*free some space"):
        training(small_disk / "run", before_epoch=fill)
    assert len(utils.read_checkpoint(small_disk / "run" / "last.t7")["history"]) == 2
    ballast.unlink()
    resumed, _ = training(small_disk / "run")
    assert torch.equal(weights(expected), weights(resumed))


def test_an_interrupted_cell_may_run_again(tmp_path):
    """The interrupted loop is still referred to, by a traceback for example."""
    with pytest.raises(Killed) as interrupted:
        training(tmp_path, kill_at=2)
    assert interrupted.tb
    _, run = training(tmp_path)
    assert len(run.history) == EPOCHS


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(
        RuntimeError, match="not finite from step 2 of epoch 1 on: lower the learning rate, and move"
    ):
        training(tmp_path, not_finite_at=1)
    assert len(utils.read_checkpoint(tmp_path / "last.t7")["history"]) == 1


@pytest.mark.parametrize("epoch", [0, 2])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, epoch):
    """The last step of an epoch breaks them: no loss has told yet."""
    end_epoch = TrainingRun.end_epoch

    def broken(self, number, **figures):
        if number == epoch:
            self.networks["resnet"].fc.bias.data[3] = float("inf")
        end_epoch(self, number, **figures)

    monkeypatch.setattr(TrainingRun, "end_epoch", broken)
    message = rf"resnet's fc\.bias is not finite after epoch {epoch}: lower the learning rate"
    with pytest.raises(RuntimeError, match=message + ", and move" * (epoch > 0)):
        training(tmp_path)
    if epoch > 0:
        assert len(utils.read_checkpoint(tmp_path / "last.t7")["history"]) == epoch
    else:
        assert not (tmp_path / "last.t7").exists()


def test_a_gpu_too_small_is_said(tmp_path):
    @utils.fits_memory
    def train():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="memory is too small for the batch: lower batch_size"):
        train()


def test_other_seeds_other_weights(tmp_path):
    first, _ = training(tmp_path / "a", seed=1)
    second, _ = training(tmp_path / "b", seed=2)
    assert not torch.equal(weights(first), weights(second))


def test_epochs_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="epochs is 0"):
        utils.TrainingRun(tmp_path, {}, {}, {}, 0, LINE)
