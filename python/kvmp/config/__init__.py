"""What a user may set, and what follows from it: parsed once into frozen dataclasses, every mistake refused by name.

Imports neither torch, numpy nor vllm.
"""

from kvmp.errors import ConfigError

from .connector import ConnectorConfig

__all__ = ["ConfigError", "ConnectorConfig"]
