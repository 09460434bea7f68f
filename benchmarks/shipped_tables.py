"""How far off the tables in latency_tables/data are: what they predict by this version, against what was measured.

Every shipped table holds the measurements of its validation, so nothing is measured here: a version that predicts
otherwise shows at once what that does on every machine on record.

    python -m benchmarks.shipped_tables            # a line per table
    python -m benchmarks.shipped_tables --save     # also keep in the tables what they predict now
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from latency_tables.schema import LatencyTable, load_table, save_table
from latency_tables.shipped import shipped_file, shipped_tables
from latency_tables.validate import predicted_anew


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--save", action="store_true", help="write the tables with what they predict now")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    arguments = parser.parse_args()
    figures = []
    for name in shipped_tables():
        table = predicted_anew(load_table(name))
        figures.append(figures_of(name, table))
        if arguments.save:
            save_table(table, shipped_file(name))
    print(json.dumps(figures, indent=2) if arguments.json else "\n".join(map(line, figures)))
    return 0


def figures_of(name: str, table: LatencyTable) -> dict[str, Any]:
    """Of a validated table: its name and build time, and all of its validation but the points."""
    assert table.validation is not None
    return {
        "table": name,
        "build_s": table.build_s,
        **table.validation.model_dump(mode="json", exclude={"points", "device"}),
    }


def line(figures: dict[str, Any]) -> str:
    again, tau = figures["remeasured_speedup_mape"], figures["speedup_kendall_tau"]
    return (
        f"{figures['table']}: {figures['num_schedules']} schedules; speed-ups {figures['speedup_mape']:.1%} off"
        + (f" (measured again {again:.1%})" if again is not None else "")
        + f", {figures['speedup_within_5_percent']:.0%} within 5 %, {figures['speedup_within_10_percent']:.0%} within "
        f"10 %, tau {'-' if tau is None else format(tau, '.3f')}; latencies {figures['mape']:.1%} off, built in "
        f"{figures['build_s']:.0f} s"
    )


if __name__ == "__main__":
    raise SystemExit(main())
