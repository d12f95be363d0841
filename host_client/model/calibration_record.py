"""What `csd calibrate` measured of a model beside frequencies, as it is kept on the drive.

    float32 [layers]               weights
    float32 [layers, neurons + 1]  dropped
    uint32 [layers, neurons]       order

little endian, one behind the other. For models with one FFN a layer.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """weights: [layers], nats that a unit of squared output costs which the layer loses.

    dropped: [layers, neurons + 1], squared output that a layer loses, a token, when it keeps only
    so many neurons. order: [layers, neurons], in which neurons should lie on the drive.
    """

    weights: F32
    dropped: F32
    order: U32

    def check(self, layers: int, neurons: int) -> None:
        """Raises ValueError for another model's, or what nobody measured."""
        if self.order.shape != (layers, neurons) or self.dropped.shape != (layers, neurons + 1):
            raise ValueError(f"a calibration of {self.order.shape} units, not {(layers, neurons)}")
        if self.weights.shape != (layers,):
            raise ValueError(f"weights of {self.weights.shape[0]} layers, not {layers}")
        for measured in (self.weights, self.dropped):
            if not (np.isfinite(measured).all() and (measured >= 0).all()):
                raise ValueError("losses that are negative, or no numbers")
        if not (np.sort(self.order, axis=1) == np.arange(neurons)).all():
            raise ValueError("an order that has a neuron twice")

    def encode(self) -> bytes:
        measured = [self.weights.astype("<f4").tobytes(), self.dropped.astype("<f4").tobytes()]
        return b"".join([*measured, self.order.astype("<u4").tobytes()])


def calibration_bytes(layers: int, neurons: int) -> int:
    """Length of the record."""
    return 4 * layers * (1 + (neurons + 1) + neurons)


def decode_calibration(data: bytes, layers: int, neurons: int) -> Calibration:
    """Raises ValueError for bytes that are none of such a model."""
    if len(data) != calibration_bytes(layers, neurons):
        raise ValueError(f"{len(data)} bytes, not {calibration_bytes(layers, neurons)}")
    ends = np.cumsum([layers, layers * (neurons + 1)])
    weights, dropped, order = np.split(np.frombuffer(data, "<u4"), ends)
    made = Calibration(
        weights.view("<f4"),
        dropped.view("<f4").reshape(layers, neurons + 1),
        order.reshape(layers, neurons),
    )
    made.check(layers, neurons)
    return made
