"""Any module of the library may be the first that is imported: models are registered while timm is being imported."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import prunefront

# One process for all, emptied of what was loaded before each: a process takes seconds to import torch.
SCRIPT = """
import sys
failed = []
for name in sys.argv[1:]:
    for loaded in [n for n in sys.modules if n.partition('.')[0] in ('prunefront', 'timm')]:
        if loaded != 'prunefront.ops.native':  # A process defines an operator once; it imports none of the others.
            del sys.modules[loaded]
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != '_AfterTimm']
    try:
        __import__(name)
    except ImportError as error:
        failed.append(f"{name}: {error}")
print("\\n".join(failed))
"""


def test_every_module_of_the_library_can_be_imported_first() -> None:
    names = [
        module.name
        for module in pkgutil.walk_packages(prunefront.__path__, "prunefront.")
        if not module.name.startswith(("prunefront.cli", "prunefront.__main__"))
    ]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
