"""The console script in this process."""

import sys
from collections.abc import Callable

import pytest

from nkat_ray.cli import main

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def nkat_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `nkat` with the given words; returns exit code, standard output and standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nkat", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, said.out, said.err

    return run
