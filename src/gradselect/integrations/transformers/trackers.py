"""Ways into the trackers that transformers knows: settings of the method, and a picture."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

from transformers import TrainerCallback
from transformers.integrations import integration_utils

PICTURE = "selection/picture"


class AbstractTracker(ABC):
    """A tracker that a callback of transformers has opened.

    Args:
        callback: of transformers.
    """

    name: str

    def __init__(self, callback: Any) -> None:
        self._callback = callback

    @abstractmethod
    def is_open(self) -> bool:
        """True if there is a run to write into."""

    @abstractmethod
    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Put the settings where the tracker shows those of a run."""

    @abstractmethod
    def write_picture(self, pixels: Any, *, step: int) -> None:
        """Log a picture, uint8 (height, width, 3)."""


@final
class TensorBoard(AbstractTracker):
    """TensorBoard: settings as text and in the table of hyper-parameters."""

    name = "tensorboard"

    def is_open(self) -> bool:
        return self._callback.tb_writer is not None

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        # Here rather than above: it imports tensorboard, which others need not have.
        from torch.utils.tensorboard.summary import hparams

        writer = self._callback.tb_writer
        writer.add_text("selection/settings", f"```\n{json.dumps(settings, indent=2)}\n```")
        known = {
            name: value if isinstance(value, bool | int | float) else str(value) for name, value in settings.items()
        }
        for summary in hparams(known, {}):
            # Its own add_hparams opens a second run for them.
            writer.file_writer.add_summary(summary)
        writer.flush()

    def write_picture(self, pixels: Any, *, step: int) -> None:
        self._callback.tb_writer.add_image(PICTURE, pixels, step, dataformats="HWC")
        self._callback.tb_writer.flush()


@final
class Wandb(AbstractTracker):
    """Weights & Biases: settings in the configuration of the run."""

    name = "wandb"

    def is_open(self) -> bool:
        return self._callback._wandb is not None and self._callback._wandb.run is not None

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        self._callback._wandb.config.update(dict(settings), allow_val_change=True)

    def write_picture(self, pixels: Any, *, step: int) -> None:
        wandb = self._callback._wandb
        wandb.log({PICTURE: wandb.Image(pixels), "train/global_step": step})


@final
class Trackio(AbstractTracker):
    """trackio: settings in the configuration of the run."""

    name = "trackio"

    def is_open(self) -> bool:
        return bool(self._callback._initialized)

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        self._callback._trackio.config.update(dict(settings), allow_val_change=True)

    def write_picture(self, pixels: Any, *, step: int) -> None:
        trackio = self._callback._trackio
        trackio.log({PICTURE: trackio.Image(pixels), "train/global_step": step})


@final
class MLflow(AbstractTracker):
    """MLflow: settings as parameters, pictures as artifacts."""

    name = "mlflow"

    def is_open(self) -> bool:
        return self._callback._ml_flow.active_run() is not None

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        self._callback._ml_flow.log_params(dict(settings))

    def write_picture(self, pixels: Any, *, step: int) -> None:
        self._callback._ml_flow.log_image(pixels, f"{PICTURE}-step-{step}.png")


KINDS: Mapping[str, type[AbstractTracker]] = {
    "TensorBoardCallback": TensorBoard,
    "WandbCallback": Wandb,
    "TrackioCallback": Trackio,
    "MLflowCallback": MLflow,
}
"""By the callback of transformers. Older versions lack some of them."""


def trackers_among(callbacks: Sequence[TrainerCallback]) -> Iterator[AbstractTracker]:
    """Yield the trackers among the callbacks of a Trainer, also inside a callback with an attribute `tracker`."""
    for callback in callbacks:
        inner = getattr(callback, "tracker", callback)
        for name, kind in KINDS.items():
            known = getattr(integration_utils, name, None)
            if known is not None and isinstance(inner, known):
                yield kind(inner)
                break
