"""`nkat report`: what it says for scripts. The page has tests of its own."""

import json
from collections.abc import Callable
from typing import Any


def test_the_document_says_what_limits_the_run(nkat_script: Callable[..., Any], make_run: Callable[..., Any]) -> None:
    run = make_run(gate=0.60)
    code, said, _ = nkat_script("report", run.folder, "--json", "--quiet")
    assert code == 0
    limits = json.loads(said)["limits"]
    assert list(limits) == ["demands", "others", "measured", "gap", "losses", "reach", "diagnoses", "steps"]
    assert limits["demands"][0]["conv_stem"] == "off"
    assert limits["gap"].startswith("Trial 5 is closest to the gate")
    assert limits["diagnoses"][0]["trial"] == 5
    assert limits["steps"][0]["command"].startswith("nkat train")
