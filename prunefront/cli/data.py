"""`prunefront data`: the datasets that jobs and commands may name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunefront.cli.options import AsJson
from prunefront.cli.output import print_fields, print_json, print_table, progress_bar

app = typer.Typer(help="Look at datasets, and pack them.", no_args_is_help=True)


@app.command("inspect")
def inspect(
    dataset: Annotated[str | None, typer.Argument(help="Dataset id; without it, all known ones are listed.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a dataset can be read, and show its splits, images and classes.

    PRUNEFRONT_DATA_ROOTS names the folders that hold imagefolder:NAME and lmdb:NAME, PRUNEFRONT_DATASETS a settings
    file.

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


@app.command("lmdb")
def lmdb(
    image_folder: Annotated[
        Path, typer.Argument(metavar="IMAGE_FOLDER", help="One split: a folder with one folder of images per class.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.lmdb", help="File to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.lmdb if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Pack a folder of images into one LMDB file, which reads faster than many small files on slow disks.

    The images, their order and what is held out of them stay the same. Call the files train.lmdb and val.lmdb in one
    folder below a data root, and the dataset is lmdb:FOLDER; other names go into the settings file.

    Example: prunefront data lmdb flowers/train flowers/train.lmdb
    """
    from prunefront.training.lmdb_builder import write_lmdb

    with progress_bar(f"Packing {image_folder}") as progress:
        info = write_lmdb(image_folder, out, overwrite=force, progress=progress)
    if as_json:
        print_json(info.to_dict())
        return
    print_fields(
        [
            ("file", info.path),
            ("images", info.num_images),
            ("classes", len(info.classes)),
            ("size", f"{info.size_bytes / 2**20:.1f} MiB"),
        ]
    )
