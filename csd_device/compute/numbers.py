"""Numbers in a program file's metadata: texts, each read within stated bounds."""

from csd_device.compute.tensor_file import TensorFile, invalid
from csd_protocol.program_file import ACTIVATIONS, Key


def whole_number(file: TensorFile, key: Key, least: int, most: int) -> int:
    """Raises CommandError (Invalid Program Data) unless it is a whole number within the bounds."""
    text = file.metadata.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise invalid(f"metadata {key} is {text!r}; wanted a whole number from {least} to {most}")
    return int(text)


def number(file: TensorFile, key: Key, above: float, most: float) -> float:
    """Raises CommandError (Invalid Program Data) unless it lies above `above` and not beyond
    `most`.
    """
    text = file.metadata.get(key, "")
    try:
        value = float(text.encode("ascii"))
    except ValueError as error:
        raise invalid(f"metadata {key} is {text!r}; wanted a number") from error
    if not above < value <= most:
        raise invalid(f"metadata {key} is {text!r}; wanted a number above {above}, at most {most}")
    return value


def rms_eps(file: TensorFile) -> float:
    """Epsilon of the program's RMSNorms."""
    return number(file, Key.RMS_EPS, 0.0, 1.0)


def check_activation(file: TensorFile) -> None:
    """Raises CommandError (Invalid Program Data) for one that this drive does not compute."""
    if file.metadata.get(Key.ACTIVATION) not in ACTIVATIONS:
        raise invalid(f"{Key.ACTIVATION} must be one of {ACTIVATIONS}")
