"""How a program ends: its code, and one line for what a user can mend."""

import pytest

from mim_scale.errors import exit_with


def test_too_little_memory_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise MemoryError("Unable to allocate 1.57 PiB")

    with pytest.raises(SystemExit) as left:
        exit_with(main)
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "error: this machine has too little memory (Unable to allocate 1.57 PiB); ask for less at once\n"
    )
