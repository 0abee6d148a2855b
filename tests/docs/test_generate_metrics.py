"""The list of metrics is the one that the modules make."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "metrics.md"


def test_every_metric_that_a_module_declares_is_listed() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE))
    declared = set()
    for path in (ROOT / "relay").rglob("*.py"):
        for kind, name in re.findall(r"\b(Counter|Gauge|Histogram)\(\s*\"(relay_\w+)\"", path.read_text()):
            declared.add(f"{name}_total" if kind == "Counter" else name)
    assert declared <= listed
    assert len(declared) > 20


def test_the_page_is_up_to_date() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate_metrics.py", "--check"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (made.returncode, made.stdout) == (0, "")
