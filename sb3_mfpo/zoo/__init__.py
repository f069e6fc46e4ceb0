"""rl_zoo3 with the algorithms of this package: ``python -m sb3_mfpo.zoo train --algo mfpo --env ...``."""
