"""The ClientApp: trains and evaluates on the partition that the config of its node names."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from averaging import model, records

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the arrays of the message; reply with the new ones and the metrics."""
    seed, partition_id = _seed_and_partition(context)
    features, targets = model.split(model.load(seed, partition_id), train=True)
    arrays = model.train(records.arrays_of(message), features, targets, partition_id)
    metrics = _metrics(model.loss(arrays, features, targets), len(targets), partition_id)
    content = RecordDict({"arrays": records.to_record(arrays), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the arrays of the message; reply with the metrics."""
    seed, partition_id = _seed_and_partition(context)
    features, targets = model.split(model.load(seed, partition_id), train=False)
    metrics = _metrics(model.loss(records.arrays_of(message), features, targets), len(targets), partition_id)
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


def _seed_and_partition(context: Context) -> tuple[int, int]:
    node = context.node_config
    partition_id, partitions = int(node["partition-id"]), int(node["num-partitions"])
    if not 0 <= partition_id < partitions:
        raise ValueError(f"partition-id is {partition_id}, but num-partitions is {partitions}")
    return int(context.run_config["seed"]), partition_id


def _metrics(loss: float, examples: int, partition_id: int) -> MetricRecord:
    return MetricRecord({"loss": loss, "num-examples": examples, "partition-id": partition_id})
