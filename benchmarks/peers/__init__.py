"""
Multi-step diffusion policies to compare MFPO and SOM with: DIME, MaxEntDP and DACER. Benchmarks, not products: written from
the papers' methods onto this package's actor-critic, with what is held equal named in docs/peers.md and every departure from
the official settings in the docstring of its class.
"""

from .common import Peer
from .dacer import DACER
from .dime import DIME
from .maxentdp import MaxEntDP
from .resumable import RESUMABLE

# By their names in suites and on the zoo's command line
PEERS: dict[str, type[Peer]] = {"dime": DIME, "maxentdp": MaxEntDP, "dacer": DACER}

__all__ = ["DACER", "DIME", "PEERS", "RESUMABLE", "MaxEntDP"]
