"""Shorter waits between attempts in the processes of a chaos run: Python imports this at start where it is on the path.

Only where CHAOS_SHORT_WAITS is set, and only the constants of cnn_ray.storage_retry; the product knows nothing of it.
"""

import importlib.abc
import importlib.machinery
import os
import sys

TARGET = "cnn_ray.storage_retry"
SHORT_WAITS = {"BACKOFF_BASE_S": 0.01, "BACKOFF_MAX_S": 0.1, "RETRY_TOTAL_S": 5.0}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != TARGET:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            for constant, value in SHORT_WAITS.items():
                setattr(module, constant, value)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("CHAOS_SHORT_WAITS"):
    sys.meta_path.insert(0, _Finder())
