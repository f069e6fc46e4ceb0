"""SB3's SAC with a gradient step that can be captured: what MFPO's captured step is compared with on a GPU."""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch.nn import functional as F


class CapturedSAC(SAC):
    """
    SB3's SAC with a learned temperature. Its gradient step has the same operations in the same order, but looks at no value
    and its optimizers are fused, so that ``torch.compile`` can capture it in CUDA graphs as MFPO does with its own.

    :param compile_step: Whether to compile; if not, the step is that of ``SAC.train`` in eager mode
    """

    def __init__(self, *args: Any, compile_step: bool = True, policy_kwargs: dict[str, Any] | None = None, **kwargs: Any):
        policy_kwargs = {**(policy_kwargs or {}), "optimizer_kwargs": {"fused": True}}
        super().__init__(*args, **{**kwargs, "policy_kwargs": policy_kwargs})
        assert self.log_ent_coef is not None, "the temperature must be learned"
        self.ent_coef_optimizer = th.optim.Adam([self.log_ent_coef], lr=self.lr_schedule(1), fused=True)
        self._step = th.compile(self._update, dynamic=False, mode="reduce-overhead") if compile_step else self._update

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        As SB3's.

        :param gradient_steps: Number of gradient steps
        :param batch_size: Minibatch size
        """
        self.policy.set_training_mode(True)
        optimizers = [self.actor.optimizer, self.critic.optimizer, self.ent_coef_optimizer]
        self._update_learning_rate(optimizers)  # type: ignore[arg-type]
        losses = []
        for _ in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[union-attr]
            th.compiler.cudagraph_mark_step_begin()
            # The next step may write to the same memory
            losses.append(self._step(batch).clone())
        self._n_updates += gradient_steps
        actor_loss, critic_loss = th.stack(losses).mean(0).tolist()
        self.logger.record("train/actor_loss", actor_loss)
        self.logger.record("train/critic_loss", critic_loss)

    def _sample(self, observations: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param observations: Shape (B, observation size)
        :return: Actions within [-1, 1], shape (B, d), and their log-probabilities, shape (B, 1)
        """
        mean, log_std, _ = self.actor.get_action_dist_params(observations)
        noise = th.randn_like(mean)
        actions = th.tanh(mean + log_std.exp() * noise)
        log_prob = th.distributions.Normal(0.0, 1.0, validate_args=False).log_prob(noise) - log_std
        return actions, (log_prob - th.log(1 - actions**2 + 1e-6)).sum(1, keepdim=True)

    def _update(self, batch: ReplayBufferSamples) -> th.Tensor:
        """
        :param batch: Sample of a replay buffer
        :return: Losses of actor and critic, shape (2,)
        """
        assert self.log_ent_coef is not None
        actions, log_prob = self._sample(batch.observations)
        ent_coef = self.log_ent_coef.detach().exp()
        self._learn_ent_coef(log_prob.detach())

        with th.no_grad():
            next_actions, next_log_prob = self._sample(batch.next_observations)
            next_values = th.cat(self.critic_target(batch.next_observations, next_actions), dim=1).amin(1, keepdim=True)
            target = batch.rewards + (1 - batch.dones) * self.gamma * (next_values - ent_coef * next_log_prob)
        values = self.critic(batch.observations, batch.actions)
        critic_loss = 0.5 * th.stack([F.mse_loss(one, target) for one in values]).sum()
        self._descend(critic_loss, self.critic.optimizer)

        values = th.cat(self.critic(batch.observations, actions), dim=1).amin(1, keepdim=True)
        actor_loss = (ent_coef * log_prob - values).mean()
        self._descend(actor_loss, self.actor.optimizer)
        with th.no_grad():
            th._foreach_lerp_(list(self.critic_target.parameters()), list(self.critic.parameters()), self.tau)
        return th.stack([actor_loss.detach(), critic_loss.detach()])

    @th.compiler.disable
    def _learn_ent_coef(self, log_prob: th.Tensor) -> None:
        # Within the compiled code, this loss and the actor's would share one backward pass
        assert self.log_ent_coef is not None and self.ent_coef_optimizer is not None
        loss = -(self.log_ent_coef * (log_prob + float(self.target_entropy))).mean()
        self._descend(loss, self.ent_coef_optimizer)

    @th.compiler.disable
    def _descend(self, loss: th.Tensor, optimizer: th.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
