"""
The zoo's command line with the peers, and with SAC and its like as algorithms that resume runs, for a shell in
``benchmarks/``:

    python -m peers train --algo dime --env Pendulum-v1 --conf-file peers.frame
"""

from __future__ import annotations

from rl_zoo3 import utils

from sb3_mfpo.zoo.__main__ import main

from . import PEERS, RESUMABLE

utils.ALGOS.update({**PEERS, **RESUMABLE})
main()
