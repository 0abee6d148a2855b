"""Arrays to and from Flower's records."""

from flwr.app import Array, ArrayRecord, Message

from averaging.model import Arrays


def to_record(arrays: Arrays) -> ArrayRecord:
    """The arrays as an ArrayRecord."""
    return ArrayRecord({name: Array(values) for name, values in arrays.items()})


def arrays_of(message: Message) -> Arrays:
    """The arrays that a message carries under "arrays"."""
    return {name: array.numpy() for name, array in message.content["arrays"].items()}
