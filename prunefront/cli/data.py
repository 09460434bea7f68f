"""`prunefront data`: the datasets that jobs and commands may name."""

from __future__ import annotations

from typing import Annotated

import typer

from prunefront.cli.options import AsJson
from prunefront.cli.output import print_fields, print_json, print_table

app = typer.Typer(help="Look at datasets.", no_args_is_help=True)


@app.command("inspect")
def inspect(
    dataset: Annotated[str | None, typer.Argument(help="Dataset id; without it, all known ones are listed.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a dataset can be read, and show its splits, images and classes.

    PRUNEFRONT_DATA_ROOTS names the folders that hold imagefolder:NAME, PRUNEFRONT_DATASETS a settings file.

    Example: prunefront data inspect digit-scenes
    """
    from prunefront.training.data import check_dataset, dataset_info, list_datasets

    if dataset is None:
        known = list_datasets()
        if as_json:
            print_json(list(known))
        else:
            for name in known:
                typer.echo(name)
        return
    check_dataset(dataset)
    info = dataset_info(dataset)
    if as_json:
        print_json(info.model_dump(mode="json"))
        return
    print_fields([("dataset", info.id), ("classes", info.num_classes)])
    print_table(
        ["split", "images", "made of"],
        [(name, split and split.num_images, split and split.origin) for name, split in info.splits.items()],
    )
