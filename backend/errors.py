"""What can go wrong, said in a sentence: what, where, and what to do.

FirstRowError
|- SettingsError       the environment
|- LabelStudioError    Label Studio did not do what was asked
|- ConfigError         a label config that cannot be used
|- ImageFetchError     one image cannot be had
|  `- SlowHostError    its host does not answer in time
|     `- NotAskedError its host was not asked, for it does not answer
|- FeatureError        what the network computes of one image cannot be used
|- MaskError           one region or mask cannot be read
|- InUseError          somebody is at work on an annotation that we would change
|- StoreError          the store cannot be read or written
|- AttachRefused       a project that cannot be attached as it is
|- NotAttached         a project without an ML backend of ours
|- DetachUnfinished    a project that could not be detached as a whole
|- JobError            a step of a round cannot be done
|- RoundOver           a round that must not go on
|- StartAnew           a round that must begin again
`- BenchError          a benchmark that cannot be run or reported
"""

from __future__ import annotations


class FirstRowError(Exception):
    """A failure whose message a person can act on; shown without a traceback."""


class SettingsError(FirstRowError):
    """All that is wrong with the environment, a line each."""


class LabelStudioError(FirstRowError):
    """Label Studio refused, failed or did not answer.

    Args:
        message: what was asked, what came back, what to do.
        status: HTTP status, None when there was no answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ConfigError(FirstRowError):
    """A label config, or its coarse groups, cannot be used."""


class ImageFetchError(FirstRowError):
    """The image of one task cannot be fetched or read."""


class SlowHostError(ImageFetchError):
    """A host did not answer, or not within the time for one file."""


class NotAskedError(SlowHostError):
    """A host that has not answered lately was left alone: this picture was not asked for."""


class FeatureError(FirstRowError):
    """What the network computes of the image of one task cannot be used."""


class MaskError(FirstRowError):
    """A region or mask of one task cannot be read."""


class InUseError(FirstRowError):
    """Somebody has a draft of an annotation: Label Studio would delete it if we changed the annotation."""


class StoreError(FirstRowError):
    """The store cannot be read or written."""


class DetachUnfinished(FirstRowError):
    """Something of us is left in a project; says what to do before the next try."""


class AttachRefused(FirstRowError):
    """A project cannot be attached as it is."""


class NotAttached(FirstRowError):
    """A project has no ML backend of ours: nothing of it may be changed."""


class JobError(FirstRowError):
    """A step of a round cannot be done."""


class RoundOver(FirstRowError):
    """This round must not go on: its project was stopped, or another round has it. Its job ends, and has not failed."""


class StartAnew(FirstRowError):
    """What this round goes by has changed: it ends here, and another one begins. Raised in any job of a round."""


class BenchError(FirstRowError):
    """A benchmark cannot be run or reported as it was ordered."""
