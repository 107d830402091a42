"""Files are replaced whole, and what is no regular file is written through."""

import os
import threading
from pathlib import Path

import pytest

from grpo_cli.core.errors import CountdownError
from grpo_cli.core.files import check_writable, write

pytestmark = pytest.mark.faults


def test_a_file_is_replaced_whole_and_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    write(path, b"old")
    path.chmod(0o640)
    with path.open("rb") as reader:
        write(path, b"new")
        assert (reader.read(), path.read_bytes()) == (b"old", b"new")
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grpo_cli.core.files.sync", full)
    with pytest.raises(CountdownError, match=r"cannot write `.*file`: No space left on device") as caught:
        write(path, b"new")
    assert caught.value.exit_code == 1
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_written_through_and_stays(tmp_path: Path, exists: bool) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    if exists:
        target.write_bytes(b"old")
    with pytest.raises(CountdownError, match="link` exists"):
        check_writable(link, overwrite=False)
    check_writable(link, overwrite=True)
    write(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"


def test_a_fifo_is_written_through_and_stays(tmp_path: Path) -> None:
    path, read = tmp_path / "fifo", list[bytes]()
    os.mkfifo(path)
    check_writable(path, overwrite=False)
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    write(path, b"new")
    reader.join(timeout=5)
    assert read == [b"new"] and path.is_fifo()


@pytest.mark.parametrize(("device", "said"), [("/dev/null", None), ("/dev/full", "No space left on device")])
def test_a_device_is_written_through_and_stays(device: str, said: str | None) -> None:
    check_writable(Path(device), overwrite=False)
    if said is None:
        write(Path(device), b"new")
    else:
        with pytest.raises(CountdownError, match=said):
            write(Path(device), b"new")
    assert Path(device).is_char_device()


@pytest.mark.parametrize(("name", "said"), [("x" * 300, "File name too long"), ("a\0", "null byte")])
def test_a_name_that_no_file_can_have_is_refused_before_any_work(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(CountdownError, match=said) as caught:
        check_writable(tmp_path / name, overwrite=True)
    assert caught.value.exit_code == 2
