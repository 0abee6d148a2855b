import json
from collections import Counter
from pathlib import Path

from rich.console import Console

from drills.matrix import Configuration, Edge, Left
from drills.report import show, table_of, write_json
from drills.runner import Result
from relay.call import Wire

PLAIN = Configuration(Wire.HTTP_V1, tls=False, edge=Edge.DIRECT)
TLS = Configuration(Wire.REST_V0, tls=True, edge=Edge.NGINX)
RESULTS = [
    Result("upstream-cuts", PLAIN, run="failed: RuntimeError: [x] 1 of 2 replies", note="17 calls met it"),
    Result(
        "worker-killed",
        TLS,
        problems=["supernode-1 ended with exit code 1"],
        lost=Counter(PullObject=2, GetRun=1),
        unclaimed=Counter(PullObject=3),
        abandoned=Counter(PullMessages=1),
        refused=Counter(upstream_down=4),
        complaints=["error call failed {}"],
        extra_seconds=-0.04,
        seconds=41.0,
    ),
]
LEFT = [Left("half-handshakes", PLAIN, "it is about TLS handshakes")]


def shown() -> str:
    console = Console(width=220)
    with console.capture() as capture:
        show(console, RESULTS, LEFT, {str(TLS): "no federation"})
    return capture.get()


def test_a_row_for_each_result() -> None:
    console = Console(width=220)
    with console.capture() as capture:
        console.print(table_of(RESULTS))
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in capture.get().split("\n") if "|" in row
    ]
    assert rows[2] == [
        *("upstream-cuts", "http_v1", "off", "direct", "yes"),
        *("failed: RuntimeError: [x] 1 of 2 replies", "0", "0", "0", "-", ""),
    ]
    assert rows[3] == [
        *("worker-killed", "rest_v0", "on", "nginx", "NO", "complete"),
        *("1 GetRun, 2 PullObject", "3 PullObject", "1 PullMessages", "-0.0", "4 upstream_down"),
    ]


def test_all_that_people_should_know_is_printed() -> None:
    text = shown()
    assert "NOT SURVIVED worker-killed (rest_v0, TLS, nginx): supernode-1 ended with exit code 1" in text
    assert "relay's log worker-killed (rest_v0, TLS, nginx): error call failed {}" in text
    assert "upstream-cuts (http_v1, plain, direct): 17 calls met it" in text
    assert "the run of upstream-cuts may fail: the SuperLink gives a message out once" in text
    assert "left out half-handshakes (http_v1, plain, direct): it is about TLS handshakes" in text
    assert "FAILED rest_v0, TLS, nginx: no federation" in text


def test_json_has_it_all(tmp_path: Path) -> None:
    path = tmp_path / "drills.json"
    write_json(path, RESULTS, LEFT, {})
    report = json.loads(path.read_text())
    assert [result["survived"] for result in report["results"]] == [True, False]
    assert report["results"][1] == {
        "drill": "worker-killed",
        "wire": "rest_v0",
        "tls": True,
        "edge": "nginx",
        "keys": False,
        "superlink": "rest_v0",
        "survived": False,
        "problems": ["supernode-1 ended with exit code 1"],
        "run": "complete",
        "lost": {"PullObject": 2, "GetRun": 1},
        "unclaimed": {"PullObject": 3},
        "abandoned": {"PullMessages": 1},
        "refused": {"upstream_down": 4},
        "complaints": ["error call failed {}"],
        "extra_seconds": -0.04,
        "seconds": 41.0,
        "note": "",
    }
    assert report["left_out"][0]["why"] == "it is about TLS handshakes"
    assert report["failures"] == {}
