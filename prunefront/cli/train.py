"""`prunefront train`: from a config to trained weights, on one device or many."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast
from urllib.parse import parse_qsl

import typer

from prunefront.cli.options import AsJson, Checkpoint, Sha256, weights_file
from prunefront.cli.output import (
    JobFailedError,
    note,
    print_fields,
    print_json,
    progress_bar,
)
from prunefront.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from prunefront.config import ModelSpec, PruneConfig
    from prunefront.training.data import OnCorrupt
    from prunefront.training.distributed import World
    from prunefront.training.evaluate import DType
    from prunefront.training.outcome import Verdict
    from prunefront.training.recipes import Recipe

CHECKPOINT_EVERY_STEPS = 500
# Ctrl-C under torchrun reaches a process twice: from the terminal, and passed on.
SECOND_SIGNAL_S = 2.0
RESULT_NAME, CONFIG_NAME, RECIPE_NAME, START_NAME = "result.json", "config.json", "recipe.json", "start.safetensors"
# What this command's options are called elsewhere, with dashes or underscores.
CONTEXT_SETTINGS = {"token_normalize_func": lambda name: name.replace("_", "-")}

_JOB_URL = re.compile(r"(?P<service>https?://.+?)/api/v1/jobs/(?P<job>[^/?#]+)(?:/best)?/?(?:\?(?P<limits>[^#]*))?")
_LIMITS: dict[str, Any] = {
    "max_latency_ms": float,
    "min_top1": float,
    "min_speedup": float,
    "fidelity": str,
    "device": str,
}


def train(
    config: Annotated[
        str, typer.Option(metavar="FILE|URL", help="Config (JSON or YAML), or a job: http://HOST/api/v1/jobs/ID.")
    ],
    dataset: Annotated[str, typer.Option(help="Dataset id; see prunefront data inspect.")],
    out: Annotated[Path, typer.Option(help="Folder of this training; a training that was left there goes on.")],
    recipe: Annotated[
        str | None, typer.Option(help="Name of a recipe; the method's, or the dataset's own, when left out.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the train split; the recipe's.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Replace a value of the recipe; may be repeated."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per pass of each process; the recipe's.")
    ] = None,
    accumulate: Annotated[int | None, typer.Option(min=1, help="Batches that make one step; the recipe's.")] = None,
    amp: Annotated[
        Literal["off", "bf16", "fp16"] | None, typer.Option(help="Autocast; the recipe's on a GPU, off on a CPU.")
    ] = None,
    pretrained: Annotated[
        bool | None, typer.Option("--pretrained/--scratch", help="Start from timm's weights, or from random ones.")
    ] = None,
    checkpoint: Checkpoint = None,
    sha256: Sha256 = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="timm model to learn from, instead of the dense one.")
    ] = None,
    teacher_checkpoint: Annotated[
        str | None,
        typer.Option(metavar="FILE|URL", help="Weights of the teacher; timm's pretrained ones when left out."),
    ] = None,
    teacher_sha256: Annotated[
        str | None, typer.Option(metavar="HEX", help="SHA-256 of the teacher's weights at an https address.")
    ] = None,
    device: Annotated[str | None, typer.Option(help='"cpu", "cuda" or "cuda:1"; a GPU where there is one.')] = None,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that load images, per training process.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of order, augmentation and random weights.")] = 0,
    checkpoint_every_steps: Annotated[
        int, typer.Option(min=1, help="A killed training loses no more steps than these.")
    ] = CHECKPOINT_EVERY_STEPS,
    test: Annotated[
        bool, typer.Option("--test/--no-test", help="Evaluate the final weights on the test split, once.")
    ] = True,
    table: Annotated[
        Path | None,
        typer.Option(
            help="Latency table (JSON, or shipped:NAME): the recipe diffrate aims at a share of its latency instead of "
            "MACs; dynamicvit and spvit get keep ratios that meet a limit."
        ),
    ] = None,
    max_latency_ms: Annotated[
        float | None,
        typer.Option(min=0.0, help="With --table, for dynamicvit and spvit: the limit, per pass of the table's batch."),
    ] = None,
    latency_share: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="The same limit as a share of the dense model's latency, such as 0.7."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse images that cannot be decoded instead of leaving them out.")
    ] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a config's model with the recipe of its method; --out gets the weights, with config and accuracy inside.

    Stop it with Ctrl-C or SIGTERM, or lose it: the same command goes on where it was. Under torchrun, several processes
    train together.

    Example: prunefront train --config best.json --dataset digit-scenes --out run --epochs 2 --set lr=5e-5
    """
    from prunefront.compress import compress
    from prunefront.files import require_writable
    from prunefront.training.checkpoints import CHECKPOINT_NAME
    from prunefront.training.data import check_dataset
    from prunefront.training.distributed import joined
    from prunefront.training.outcome import without_accuracy
    from prunefront.training.schedules import merged_config

    if checkpoint is not None and pretrained is not None:
        raise ConfigError("Training starts from one thing: give --checkpoint, --pretrained or --scratch.")
    place = _place(device)
    check_dataset(dataset, needs_train=True)
    require_writable(out / CHECKPOINT_NAME)
    own = _own_values(changes, batch_size=batch_size, accumulate=accumulate, amp=amp)
    with joined(place) as world:
        document, job_weights = _read_config(config, out, world)
        name, chosen = _choose_recipe(recipe, document, dataset, epochs, own)
        document = _within_limit(document, chosen, table, max_latency_ms, latency_share, world)
        chosen_dtype: DType = _DTYPES[chosen.amp] if place.type == "cuda" or "amp" in own else "fp32"
        weights = weights_file(checkpoint, sha256, world=world)
        guide_weights = weights_file(teacher_checkpoint, teacher_sha256, hash_option="--teacher-sha256", world=world)
        start = _start(document, config, weights, pretrained, job_weights, chosen)
        with progress_bar(f"Loading {document.model.name}", shown=world.is_main):
            model, guide = _models(document, start, seed, chosen, teacher, guide_weights)
        run = _Training(
            model=model,
            teacher=guide,
            dataset=dataset,
            out=out,
            recipe=chosen,
            recipe_name=name,
            place=place,
            dtype=chosen_dtype,
            num_workers=num_workers,
            seed=seed,
            world=world,
            on_corrupt="refuse" if strict else "skip",
        )
        if chosen.rates is not None:
            run.model = _learner(model, document, chosen, table)
        history = run.train(checkpoint_every_steps, tensorboard)
        if chosen.rates is not None:
            run.model = cast(Any, run.model).compressed()
        if chosen.phases is not None:
            run.model = compress(run.model, without_accuracy(merged_config(document, chosen.phases.merge_within)))
        if world.is_main:
            run.save()  # before the test, which may be interrupted
        verdict = run.test() if test else None
        if world.is_main:
            run.report(history, verdict, as_json)


_DTYPES: dict[str, DType] = {"off": "fp32", "bf16": "bf16", "fp16": "fp16"}


@dataclass(kw_only=True)
class _Training:
    """One training of the command, from a built model to its report."""

    model: nn.Module
    teacher: nn.Module | None
    dataset: str
    out: Path
    recipe: Recipe
    recipe_name: str
    place: torch.device
    dtype: DType
    num_workers: int
    seed: int
    world: World
    on_corrupt: OnCorrupt

    def train(self, checkpoint_every_steps: int, tensorboard: bool) -> tuple[dict[str, float], ...]:
        """Run the loop; a signal ends it with a checkpoint."""
        from prunefront.training.errors import DivergedError, StoppedError
        from prunefront.training.logs import RunLog
        from prunefront.training.loop import train as run_loop

        log = None
        if self.world.is_main:
            parameters = sum(parameter.numel() for parameter in self.model.parameters())
            log = RunLog(self.out, num_parameters=parameters, tensorboard=tensorboard)
            document = {"name": self.recipe_name, **self.recipe.model_dump(mode="json")}
            _write(self.out / RECIPE_NAME, document)
            note(
                f"Training {self.recipe.epochs} epochs with the recipe {self.recipe_name} on {self.world.size} x "
                f"{self.place.type} in {self.dtype}, into {self.out}"
            )
        with _signals() as received, progress_bar("Training", shown=self.world.is_main) as progress:
            try:
                return run_loop(
                    self.model,
                    self.dataset,
                    epochs=self.recipe.epochs,
                    folder=self.out,
                    recipe=self.recipe,
                    teacher=self.teacher,
                    device=self.place,
                    dtype=self.dtype,
                    num_workers=self.num_workers,
                    seed=self.seed,
                    world=self.world,
                    on_corrupt=self.on_corrupt,
                    log=log,
                    progress=progress,
                    on_epoch=self._tell if self.world.is_main else None,
                    should_stop=lambda: bool(received),
                    checkpoint_every_steps=checkpoint_every_steps,
                )
            except StoppedError as error:
                raise self._stop(error, received) from error
            except DivergedError as error:
                if not self.world.is_main:  # every process knows; one tells
                    raise typer.Exit(1) from error
                raise JobFailedError(str(error)) from error

    def _tell(self, record: dict[str, float], seconds: float) -> None:
        epoch = int(record["epoch"]) + 1
        left_min = seconds * (self.recipe.epochs - epoch) / 60
        searched = f", search top-1 {record['search_top1']:.2%}" if "search_top1" in record else ""
        note(
            f"Epoch {epoch}/{self.recipe.epochs}: loss {record['loss']:.4f}, train top-1 {record['top1']:.2%}"
            f"{searched}; {seconds:.1f} s, {left_min:.1f} min left"
        )

    def _stop(self, error: Exception, received: list[int]) -> typer.Exit:
        if self.world.is_main:
            note(f"{error} Run the same command again to go on.")
        return typer.Exit(128 + (received[0] if received else signal.SIGINT))

    def save(self) -> None:
        """Write the weights, with the config as it is now."""
        from prunefront.training.checkpoints import WEIGHTS_NAME, save_weights

        save_weights(self.model, self.out / WEIGHTS_NAME)

    def test(self) -> Verdict:
        """Look at the test split, with all processes."""
        from prunefront.training.errors import StoppedError
        from prunefront.training.outcome import judge

        with _signals() as received, progress_bar("Testing", shown=self.world.is_main) as progress:
            try:
                return judge(
                    self.model,
                    self.dataset,
                    batch_size=self.recipe.batch_size,
                    device=self.place,
                    dtype=self.dtype,
                    num_workers=self.num_workers,
                    world=self.world,
                    on_corrupt=self.on_corrupt,
                    progress=progress,
                    should_stop=lambda: bool(received),
                )
            except StoppedError as error:
                raise self._stop(error, received) from error

    def report(self, history: tuple[dict[str, float], ...], verdict: Verdict | None, as_json: bool) -> None:
        """Write the config with what was found, and tell."""
        from prunefront.config import Weights
        from prunefront.training.checkpoints import WEIGHTS_NAME
        from prunefront.training.loop import BEST_NAME
        from prunefront.training.outcome import with_accuracy

        compressed = cast(Any, self.model)
        weights = self.out / WEIGHTS_NAME
        last_phase = history[-1].get("phase")  # accuracies of those before are of fewer selectors
        searched = [record for record in history if "search_top1" in record and record.get("phase") == last_phase]
        document: dict[str, Any] = {
            "out": str(self.out),
            "weights": str(weights),
            "config": str(self.out / CONFIG_NAME),
            "recipe": self.recipe_name,
            "epochs": self.recipe.epochs,
            "loss": history[-1]["loss"],
            "search_top1": searched[-1]["search_top1"],
            "best_search_top1": max(
                record[name] for record in searched for name in ("search_top1", "ema_search_top1") if name in record
            ),
            "best_weights": str(self.out / BEST_NAME),
        }
        if verdict is not None:
            compressed.prune_config = with_accuracy(compressed.prune_config, verdict, Weights(source=WEIGHTS_NAME))
            self.save()
            document |= {
                "top1": verdict.evaluation.top1,
                "top1_ci": list(verdict.interval),
                "top5": verdict.evaluation.top5,
                "num_images": verdict.evaluation.num_images,
                "num_skipped": verdict.evaluation.num_skipped,
            }
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
        final: PruneConfig = compressed.prune_config.evolve(weights=Weights(source=WEIGHTS_NAME, sha256=sha256))
        final.save(self.out / CONFIG_NAME)
        document |= {"sha256": sha256, "macs": final.results.macs if final.results else None}
        _write(self.out / RESULT_NAME, document)
        if as_json:
            print_json(document)
            return
        fields: list[tuple[str, object]] = [
            ("weights", weights),
            ("recipe", self.recipe_name),
            ("search top-1", f"{document['search_top1']:.2%}  (best {document['best_search_top1']:.2%})"),
        ]
        if verdict is not None:
            low, high = verdict.interval
            fields.append(("test top-1", f"{document['top1']:.2%}  (95 %: {low:.2%} to {high:.2%})"))
            if document["num_skipped"]:
                fields.append(("left out", f"{document['num_skipped']} images that cannot be decoded"))
        print_fields(fields)


# What to train ------------------------------------------------------------------------------------------------------


def _place(device: str | None) -> torch.device:
    """The device of this process: of several, each has the GPU of its own number."""
    import torch

    from latency_tables.device import torch_device
    from prunefront.training.distributed import place_of_process

    _, size, local_rank = place_of_process()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and size > 1:
        device = f"cuda:{local_rank}"
    return torch_device(device)


def _read_config(source: str, out: Path, world: World) -> tuple[PruneConfig, Path | None]:
    """The config, and for a job's config the fine-tuned weights that the job has for it."""
    from prunefront.config import load_config

    if not source.startswith(("http://", "https://")):
        return load_config(source), None
    match = _JOB_URL.fullmatch(source)
    if match is None:
        raise ConfigError(f"--config expects a file or a job's address http://HOST/api/v1/jobs/ID, but got {source!r}.")
    from prunefront.client import ApiError, Client

    limits: dict[str, Any] = {}
    for name, value in parse_qsl(match["limits"] or ""):
        if name not in _LIMITS:
            raise ConfigError(f"A job's address takes {', '.join(_LIMITS)}, but got {name!r}; leave it out.")
        try:
            limits[name] = _LIMITS[name](value)
        except ValueError as error:
            raise ConfigError(f"{name} in a job's address is a number, but got {value!r}.") from error
    with Client(match["service"]) as client:
        config = client.best(match["job"], **limits)
        path = out / START_NAME
        if world.is_main and not path.exists() and config.results is not None and config.results.trial is not None:
            # Without fine-tuned weights the config belongs to the dense ones.
            with contextlib.suppress(ApiError):
                client.download_checkpoint(match["job"], config.results.trial, path)
    world.wait()
    return config, path if path.exists() else None


def _own_values(changes: list[str] | None, **options: object) -> dict[str, Any]:
    """What the user replaces in the recipe: ``--set`` and the options that have a name of their own."""
    values: dict[str, Any] = {}
    for change in changes or ():
        name, equals, value = change.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set expects FIELD=VALUE, such as lr=1e-4, but got {change!r}.")
        name = name.strip().replace("-", "_")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = None if value.strip().lower() == "none" else value
    return values | {name: value for name, value in options.items() if value is not None}


def _choose_recipe(
    name: str | None, config: PruneConfig, dataset: str, epochs: int | None, own: dict[str, Any]
) -> tuple[str, Recipe]:
    from prunefront.training.recipes import check_recipe, default_recipe_name, fit_to_epochs, get_recipe, override

    name = name or default_recipe_name(dataset, config.method, config.model.name)
    preset = get_recipe(name, config.model.name)
    # The user's own values are taken as they are; the preset's phases have to fit the epochs first.
    wanted = override(preset, own).epochs if epochs is None else epochs
    recipe = override(fit_to_epochs(preset, wanted), {**own, "epochs": wanted})
    check_recipe(recipe, config.method, name)
    return name, recipe


def _within_limit(
    config: PruneConfig,
    recipe: Recipe,
    table: Path | None,
    max_latency_ms: float | None,
    latency_share: float | None,
    world: World,
) -> PruneConfig:
    """The config with keep ratios that meet the latency limit, where learned selection is given one."""
    limits = [limit for limit in (max_latency_ms, latency_share) if limit is not None]
    if recipe.objective != "pruning-distillation":
        if limits:
            raise ConfigError(
                "--max-latency-ms and --latency-share choose keep ratios for learned selection; use them with --recipe "
                "dynamicvit or spvit. The recipe diffrate takes --table and --set rates.cost_share=0.7."
            )
        if table is not None and recipe.rates is None:
            raise ConfigError(
                "--table is for what is learned for a device; use it with --recipe diffrate, dynamicvit or spvit, or "
                "leave it out."
            )
        return config
    if table is None and not limits:
        return config
    if table is None or len(limits) != 1:
        raise ConfigError(
            "Keep ratios for a device need --table and one limit, --max-latency-ms or --latency-share; without any of "
            "them the config's own are used."
        )
    from functools import partial

    from latency_tables.keep_ratios import dense_ms, keep_ratios_within
    from latency_tables.predict import predict_latency_ms
    from latency_tables.schema import load_table

    cost = partial(predict_latency_ms, load_table(table))
    dense = dense_ms(config, cost)
    chosen = keep_ratios_within(config, cost, limits[0] if latency_share is None else latency_share * dense)
    if world.is_main:
        ratios = ", ".join(f"{site.cumulative_keep_ratio:.3f} from block {site.block}" for site in chosen.sites)
        note(f"The table predicts {cost(chosen):.4g} ms of the dense model's {dense:.4g} ms for keep ratios {ratios}")
    return chosen


def _start(
    config: PruneConfig,
    config_source: str,
    checkpoint: Path | None,
    pretrained: bool | None,
    job_weights: Path | None,
    recipe: Recipe,
) -> Path | bool:
    """What training starts from: a file, timm's weights (True) or random ones (False)."""
    if checkpoint is not None:
        return checkpoint
    if pretrained is not None:
        return pretrained
    if recipe.start == "random":
        return False
    if job_weights is not None:
        return job_weights
    if config.weights is None or config.weights.source == "timm":
        return True
    return _stated_weights(config.weights.source, config.weights.sha256, Path(config_source).parent)


def _stated_weights(source: str, sha256: str | None, folder: Path) -> Path:
    """The file that a config names, beside it, or the checkpoint that is registered on this machine."""
    candidates = [folder / source, Path(source)]
    with contextlib.suppress(ImportError):  # the installed library has no application
        from search.settings import StorageSettings

        candidates.append(StorageSettings.read().checkpoints_dir / f"{source}.safetensors")
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise CheckpointError(
            f"The config's weights are {source!r}, which is no file here; name them with --checkpoint, or use "
            "--pretrained for timm's."
        )
    if sha256 is not None and hashlib.sha256(found.read_bytes()).hexdigest() != sha256:
        raise CheckpointError(
            f"{found} is not the file that the config means: its sha256 differs. Name the weights with --checkpoint."
        )
    return found


def _models(
    config: PruneConfig,
    start: Path | bool,
    seed: int,
    recipe: Recipe,
    teacher: str | None,
    teacher_checkpoint: Path | None,
) -> tuple[nn.Module, nn.Module | None]:
    """The model to train and its teacher."""
    import torch

    from prunefront.checkpoints import load_weights
    from prunefront.compress import compress, create_dense
    from prunefront.schedule import plan_schedule
    from prunefront.training.objectives import build_objective
    from prunefront.training.outcome import without_accuracy

    plan_schedule(config)  # what cannot work is refused before weights are downloaded
    torch.manual_seed(seed)  # of random weights: the same on every process and on a resume
    dense = create_dense(config.model, pretrained=start is True)
    model = compress(dense, without_accuracy(config))
    if isinstance(start, Path):
        load_weights(model, start)  # the dense model shares them
    labels_tokens = recipe.objective == "token-labels"
    if build_objective(recipe, model).needs_teacher:
        guide = _teacher(dense, config.model, teacher, teacher_checkpoint)
        if guide is dense and start is False:
            raise ConfigError(
                "This recipe learns from the dense model, whose weights are random here; name a --teacher, start from "
                f"weights, or add --set {'token_labels.source=image' if labels_tokens else 'distillation=null'}."
            )
        return model, guide
    if teacher is not None or teacher_checkpoint is not None:
        setting = "token_labels.source=teacher" if labels_tokens else "distillation.alpha=0.5"
        raise ConfigError(f"This recipe has no teacher; add --set {setting} to learn from one.")
    return model, None


def _learner(model: nn.Module, config: PruneConfig, recipe: Recipe, table: Path | None) -> nn.Module:
    """The model frozen, with counts to learn, under MACs or the latency of a table."""
    from prunefront.training.rates import RateLearner

    assert recipe.rates is not None
    cost = None
    if table is not None:
        from latency_tables.rates import latency_cost
        from latency_tables.schema import load_table

        cost = latency_cost(load_table(table), config.model)
    return RateLearner(model, config, granularity=recipe.rates.granularity, cost=cost)


def _teacher(dense: nn.Module, spec: ModelSpec, name: str | None, checkpoint: Path | None) -> nn.Module:
    from prunefront.compress import create_dense

    if name is None and checkpoint is None:
        return dense
    if name is not None and name != spec.name:
        # Its own classes, unless a checkpoint brings the student's: timm would give it a fresh head otherwise.
        num_classes = getattr(dense, "num_classes", None) if checkpoint is not None else None
        spec = type(spec)(name=name, img_size=spec.img_size, in_chans=spec.in_chans, num_classes=num_classes)
    try:
        return create_dense(spec, pretrained=checkpoint is None, checkpoint=checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"The teacher cannot be loaded: {error}") from error


# Terminal -----------------------------------------------------------------------------------------------------------


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and Ctrl-C instead of ending at once; a second Ctrl-C, some time later, does end at once."""
    received: list[int] = []
    first_at = 0.0

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal first_at
        if not received:
            first_at = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - first_at >= SECOND_SIGNAL_S:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():  # signals go elsewhere
        yield received
        return
    earlier = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _write(path: Path, document: dict[str, Any]) -> None:
    from prunefront.files import write_json_atomic

    write_json_atomic(path, document)
