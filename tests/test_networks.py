"""Networks: names, kept and dropped blocks, torchvision's logits, FLOPs, and what learns."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import utils


def randomized(network):
    """Give the batch norms something to do, as training would."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    return network.eval()


def networks(model="R8_SYN", seed=0):
    """Return a ResNet and a policy network as after training: the policies differ between images."""
    torch.manual_seed(seed)
    rnet, agent = map(randomized, utils.build_model(model))
    torch.nn.init.uniform_(agent.logit.bias, -1, 1)
    return rnet, agent


@pytest.fixture
def rnet():
    return networks("R14_SYN")[0]


@pytest.mark.parametrize("model", ["R33_C10", "R2_C10", "R32", "R32_MNIST", "R34_ImgNet", "r32_C10", "", 32])
def test_other_names_are_refused(model):
    with pytest.raises(ValueError, match=r"expected R<depth>_<dataset>"):
        utils.build_model(model)


@torch.no_grad()
def test_a_kept_block_adds_to_its_shortcut_and_a_dropped_one_is_its_shortcut(rnet):
    images = torch.rand(3, 3, 32, 32)
    x = rnet.seed(images)
    kept = F.relu(x + rnet.blocks[0][0](x))
    for segment in (1, 2):
        x, kept = rnet.ds[segment](x), rnet.ds[segment](kept)
    for policy, expected in (([0] * 6, x), ([1, 0, 0, 0, 0, 0], kept)):
        torch.testing.assert_close(rnet.forward_single(images, policy), rnet.classify(expected))


@pytest.mark.parametrize("autocast", [False, True])
def test_skipping_dropped_blocks_gives_the_masked_gradients(rnet, autocast):
    images = torch.rand(8, 3, 32, 32)
    policies = torch.randint(2, (8, 6)).float()
    policies[:, 1], policies[:, 5] = 0, 1  # kept by none, by all; 2 and 4, by some, change the shape
    gradients = []
    for skip_dropped in (False, True):
        rnet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = rnet(images, policies, skip_dropped)
        logits.float().square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in rnet.named_parameters()})
    for name, masked in gradients[0].items():
        skipped = torch.zeros_like(masked) if gradients[1][name] is None else gradients[1][name]
        tolerance = (0.05 if autocast else 1e-5) * max(1, masked.abs().max().item())
        torch.testing.assert_close(skipped, masked, atol=tolerance, rtol=0)
        assert name.startswith("blocks.0.1.") != bool(masked.any())  # block 1 alone learns nothing


@pytest.mark.parametrize("keeping", [0, 2, 4])
def test_batch_norm_sees_the_images_that_keep_a_block(rnet, keeping):
    images, policies = torch.rand(4, 3, 32, 32), torch.ones(4, 6)
    policies[keeping:, 1] = 0
    block, alone = rnet.blocks[0][1], copy.deepcopy(rnet)
    block.train()
    rnet(images, policies, skip_dropped=True)
    if keeping:
        alone.blocks[0][1].train()
        alone.forward_full(images[:keeping])
    torch.testing.assert_close(block.bn2.running_mean, alone.blocks[0][1].bn2.running_mean)


def test_policies_of_another_shape_are_refused(rnet):
    with pytest.raises(ValueError, match="one row per image, one column per block"):
        rnet(torch.rand(2, 3, 32, 32), torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"shape \(1, 5\), expected \(1, 6\)"):
        rnet.forward_single(torch.rand(1, 3, 32, 32), [1] * 5)


@torch.no_grad()
def test_flatresnet224_gives_torchvisions_logits():
    torch.manual_seed(0)
    source = randomized(torchvision.models.get_model("resnet101", weights=None))
    rnet, _ = utils.build_model("R101_ImgNet")
    utils.load_weights_to_flatresnet(source, rnet).eval()
    images = torch.rand(1, 3, 224, 224)
    expected = source(images)
    torch.testing.assert_close(rnet.forward_full(images), expected, atol=1e-4 * expected.std(), rtol=1e-4)


def test_flops_agree_with_pytorchs_counter_and_the_original():
    rnet, agent = utils.build_model("R50_ImgNet")
    policy, image = torch.arange(16) % 2, torch.rand(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        agent.eval()(image)
        rnet.eval().forward_single(image, policy)
    assert utils.count_flops(rnet, policy[None], agent).item() == counter.get_total_flops()
    assert f"{utils.count_flops(utils.build_model('R110_C10')[0]).item():.1E}" == "5.1E+08"


def test_bf16_training_reaches_every_weight():
    """As in finetuning: a pass without gradients first must not cut the second one off."""
    rnet, agent = (network.train() for network in networks())
    images, policy = torch.rand(4, 3, 32, 32), torch.ones(4, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rnet(images, policy)
    with torch.autocast("cpu", torch.bfloat16):
        probs, value = agent(images)
        loss = rnet(images, policy).float().square().mean() + probs.mean() + value.mean()
    loss.backward()
    assert probs.dtype == torch.float32
    for network in (rnet, agent):
        assert all(p.grad is not None and p.grad.any() for p in network.parameters())
