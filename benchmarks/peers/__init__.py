"""
Diffusion and flow policies to compare MFPO and SOM with: DIME, MaxEntDP, DACER, SAC-Flow and FlowRL. Benchmarks, not
products: written from the papers' methods onto this package's actor-critic, with what is held equal named in docs/peers.md and
every departure from the official settings in the docstring of its class.
"""

from .common import Peer
from .dacer import DACER
from .dime import DIME
from .flowrl import FlowRL
from .maxentdp import MaxEntDP
from .resumable import RESUMABLE
from .sacflow import SACFlow

# By their names in suites and on the zoo's command line
PEERS: dict[str, type[Peer]] = {"dime": DIME, "maxentdp": MaxEntDP, "dacer": DACER, "sacflow": SACFlow, "flowrl": FlowRL}

__all__ = ["DACER", "DIME", "PEERS", "RESUMABLE", "FlowRL", "MaxEntDP", "SACFlow"]
