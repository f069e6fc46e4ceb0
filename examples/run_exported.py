"""
An episode with a policy that ``model.policy.export("policy.onnx")`` wrote. It needs neither PyTorch nor this package.

    python examples/run_exported.py policy.onnx Pendulum-v1
"""

import sys

import gymnasium as gym
import onnxruntime

policy, env = onnxruntime.InferenceSession(sys.argv[1]), gym.make(sys.argv[2])
observation, _ = env.reset(seed=0)
ended, episode_return = False, 0.0
while not ended:
    (actions,) = policy.run(["action"], {"observation": observation[None]})
    observation, reward, terminated, truncated, _ = env.step(actions[0])
    ended, episode_return = terminated or truncated, episode_return + float(reward)
print(f"Return of the episode: {episode_return:.2f}")
