"""What CUDA computes is what the CPU computes; needs a CUDA GPU."""

import subprocess
import sys

import pytest
import torch
from conftest import NOTEBOOKS, ROOT
from test_notebooks import BLOCKDROP, INFERENCE, SOLE, execute

import utils
from models import inference
from models.lab.data import Images
from models.lab.device import seed_everything

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")

TRAIN_TWICE = """
import sys
sys.path[:0] = ["tests", "."]
from test_notebooks import train

found = [train(folder, {"device": "cuda", "deterministic": True}) for folder in sys.argv[1:]]
assert found[0] == found[1], found
"""


@pytest.mark.parametrize("n", [0, 1, 2, 7])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-4), ("tf32", 0.01), ("bf16", 0.05), ("fp16", 0.01)]
)
@torch.no_grad()
def test_conditional_on_cuda_is_masked_on_the_cpu(n, precision, tolerance):
    seed_everything(0)
    rnet, agent = utils.build_model("R20_SYN")
    images, policy = torch.rand(n, 3, 32, 32), torch.randint(2, (n, 9)).float()
    expected = rnet.eval()(images, policy)
    net = inference.prepare(rnet, agent, precision, "cuda")
    for _ in range(2):  # a graph is captured, then replayed
        logits, ran = net(images.cuda(), policy.cuda())
        assert (logits.cpu() - expected).norm() <= tolerance * expected.norm()
        assert torch.equal(ran.cpu(), policy)
    assert net.note == ("CUDA graphs" if n == 1 else "eager")


def test_images_are_augmented_alike():
    pixels, read = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8), []
    for device in ("cpu", "cuda"):
        images = Images(pixels, torch.arange(40) % 10, list("abcdefghij"), augment=True).to(device)
        generator = torch.Generator().manual_seed(1)
        read.append(images.read(torch.arange(20, device=device), generator=generator)[0].cpu())
    torch.testing.assert_close(*read)


def test_the_notebooks_run(tmp_path):
    for name, settings in zip(NOTEBOOKS, (SOLE, BLOCKDROP, INFERENCE), strict=True):
        text = execute(name, tmp_path, settings | {"device": "cuda"})
    assert "How a single image runs: CUDA graphs; sole ResNet: CUDA graphs" in text


def test_deterministic_training_gives_the_same_weights_twice(tmp_path):
    """In a process of its own: CUDA must not have started before."""
    folders = [str(tmp_path / name) for name in "ab"]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_TWICE, *folders], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
