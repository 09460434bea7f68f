"""`prunefront devices`: what this machine can measure on."""

from __future__ import annotations

from prunefront.cli.options import AsJson
from prunefront.cli.output import print_json, print_table


def devices(as_json: AsJson = False) -> None:
    """List the devices of this machine, with the fingerprint that latency tables are looked up by.

    Example: prunefront devices --json
    """
    from latency_tables.device import local_devices

    found = local_devices()
    if as_json:
        print_json(
            [
                {"id": name, "fingerprint": info.fingerprint(), **info.model_dump(mode="json")}
                for name, info in found.items()
            ]
        )
        return
    rows = [(name, info.name, info.threads, info.memory_gib, info.fingerprint()) for name, info in found.items()]
    print_table(["device", "name", "threads", "GiB", "fingerprint"], rows)
