"""Our definitions as metrics of the engine's endpoint."""

import itertools
from collections.abc import Collection
from typing import Any

from sglang_ext.adapter.metric_definitions import METRICS, PREFIX, Definition, Kind, Where
from sglang_ext.errors import StartupError


class Exported:
    """Metrics of this process. All values of all labels are there from the start, at 0.

    Args:
        labels: of the engine, with the values of this process.
        where: kinds of servers that this one is.

    Import of prometheus_client must wait until the engine has set
    ``PROMETHEUS_MULTIPROC_DIR``, so it happens on construction.

    Raises:
        StartupError: a label that was asked for has the name of one of ours.
    """

    def __init__(self, labels: dict[str, Any], where: Collection[Where]) -> None:
        own = sorted({label for definition in METRICS for label in definition.labels})
        if taken := [label for label in own if label in labels]:
            raise StartupError(
                f"--extra-metric-labels {taken[0]}={labels[taken[0]]!r}: metrics of the cache have "
                f"a label of this name; allowed are others than {', '.join(own)}"
            )
        self._labels = labels
        self._children: dict[tuple[str, ...], Any] = {}
        self._metrics: dict[str, Any] = {}
        for definition in METRICS:
            if definition.where in where:
                self._metrics[definition.name] = _made(definition, list(labels))
                for values in itertools.product(*definition.labels.values()):
                    self.child(definition.name, *values)

    def child(self, name: str, *values: str) -> Any:
        """A metric with values of its own labels, in their order. To look one up takes longer than
        to set it, so it is done once."""
        key = (name, *values)
        if key not in self._children:
            own = next(d for d in METRICS if d.name == name).labels
            labels = {**self._labels, **dict(zip(own, values, strict=True))}
            self._children[key] = self._metrics[name].labels(**labels)
        return self._children[key]


def _made(definition: Definition, labels: list[str]) -> Any:
    from prometheus_client import Counter, Gauge, Histogram

    name, text = PREFIX + definition.name, definition.text.replace("`", "")
    names = [*labels, *definition.labels]
    if definition.kind is Kind.COUNTER:
        return Counter(name, text, names)
    if definition.kind is Kind.GAUGE:
        return Gauge(name, text, names, multiprocess_mode="mostrecent")
    return Histogram(name, text, names, buckets=definition.buckets)
