"""The ServerApp: rounds of train and evaluate on every node, aggregated in the order of the partitions.

With an `output` directory in the run config it writes there
- `history.jsonl`: a line a round, as soon as it is over: {"round", "train_loss", "evaluate_loss", "seconds"};
- `arrays.npz`: the final arrays. The file is whole when it is there, and a run is complete when it is there.
"""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from averaging import model, records

POLL_SECONDS = 0.25  # Grid.send_and_receive asks every 3 s, which would be half the length of a round here
NODES_SECONDS = 120.0

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every round. Raises RuntimeError for missing nodes, a missing reply or a reply with an error."""
    config = context.run_config
    timeout = float(config["round-timeout"])
    output = Path(str(config["output"])) if config["output"] else None
    arrays = model.initial(int(config["seed"]), int(config["array-size"]))

    for number in range(1, int(config["num-server-rounds"]) + 1):
        start = time.monotonic()
        nodes = _wait_for_nodes(grid, int(config["num-nodes"]))
        replies = _ask(grid, MessageType.TRAIN, arrays, nodes, timeout)
        models = [records.arrays_of(reply) for reply in replies]
        arrays = model.average(models, [_examples(reply) for reply in replies])
        train_loss = _mean_loss(replies)
        evaluate_loss = _mean_loss(_ask(grid, MessageType.EVALUATE, arrays, nodes, timeout))
        done = {
            "round": number,
            "train_loss": train_loss,
            "evaluate_loss": evaluate_loss,
            "seconds": round(time.monotonic() - start, 3),
        }
        print(json.dumps(done), flush=True)
        if output is not None:
            _append(output / "history.jsonl", done)

    if output is not None:
        _save(output / "arrays.npz", arrays)


def _wait_for_nodes(grid: Grid, count: int) -> list[int]:
    end = time.monotonic() + NODES_SECONDS
    while len(nodes := sorted(grid.get_node_ids())) < count:
        if time.monotonic() > end:
            raise RuntimeError(f"only {len(nodes)} of {count} nodes came within {NODES_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)
    return nodes


def _ask(grid: Grid, kind: str, arrays: model.Arrays, nodes: list[int], timeout: float) -> list[Message]:
    """Send the arrays to every node and return the replies in the order of their partitions."""
    content = RecordDict({"arrays": records.to_record(arrays)})
    waiting = set(grid.push_messages([Message(content, node, kind) for node in nodes]))
    replies: list[Message] = []
    end = time.monotonic() + timeout
    while waiting:
        if time.monotonic() > end:
            missing = f"{len(waiting)} of {len(nodes)} replies to {kind}"
            raise RuntimeError(f"{missing} did not come within {timeout:.0f} s")
        time.sleep(POLL_SECONDS)
        for reply in grid.pull_messages(waiting):
            if reply.has_error():
                node = reply.metadata.src_node_id
                raise RuntimeError(f"node {node} failed to {kind}: {reply.error.reason}")
            waiting.discard(reply.metadata.reply_to_message_id)
            replies.append(reply)
    replies.sort(key=_partition)
    partitions = [_partition(reply) for reply in replies]
    if len(set(partitions)) != len(partitions):
        raise RuntimeError(f"two nodes hold the same partition: {partitions}")
    return replies


def _partition(reply: Message) -> int:
    return int(reply.content["metrics"]["partition-id"])


def _examples(reply: Message) -> int:
    return int(reply.content["metrics"]["num-examples"])


def _mean_loss(replies: Iterable[Message]) -> float:
    pairs = [(float(reply.content["metrics"]["loss"]), _examples(reply)) for reply in replies]
    return sum(loss * examples for loss, examples in pairs) / sum(examples for _, examples in pairs)


def _append(path: Path, line: dict[str, float]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _save(path: Path, arrays: model.Arrays) -> None:
    with (partial := path.with_suffix(".partial")).open("wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)
