"""What cannot work is refused through the command line: a clear message and its exit status."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from real_model import (
    BUDGET,
    DEADLINE_S,
    MODEL,
    SCRIPTS,
    CommandLine,
    Device,
    Reference,
    flip_bit,
)

from csd_protocol.csd.v1.csd_pb2_grpc import ControllerStub
from csd_protocol.packed import Role
from csd_protocol.status import Status
from host_client.driver import CommandFailed, Drive, StageTarget, entries
from host_client.model.catalog import open_model
from host_client.model.source import Source

USAGE, MODEL_REFUSED, DRIVE_REFUSED, REQUEST_REFUSED, DAMAGED = 2, 3, 4, 5, 6
ASK = ("generate", MODEL, "--prompt", "The capital of France is", "--raw", "--max-new-tokens", "2")


# ---- models on disk --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param(0.0, id="empty"),
        pytest.param(2e-7, id="in-the-header"),
        pytest.param(1e-3, id="in-the-metadata"),
        pytest.param(0.5, id="in-a-tensor"),
        pytest.param(0.999999, id="at-the-end"),
    ],
)
def test_torn_gguf(
    csd: CommandLine, device: Device, source: Source, tmp_path: Path, kept: float
) -> None:
    torn = tmp_path / "torn.gguf"
    shutil.copyfile(source.path, torn)
    with torn.open("r+b") as file:
        file.truncate(int(source.path.stat().st_size * kept))
    message = csd("pack", torn, drive=device).refused(MODEL_REFUSED)
    assert f"error: {torn} ({torn.stat().st_size} bytes) is damaged" in message
    assert "torn" not in csd("models", drive=device).stdout


def linked(folder: Path, target: Path, *without: str) -> Path:
    """A folder like `folder`, lacking some files."""
    target.mkdir()
    for file in folder.iterdir():
        if file.name not in without:
            (target / file.name).symlink_to(file)
    return target


def test_missing_shard(
    csd: CommandLine, device: Device, reference: Reference, tmp_path: Path
) -> None:
    shard = sorted(reference.folder.glob("*.safetensors"))[1].name
    folder = linked(reference.folder, tmp_path / "lacking", shard)
    assert shard in csd("pack", folder, drive=device).refused(MODEL_REFUSED)
    assert "lacking" not in csd("models", drive=device).stdout


def test_unknown_family(
    csd: CommandLine, device: Device, reference: Reference, tmp_path: Path
) -> None:
    folder = linked(reference.folder, tmp_path / "stranger", "config.json")
    config = json.loads((reference.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
    message = csd("pack", folder, drive=device).refused(MODEL_REFUSED)
    assert "gpt_neox" in message
    assert "llama" in message


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", "[bold]name[/]"])
def test_unknown_model(csd: CommandLine, device: Device, name: str) -> None:
    for command in (("pack", name), ("generate", name, "--prompt", "x")):
        message = csd(*command, drive=device).refused(MODEL_REFUSED)
        assert f"error: {name} does not exist" in message


def test_a_file_of_another_kind(csd: CommandLine, device: Device, tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(64))
    message = csd("pack", file, drive=device).refused(MODEL_REFUSED)
    assert "neither a folder nor a .gguf file" in message


# ---- models on the drive -----------------------------------------------------------------------


def test_not_packed(csd: CommandLine, tmp_path: Path) -> None:
    empty = Device(tmp_path / "empty.csd", "tiny")
    through_drive = ("bench", "quality", MODEL, "--through-drive")
    try:
        for command in (ASK, ("plan", MODEL), ("remove", MODEL), through_drive):
            message = csd(*command, drive=empty).refused(MODEL_REFUSED)
            assert f"no model '{MODEL}' on the drive (models on it: none)" in message
    finally:
        empty.close()


def test_drive_too_small(csd: CommandLine, tmp_path: Path) -> None:
    small = tmp_path / "small.toml"
    small.write_text(preset("tiny").replace("blocks_per_plane = 288", "blocks_per_plane = 40"))
    device = Device(tmp_path / "small.csd", str(small))
    try:
        message = csd("pack", MODEL, drive=device).refused(MODEL_REFUSED)
        assert re.search(rf"{MODEL} needs [\d.]+ MiB .* the drive of [\d.]+ MiB has", message)
        with Drive.connect(device.address) as drive:
            assert csd("models", drive=device).status == 0
            assert not any(drive.read(0, drive.block_bytes))
    finally:
        device.close()


def test_other_files_under_the_same_name(
    csd: CommandLine, device: Device, reference: Reference, tmp_path: Path
) -> None:
    folder = linked(reference.folder, tmp_path / MODEL)
    message = csd("pack", folder, drive=device).refused(MODEL_REFUSED)
    assert f"{MODEL} on the drive (complete) was packed from other files" in message


# ---- requests ----------------------------------------------------------------------------------


def test_budget_too_small(csd: CommandLine, device: Device) -> None:
    """The smallest one that is named then works, and one byte less does not."""
    message = csd(*ASK, "--dram", "5MiB", drive=device).refused(REQUEST_REFUSED)
    assert "a budget of 5.0 MiB cannot work" in message
    named = re.search(r"\((\d+) bytes\)", message)
    assert named is not None
    smallest = int(named[1])
    run = csd(*ASK, "--dram", smallest, "--json", drive=device)
    assert run.answer["host_weights_peak_bytes"] <= smallest
    assert " Paris" in run.answer["text"]
    csd(*ASK, "--dram", smallest - 1, drive=device).refused(REQUEST_REFUSED)


@pytest.mark.parametrize("budget", ["lots", "inf%", "nan%", "-5%", "-5MiB"])
def test_no_budget(csd: CommandLine, device: Device, budget: str) -> None:
    message = csd("plan", MODEL, "--dram", budget, drive=device).refused(REQUEST_REFUSED)
    assert f"{budget!r} is neither a size like 5GiB nor a share of the weights" in message


@pytest.mark.parametrize("quality", ["good", "7", "0", "nan"])
def test_no_quality(csd: CommandLine, device: Device, quality: str) -> None:
    message = csd(*ASK, "--quality", quality, drive=device).refused(REQUEST_REFUSED)
    assert f"quality {quality!r} is neither 'exact' nor a kept fraction" in message


def test_context_too_short(csd: CommandLine, device: Device) -> None:
    message = csd(*ASK, "--context", 3, drive=device).refused(REQUEST_REFUSED)
    assert "the plan made room for 3" in message


def test_kept_fraction_without_a_predictor(
    csd: CommandLine, device: Device, reference: Reference
) -> None:
    """The folder was packed without calibration, and what was loaded since belongs to another."""
    with Drive.connect(device.address) as drive:
        models = {entry["model"] for entry in drive.programs()}
    name = reference.folder.name
    assert name not in models
    asked = ("generate", reference.folder, "--prompt", "x", "--quality", "0.5")
    message = csd(*asked, drive=device).refused(REQUEST_REFUSED)
    assert f"needs a predictor for {name}" in message
    assert f"csd predictor build rollout {name}" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", MODEL),
        ("generate", MODEL, "--prompt", "x", "--max-new-tokens", "0"),
        ("generate", MODEL, "--prompt", "x", "--reader", "telepathy"),
        ("no-such-command",),
        ("log", "cabin"),
        ("identify", "--drive", "nonsense"),
        ("identify", "--drive", "unix:"),
    ],
    ids=" ".join,
)
def test_command_line_that_does_not_parse(
    csd: CommandLine, device: Device, arguments: tuple[str, ...]
) -> None:
    assert "Usage: csd" in csd(*arguments, drive=device).refused(USAGE)


# ---- the drive and the way to it ---------------------------------------------------------------


def test_nobody_listens(csd: CommandLine, tmp_path: Path) -> None:
    for address in (f"unix:{tmp_path}/s", "127.0.0.1:1"):
        message = csd("identify", "--drive", address).refused(DRIVE_REFUSED)
        assert f"error: no drive answers at {address}" in message
    assert "no drive answers" in csd(*ASK, drive="127.0.0.1:1").refused(DRIVE_REFUSED)


def test_window_missing(csd: CommandLine, own_device: Device) -> None:
    own_device.window.unlink()
    message = csd(*ASK, drive=own_device).refused(DRIVE_REFUSED)
    assert f"the drive's window {own_device.window} cannot be opened" in message
    assert "No such file or directory" in message
    assert csd("models", drive=own_device).status == 0


def test_other_protocol_version(csd: CommandLine, tmp_path: Path) -> None:
    """A daemon of the next major version, for which this host's Connect is the wrong one."""
    program = (
        "import csd_protocol; csd_protocol.PROTOCOL_MAJOR = 2; "
        "from csd_device.service.cli import main; main()"
    )
    address = f"unix:{tmp_path / 's'}"
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", program, "serve", "--drive", "tiny"),
            *("--media", str(tmp_path / "next.csd"), "--listen", address),
        ],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"ready: ")
    try:
        said = "the host speaks protocol 1.0, this drive 2.0: install the same version"
        for command in (ASK, ("identify",)):
            assert said in csd(*command, drive=address).refused(DRIVE_REFUSED)
        hello = entries.connect("host", "id", 0).entry
        with grpc.insecure_channel(address) as channel:
            (answer,) = ControllerStub(channel).QueuePair(iter([hello]), timeout=DEADLINE_S)
        assert (answer.status.sct, answer.status.sc) == (
            Status.PROTOCOL_VERSION.sct,
            Status.PROTOCOL_VERSION.sc,
        )
    finally:
        process.terminate()
        process.wait(DEADLINE_S)
        process.stdout.close()


def test_unit_whose_crc_does_not_match(csd: CommandLine, own_device: Device) -> None:
    """One bit of one neuron turns over on the flash while the daemon is down."""
    layer, unit = 12, 700
    with Drive.connect(own_device.address) as drive:
        model_id, model = open_model(drive, MODEL)
        site = model.find(Role.FFN, layer)
        neuron = drive.read(site.offset_bytes + unit * site.unit_bytes, site.unit_bytes)
    own_device.kill()
    flip_bit(own_device.media / "nand.img", neuron)
    own_device.restart()
    with Drive.connect(own_device.address) as drive:
        pending = drive.stage(model_id, [StageTarget(site.site, all=True)])
        with pytest.raises(CommandFailed, match=f"{site.name}.*{unit}|{unit}.*{site.name}") as no:
            pending.result()
        assert (no.value.sct, no.value.sc) == (0x2, 0x82)
    for quality in ("exact", "0.9"):
        run = csd(*ASK, "--dram", BUDGET, "--quality", quality, drive=own_device)
        message = run.refused(DAMAGED)
        assert (
            f"{MODEL} has lost unit {unit} of {site.name}: unreadable in its only copy" in message
        )
        assert "--replace --copies 2" in message
    assert str(unit) in csd("log", "error", "--json", drive=own_device).stdout


def test_not_a_program(csd: CommandLine, device: Device, tmp_path: Path) -> None:
    file = tmp_path / "[red]noise.safetensors"
    file.write_bytes(bytes(range(256)))
    message = csd("predictor", "load", file, "--program", 9, drive=device).refused(DRIVE_REFUSED)
    assert "Load Program" in message
    written = csd("predictor", "build", "frequency", MODEL, "--to", "/no/such", drive=device)
    assert "/no/such" in written.refused(1)


# ---- the daemon ----------------------------------------------------------------------------------


def preset(name: str) -> str:
    import csd_device

    return (Path(csd_device.__file__).parent / "presets" / f"{name}.toml").read_text()


def serve(media: Path, drive: str, address: str) -> str:
    """What `csd-device serve` says when it refuses."""
    run = subprocess.run(
        [
            *(str(SCRIPTS / "csd-device"), "serve", "--drive", drive),
            *("--media", str(media), "--listen", address),
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert run.returncode == 1, run
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
    return " ".join(run.stderr.split())


def test_second_daemon_on_the_same_media(device: Device, tmp_path: Path) -> None:
    message = serve(device.media, "edge-gen5", f"unix:{tmp_path / 's'}")
    assert message.startswith("refused: ")
    assert str(device.process.pid) in message


def test_media_of_another_geometry(own_device: Device) -> None:
    own_device.end_process()
    message = serve(own_device.media, "end-gen4", own_device.address)
    assert message.startswith("refused: ")
    assert "channels" in message
    own_device.restart()
