"""rl_zoo3 with MFPO and SOM: ``python -m sb3_mfpo.zoo train --algo mfpo --env ...``."""
