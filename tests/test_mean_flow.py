"""Time pairs, the MeanFlow identity and the sampler against closed forms."""

import math
from typing import Any

import pytest
import torch as th
from scipy import stats

from sb3_mfpo.maths import mean_flow, paths
from sb3_mfpo.maths.paths import linear_path

B, D = 64, 3


def gaussian_velocity(actions: th.Tensor, t: th.Tensor, mean: float, std: float) -> th.Tensor:
    """
    Velocity of the linear path when the actions are N(mean, std^2): a_t is N((1 - t) mean, (1 - t)^2 std^2 + t^2), and
    E[eps - a_0 | a_t] follows from the joint Gaussian.
    """
    variance = (1 - t) ** 2 * std**2 + t**2
    return -mean + (t - (1 - t) * std**2) / variance * (actions - (1 - t) * mean)


def gaussian_average_velocity(actions: th.Tensor, t: th.Tensor, length: th.Tensor, mean: float, std: float) -> th.Tensor:
    """The flow keeps the standardised position, which gives the average velocity in closed form."""
    r = t - length

    def scale(time: th.Tensor) -> th.Tensor:
        return ((1 - time) ** 2 * std**2 + time**2).sqrt()

    start = (1 - r) * mean + scale(r) / scale(t) * (actions - (1 - t) * mean)
    return (actions - start) / length


def gaussian_flow(actions: th.Tensor, t: th.Tensor, length: th.Tensor) -> th.Tensor:
    return gaussian_average_velocity(actions, t, length, mean=0.3, std=0.2)


def gaussian_average_divergence(actions: th.Tensor, t: th.Tensor, length: th.Tensor) -> th.Tensor:
    """Divergence of a linear field is d times its slope; its time average is a difference of log scales."""
    r = t - length
    log_scale = [0.5 * ((1 - time) ** 2 * 0.2**2 + time**2).log() for time in (t, r)]
    return (actions.shape[-1] * (log_scale[0] - log_scale[1]) / length).expand(*actions.shape[:-1], 1)


def on_grid(average: Any, times: th.Tensor) -> Any:
    return lambda actions, k: average(actions, times[k], times[k] - times[k + 1])


def test_times_of_a_wide_distribution_stay_between_the_ends() -> None:
    """Where the logistic function rounds to 0 or 1."""
    normal = th.tensor([[30.0, -30.0], [30.0, 29.0], [-200.0, -200.0]])
    t, r = mean_flow.logit_normal_times(normal, 0.0, 4.0, n_equal=0)
    assert th.allclose(t, th.tensor([[0.999], [0.999], [0.001]])) and th.allclose(r, th.tensor([[0.001], [0.999], [0.001]]))


def test_uniform_times_are_ordered_and_uniform() -> None:
    uniform = th.rand(20_000, 2, generator=th.Generator().manual_seed(0))
    t, r = mean_flow.uniform_times(uniform, n_equal=5_000)
    assert t.shape == r.shape == (20_000, 1)
    assert (t[:5_000] == r[:5_000]).all() and (r[5_000:] < t[5_000:]).all() and (r >= 0).all()
    assert stats.kstest(t[:, 0].numpy(), stats.uniform(0.001, 0.998).cdf).pvalue > 1e-3
    assert stats.kstest((r / t)[5_000:, 0].numpy(), "uniform").pvalue > 1e-3
    extremes, _ = mean_flow.uniform_times(th.tensor([[0.0, 0.5], [1 - 1e-7, 0.5]]), n_equal=0)
    assert extremes.flatten().tolist() == pytest.approx([0.001, 0.999])


def test_adaptive_weights_are_those_computed_by_hand() -> None:
    """By hand: ||(0.3, 0.4)||^2 = 0.25; no gradient flows through them."""
    errors = th.tensor([[0.3, 0.4], [0.0, 0.0]], requires_grad=True)
    weights = mean_flow.adaptive_weights(errors, offset=0.25)
    assert weights.flatten().tolist() == pytest.approx([2.0, 4.0])
    assert not weights.requires_grad
    assert mean_flow.adaptive_weights(errors).flatten().tolist() == pytest.approx([1 / 0.251, 1000.0])


def test_times_are_ordered_logit_normal_pairs() -> None:
    generator = th.Generator().manual_seed(0)
    normal = th.randn(20_000, 2, generator=generator)
    t, r = mean_flow.logit_normal_times(normal, mean=-0.4, std=1.0, n_equal=5_000)
    assert t.shape == r.shape == (20_000, 1)
    assert (t[:5_000] == r[:5_000]).all()
    assert (r[5_000:] < t[5_000:]).all()
    # Undo the logit-normal: larger and smaller of two normals
    assert th.allclose(th.logit(t), normal.amax(1, keepdim=True) - 0.4, atol=1e-4)
    assert th.allclose(th.logit(r[5_000:]), normal[5_000:].amin(1, keepdim=True) - 0.4, atol=1e-4)


def test_all_rows_may_have_equal_times() -> None:
    t, r = mean_flow.logit_normal_times(th.randn(8, 2), 0.0, 1.0, n_equal=8)
    assert (t == r).all()


def test_path_ends_at_action_and_noise() -> None:
    actions, noise = th.randn(B, D), th.randn(B, D)
    assert th.equal(paths.interpolate(actions, noise, *linear_path(th.zeros(B, 1))), actions)
    assert th.equal(paths.interpolate(actions, noise, *linear_path(th.ones(B, 1))), noise)


def gaussian_divergence(actions: th.Tensor, t: th.Tensor) -> th.Tensor:
    """The velocity is linear in the action: d times its slope."""
    return D * (t - (1 - t) * 0.2**2) / ((1 - t) ** 2 * 0.2**2 + t**2)


@pytest.mark.parametrize(
    "average, instantaneous",
    [
        (gaussian_flow, lambda actions, t: gaussian_velocity(actions, t, mean=0.3, std=0.2)),
        (gaussian_average_divergence, gaussian_divergence),
    ],
    ids=["velocity", "divergence"],
)
def test_the_true_averages_of_a_gaussian_satisfy_the_mean_flow_identity(average: Any, instantaneous: Any) -> None:
    """With the true average as network, the regression target is the network itself."""
    generator = th.Generator().manual_seed(0)
    t = 0.05 + 0.9 * th.rand(B, 1, generator=generator, dtype=th.float64)
    r = t * (0.1 + 0.8 * th.rand(B, 1, generator=generator, dtype=th.float64))
    actions = th.randn(B, D, generator=generator, dtype=th.float64)
    velocity = gaussian_velocity(actions, t, mean=0.3, std=0.2)
    one = th.ones_like(t)
    value, derivative = th.func.jvp(average, (actions, t, t - r), (velocity, one, one))
    target = mean_flow.mean_flow_target(instantaneous(actions, t), t - r, derivative)
    assert th.allclose(target, value, atol=1e-9)


def test_rows_without_a_derivative_have_the_instantaneous_value() -> None:
    instantaneous, length, derivative = th.randn(B, D), th.rand(B, 1), th.randn(B, D)
    full = mean_flow.mean_flow_target(instantaneous, length, derivative)
    assert th.equal(full, instantaneous - length * derivative)
    for n_equal in (1, B // 2, B):
        target = mean_flow.mean_flow_target(instantaneous, length, derivative[n_equal:])
        assert th.equal(target[:n_equal], instantaneous[:n_equal])
        assert th.equal(target[n_equal:], full[n_equal:])


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_few_steps_of_the_true_average_velocity_are_exact(steps: int) -> None:
    """Any number of steps carries N(0, I) to N(0.3, 0.2^2), with the right log-density."""
    noise = th.randn(5_000, D, generator=th.Generator().manual_seed(0), dtype=th.float64)
    times = th.linspace(1, 0, steps + 1, dtype=th.float64)
    actions, log_prob = mean_flow.few_step_sample(
        on_grid(gaussian_flow, times), noise, times, on_grid(gaussian_average_divergence, times)
    )
    assert th.allclose(actions, 0.3 + 0.2 * noise, atol=1e-9)
    expected = th.as_tensor(stats.norm(0.3, 0.2).logpdf(actions.numpy())).sum(-1)
    assert th.allclose(log_prob, expected, atol=1e-9)


def test_the_density_is_followed_only_with_a_divergence() -> None:
    noise, times = th.randn(B, D), th.linspace(1, 0, 3)
    velocity = on_grid(gaussian_flow, times)
    actions, log_prob = mean_flow.few_step_sample(velocity, noise, times)
    assert log_prob is None
    with_density = mean_flow.few_step_sample(velocity, noise, times, lambda actions, k: th.zeros(B, 1))
    assert th.equal(with_density[0], actions)
    assert th.allclose(with_density[1], th.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1), atol=1e-5)
    assert math.isclose(
        mean_flow.standard_normal_log_prob(th.zeros(1, 2)).item(),
        stats.multivariate_normal([0, 0]).logpdf([0, 0]),
        rel_tol=1e-6,
    )
