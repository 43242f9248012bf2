"""What CUDA computes is what the CPU computes; needs a CUDA GPU."""

import pytest
import torch
from running import run_cells
from test_notebooks import BLOCKDROP, SOLE

import utils
from models import inference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")


@pytest.mark.parametrize("n", [0, 1, 2, 7])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-4), ("tf32", 0.01), ("bf16", 0.05), ("fp16", 0.01)]
)
@torch.no_grad()
def test_conditional_on_cuda_is_masked_on_the_cpu(n, precision, tolerance):
    utils.seed_everything(0)
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
    pixels = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    read = []
    for device in ("cpu", "cuda"):
        images = utils.Images(pixels, torch.arange(40) % 10, list("abcdefghij"), augment=True).to(device)
        generator = torch.Generator().manual_seed(1)
        read.append(images.read(torch.arange(20, device=device), generator=generator)[0].cpu())
    torch.testing.assert_close(*read)


def test_deterministic_training_gives_the_same_weights_twice(at_root, tmp_path):
    def weights(folder):
        settings = {"cv_dir": str(tmp_path / folder), "device": "cuda", "deterministic": True}
        sole = run_cells("rnet_sole", SOLE | settings)
        trained = run_cells("blockdrop_training", BLOCKDROP | settings)
        return [utils.fingerprint(network) for network in (sole["rnet"], trained["rnet"], trained["agent"])]

    try:
        assert weights("a") == weights("b")
    finally:
        torch.use_deterministic_algorithms(False)
