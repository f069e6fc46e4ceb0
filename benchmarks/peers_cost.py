"""
What MFPO and its peers cost, with two layers of 256: a gradient step, a step of ``learn`` with its environment, and an action,
sampled or chosen (``deterministic``), at batches of 1 and 64. Everything takes turns within one process, so that other load on
the machine meets all alike. Beside the milliseconds stand passes and chain by the model of docs/peers.md, which do not depend
on a machine.

With ``--compiled`` gradient steps and ``learn`` alone, every step compiled, which on a CUDA device also captures it.

    OMP_NUM_THREADS=1 python benchmarks/peers_cost.py
    python benchmarks/peers_cost.py --device cuda --compiled --output benchmarks/results/gpu/peers_cost_compiled.csv
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch as th
from captured_sac import CapturedSAC
from machine import processor, versions
from peers import DACER, DIME, FlowRL, MaxEntDP, SACFlow
from run import RESULTS, commit
from speed import BATCH_SIZE, STEPS, Rows, compare
from stable_baselines3 import SAC
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_mfpo import MFPO


class Kind(NamedTuple):
    """
    An algorithm, passes and chain of its gradient step, steps of its sampler, and passes that a state takes beside them.
    """

    algorithm: type[OffPolicyAlgorithm]
    settings: dict[str, Any]
    passes: float
    chain: float
    sampling_steps: int
    state_passes: int = 0


KINDS = {
    "SAC": Kind(SAC, {}, 16, 8, 1),
    # At every eighth step the policy learns: 4 (sample, divergence) + 12 (centres) + 24 (values) + 3 (actor) + 6 (divergence)
    "MFPO": Kind(MFPO, {}, 12 + 49 / 8, 5 + 11 / 8, 2),
    "MFPO, paper": Kind(MFPO, MFPO.PAPER, 181, 16, 2),
    "DIME": Kind(DIME, {}, 76, 53, 16),
    "MaxEntDP": Kind(MaxEntDP, {}, 2031, 27, 20),
    "MaxEntDP, MFPO's budget": Kind(MaxEntDP, dict(n_samples=48, n_entropy_draws=2), 167, 27, 20),
    "DACER": Kind(DACER, {}, 92, 65, 20),
    # The noise of all steps is that of a network of the state
    "SAC-Flow (Flow-G)": Kind(SACFlow, {}, 32, 17, 4, state_passes=1),
    # One midpoint step of two evaluations
    "FlowRL": Kind(FlowRL, {}, 37, 17, 2),
}


def model_costs(name: str, what: str) -> tuple[float, float]:
    """
    :param name: One of ``KINDS``
    :param what: What is timed
    :return: Its passes for one state, and its chain, without the environment. A choice is made by two critics among ten; SAC's
        is its mean.
    """
    kind = KINDS[name]
    if what == "gradient step":
        return kind.passes, kind.chain
    if what == "learn":
        return kind.passes, kind.chain + kind.sampling_steps
    if what == "chosen action" and name != "SAC":
        return 10 * kind.sampling_steps + kind.state_passes + 20, kind.sampling_steps + 1
    return kind.sampling_steps + kind.state_passes, kind.sampling_steps


def make_models(
    names: Sequence[str], env: str, width: int, batch_size: int, device: str, compiled: bool
) -> dict[str, OffPolicyAlgorithm]:
    """These algorithms, their buffers filled with 300 random steps, and their gradient steps compiled if they are to be."""
    common: dict[str, Any] = dict(learning_starts=300, buffer_size=10_000, batch_size=batch_size, device=device)
    if compiled:
        common["compile_step"] = True
    models = {}
    for name in names:
        kind = KINDS[name]
        algorithm = CapturedSAC if compiled and name == "SAC" else kind.algorithm
        policy_kwargs = {**kind.settings.get("policy_kwargs", {}), "net_arch": [width] * 2}
        models[name] = algorithm("MlpPolicy", env, **{**common, **kind.settings, "policy_kwargs": policy_kwargs})
        models[name].learn(300)
        start = time.perf_counter()
        models[name].train(STEPS, batch_size)
        print(f"{name}: its first {STEPS} gradient steps take {time.perf_counter() - start:.1f} s", flush=True)
    return models


def measure(
    models: dict[str, OffPolicyAlgorithm], rounds: int, batch_size: int, device: str, acting: bool
) -> dict[tuple[str, int], Rows]:
    """
    :param models: From ``make_models``
    :param rounds: That are measured
    :param batch_size: Of the gradient steps
    :param device: Of the models
    :param acting: Whether to time actions, too
    :return: By what is timed and the batch's size: milliseconds and ratios of every algorithm
    """
    # Several at a time: MFPO learns its policy at every eighth
    steps = {name: partial(model.train, STEPS, batch_size) for name, model in models.items()}
    loops = {name: partial(model.learn, STEPS, reset_num_timesteps=False) for name, model in models.items()}
    results = {("gradient step", batch_size): compare(steps, rounds, ("MFPO",), device)}
    results["learn", batch_size] = compare(loops, rounds, ("MFPO",), device)
    for rows in results.values():
        for row in rows.values():
            row["milliseconds"] /= STEPS
    if not acting:
        return results
    space = models["MFPO"].observation_space
    for batch, repeats in ((1, 10), (64, 1)):
        observations = space.sample() if batch == 1 else np.stack([space.sample() for _ in range(batch)])
        functions = {
            (name, what): partial(model.predict, observations, deterministic=what == "chosen action")
            for name, model in models.items()
            for what in ("sample", "chosen action")
        }
        by_label = {f"{name}: {what}": function for (name, what), function in functions.items()}
        # MFPO's choice is also told in samples of others
        references = ("MFPO: sample", "MFPO: chosen action")
        rows = compare(by_label, rounds, references, "cpu", repeats)
        for what in ("sample", "chosen action"):
            results[what, batch] = {name: rows[f"{name}: {what}"] for name in models}
    return results


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v5", help="Gymnasium id (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=12, help="that are measured (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--algorithms", nargs="+", default=list(KINDS), choices=list(KINDS), help="MFPO among them (default: all)"
    )
    parser.add_argument("--compiled", action="store_true", help="compile the gradient steps; actions are not timed")
    parser.add_argument("--quick", action="store_true", help="small networks and batches, one round: shows that it works")
    parser.add_argument("--output", type=Path, default=RESULTS / "peers_cost.csv", help="CSV file (default: %(default)s)")
    options = parser.parse_args(arguments)
    if "MFPO" not in options.algorithms:
        parser.error(f"`--algorithms` must have MFPO, whose time the ratios are to, not only {options.algorithms}")
    th.set_num_threads(1)
    rounds, width, batch_size = (1, 16, 8) if options.quick else (options.rounds, 256, BATCH_SIZE)
    # The paper's range does not fit the first steps of any task
    warnings.filterwarnings("ignore", message=".*of the value targets' mass lies outside")
    models = make_models(options.algorithms, options.env, width, batch_size, options.device, options.compiled)
    results = measure(models, rounds, batch_size, options.device, acting=not options.compiled)
    table = pd.DataFrame(
        [
            dict(env=options.env, what=what, batch=batch, algorithm=name, milliseconds=row["milliseconds"])
            | dict(zip(("passes", "chain"), model_costs(name, what), strict=True))
            | {key: value for key, value in row.items() if key.startswith("ratio")}
            for (what, batch), rows in results.items()
            for name, row in rows.items()
        ]
    )
    gpu = th.cuda.get_device_name() if options.device == "cuda" else None
    table = table.assign(
        rounds=rounds,
        hardware=gpu or f"1 thread of {processor()}",
        versions=", ".join(f"{name} {number}" for name, number in versions().items()),
        command=" ".join(["python", "benchmarks/peers_cost.py", *(sys.argv[1:] if arguments is None else arguments)]),
        commit=commit(),
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(options.output, index=False)
    print(table.drop(columns=["env", "hardware", "versions", "command", "commit", "rounds"]).round(3).to_string(index=False))
    return table


if __name__ == "__main__":
    main()
