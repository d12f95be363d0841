"""What can be wrong with a model, on disk or on a drive: what, where, and what to do."""


class ModelError(Exception):
    """A model that cannot be read, packed or opened, through no fault of the program."""


class ModelNotFound(ModelError):
    """Nothing of that name on disk."""


class NotPacked(ModelError):
    """No complete model of that name on the drive."""


class TornFile(ModelError):
    """A file that ends early, or whose bytes are not what its format says."""


class MissingShard(ModelError):
    """A file of a sharded checkpoint is not there."""


class MissingTensor(ModelError):
    """A weight that the model's config calls for is not in its files."""


class ShapeMismatch(ModelError):
    """A weight whose shape is not what the model's config says."""


class MissingConfig(ModelError):
    """No config.json beside the weights."""


class InvalidConfig(ModelError):
    """A config that lacks a field, or whose fields contradict each other."""


class UnknownFamily(ModelError):
    """A `model_type` that the table of families does not have."""


class UnsupportedModel(ModelError):
    """A known family, with an option or a number format that is not supported."""


class ValueOverflow(ModelError):
    """Weights that the 16-bit type, a scale or a row of 12 bits cannot hold."""


class DriveTooSmall(ModelError):
    """No run of free blocks on the drive is long enough."""


class DifferentModel(ModelError):
    """Another model lies on the drive under that name."""


class DamagedRecord(ModelError):
    """A directory, manifest or table on the drive that does not match its checksum."""


class PackedBefore(ModelError):
    """A model that an earlier version packed, without room for what is to be stored with it."""


class NotCalibrated(ModelError):
    """A packed model of which was never measured what is needed."""
