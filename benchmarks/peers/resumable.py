"""
Algorithms of SB3 and sb3-contrib with runs that are saved and resumed as MFPO's are; their gradient steps are untouched. An
interrupted suite would begin them anew otherwise.
"""

from __future__ import annotations

from sb3_contrib import TQC, CrossQ
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_mfpo.runs.algorithm import ResumableAlgorithm


def resumable(algorithm: type[OffPolicyAlgorithm]) -> type[ResumableAlgorithm]:
    """
    :param algorithm: An algorithm
    :return: The same, saved by ``RunCheckpointCallback`` and with ``resume``, under the same name
    """
    return type(algorithm.__name__, (ResumableAlgorithm, algorithm), {"__doc__": algorithm.__doc__})


# By their names in the zoo, whose hyperparameters they take
RESUMABLE: dict[str, type[ResumableAlgorithm]] = {
    "sac": resumable(SAC),
    "td3": resumable(TD3),
    "tqc": resumable(TQC),
    "crossq": resumable(CrossQ),
}
