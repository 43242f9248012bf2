"""The algorithm as it stands in blockdrop_training.ipynb, against slow and direct formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import step_functions

import utils

algorithm = step_functions("blockdrop_training")
cases = settings(max_examples=50, deadline=None, derandomize=True)


@cases
@given(st.integers(1, 20), st.integers(1, 9), st.integers(2, 7), st.floats(-100, -0.01), st.integers(0, 999))
def test_reward_is_one_minus_squared_use_or_the_penalty(n, num_blocks, classes, penalty, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator)
    targets = torch.randint(classes, (n,), generator=generator)
    policy = torch.randint(2, (n, num_blocks), generator=generator).float()
    rewards, matches = algorithm.get_reward(logits, targets, policy, penalty)
    for scores, target, kept, reward, match in zip(logits, targets, policy, rewards, matches, strict=True):
        right = max(range(classes), key=lambda c: scores[c]) == target
        expected = 1 - (sum(kept.tolist()) / num_blocks) ** 2 if right else penalty
        assert match == right and reward.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@cases
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 99), st.integers(1, 4))
def test_statistics_are_the_slow_formulas(n, num_blocks, seed, parts):
    torch.manual_seed(seed)
    policies, rewards = torch.randint(2, (n, num_blocks)).float(), torch.randn(n)
    matches = torch.rand(n) < 0.5
    batches = (values.chunk(parts) for values in (policies, rewards, matches))
    accuracy, reward, sparsity, variance, policy_set = utils.performance_stats(*batches)
    kept = [sum(row) for row in policies.tolist()]
    assert accuracy == pytest.approx(sum(matches.tolist()) / n)
    assert reward == pytest.approx(sum(rewards.tolist()) / n, abs=1e-6)
    assert sparsity == pytest.approx(sum(kept) / n)
    spread = math.sqrt(sum((k - sparsity) ** 2 for k in kept) / max(1, n - 1))
    assert variance == pytest.approx(spread, abs=1e-5)
    assert policy_set == {"".join(str(int(u)) for u in row) for row in policies.tolist()}


@pytest.mark.parametrize("temperature", [0.02, 0.1, 0.5, 1])
def test_temperature_divides_the_logits(temperature):
    logits = torch.tensor([-9.0, -0.5, 0, 0.1, 20], requires_grad=True)
    explored = algorithm.explore(torch.sigmoid(logits), 0.99, temperature)
    expected = 0.01 + 0.98 * torch.sigmoid(logits / temperature)
    torch.testing.assert_close(explored, expected, atol=1e-5, rtol=1e-4)
    explored.sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[2] > 0


def test_sampled_policies_follow_their_probabilities():
    torch.manual_seed(0)
    sampled = algorithm.sample(torch.tensor([0.0, 0.3, 1.0]).expand(20000, 3))
    assert sampled.unique().tolist() == [0, 1]
    torch.testing.assert_close(sampled.mean(0), torch.tensor([0.0, 0.3, 1.0]), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("curriculum", "decided"),
    [(0, [4, 4, 4, 4, 4]), (1, [4, 4, 4, 4, 4]), (2, [2, 4, 4, 4, 4]), (3, [2, 3, 4, 4, 4]),
     (4, [1, 2, 3, 4, 4]), (5, [1, 2, 3, 4, 4]), (8, [1, 1, 2, 2, 3])],
)  # fmt: skip
def test_the_curriculum_grows_to_every_block(curriculum, decided):
    assert [algorithm.decided_blocks(epoch, curriculum, 4) for epoch in range(5)] == decided


@pytest.mark.parametrize("cl_step", [1, 3, 4])
def test_policy_loss_is_the_formula(cl_step):
    torch.manual_seed(0)
    explored = algorithm.explore(torch.rand(5, 4), alpha=0.8)
    sampled, advantage = torch.bernoulli(explored), torch.randn(5)
    expected = 0
    for i in range(5):
        for k in range(4 - cl_step, 4):
            p = explored[i, k].item()
            chosen = p if sampled[i, k] else 1 - p
            expected += -math.log(chosen) * advantage[i].item() + 0.1 * p * math.log(p)
    loss = algorithm.policy_loss(explored, sampled, advantage, cl_step, beta=0.1)
    assert loss.item() == pytest.approx(expected / 5, rel=1e-5)


def test_a_step_holds_a_sampled_policy_against_the_greedy_one():
    torch.manual_seed(1)
    probs, weight = torch.rand(6, 4), torch.randn(4, 3, requires_grad=True)
    probs[0, 1:3] = torch.tensor([0.499, 0.5])  # dropped, kept
    probs.requires_grad_()
    targets, ran = torch.arange(6) % 3, []

    def predict(policy):
        ran.append(policy)
        return policy @ weight

    sampling = {"penalty": -2, "alpha": 0.8, "temperature": 0.5, "beta": 0.1}
    loss, logits, outcome = algorithm.blockdrop_step(probs, predict, targets, cl_step=3, **sampling)
    greedy, sampled = ran
    assert torch.equal(greedy[:, 1:], (probs[:, 1:] >= 0.5).float()) and not torch.equal(greedy, sampled)
    assert greedy[:, 0].all() and sampled[:, 0].all()  # not decided yet
    baseline, _ = algorithm.get_reward(greedy @ weight, targets, greedy, -2)
    reward, match = algorithm.get_reward(sampled @ weight, targets, sampled, -2)
    for found, expected in zip((logits, *outcome), (sampled @ weight, sampled, reward, match), strict=True):
        torch.testing.assert_close(found, expected)
    explored = algorithm.explore(probs, 0.8, 0.5)
    torch.testing.assert_close(loss, algorithm.policy_loss(explored, sampled, reward - baseline, 3, beta=0.1))
    loss.backward()
    assert weight.grad is None  # the ResNet learns from the cross-entropy alone
    logits.sum().backward()
    assert weight.grad is not None


def test_a_block_that_no_image_keeps_still_decays():
    torch.manual_seed(0)
    rnet, _ = utils.build_model("R8_SYN")
    optimizer, _ = algorithm.sgd(rnet.train(), lr=0.1, steps=10)
    weight = rnet.blocks[1][0].conv1.weight
    norms = [weight.norm().item()]
    for _ in range(3):
        algorithm.depth_step(rnet, optimizer, torch.rand(4, 3, 32, 32), torch.arange(4), 0.0, "fp32", True)
        norms.append(weight.norm().item())
    assert norms == sorted(norms, reverse=True) and len(set(norms)) == 4
    assert rnet.blocks[1][0].bn1.num_batches_tracked == 0
