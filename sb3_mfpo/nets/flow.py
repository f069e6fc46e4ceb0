"""The network of a state, a noisy action and a time interval, and the mean-flow actor on top of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_mfpo.maths.mean_flow import few_step_sample
from sb3_mfpo.nets.actor import GenerativeActor
from sb3_mfpo.nets.layers import (
    ALL_ROWS,
    JVP,
    BroadcastLinear,
    MultiInputMLP,
    differentiate,
    has_global_hooks,
    in_chunks,
    init_linear_layers,
    is_bare,
    linearize,
)


class TimeEmbedding(nn.Module):
    """
    Embedding of a time: learned Fourier features followed by a small MLP (paper, App. on implementation details).

    :param fourier_dim: Number of Fourier features, cosines and sines together (even)
    :param embedding_dim: Width of both layers of the MLP, and of its output
    :param activation_fn: Makes the activation between the two layers
    """

    # Standard deviation of the initial frequencies (authors' code)
    FREQUENCY_STD = 0.2

    phases: th.Tensor

    def __init__(self, fourier_dim: int, embedding_dim: int, activation_fn: Callable[[], nn.Module]):
        super().__init__()
        self.frequencies = nn.Parameter(self.FREQUENCY_STD * th.randn(fourier_dim // 2))
        # A cosine is a sine a quarter of a turn later
        self.register_buffer("phases", th.tensor([[math.pi / 2], [0.0]]), persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(fourier_dim, embedding_dim),
            activation_fn(),
            nn.Linear(embedding_dim, embedding_dim),
        )

    def forward(self, time: th.Tensor) -> th.Tensor:
        """
        :param time: shape (..., 1)
        :return: shape (..., embedding_dim)
        """
        return self.mlp(self.fourier_features(time))

    def fourier_features(self, time: th.Tensor) -> th.Tensor:
        """
        Cosines, then sines, of ``2 pi time * frequency``.

        :param time: Times or time differences in [0, 1], shape (..., 1)
        :return: Features in [-1, 1], shape (..., fourier_dim)
        """
        return self._angles(time).sin().flatten(-2)

    def _angles(self, time: th.Tensor) -> th.Tensor:
        # One sine for both: operators are what a single action pays for
        return th.addcmul(self.phases, time.unsqueeze(-1), self.frequencies, value=2 * math.pi)

    def linearize(self, time: th.Tensor) -> tuple[th.Tensor, JVP]:
        """
        By hand, for bare modules alone: see ``MeanFlowMLP.linearize``.

        :param time: shape (B, ..., 1)
        :return: The embedding, and the function that carries a tangent of the time to that of the embedding
        """
        angles = self._angles(time)
        output, jvp = linearize(self.mlp, angles.sin().flatten(-2))

        @th.no_grad()
        def jvp_of_time(tangent: th.Tensor, rows: slice = ALL_ROWS) -> th.Tensor:
            speed = 2 * math.pi * tangent.unsqueeze(-1) * self.frequencies
            return jvp((angles.detach()[rows].cos() * speed).flatten(-2), rows)

        return output, jvp_of_time


class MeanFlowMLP(nn.Module):
    """
    Network of a state, a noisy action and a time interval [r, t]: the mean-flow actor and the average divergence network.

    :param features_dim: Size of the state's features
    :param action_dim: Number of action coordinates
    :param output_dim: Size of the output
    :param net_arch: Widths of the hidden layers
    :param activation_fn: Makes the activations
    :param layer_norm: Whether to use LayerNorm in the hidden layers
    :param time_fourier_dim: Number of Fourier features of each of t and t - r
    :param time_embedding_dim: Size of their embeddings, which are added
    :param instantaneous: Ignore the interval's length and return the value at t, as in flow matching (an ablation)
    """

    def __init__(
        self,
        features_dim: int,
        action_dim: int,
        output_dim: int,
        net_arch: Sequence[int],
        activation_fn: Callable[[], nn.Module],
        layer_norm: bool,
        time_fourier_dim: int,
        time_embedding_dim: int,
        instantaneous: bool,
    ):
        super().__init__()
        self.instantaneous = instantaneous
        self.time_embedding = TimeEmbedding(time_fourier_dim, time_embedding_dim, activation_fn)
        self.length_embedding = TimeEmbedding(time_fourier_dim, time_embedding_dim, activation_fn)
        # The bias goes with the state's features
        self.mlp = MultiInputMLP(
            [action_dim, features_dim, time_embedding_dim], 1, output_dim, net_arch, activation_fn, layer_norm
        )
        init_linear_layers(self)

    def forward(self, features: th.Tensor, noisy_actions: th.Tensor, interval: th.Tensor) -> th.Tensor:
        """
        All leading dimensions broadcast: features of shape (B, 1, S) serve K actions each, of shape (B, K, d), and an interval
        of shape (1, E) serves them all.

        :param features: State features, shape (..., features_dim)
        :param noisy_actions: Points on the flow's path, shape (..., action_dim)
        :param interval: Embedding of the time interval, from ``embed``, shape (..., time_embedding_dim)
        :return: Average over the interval, shape (..., output_dim)
        """
        # Within `autocast` layers return fewer digits
        return self.mlp(noisy_actions, features, interval).to(noisy_actions.dtype)

    def embed(self, t: th.Tensor, h: th.Tensor) -> th.Tensor:
        """
        :param t: End of the interval in [0, 1] (t = 1 is noise, t = 0 is the action), shape (..., 1)
        :param h: Length h = t - r of the interval in [0, t], shape (..., 1)
        :return: Embedding of the interval, shape (..., time_embedding_dim)
        """
        return self.time_embedding(t) + self.length_embedding(th.zeros_like(h) if self.instantaneous else h)

    def linearize(
        self, features: th.Tensor, noisy_actions: th.Tensor, t: th.Tensor, h: th.Tensor
    ) -> tuple[th.Tensor, Callable[..., th.Tensor]]:
        """
        :param features: State features, shape (B, ..., features_dim)
        :param noisy_actions: Points on the flow's path, shape (B, ..., action_dim)
        :param t: End of the interval in [0, 1], shape (B, ..., 1)
        :param h: Length h = t - r of the interval in [0, t], shape (B, ..., 1)
        :return: What ``forward`` returns, and the function that carries tangents to that of the output, without gradient:
            ``(action_tangent, time_tangent=None, rows=slice(None))``, the time tangent being that of t and, as r is fixed, of
            h
        """
        if not self._is_bare():
            return linearize_call(self, features, noisy_actions, t, h)
        t_embedding, jvp_of_t = self.time_embedding.linearize(t)
        length_embedding, jvp_of_h = self.length_embedding.linearize(th.zeros_like(h) if self.instantaneous else h)
        output, jvp = self.mlp.linearize(noisy_actions, features, t_embedding + length_embedding)

        def jvp_all(action_tangent: th.Tensor, time_tangent: th.Tensor | None = None, rows: slice = ALL_ROWS) -> th.Tensor:
            if time_tangent is None:
                return jvp(action_tangent, None, None, rows=rows)
            embedding_tangent = jvp_of_t(time_tangent, rows)
            if not self.instantaneous:
                embedding_tangent = embedding_tangent + jvp_of_h(time_tangent, rows)
            return jvp(action_tangent, None, embedding_tangent, rows=rows)

        return output, jvp_all

    def _is_bare(self) -> bool:
        if has_global_hooks() or th.is_autocast_enabled(self.time_embedding.frequencies.device.type):
            return False
        formulas = {kind: kind.forward for kind in (MeanFlowMLP, TimeEmbedding, MultiInputMLP, BroadcastLinear, nn.Sequential)}
        return all(
            is_bare(module)
            and all(type(module).forward is forward for kind, forward in formulas.items() if isinstance(module, kind))
            for module in self.modules()
        )


class MeanFlowActor(GenerativeActor):
    """
    Average velocity u(s, a_t, r, t) of the flow that carries noise (t = 1) to actions (t = 0), and the steps along it.

    :param observation_space: Observation space
    :param action_space: Action space
    :param features_extractor: Network to extract features
    :param net_arch: Widths of the hidden layers
    :param activation_fn: Makes the activations
    :param layer_norm: Whether to use LayerNorm in the hidden layers
    :param time_fourier_dim: Number of Fourier features of each of t and t - r
    :param time_embedding_dim: Size of their embeddings, which are added
    :param sampling_steps: Number of steps T from noise to action
    :param instantaneous: Ignore the interval's length and return the velocity at t, as in flow matching (an ablation)
    :param normalize_images: Whether to divide images by 255
    """

    sampling_times: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        features_extractor: BaseFeaturesExtractor,
        net_arch: Sequence[int],
        activation_fn: Callable[[], nn.Module],
        layer_norm: bool,
        time_fourier_dim: int,
        time_embedding_dim: int,
        sampling_steps: int,
        instantaneous: bool,
        normalize_images: bool = True,
    ):
        super().__init__(observation_space, action_space, features_extractor, normalize_images)
        self.network_arguments: dict[str, Any] = dict(
            net_arch=net_arch,
            activation_fn=activation_fn,
            layer_norm=layer_norm,
            time_fourier_dim=time_fourier_dim,
            time_embedding_dim=time_embedding_dim,
            instantaneous=instantaneous,
        )
        action_dim = get_action_dim(action_space)
        self.network = MeanFlowMLP(features_extractor.features_dim, action_dim, action_dim, **self.network_arguments)
        # A buffer, so that a checkpoint restores how the actor acts whatever it was constructed with
        self.register_buffer("sampling_times", th.linspace(1, 0, sampling_steps + 1))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | self.network_arguments | dict(sampling_steps=self.sampling_steps)

    @property
    def sampling_steps(self) -> int:
        """Number of steps from noise to action; may be changed at any time, also on a trained actor."""
        return len(self.sampling_times) - 1

    @sampling_steps.setter
    def sampling_steps(self, value: int) -> None:
        self.sampling_times = th.linspace(1, 0, value + 1, device=self.sampling_times.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The number of steps is a setting: take that of the checkpoint
        if (times := state_dict.get(prefix + "sampling_times")) is not None:
            self.sampling_times = self.sampling_times.new_empty(times.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def act(self, features: th.Tensor, noise: th.Tensor) -> th.Tensor:
        intervals = embed_grid(self.network, self.sampling_times)

        def flow(features: th.Tensor, noise: th.Tensor) -> th.Tensor:
            def velocity(noisy_actions: th.Tensor, k: int) -> th.Tensor:
                return self.network(features, noisy_actions, intervals[k])

            return few_step_sample(velocity, noise, self.sampling_times)[0].clamp(-1, 1)

        return in_chunks(flow, features, noise)

    def linearize(
        self, features: th.Tensor, noisy_actions: th.Tensor, t: th.Tensor, h: th.Tensor
    ) -> tuple[th.Tensor, Callable[..., th.Tensor]]:
        """
        Average velocity over [r, t], and its derivatives with respect to a_t and t: see ``MeanFlowMLP.linearize``.

        :param features: State features, shape (B, ..., features_dim)
        :param noisy_actions: a_t, shape (B, ..., d)
        :param t: End of the interval in [0, 1], shape (..., 1)
        :param h: Its length h = t - r in [0, t], shape (..., 1)
        :return: Average velocity, shape (B, ..., d); the function that multiplies the Jacobian by tangents, without gradient
        """
        return self.network.linearize(features, noisy_actions, t, h)

    def linearize_velocity(
        self, features: th.Tensor, noisy_actions: th.Tensor, t: th.Tensor
    ) -> tuple[th.Tensor, Callable[..., th.Tensor]]:
        """
        Instantaneous velocity v(s, a_t, t) = u(s, a_t, t, t), and its Jacobian with respect to a_t.

        :param features: State features, shape (B, ..., features_dim)
        :param noisy_actions: a_t, shape (B, ..., d)
        :param t: Time in [0, 1], shape (..., 1)
        :return: d a_t / dt, shape (B, ..., d); the function that multiplies the Jacobian by vectors, shape (N, B, ..., d),
            without gradient
        """
        return self.linearize(features, noisy_actions, t, th.zeros_like(t))


def linearize_call(
    module: nn.Module, features: th.Tensor, noisy_actions: th.Tensor, t: th.Tensor, h: th.Tensor
) -> tuple[th.Tensor, Callable[..., th.Tensor]]:
    """
    ``MeanFlowMLP.linearize`` of anything that is called like one, by automatic differentiation.

    :param module: Has the ``forward`` and ``embed`` of ``MeanFlowMLP``
    :param features: State features, shape (B, ..., features_dim)
    :param noisy_actions: Points on the flow's path, shape (B, ..., action_dim)
    :param t: End of the interval in [0, 1], shape (B, ..., 1)
    :param h: Length h = t - r of the interval in [0, t], shape (B, ..., 1)
    :return: As ``MeanFlowMLP.linearize``
    """
    embed: Any = module.embed
    output, jvp_of_points = differentiate(
        lambda noisy_actions, t, h: module(features, noisy_actions, embed(t, h)), noisy_actions, t, h
    )

    def jvp_all(action_tangent: th.Tensor, time_tangent: th.Tensor | None = None, rows: slice = ALL_ROWS) -> th.Tensor:
        return jvp_of_points(action_tangent, time_tangent, time_tangent, rows=rows)

    return output, jvp_all


def embed_grid(network: nn.Module, times: th.Tensor) -> tuple[th.Tensor, ...]:
    """
    Embed all intervals of a grid at once.

    :param network: Has the ``embed`` of ``MeanFlowMLP``
    :param times: Grid from 1 (noise) down to 0 (action), shape (T + 1,)
    :return: Embeddings of the T intervals, shape (1, time_embedding_dim) each
    """
    embed: Any = network.embed
    return embed(times[:-1, None], (times[:-1] - times[1:])[:, None]).split(1)
