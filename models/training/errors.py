"""What ends a training with one line."""

from __future__ import annotations


class TrainingError(Exception):
    """A training that can't begin or go on: the message names the setting or the file, and what is allowed.

        TrainingError
        ├── TeacherError      what is given as the teacher isn't one
        ├── PicturesError     a folder of pictures that nothing can be learnt from
        ├── FeaturesError     what is given to look at pictures through can't do that
        ├── StartError        a LoRA to start from that doesn't fit the teacher
        ├── ExtractError      two networks between which no LoRA lies
        ├── CheckpointError   a checkpoint of another run
        └── Diverged          the loss is no number any more

    Files that can't be read raise `models.networks.LoadError` and `models.sources.SourceError`, as they do in serving.
    """


class TeacherError(TrainingError):
    """The folder or the entry, what is wrong with it, and what a teacher is made of."""


class PicturesError(TrainingError):
    """The folder or the file, and what is expected there."""


class FeaturesError(TrainingError):
    """The folder, and what is needed there."""


class StartError(TrainingError):
    """The folder, and the first weight that differs, with both shapes."""


class ExtractError(TrainingError):
    """The folders, and the first layer in which they differ."""


class CheckpointError(TrainingError):
    """The checkpoint's path, the setting, its value then and now."""


class Diverged(TrainingError):
    """The step at which it was seen."""


class Interrupted(KeyboardInterrupt):
    """Somebody pressed Ctrl-C, and the checkpoint of the last finished step is written."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(f"stopped at step {step} of {steps}; its checkpoint is written")
        self.step, self.steps = step, steps
