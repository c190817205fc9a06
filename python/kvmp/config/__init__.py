"""What a user may set, and what follows from it: parsed once into frozen dataclasses, every mistake refused by name.

Imports neither torch, numpy nor vllm.
"""

from kvmp.errors import ConfigError

from .connector import ConnectorConfig
from .offloading import OffloadingConfig
from .transfer import KVTransferConfig
from .translation import translate

__all__ = ["ConfigError", "ConnectorConfig", "KVTransferConfig", "OffloadingConfig", "translate"]
