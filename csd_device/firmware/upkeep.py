"""What the drive keeps up with beside its commands: wear, warmth, warnings, its own records.

After each command a few integers change. Every `TICK_NS` of the drive's clock the thermal model
moves on and critical warnings are looked at; every `SAVE_COMMANDS` commands, and with a Flush once
`FLUSH_SAVE_COMMANDS` have gone by, the counters are saved. So a daemon that is killed loses the
counts of at most `SAVE_COMMANDS` commands; errors and events are written as they happen.
"""

from typing import Any

from csd_device.firmware import events
from csd_device.firmware.commands import AsyncEventResult
from csd_device.firmware.controller import Controller
from csd_device.firmware.counters import Counters
from csd_device.firmware.event_log import Happening
from csd_device.firmware.flash_health import FlashHealth, flash_health
from csd_device.firmware.identify import FIRMWARE_REVISION
from csd_device.firmware.log_folder import LogFolder
from csd_protocol.units import NS_PER_S

TICK_NS = NS_PER_S
SAVE_COMMANDS = 1024
FLUSH_SAVE_COMMANDS = 32
SPARE_LOW, TEMPERATURE, RELIABILITY, READ_ONLY = 1, 2, 4, 8  # critical warning bits
_EVENTS: dict[int, AsyncEventResult] = {
    SPARE_LOW: events.SPARE,
    TEMPERATURE: events.TEMPERATURE,
    RELIABILITY: events.RELIABILITY,
    READ_ONLY: events.RELIABILITY,  # what NVMe reports it as
}


def restore_counters(folder: LogFolder) -> tuple[Counters, int]:
    """The drive's counters and its error count, zero when nothing usable was saved."""
    if folder.life is None:
        return Counters(), 0
    try:
        error_count = int(folder.life["error_count"])
        return Counters.restore(folder.life["counters"]), error_count
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        folder.damage.append(f"the drive's counters start anew: {error!r}")
        return Counters(), 0


def power_on(controller: Controller) -> None:
    """A power cycle begins; one that was not ended in order is noted."""
    folder, counters = controller.folder, controller.counters
    counters.power_cycles += 1
    note(controller, Happening.POWER_ON, firmware=FIRMWARE_REVISION)
    for damage in folder.damage:
        note(controller, Happening.LOG_DAMAGED, reason=damage)
    if folder.life is not None and not folder.life.get("clean"):
        counters.unsafe_shutdowns += 1
        note(controller, Happening.UNSAFE_SHUTDOWN, power_cycle_ended=counters.power_cycles - 1)
    health = flash_health(controller.ftl, controller.config)
    controller.upkeep.bad_superblocks = health.bad_superblocks
    save(controller, durable=True)


def power_off(controller: Controller) -> None:
    """A power cycle ends in order. Everything written must be on the media."""
    tick(controller, controller.clock.now_ns())
    note(controller, Happening.POWER_OFF)
    save(controller, clean=True, durable=True)


def after_command(controller: Controller, kind: str, start_ns: int, done_ns: int) -> None:
    """One command came in at `start_ns` and is done then; counts it, and does what is due."""
    upkeep = controller.upkeep
    controller.counters.busy_ns += upkeep.busy.add(start_ns, done_ns)
    upkeep.latencies.of(kind).add(done_ns - start_ns)
    upkeep.unsaved_commands += 1
    if start_ns >= upkeep.due_ns or upkeep.unsaved_commands >= SAVE_COMMANDS:
        _catch_up(controller, start_ns)


def after_flush(controller: Controller) -> None:
    """A host made things durable; so does the drive, unless little happened."""
    if controller.upkeep.unsaved_commands >= FLUSH_SAVE_COMMANDS:
        save(controller)


def _catch_up(controller: Controller, now_ns: int) -> None:
    tick(controller, now_ns)
    if controller.upkeep.unsaved_commands >= SAVE_COMMANDS:
        save(controller)


def tick(controller: Controller, now_ns: int) -> None:
    """Temperature and warnings as of now."""
    upkeep, counters = controller.upkeep, controller.counters
    upkeep.due_ns = now_ns + TICK_NS
    worked = controller.time.worked_ns() if controller.time else upkeep.worked_ns
    since = [new - old for new, old in zip(worked, upkeep.worked_ns, strict=True)]
    upkeep.worked_ns = worked
    thermal = upkeep.thermal
    warning_ns, critical_ns = thermal.warning_ns, thermal.critical_ns
    thermal.advance(now_ns, since)
    counters.warning_temp_ns += thermal.warning_ns - warning_ns
    counters.critical_temp_ns += thermal.critical_ns - critical_ns
    check_warnings(controller)


def check_warnings(controller: Controller) -> None:
    """Notes and reports the critical warnings that are new."""
    upkeep = controller.upkeep
    health = flash_health(controller.ftl, controller.config)
    if health.bad_superblocks > upkeep.bad_superblocks:
        note(controller, Happening.BAD_BLOCKS, bad_superblocks=health.bad_superblocks)
    upkeep.bad_superblocks = health.bad_superblocks
    before, upkeep.warnings = upkeep.warnings, _warnings(controller, health)
    for bit in _EVENTS:
        if (upkeep.warnings ^ before) & bit:
            _note_warning(controller, bit, health, begins=bool(upkeep.warnings & bit))


def note_media_error(controller: Controller, detail: str) -> None:
    """Data could not be read or written as it should be."""
    controller.counters.media_errors += 1
    controller.upkeep.media_errors += 1
    note(controller, Happening.MEDIA_ERROR, reason=detail)
    controller.upkeep.warnings |= RELIABILITY
    report(controller, RELIABILITY)
    check_warnings(controller)


def report(controller: Controller, warning: int) -> None:
    """Raises the warning's asynchronous event, unless it is configured off."""
    if controller.features.reported_warnings & warning:
        raise_everywhere(controller, _EVENTS[warning])


def raise_everywhere(controller: Controller, event: AsyncEventResult) -> None:
    for requests in controller.events.values():
        requests.raise_event(event)


def note(controller: Controller, event: Happening, **detail: Any) -> None:
    """Writes to the persistent event log."""
    now_ns = controller.clock.now_ns()
    controller.history.add(
        event,
        power_cycle=controller.counters.power_cycles,
        at_ns=now_ns,
        power_on_ns=controller.counters.power_on_ns + now_ns,
        **detail,
    )
    if controller.folder.is_full:
        records = controller.errors.records() + controller.history.records()
        controller.folder.rewrite(records)


def counters_now(controller: Controller) -> Counters:
    """With what was added since power-on."""
    written_bytes = flash_health(controller.ftl, controller.config).written_bytes
    return controller.counters.now(controller.clock.now_ns(), written_bytes)


def save(controller: Controller, *, clean: bool = False, durable: bool = False) -> None:
    """Counters to the media folder. `clean`: nothing will change any more."""
    controller.upkeep.unsaved_commands = 0
    life = {
        "clean": clean,
        "error_count": controller.errors.error_count,
        "counters": counters_now(controller).as_object(),
    }
    controller.folder.save_life(life, durable)


def _warnings(controller: Controller, health: FlashHealth) -> int:
    """The critical warning bits as of now."""
    upkeep, config = controller.upkeep, controller.config
    threshold = controller.features.temperature_threshold_kelvin
    return (
        SPARE_LOW * (health.available_spare < config.endurance.spare_threshold_percent)
        | TEMPERATURE * (upkeep.thermal.kelvin >= threshold)
        | RELIABILITY * bool(upkeep.media_errors)
        | READ_ONLY * health.is_read_only
    )


def _note_warning(controller: Controller, bit: int, health: FlashHealth, begins: bool) -> None:
    if bit == TEMPERATURE:
        kelvin, over = controller.upkeep.thermal.kelvin, begins
        note(controller, Happening.THERMAL_EXCURSION, kelvin=kelvin, over_threshold=over)
    elif bit == SPARE_LOW and begins:
        spare = health.available_spare
        note(controller, Happening.SPARE_BELOW_THRESHOLD, available_spare=spare)
    elif bit == READ_ONLY and begins:
        note(controller, Happening.READ_ONLY)
    if begins:
        report(controller, bit)
