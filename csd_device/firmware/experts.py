"""Which experts of a mixture a command's targets are staged for: a program's top ones."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from csd_device.errors import CommandError
from csd_device.firmware.commands import Target
from csd_device.firmware.modelled_time import CommandTime
from csd_device.firmware.models import LoadedModel
from csd_device.firmware.prediction import Prediction
from csd_device.firmware.selection import select_top
from csd_protocol.packed import Role
from csd_protocol.status import Status

U32 = npt.NDArray[np.uint32]


def top_experts(
    model: LoadedModel,
    targets: Iterable[Target],
    prediction: Prediction,
    count: int,
    time: CommandTime,
) -> dict[int, U32]:
    """By layer, the `count` experts that the program finds likeliest, ascending.

    Of each layer that the targets name experts of; the program runs once for each. Raises
    CommandError: No Such Site, Invalid Field for a count of 0, and what `Prediction.scores` raises.
    """
    if count < 1:
        raise CommandError(Status.INVALID_FIELD, "the top 0 experts of a layer; 1 is the least")
    sites = [model.site(target.site) for target in targets]
    layers = sorted({site.layer for site in sites if site.expert >= 0})
    routers = [model.find(Role.ROUTER, layer) for layer in layers]
    return {
        router.layer: select_top(prediction.scores(router, time), min(count, router.count))
        for router in routers
    }
