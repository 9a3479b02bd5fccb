"""The helpers of the tests are tools too: they must fail when they should, and harm nobody."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RawImage
from tests.helpers.nbd_raw import RawClient
from tests.helpers.support import run, spawn, tool_version, wait_for_socket, why_unusable

LISTENER = """
import socket, sys
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    print("ready", flush=True)
    sys.stdin.close()
    while True:
        listener.accept()[0].close()
"""
SHRUGS_AT_SIGTERM = "trap '' TERM; echo deaf; while :; do sleep 0.1; done"


def test_a_missing_or_old_tool_is_named_in_a_sentence() -> None:
    assert why_unusable("no-such-tool") == "no-such-tool is not installed; run tools/setup.sh"
    assert why_unusable("python3") is None
    assert why_unusable("python3", "3.0") is None
    assert (
        why_unusable("python3", "99.1")
        == f"python3 is {tool_version('python3')}, and this needs 99.1 or newer"
    )


def test_versions_are_compared_as_numbers() -> None:
    newest, *rest = tool_version("python3").split(".")
    assert why_unusable("python3", f"{newest}.{'.'.join(rest)}") is None
    assert why_unusable("python3", f"{newest}.1{'0' * 3}") is not None


def test_run_answers_what_was_said() -> None:
    done = run("sh", "-c", "cat; echo $WORD >&2; exit 3", check=False, env={"WORD": "loud"}, stdin="quiet")
    assert (done.returncode, done.stdout, done.stderr) == (3, "quiet", "loud\n")


def test_run_fails_with_all_that_was_said() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"(?s)exit code 3.*out here.*err here"):
        run("sh", "-c", "echo out here; echo err here >&2; exit 3")


def test_run_fails_when_it_hangs() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"(?s)still running after 2 s.*said this"):
        run("sh", "-c", "echo said this; exec sleep 30", timeout=2)


def test_spawn_ends_its_child_and_no_other() -> None:
    with subprocess.Popen(["sleep", "30"]) as bystander, spawn("sleep", "30") as child:
        assert child.process.poll() is None
        stopped = child
        assert bystander.poll() is None
        bystander.terminate()
    assert stopped.process.returncode == -15


def test_spawn_ends_a_child_that_will_not_hear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.helpers.support.PATIENCE_SECONDS", 0.2)
    with spawn("sh", "-c", SHRUGS_AT_SIGTERM) as child:
        child.wait_for_line("deaf", timeout=10)
    assert child.process.returncode == -9


def test_a_line_is_awaited() -> None:
    with spawn("sh", "-c", "echo one; echo port 4711; exec sleep 30") as child:
        assert child.wait_for_line(r"port (\d+)").group(1) == "4711"


def test_a_line_that_never_comes_fails_at_once_when_the_child_ends() -> None:
    with (
        pytest.raises(pytest.fail.Exception, match=r"(?s)never said 'ready'.*no luck"),
        spawn("sh", "-c", "echo no luck >&2") as child,
    ):
        child.wait_for_line("ready")


def test_all_output_is_there_after_the_end() -> None:
    with spawn("sh", "-c", "seq 20000; seq 20000 >&2") as child:
        assert child.wait() == 0
        assert child.stdout == child.stderr == "".join(f"{n}\n" for n in range(1, 20001))


def test_output_need_not_be_text() -> None:
    with spawn("sh", "-c", r"printf 'nbdkit: \256\n' >&2; echo done") as child:
        assert child.wait() == 0
        assert (child.stdout, child.stderr) == ("done\n", "nbdkit: \\xae\n")


def test_a_process_left_behind_is_noticed(tmp_path: Path) -> None:
    """One that ends once it reads a line."""
    line = tmp_path / "line"
    os.mkfifo(line)
    with spawn("sh", "-c", f"read word < '{line}' & echo gone") as child:
        with pytest.raises(pytest.fail.Exception, match="left behind"):
            child.wait(timeout=2)
        line.write_text("go\n")


def test_a_socket_is_awaited(tmp_path: Path) -> None:
    path = tmp_path / "listener.sock"
    with spawn(sys.executable, "-c", LISTENER, path) as child:
        wait_for_socket(path, child)
        assert path.is_socket()


def test_a_server_that_dies_before_it_listens_fails_the_wait(tmp_path: Path) -> None:
    with (
        pytest.raises(pytest.fail.Exception, match=r"(?s)ended with 7 before it listened.*no port"),
        spawn("sh", "-c", "echo no port >&2; exit 7") as child,
    ):
        wait_for_socket(tmp_path / "none.sock", child)


def test_raw_images_are_sparse_and_hold_their_data(raw_image: RawImage) -> None:
    image = raw_image(1 << 30, [(4096, b"here"), ((1 << 30) - 3, b"end")])
    status = image.stat()
    assert status.st_size == 1 << 30
    assert status.st_blocks * 512 < 1 << 20
    with image.open("rb") as reader:
        assert os.pread(reader.fileno(), 6, 4095) == b"\0here\0"
        assert os.pread(reader.fileno(), 9, (1 << 30) - 3) == b"end"


SKIPPING = """
import pytest

def test_fine(): pass

@pytest.mark.skip(reason="the moon is full")
def test_skipped(): pass

@pytest.mark.xfail
def test_expected_to_fail(): assert False
"""
MODULE_SKIPPING = "import pytest\npytest.skip('no moon at all', allow_module_level=True)\n"


def _outcome(folder: Path, source: str, no_skip: str) -> tuple[int, str]:
    (folder / "test_sample.py").write_text(source)
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    environment = {"LMDBITMAP_NO_SKIP": no_skip, "PYTHONPATH": os.fspath(Path(__file__).parent.parent)}
    done = run(sys.executable, "-m", "pytest", *options, folder, check=False, env=environment)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("source", "reason"), [(SKIPPING, "the moon is full"), (MODULE_SKIPPING, "no moon at all")]
)
def test_in_ci_a_skip_is_a_failure_with_its_reason(tmp_path: Path, source: str, reason: str) -> None:
    code, said = _outcome(tmp_path, source + "\ndef test_more(): pass\n", no_skip="1")
    assert code != 0
    assert f"test_sample.py: {reason}" in said or f"test_sample.py::test_skipped: {reason}" in said


def test_elsewhere_a_skip_is_just_a_skip(tmp_path: Path) -> None:
    code, said = _outcome(tmp_path, SKIPPING, no_skip="")
    assert code == 0
    assert "1 passed, 1 skipped, 1 xfailed" in said


def test_a_client_that_finds_nobody_leaves_no_socket_to_the_garbage_collector(tmp_path: Path) -> None:
    """Which would warn of it in the middle of another test."""
    with pytest.raises(FileNotFoundError):
        RawClient.connect(str(tmp_path / "none"))
    gc.collect()
