"""The ResNet in one kernel gives what its blocks give: on a GPU, or without one in Triton's interpreter."""

from functools import partial

import pytest
import torch
from benchmarks.common import alone
from test_networks import networks

from models.inference import Eager, fold
from models.lab.device import choose_device

pytest.importorskip("triton", reason="this PyTorch comes without Triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.fused import PROGRAMS, SCRATCH, STAGES, TILES, WARPS, FusedResNet, _resnet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF, BF16 = torch.float16, torch.bfloat16
TOLERANCE = {HALF: 0.003, BF16: 0.02}


@pytest.mark.parametrize(
    ("model", "n", "dtype"),
    [
        ("R8_SYN", 0, HALF),
        ("R8_SYN", 1, HALF),
        pytest.param("R8_SYN", PROGRAMS + 3, HALF, id="several_per_program"),
        ("R8_C100", 2, HALF),
        ("R14_SYN", 3, BF16),
        ("R20_SYN", 3, HALF),
    ],
)
@torch.no_grad()
def test_it_is_the_masked_forward(model, n, dtype):
    if dtype == BF16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter takes bf16 for whole numbers")
    rnet = fold(networks(model)[0])
    images, policy = torch.rand(n, 3, 32, 32), torch.randint(2, (n, rnet.num_blocks)).float()
    policy[:1], policy[1:2], policy[2:3] = 1, 0, torch.arange(rnet.num_blocks) == rnet.num_blocks // 2
    fused = FusedResNet(rnet, dtype, DEVICE)
    fused.programs = PROGRAMS  # on a GPU, too, programs run several images
    for found, expected in (
        (fused(images.to(DEVICE), policy.to(DEVICE)), rnet(images, policy)),
        (fused(images[:1].to(DEVICE)), rnet(images[:1])),
        (fused(images.to(DEVICE), policy[:1].expand(n, -1).to(DEVICE)), rnet(images)),
    ):
        assert found.dtype == torch.float32 and found.shape == expected.shape
        assert (found.cpu() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_layouts_and_types_of_policies_give_the_same():
    fused = FusedResNet(fold(networks()[0]), HALF, DEVICE)
    images, policy = torch.rand(2, 6, 32, 64, device=DEVICE)[:, ::2, :, ::2], torch.tensor([[1, 0, 1]] * 2)
    expected = fused(images.contiguous(), policy.float().to(DEVICE))
    for other in (policy, policy.bool(), policy.half(), policy.t().contiguous().t()):
        assert torch.equal(fused(images, other.to(DEVICE)), expected)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(fused(channels_last, policy.to(DEVICE)), expected)


@torch.no_grad()
def test_the_policy_network_decides_and_the_resnet_follows():
    choose_device(DEVICE)  # fp32 in full: PyTorch's own convolutions take TF32
    rnet, agent = (fold(network).to(DEVICE) for network in networks())
    images = (torch.rand(3, 3, 32, 32) * torch.arange(1, 4)[:, None, None, None]).to(DEVICE)
    policy = (agent(images)[0] >= 0.5).float()
    fuse = partial(FusedResNet, dtype=HALF, device=DEVICE)
    logits, decided = Eager(fuse, rnet, agent, None).both(images)
    assert torch.equal(decided, policy)
    assert (logits - rnet(images, policy)).norm() <= TOLERANCE[HALF] * logits.norm()


def test_other_values_than_0_and_1_give_no_number():
    policy = torch.tensor([[1, 0, 0.5], [1, 0, 1], [-1, 0, 0], [0, torch.nan, 0]], device=DEVICE)
    fused = FusedResNet(fold(networks()[0]), HALF, DEVICE)
    logits = fused(torch.rand(4, 3, 32, 32, device=DEVICE), policy)
    assert logits.isnan().all(1).tolist() == [True, False, True, True]


def test_what_cant_be_run_is_said():
    rnet, _ = networks()
    with pytest.raises(ValueError, match=r"float16 or bfloat16, not in torch\.float32"):
        FusedResNet(fold(rnet), torch.float32, DEVICE)
    for wrong in (rnet, torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="made of a FlatResNet32 with its batch norms folded"):
            FusedResNet(wrong, HALF, DEVICE)
    fused, images = FusedResNet(fold(rnet), HALF, DEVICE), torch.rand(2, 3, 32, 32, device=DEVICE)
    for given, message in (
        ((images[..., :24],), r"images have shape \(2, 3, 32, 24\), expected \(N, 3, 32, 32\)"),
        ((images.to("meta"),), "the images are on meta, the network on"),
        ((images, torch.ones(2, 4, device=DEVICE)), r"policy has shape \(2, 4\), expected \(2, 3\)"),
        ((images, torch.ones(2, 3, device="meta")), "the policy is on meta, the network on"),
    ):
        with pytest.raises(ValueError, match=message):
            fused(*given)


def compiled_for_h100():
    """Return the kernel's bytes of shared memory per program, and its code, as compiled for an H100."""
    constants = {"SIZE": SCRATCH, "STAGES": STAGES, "ALL": False}
    constants |= dict(zip(("T1", "T2", "T3"), TILES, strict=True))
    types = {}
    for name in _resnet.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name == "scratch" or ("weight" in name and name != "last_weight"):
            types[name] = "*fp16"
        else:
            is_pointer = name in ("images", "policy", "outputs", "last_weight") or "bias" in name
            types[name] = "*fp32" if is_pointer else "i32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"}
    source = ASTSource(_resnet, types, constants, aligned)
    options = {"num_warps": WARPS, "num_stages": 1}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return compiled.metadata.shared, compiled.asm["ptx"]


@pytest.mark.skipif(DEVICE == "cuda", reason="where there is a GPU, the other tests compile for it")
def test_it_compiles_for_a_gpu_that_is_not_here(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    shared, code = alone(compiled_for_h100)
    assert PROGRAMS * (shared + 1024) <= 228 * 1024  # of a multiprocessor; it keeps 1 KiB per program
    assert "wgmma" in code  # on tensor cores
