"""What programs share: a table of layers, read from the file, and scores that follow the input."""

from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NoReturn, Protocol, TypeVar

from csd_device.compute.layer_names import known_layer
from csd_device.compute.program import F32, NO_COST, U32, Cost, ProgramInput, Run
from csd_device.compute.tensor_file import TensorFile, invalid
from csd_device.errors import CommandError
from csd_protocol.packed import Role
from csd_protocol.program_file import ROLES, Key, ProgramKind
from csd_protocol.status import Status


class LayerOfUnits(Protocol):
    """What a program knows of one layer."""

    @property
    def units(self) -> int: ...


Layer = TypeVar("Layer", bound=LayerOfUnits)


class LayeredProgram(Generic[Layer]):
    """A program that remembers nothing and corrects nothing; see `Program`.

    A kind fills `_layers` and says what `score` and `cost` are.
    """

    kind: ClassVar[ProgramKind]
    memory_bytes = 0
    kv_groups = 0

    def __init__(self, file: TensorFile) -> None:
        """Raises CommandError (Invalid Program Data) for a role that no program has."""
        self.model = file.metadata[Key.MODEL]
        self.role = _role(file)
        self.dram_bytes = file.size_bytes
        self._layers: dict[int, Layer] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self._layers)

    def layer(self, layer: int) -> Layer:
        """Raises CommandError (Invalid Field) for a layer that it does not know."""
        return known_layer(self._layers, layer)

    def unit_count(self, layer: int) -> int:
        return self.layer(layer).units

    def new_memory(self) -> Any:
        return None

    def observe(self, layer: int, units: U32, memory: Any) -> None:
        """Nothing follows from it."""

    def begin(self, given: ProgramInput, memory: Any = None) -> Run:
        return _DirectRun(self, given.hidden)

    def score(self, layer: int, hidden: F32) -> F32:
        """Scores float32 [units] for hidden float32 [rows, hidden]."""
        raise NotImplementedError

    def cost(self, layer: int, rows: int) -> Cost:
        """What `score` takes for `rows` hidden states."""
        raise NotImplementedError

    def correct(self, layer: int, inputs: F32, computed: U32) -> tuple[F32, Cost]:
        self.refuse_correction()

    def refuse_correction(self) -> NoReturn:
        """Raises CommandError (Invalid Field)."""
        raise CommandError(
            Status.INVALID_FIELD,
            f"this program ({self.kind}, of {self.model}) has no down rows and cannot correct",
        )


@dataclass(frozen=True, slots=True)
class _DirectRun:
    """Each layer scored by itself."""

    program: LayeredProgram[Any]
    hidden: F32

    def score(self, layer: int) -> tuple[F32, Cost]:
        scores = self.program.score(layer, self.hidden)
        return scores, self.program.cost(layer, self.hidden.shape[0])

    def remember(self, layer: int) -> Cost:
        """Nothing is remembered."""
        self.program.layer(layer)
        return NO_COST


def check_width(values: F32, width: int) -> None:
    """Raises CommandError (Invalid Field) unless values are [rows, width] with a row at least."""
    if values.ndim != 2 or values.shape[0] == 0 or values.shape[1] != width:
        raise CommandError(
            Status.INVALID_FIELD, f"input {list(values.shape)}; the program takes [rows, {width}]"
        )


def _role(file: TensorFile) -> Role:
    text = file.metadata.get(Key.ROLE, Role.FFN.value)
    if text not in ROLES:
        raise invalid(f"{Key.ROLE} is {text!r}; programs speak for {', '.join(ROLES)}")
    return Role(text)
