"""What a training needs to go on after a crash, as files: weights, optimizer slots, random states, callbacks, position.

A `.keras` file holds neither the epoch nor what callbacks know (best value so far, epochs waited), so these are written
beside the weights: a resumed run stops early, lowers its rate and ends exactly where an undisturbed one does.
"""

from __future__ import annotations

import inspect
import json
import numbers
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS_FILE = "model.weights.h5"
ARRAYS_FILE = "state.npz"
POSITION_FILE = "position.json"


@dataclass
class Position:
    """How far a training is."""

    phase: int = 0
    """Index of the current phase."""
    epoch: int = 0
    """Epochs of the current phase that are done."""
    stopped: bool = False
    """A callback ended the current phase early."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Logs of every epoch so far, of all phases."""


def save_state(folder: Path, model: Any, optimizer: Any, position: Position, callbacks: list[Any]) -> None:
    """Afterwards the folder holds all that `restore_model` and `restore_callbacks` read. No communication in here."""
    model.save_weights(folder / WEIGHTS_FILE)
    arrays = {f"optimizer_{k}": np.asarray(v.numpy()) for k, v in enumerate(optimizer.variables)}
    arrays |= {f"random_{k}": np.asarray(v.numpy()) for k, v in enumerate(_random_states(model))}
    scalars: list[dict[str, Any]] = []
    for k, callback in enumerate(callbacks):
        scalars.append(_scalars(callback))
        best = vars(callback).get("best_weights")
        arrays |= {f"callback_{k}_{n}": np.asarray(array) for n, array in enumerate(best or [])}
    with (folder / ARRAYS_FILE).open("wb") as stream:
        np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]
    (folder / POSITION_FILE).write_text(json.dumps({**asdict(position), "callbacks": scalars}))


def read_position(folder: Path) -> Position:
    """How far the saved training was."""
    saved = json.loads((folder / POSITION_FILE).read_text())
    del saved["callbacks"]
    return Position(**saved)


def restore_model(folder: Path, model: Any, optimizer: Any) -> None:
    """Afterwards weights, optimizer slots (which must be built) and random states are those that were saved."""
    model.load_weights(folder / WEIGHTS_FILE)
    with np.load(folder / ARRAYS_FILE) as arrays:
        for k, variable in enumerate(optimizer.variables):
            variable.assign(arrays[f"optimizer_{k}"])
        for k, variable in enumerate(_random_states(model)):
            variable.assign(arrays[f"random_{k}"])


def restore_callbacks(folder: Path, callbacks: list[Any]) -> None:
    """Afterwards the callbacks know what they knew; to be called after `on_train_begin`, which makes them forget.

    The list may be longer than the saved one (another rank has fewer callbacks): the common beginning is restored.
    """
    saved = json.loads((folder / POSITION_FILE).read_text())["callbacks"]
    with np.load(folder / ARRAYS_FILE) as arrays:
        for k, (callback, scalars) in enumerate(zip(callbacks, saved, strict=False)):
            vars(callback).update(scalars)
            names = sorted(
                (n for n in arrays.files if n.startswith(f"callback_{k}_")), key=lambda n: int(n.split("_")[2])
            )
            if names:
                callback.best_weights = [arrays[name] for name in names]


def _scalars(callback: Any) -> dict[str, Any]:
    """The callback's public numbers and texts that are no settings: best, wait, cooldown_counter and their like.

    Settings must stay as they were given: Keras turns the sign of `min_delta` when a callback sees its first epoch.
    What a CSVLogger knows (whether to write a header) it sees from its file.
    """
    import keras

    if isinstance(callback, keras.callbacks.CSVLogger):
        return {}
    settings = inspect.signature(type(callback)).parameters
    found: dict[str, Any] = {}
    for name, value in vars(callback).items():
        if name.startswith("_") or name in settings:
            continue
        if isinstance(value, (bool, str)):
            found[name] = value
        elif isinstance(value, numbers.Integral):
            found[name] = int(value)
        elif isinstance(value, numbers.Real):
            found[name] = float(value)
    return found


def _random_states(model: Any) -> list[Any]:
    """The variables that are no weights: states of the generators in dropout and augmentation layers."""
    weights = {id(variable) for variable in model.weights}
    return [variable for variable in model.variables if id(variable) not in weights and "seed" in variable.path]
