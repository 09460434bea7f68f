"""Which training images to leave out: the example level of Tri-Level E-ViT, for training from scratch.

Kong et al., "Peeling the Onion: Hierarchical Reduction of Data Redundancy for Efficient Vision Transformer Training",
AAAI 2023 (arXiv:2211.10801). A share of the images is left out from the start. At a few epochs, the images that the
model learnt and rarely forgot since the last such event are exchanged for as many drawn from those left out, so the
training set keeps its size. The training loop calls `ExampleSelection.start_epoch` and `ExampleSelection.record`;
nothing here needs torch.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from prunefront.config import StrictModel, expecting
from prunefront.errors import CheckpointError, ConfigError
from prunefront.training.errors import ExampleError

STATE_FORMAT: Literal["prunefront/examples/1"] = "prunefront/examples/1"

Ids = NDArray[np.int64]
# Strict: true is not one image, and "5" is not a count.
ShareOrCount = Annotated[
    Annotated[int, Field(strict=True, ge=0)] | Annotated[float, Field(strict=True, ge=0.0, lt=1.0)],
    expecting("a share such as 0.05, below 1, or a whole number of images"),
]


class ExampleOptions(StrictModel):
    """How many images to leave out and exchange, when, and by which score. The defaults are the paper's."""

    initial_removed: ShareOrCount = Field(0.20, description="Images left out from the start, at random.")
    remove: ShareOrCount = Field(
        0.05, description="Images exchanged per event, as a share of the whole data set or a count; 0 turns events off."
    )
    keep_lowest: ShareOrCount = Field(0, description="Images of the lowest scores that events leave in training.")
    interval_epochs: Annotated[int, Field(ge=1)] = Field(30, description="Epochs from one event to the next.")
    events: Annotated[int, Field(ge=0)] = 5
    score: Literal["forgetting", "forgetting+cls_var"] = Field(
        "forgetting",
        description="Forgetting events; +cls_var removes the flattest class attention first among equal ones.",
    )
    window_cap: Annotated[int, Field(ge=1)] = Field(
        30, description="Presentations since the last event that count; also the score of an image never learnt."
    )
    shuffle: bool = Field(True, description="Bring images back at random; false: those left out longest first.")

    @property
    def scores_attention(self) -> bool:
        """Whether the score needs the class attention of every image."""
        return self.score == "forgetting+cls_var"


@dataclass(frozen=True, kw_only=True, eq=False)
class Event:
    """One exchange of training images, with the scores that decided it."""

    epoch: int
    # Exchanged ids, each of shape (R,): in ascending score, and in the order drawn.
    removed: Ids
    restored: Ids
    # Both lists after it: the ids that stayed, sorted, then the restored; the rest of the pool, then the removed.
    train: Ids
    pool: Ids
    # Ids scored in this window, shape (S,), ascending by score, with the keys they were sorted by.
    ranking: Ids
    forgetting: NDArray[np.int64]
    class_variance: NDArray[np.float64] | None

    @property
    def num_unforgettable(self) -> int:
        """How many images were learnt and never forgotten (score 0)."""
        return int(np.count_nonzero(self.forgetting == 0))


class ExampleSelection:
    """The training set of each epoch, and what is remembered about its images to choose the next one.

    Section "Example-level" of the paper, with these departures from its official code (ZLKong/Tri-Level-ViT): one
    generator instead of one per rank; a complete state for checkpoints; an event that a resumed run has passed still
    happens; ``remove=0`` is off; ``keep_lowest`` loses no id; an event never exchanges more images than were scored,
    so the training set keeps its size; nothing is collected once no event is left.

    Several ranks: give all the same seed, gather the ids and bits of a batch (or of an epoch) from all ranks before
    `record`, and let every rank record the same. Then all hold the same lists without exchanging them. The order in
    which ranks are merged does not matter, except between presentations of one image in one epoch. Padding by a
    distributed sampler presents a few images twice; that is harmless.

    Instead of the bits of a window, their running summary is kept: all that the score reads, in a few bytes per image.
    """

    def __init__(self, num_examples: int, options: ExampleOptions | None = None, *, seed: int = 0) -> None:
        """Leave out the initial share.

        Args:
            num_examples: Images of the whole data set; their ids are 0..num_examples-1.
            options: None takes the paper's.
            seed: Of this object's own generator, 0..2**32-1; the same on every rank.

        Raises:
            ConfigError: If the counts do not fit the data set or each other, or the seed is out of range.
        """
        self.options = options if options is not None else ExampleOptions()
        self.num_examples = num_examples
        self.seed = seed
        if num_examples < 1:
            raise ConfigError(f"A training set has at least one image, but got {num_examples=}. Pass its length.")
        if not 0 <= seed < 2**32:
            raise ConfigError(f"The seed lies between 0 and 2**32 - 1, but got {seed}. Choose a smaller one.")
        initial_removed = self._count("initial_removed")
        self._remove = self._count("remove")
        self._keep_lowest = self._count("keep_lowest")
        if initial_removed >= num_examples:
            raise ConfigError(
                f"initial_removed has to leave images to train on, but got {initial_removed} of {num_examples}. "
                "Lower it."
            )
        if self._remove > initial_removed:
            raise ConfigError(
                f"An event brings back as many images as it removes, so remove is at most initial_removed "
                f"({initial_removed} of {num_examples} images), but got {self._remove}. Lower remove or raise "
                "initial_removed."
            )
        if self._remove + self._keep_lowest > num_examples - initial_removed:
            raise ConfigError(
                f"remove and keep_lowest together are at most the {num_examples - initial_removed} images trained on, "
                f"but got {self._remove} and {self._keep_lowest}. Lower one of them."
            )
        self._generator = np.random.RandomState(seed)  # the legacy one, whose stream the official code draws from
        order = self._generator.permutation(np.arange(num_examples, dtype=np.int64))
        self._train, self._pool = order[: num_examples - initial_removed], order[num_examples - initial_removed :]
        self._epoch = 0
        self._events_done = 0
        interval, events = self.options.interval_epochs, self.options.events if self._remove else 0
        self._pending = [interval * (index + 1) for index in range(events)]
        self._open_window()

    @property
    def train(self) -> Ids:
        """Ids to train on, shape (T,); a copy. T never changes."""
        return self._train.copy()

    @property
    def pool(self) -> Ids:
        """Ids left out, shape (num_examples - T,); a copy."""
        return self._pool.copy()

    @property
    def events_done(self) -> int:
        """Events that have happened."""
        return self._events_done

    @property
    def pending_epochs(self) -> tuple[int, ...]:
        """Epochs at whose start the remaining events happen."""
        return tuple(self._pending)

    @property
    def is_collecting(self) -> bool:
        """Whether an event is left; if not, `record` ignores what it gets, and gathering it is a waste."""
        return bool(self._pending)

    def record(self, ids: ArrayLike, correct: ArrayLike, class_variance: ArrayLike | None = None) -> None:
        """Remember whether the model was right about a batch of training images.

        Args:
            ids: Ids in the whole data set (``train[position]``), shape (B,), in order of presentation; one may repeat.
            correct: Whether the largest logit was the label's, shape (B,), booleans or 0 and 1. The official code takes
                the logits of the training step as they are: of mixed images, with the label of the first.
            class_variance: Unbiased variance over the patch tokens of the last block's class attention, averaged over
                heads, shape (B,). Needed by the score "forgetting+cls_var", else ignored.

        Raises:
            ExampleError: If the shapes differ, an id is not in the training set, a bit is not 0 or 1, or a variance is
                missing, negative or not a number. Nothing is recorded then.
        """
        if not self._pending:
            return
        checked_ids, bits, variances = self._checked_batch(ids, correct, class_variance)
        # Presentations of one image are counted one after the other: first all first ones, then all second ones.
        by_id = np.argsort(checked_ids, kind="stable")
        _, starts, counts = np.unique(checked_ids[by_id], return_index=True, return_counts=True)
        turn = np.arange(len(by_id)) - np.repeat(starts, counts)
        for index in range(int(counts.max(initial=0))):
            chosen = by_id[turn == index]
            self._record_once(checked_ids[chosen], bits[chosen], None if variances is None else variances[chosen])

    def start_epoch(self, epoch: int, tie_order: Sequence[int] | None = None) -> Event | None:
        """Exchange images if an event is due; call it before the data loader and its sampler are built.

        A run that resumes after an event's epoch catches up at once. Of several missed events only one happens: their
        statistics were never collected, so the others would have nothing to choose by.

        Equal scores are ordered by the epoch of their first presentation in the window, then by a shuffle that depends
        on the seed and the event alone. (The official sort leaves that order undefined, and ordering by id would empty
        the first classes of a data set sorted by class.)

        Args:
            epoch: The epoch about to start, counted from 0.
            tie_order: Ids in the order to use within equal scores instead, such as a recorded one; ids it lacks follow.

        Returns:
            What changed, or None when no event is due. After an event the sampler needs to be rebuilt.

        Raises:
            ExampleError: If ``epoch`` is negative or ``tie_order`` names an id that does not exist.
        """
        if epoch < 0:
            raise ExampleError(f"Epochs are counted from 0, but got {epoch}. Pass the epoch about to start.")
        self._epoch = epoch
        if not self._pending or epoch < self._pending[0]:
            return None
        ranking, forgetting, variance = self._ranked(tie_order)
        num_exchanged = max(0, min(self._remove, len(ranking) - self._keep_lowest))
        removed = ranking[self._keep_lowest : self._keep_lowest + num_exchanged]
        if self.options.shuffle:
            self._generator.shuffle(self._pool)
        restored = self._pool[:num_exchanged]
        self._train = np.concatenate((np.setdiff1d(self._train, removed), restored))
        # Removed ids come last, so none returns in the same event.
        self._pool = np.concatenate((self._pool[num_exchanged:], removed))
        self._pending = [due for due in self._pending if due > epoch]
        self._events_done += 1
        self._open_window()
        return Event(
            epoch=epoch,
            removed=removed,
            restored=restored,
            train=self.train,
            pool=self.pool,
            ranking=ranking,
            forgetting=forgetting,
            class_variance=variance,
        )

    def forgetting_counts(self) -> tuple[Ids, NDArray[np.int64]]:
        """Score the images presented since the last event.

        Returns:
            Their ids, ascending, and how often each was right and then wrong within its first ``window_cap``
            presentations (forgetting events of Toneva et al., arXiv:1812.05159); ``window_cap`` for an image that was
            never right in them. Both of shape (S,).
        """
        ids = np.flatnonzero(self._presentations).astype(np.int64)
        counts = np.where(self._is_learnt[ids], self._forgotten[ids], self.options.window_cap)
        return ids, counts.astype(np.int64)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, as plain JSON values; large arrays are compressed text."""
        name, key, position, *_ = self._generator.get_state(legacy=True)
        return {
            "format": STATE_FORMAT,
            "num_examples": self.num_examples,
            "seed": self.seed,
            "options": self.options.model_dump(mode="json"),
            "epoch": self._epoch,
            "events_done": self._events_done,
            "pending": list(self._pending),
            "generator": {"name": str(name), "key": np.asarray(key).tolist(), "position": int(position)},
            "arrays": {name: _packed(getattr(self, f"_{name}"), dtype) for name, dtype in _ARRAYS.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            CheckpointError: If the state is damaged or belongs to another data set, seed or options; this object is
                unchanged then.
        """
        if state.get("format") != STATE_FORMAT:
            raise CheckpointError(
                f"The state of an example selection has format {STATE_FORMAT!r}, but got {state.get('format')!r}. "
                "Resume from a checkpoint of this version."
            )
        mine = {
            "num_examples": self.num_examples,
            "seed": self.seed,
            "options": self.options.model_dump(mode="json"),
        }
        for name, value in mine.items():
            if state.get(name) != value:
                raise CheckpointError(
                    f"The run to resume had {name}={state.get(name)!r}, but this one has {value!r}. "
                    "Resume with the same, or start a new run."
                )
        try:
            arrays = {name: _unpacked(state["arrays"][name], dtype) for name, dtype in _ARRAYS.items()}
            generator = np.random.RandomState()
            saved = state["generator"]
            key = np.array(saved["key"], dtype=np.uint32)
            position = int(saved["position"])
            if not 0 <= position <= len(key):  # numpy would read beyond the key
                raise ValueError(f"the generator's position is {position} of {len(key)}")
            generator.set_state((saved["name"], key, position, 0, 0.0))
            epoch, events_done = int(state["epoch"]), int(state["events_done"])
            pending = [int(due) for due in state["pending"]]
            self._check_lists(arrays)
        except (LookupError, TypeError, ValueError, OverflowError, zlib.error, binascii.Error) as error:
            raise CheckpointError(
                f"The state of the example selection is damaged ({type(error).__name__}: {error}). Resume from another "
                "checkpoint."
            ) from error
        for name, array in arrays.items():
            setattr(self, f"_{name}", array)
        self._generator, self._pending = generator, pending
        self._epoch, self._events_done = epoch, events_done
        self._is_trained_on = np.zeros(self.num_examples, dtype=np.bool_)
        self._is_trained_on[self._train] = True

    def _count(self, name: str) -> int:
        """An option's number of images; shares are rounded to the nearest."""
        value: float = getattr(self.options, name)
        return value if isinstance(value, int) else round(value * self.num_examples)

    def _open_window(self) -> None:
        """Forget all statistics."""
        shape = self.num_examples
        self._presentations = np.zeros(shape, dtype=np.int32)
        self._was_correct = np.zeros(shape, dtype=np.bool_)
        self._is_learnt = np.zeros(shape, dtype=np.bool_)
        self._forgotten = np.zeros(shape, dtype=np.int32)
        self._first_epoch = np.zeros(shape, dtype=np.int32)
        self._variance_sum = np.zeros(shape if self.options.scores_attention else 0, dtype=np.float64)
        self._is_trained_on = np.zeros(shape, dtype=np.bool_)
        self._is_trained_on[self._train] = True

    def _checked_batch(
        self, ids: ArrayLike, correct: ArrayLike, class_variance: ArrayLike | None
    ) -> tuple[Ids, NDArray[np.bool_], NDArray[np.float64] | None]:
        numbers, bits = np.asarray(ids), np.asarray(correct)
        if numbers.ndim != 1 or bits.shape != numbers.shape:
            raise ExampleError(
                f"record expects one id and one bit per image, but got shapes {numbers.shape} and {bits.shape}. "
                "Flatten both to (B,)."
            )
        if not numbers.size:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_), None
        if not np.issubdtype(numbers.dtype, np.integer):
            raise ExampleError(f"record expects whole numbers as ids, but got {numbers.dtype}. Pass train[position].")
        outside = (numbers < 0) | (numbers >= self.num_examples)
        wrong = outside | ~self._is_trained_on[np.where(outside, 0, numbers)]
        if wrong.any():
            raise ExampleError(
                f"record expects ids of the training set, but got {numbers[wrong][0]}, which is not in it. Pass ids of "
                "the whole data set (train[position]), and rebuild the data loader after an event."
            )
        if bits.dtype != np.bool_ and not np.isin(bits, (0, 1)).all():
            raise ExampleError(
                f"record expects 1 or true where the model was right and 0 or false where not, but got "
                f"{bits[~np.isin(bits, (0, 1))][0]}. Compare the largest logit with the label."
            )
        variances = None
        if self.options.scores_attention:
            if class_variance is None:
                raise ExampleError(
                    "The score forgetting+cls_var expects the class-attention variance of every image, but got none. "
                    "Pass class_variance, or use the score forgetting."
                )
            variances = np.asarray(class_variance, dtype=np.float64)
            if variances.shape != numbers.shape:
                raise ExampleError(
                    f"record expects one class-attention variance per image, but got shape {variances.shape} for "
                    f"{len(numbers)} image(s). Reduce it over the patch tokens to (B,)."
                )
            if not (np.isfinite(variances) & (variances >= 0)).all():
                raise ExampleError(
                    "record expects class-attention variances that are zero or larger, but got a negative or undefined "
                    "one. Check that the training has not diverged."
                )
        return numbers.astype(np.int64), bits.astype(np.bool_), variances

    def _record_once(self, ids: Ids, correct: NDArray[np.bool_], variances: NDArray[np.float64] | None) -> None:
        """Record one presentation each of distinct images."""
        presentations = self._presentations[ids]
        self._first_epoch[ids[presentations == 0]] = self._epoch
        counts = presentations < self.options.window_cap
        # No bit before the first: _was_correct starts as false.
        self._forgotten[ids] += counts & self._was_correct[ids] & ~correct
        self._is_learnt[ids] |= counts & correct
        self._was_correct[ids] = correct
        if variances is not None:  # over all presentations, those beyond the cap included
            self._variance_sum[ids] += variances
        self._presentations[ids] += 1

    def _ranked(self, tie_order: Sequence[int] | None) -> tuple[Ids, NDArray[np.int64], NDArray[np.float64] | None]:
        """Scored ids in ascending order of (score, mean variance if used, tie rule), with both keys."""
        ids, forgetting = self.forgetting_counts()
        # Not drawn from the own generator, whose stream would then differ from the official one.
        shuffled = np.random.RandomState([self.seed, self._events_done]).permutation(self.num_examples)
        place = np.zeros(self.num_examples, dtype=np.int64)
        if tie_order is not None and len(tie_order):
            named = np.asarray(tie_order, dtype=np.int64)
            if named.min() < 0 or named.max() >= self.num_examples:
                raise ExampleError(
                    f"tie_order expects ids between 0 and {self.num_examples - 1}, but got {named.min()} to "
                    f"{named.max()}. Pass ids of the whole data set."
                )
            place[named] = np.arange(len(named)) - len(named)
        keys: list[NDArray[Any]] = [shuffled[ids], self._first_epoch[ids], place[ids]]
        variance = None
        if self.options.scores_attention:
            variance = self._variance_sum[ids] / self._presentations[ids]
            keys.append(variance)
        order = np.lexsort((*keys, forgetting))  # the last key counts most
        return ids[order], forgetting[order], None if variance is None else variance[order]

    def _check_lists(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        train, pool = arrays["train"], arrays["pool"]
        if len(train) != len(self._train):
            raise ValueError(f"the training set has {len(train)} images, not {len(self._train)}")
        if not np.array_equal(np.sort(np.concatenate((train, pool))), np.arange(self.num_examples)):
            raise ValueError("training set and pool do not hold every image once")
        for name in arrays.keys() - {"train", "pool"}:
            expected = len(getattr(self, f"_{name}"))
            if len(arrays[name]) != expected:
                raise ValueError(f"{name} has {len(arrays[name])} entries, not {expected}")


# What a state holds per image, with the little-endian type it is stored in.
_ARRAYS = {
    "train": "<i8",
    "pool": "<i8",
    "presentations": "<i4",
    "was_correct": "|b1",
    "is_learnt": "|b1",
    "forgotten": "<i4",
    "first_epoch": "<i4",
    "variance_sum": "<f8",
}


def _packed(array: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(zlib.compress(array.astype(dtype).tobytes(), level=1)).decode("ascii")


def _unpacked(text: str, dtype: str) -> NDArray[Any]:
    array = np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), dtype=dtype)
    return array.astype(array.dtype.newbyteorder("="))  # a copy in native order, which can be written to


def replay_example_level(case: Mapping[str, Any]) -> dict[str, Any]:
    """Our results for a recorded trace, under the case's own names.

    Within equal scores the official order is undefined. It follows the order of removal that the case records, or,
    where it records none, numpy's default sort, as the official code. Ids of other scores are not affected, so a
    recorded choice that the scores do not allow shows up as a difference.

    Args:
        case: The JSON of a case of kind "example_level".

    Returns:
        ``initial`` (``train``, ``removed``) and ``events``, as JSON values.

    Raises:
        ConfigError: If the case is of another kind, lacks an entry or has one that cannot be used.
    """
    if case.get("kind") != "example_level":
        raise ConfigError(f"Expected a case of kind 'example_level', but got {case.get('kind')!r}. Pass its case.json.")
    try:
        return _replayed(case)
    except (KeyError, IndexError) as error:
        raise ConfigError(f"The example-level case lacks {error}. Add what its conventions describe.") from error


def _replayed(case: Mapping[str, Any]) -> dict[str, Any]:
    config = case["config"]
    uses_variance = config.get("variant") == "cls"
    options = ExampleOptions(
        initial_removed=int(config["initial_removed"]),
        remove=int(config["remove_n"]),
        keep_lowest=int(config.get("keep_lowest_n", 0)),
        interval_epochs=int(config.get("event_interval_epochs", 30)),
        events=int(config.get("max_events", 5)),
        score="forgetting+cls_var" if uses_variance else "forgetting",
        window_cap=int(config.get("statistics_window", 30)),
    )
    selection = ExampleSelection(int(config["num_examples"]), options, seed=int(config["numpy_seed"]))
    initial = {"train": selection.train.tolist(), "removed": selection.pool.tolist()}
    recorded = {int(event["epoch"]): event for event in case.get("events", ())}
    passes: defaultdict[int, list[int]] = defaultdict(list)
    for index, trace in enumerate(case["passes"]):
        passes[int(trace["epoch"])].append(index)
    first_presented: dict[int, None] = {}
    events = []
    for epoch in range(int(config.get("epochs", max(passes, default=0) + 1))):
        ties = _recorded_ties(recorded.get(epoch, {}), selection, first_presented)
        if (event := selection.start_epoch(epoch, ties)) is not None:
            events.append(_event_values(event, selection))
            first_presented = {}
        for index in passes[epoch]:
            trace = case["passes"][index]
            train = selection.train
            if "presented" in trace:
                train = train[_bits(trace["presented"])[train]]
            variances = np.asarray(case["cls_variance"]["values"][index])[train] if uses_variance else None
            selection.record(train, _bits(trace["correct"])[train], variances)
            first_presented |= dict.fromkeys(train.tolist())
    return {"initial": initial, "events": events}


def _bits(text: str | Sequence[int]) -> NDArray[np.bool_]:
    return np.array([int(bit) for bit in text], dtype=np.bool_)


def _recorded_ties(
    recorded: Mapping[str, Any], selection: ExampleSelection, first_presented: Mapping[int, None]
) -> list[int]:
    """Ids in the order that the official code gave, or would have given, to equal scores."""
    for name in ("ordered_examples", "removed_in_official_order", "removed"):
        if name in recorded:
            return [int(example) for example in recorded[name]]
    ids, counts = selection.forgetting_counts()
    score = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    presented = [example for example in first_presented if example in score]
    order = np.argsort(np.array([score[example] for example in presented], dtype=np.float64))
    return [presented[index] for index in order]


def _event_values(event: Event, selection: ExampleSelection) -> dict[str, Any]:
    """An event under the names of the recorded cases, as JSON values."""
    by_id = np.argsort(event.ranking)
    values: dict[str, Any] = {
        "epoch": event.epoch,
        "forgetting_count": {
            str(example): count
            for example, count in zip(event.ranking[by_id].tolist(), event.forgetting[by_id].tolist(), strict=True)
        },
        "num_unforgettable": event.num_unforgettable,
        "removed": sorted(event.removed.tolist()),
        "removed_in_official_order": event.removed.tolist(),
        "restored_in_order": event.restored.tolist(),
        "train_after": sorted(event.train.tolist()),
        "train_after_in_order": event.train.tolist(),
        "pool_after_in_order": event.pool.tolist(),
    }
    # The last one removed and the first one that stays have equal keys: which of their group left is arbitrary.
    keys = [event.forgetting] if event.class_variance is None else [event.forgetting, event.class_variance]
    start = selection._keep_lowest
    end = start + len(event.removed)
    is_tie = start < end < len(event.ranking) and all(key[end - 1] == key[end] for key in keys)
    values["tie_at_boundary"] = is_tie
    if is_tie:
        group = np.logical_and.reduce([key == key[end] for key in keys])
        outside_group = event.removed[~group[start:end]]
        values["must_remove"] = sorted(outside_group.tolist())
        values["tie_group"] = sorted(event.ranking[group].tolist())
        values["take_from_tie_group"] = len(event.removed) - len(outside_group)
    if event.class_variance is not None:
        values["ordered_examples"] = event.ranking.tolist()
    return values


__all__ = ["Event", "ExampleOptions", "ExampleSelection", "replay_example_level"]
