"""rl_zoo3 with the algorithms of this package: ``python -m sb3_mfpo.zoo train --algo mfpo --env ...``."""

from sb3_mfpo.zoo.registration import register

__all__ = ["register"]
