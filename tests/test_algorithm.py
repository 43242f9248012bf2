"""The algorithm as it stands in blockdrop_training.ipynb, against slow and direct formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


def test_reward_is_one_minus_squared_use_or_the_penalty(algorithm):
    logits = torch.eye(3)  # predicts 0, 1, 2
    targets = torch.tensor([0, 1, 0])
    policy = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).float()
    reward, match = algorithm.get_reward(logits, targets, policy, penalty=-5)
    assert reward.tolist() == [0, 1 - (1 / 4) ** 2, -5]
    assert match.tolist() == [1, 1, 0]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(2, 7), st.floats(-100, -0.01), st.integers(0, 999))
def test_reward_is_the_slow_formula(algorithm, n, num_blocks, num_classes, penalty, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, num_classes, generator=generator)
    targets = torch.randint(num_classes, (n,), generator=generator)
    policy = torch.randint(2, (n, num_blocks), generator=generator).float()
    rewards, matches = algorithm.get_reward(logits, targets, policy, penalty)
    for scores, target, kept, reward, match in zip(logits, targets, policy, rewards, matches, strict=True):
        right = max(range(num_classes), key=lambda c: scores[c]) == target
        expected = 1 - (sum(kept.tolist()) / num_blocks) ** 2 if right else penalty
        assert match == right and reward.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_exploration_bounds_probabilities(algorithm):
    explored = algorithm.explore(torch.tensor([0.0, 0.25, 0.5, 1.0]), alpha=0.8)
    torch.testing.assert_close(explored, torch.tensor([0.2, 0.35, 0.5, 0.8]))


@pytest.mark.parametrize("temperature", [0.02, 0.1, 0.5, 1])
def test_temperature_divides_the_logits(algorithm, temperature):
    logits = torch.tensor([-9.0, -0.5, 0, 0.1, 20], requires_grad=True)
    explored = algorithm.explore(torch.sigmoid(logits), 0.99, temperature)
    expected = 0.01 + 0.98 * torch.sigmoid(logits / temperature)
    torch.testing.assert_close(explored, expected, atol=1e-5, rtol=1e-4)
    explored.sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[2] > 0


def test_sampled_policies_follow_their_probabilities(algorithm):
    torch.manual_seed(0)
    sampled = algorithm.sample(torch.tensor([0.0, 0.3, 1.0]).expand(20000, 3))
    assert sampled.unique().tolist() == [0, 1]
    torch.testing.assert_close(sampled.mean(0), torch.tensor([0.0, 0.3, 1.0]), atol=0.015, rtol=0)


def test_curriculum_decides_one_more_block_each_epoch(algorithm):
    assert [algorithm.curriculum(epoch) for epoch in range(6)] == [1, 2, 3, 4, 4, 4]


def test_curriculum_keeps_the_first_blocks(algorithm):
    policy = torch.zeros(2, 4)
    assert algorithm.keep_first(policy, 1).tolist() == [[1, 1, 1, 0]] * 2
    assert algorithm.keep_first(policy, 4).tolist() == [[0, 0, 0, 0]] * 2
    assert not policy.any()  # the policy given is left alone


@pytest.mark.parametrize("cl_step", [1, 3, 4])
def test_policy_loss_is_the_formula(algorithm, cl_step):
    torch.manual_seed(0)
    explored = algorithm.explore(torch.rand(5, 4), alpha=0.8)
    sampled = torch.bernoulli(explored)
    advantage = torch.randn(5)
    expected = 0
    for i in range(5):
        for k in range(4 - cl_step, 4):
            p = explored[i, k].item()
            chosen = p if sampled[i, k] else 1 - p
            expected += -math.log(chosen) * advantage[i].item() + 0.1 * p * math.log(p)
    loss = algorithm.policy_loss(explored, sampled, advantage, cl_step, beta=0.1)
    assert loss.item() == pytest.approx(expected / 5, rel=1e-5)


def test_forced_blocks_get_no_gradient(algorithm):
    explored = torch.full((2, 4), 0.4, requires_grad=True)
    algorithm.policy_loss(explored, torch.ones(2, 4), torch.ones(2), 2, beta=0.1).backward()
    assert not explored.grad[:, :2].any() and explored.grad[:, 2:].all()


def test_gradient_follows_the_reward(algorithm):
    """A sampled policy better than the greedy one becomes more likely."""
    logits = torch.zeros(1, 4, requires_grad=True)
    sampled = torch.tensor([[1.0, 0, 1, 0]])
    explored = algorithm.explore(torch.sigmoid(logits), alpha=0.8)
    algorithm.policy_loss(explored, sampled, torch.tensor([0.5]), 4, beta=0).backward()
    assert (-logits.grad).sign().tolist() == [[1, -1, 1, -1]]
