"""Networks: the three forwards agree, names are the original's, torchvision's logits come out."""

import copy

import pytest
import torch
import torchvision

import utils
from models.base import DownsampleB
from models.policy import Policy32, Policy224, greedy_policy
from models.resnet import FlatResNet32, FlatResNet224


def randomized(network):
    """Give the batch norms something to do, as training would."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    return network.eval()


@pytest.fixture
def rnet():
    torch.manual_seed(0)
    return randomized(FlatResNet32(layer_config=(2, 2, 2)))


@torch.no_grad()
def test_masked_and_single_agree(rnet):
    images = torch.rand(8, 3, 32, 32)
    policies = torch.randint(2, (8, 6)).float()
    masked = rnet(images, policies)
    single = torch.cat([rnet.forward_single(x[None], p) for x, p in zip(images, policies, strict=True)])
    torch.testing.assert_close(masked, single, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_full_is_all_blocks(rnet):
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(rnet.forward_full(images), rnet(images, torch.ones(3, 6)))


@torch.no_grad()
def test_dropping_every_block_leaves_the_shortcuts(rnet):
    images = torch.rand(3, 3, 32, 32)
    x = rnet.seed(images)
    for shortcut in rnet.ds:
        x = shortcut(x)
    torch.testing.assert_close(rnet.forward_single(images, [0] * 6), rnet.classify(x))


@torch.no_grad()
def test_downsample_pools_and_adds_zero_channels():
    x = torch.rand(2, 4, 6, 6)
    y = DownsampleB(4, 8, 2)(x)
    torch.testing.assert_close(y[:, :4], torch.nn.functional.avg_pool2d(x, 2))
    assert y.shape == (2, 8, 3, 3) and not y[:, 4:].any()


def test_a_dropped_block_gets_no_gradient(rnet):
    policy = torch.tensor([[1, 1, 0, 1, 1, 1]]).float()
    rnet(torch.rand(1, 3, 32, 32), policy).sum().backward()
    assert not rnet.blocks[1][0].conv1.weight.grad.any()
    assert rnet.blocks[1][1].conv1.weight.grad.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_skipping_dropped_blocks_gives_the_masked_gradients(rnet, autocast):
    images = torch.rand(8, 3, 32, 32)
    policies = torch.randint(2, (8, 6)).float()
    policies[:, 1], policies[:, 5] = 0, 1  # by none, by all; 2 and 4, by some, change the shape
    gradients = []
    for skip_dropped in (False, True):
        rnet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = rnet(images, policies, skip_dropped)
        logits.float().square().sum().backward()
        gradients.append([parameter.grad for parameter in rnet.parameters()])
    for masked, skipped in zip(*gradients, strict=True):
        tolerance = (0.05 if autocast else 1e-5) * max(1, masked.abs().max().item())
        torch.testing.assert_close(skipped, masked, atol=tolerance, rtol=0)


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


@pytest.mark.parametrize("policy", [torch.ones(2, 5), torch.ones(6), torch.ones(3, 6)])
def test_masked_refuses_policies_of_another_shape(rnet, policy):
    with pytest.raises(ValueError, match="one row per image, one column per block"):
        rnet(torch.rand(2, 3, 32, 32), policy)


def test_single_refuses_policies_of_another_length(rnet):
    with pytest.raises(ValueError, match="5 entries, expected 6"):
        rnet.forward_single(torch.rand(1, 3, 32, 32), [1] * 5)


def test_names_are_the_originals():
    rnet, agent = utils.build_model("R32_C10")
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "fc.weight", "fc.bias"} | {f"bn1.{n}" for n in norm}
    for segment in range(3):
        for block in range(5):
            for layer in (1, 2):
                expected.add(f"blocks.{segment}.{block}.conv{layer}.weight")
                expected |= {f"blocks.{segment}.{block}.bn{layer}.{n}" for n in norm}
    assert set(rnet.state_dict()) == expected
    assert rnet.layer_config == [5, 5, 5]
    heads = {f"{head}.{n}" for head in ("logit", "vnet") for n in ("weight", "bias")}
    names = set(agent.state_dict())
    assert {n for n in names if not n.startswith("features.")} == heads
    assert not any(n.startswith("features.fc") for n in names)
    assert "features.blocks.2.0.bn2.running_var" in names


@pytest.mark.parametrize("depth", [50, 101])
@torch.no_grad()
def test_flatresnet224_gives_torchvisions_logits(depth):
    torch.manual_seed(0)
    source = randomized(torchvision.models.get_model(f"resnet{depth}", weights=None))
    rnet, _ = utils.build_model(f"R{depth}_ImgNet")
    utils.load_weights_to_flatresnet(source, rnet).eval()
    images = torch.rand(1, 3, 224, 224)
    expected = source(images)
    torch.testing.assert_close(rnet.forward_full(images), expected, atol=1e-4 * expected.std(), rtol=1e-4)


@pytest.mark.parametrize(
    ("agent", "size", "num_blocks"), [(Policy32(), 32, 15), (Policy224(num_blocks=16), 64, 16)]
)
@torch.no_grad()
def test_policy_gives_probabilities_and_value(agent, size, num_blocks):
    probs, value = agent.eval()(torch.rand(2, 3, size, size))
    assert probs.shape == (2, num_blocks) and value.shape == (2, 1)
    assert ((probs > 0) & (probs < 1)).all()


def test_bf16_training_reaches_every_weight():
    """As in finetuning: a pass without gradients first must not cut the second one off."""
    torch.manual_seed(0)
    rnet, agent = utils.build_model("R8_SYN")
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


def test_policy224_starts_from_a_resnet18():
    source = torchvision.models.resnet18(weights=None)
    agent = Policy224()
    utils.load_weights_to_flatresnet(source, agent.features)
    torch.testing.assert_close(agent.features.ds[3][0].weight, source.layer4[0].downsample[0].weight)
    torch.testing.assert_close(agent.features.blocks[2][0].conv2.weight, source.layer3[0].conv2.weight)


def test_greedy_keeps_from_one_half_on():
    assert greedy_policy(torch.tensor([[0.499, 0.5, 0.9]])).tolist() == [[0, 1, 1]]


def test_imagenet_shapes():
    rnet, agent = utils.build_model("R50_ImgNet")
    assert isinstance(rnet, FlatResNet224) and rnet.num_blocks == 16 == agent.logit.out_features
