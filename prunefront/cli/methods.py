"""`prunefront methods`: the token-reduction methods and what each can do."""

from __future__ import annotations

from prunefront.cli.options import AsJson
from prunefront.cli.output import print_json, print_table


def methods(as_json: AsJson = False) -> None:
    """List the methods: operations, options with their defaults, paper.

    Example: prunefront methods
    """
    from prunefront.registry import get_method, list_methods

    known = [get_method(name) for name in list_methods()]
    if as_json:
        print_json(
            [
                {
                    "name": method.name,
                    "title": method.title,
                    "paper": method.paper,
                    "ops": list(method.ops),
                    "options": method.parse_options({}),
                    "needs_class_token_for": list(method.ranking_ops),
                    "needs_training": method.needs_training,
                }
                for method in known
            ]
        )
        return
    rows = [
        (
            method.name,
            ", ".join(method.ops),
            ", ".join(f"{name}={value}" for name, value in method.parse_options({}).items()) or None,
            "train" if method.needs_training else "off the shelf",
            method.paper,
        )
        for method in known
    ]
    print_table(["method", "operations", "options", "use", "paper"], rows)
