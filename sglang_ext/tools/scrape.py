"""What a running server exports at ``/metrics``."""

import httpx
from prometheus_client.parser import text_string_to_metric_families


class ScrapeError(Exception):
    """The server tells nothing; why, in one line."""


_RANKS = ("tp_rank", "pp_rank")


class Metrics:
    """What a server exports. A sample without the number of a rank is of the first one.

    Args:
        text: of ``/metrics``.

    Raises:
        ValueError: it is something else.
    """

    def __init__(self, text: str) -> None:
        self._samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found = self._samples.setdefault(sample.name, [])
                found.append((sample.labels, sample.value))

    def __contains__(self, name: str) -> bool:
        return name in self._samples

    def total(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that have these labels, over all ranks that export it."""
        return sum(value for found, value in self._samples.get(name, ()) if _has(found, labels))

    def mean(self, name: str) -> float:
        """Of a gauge that each rank exports."""
        values = [value for _, value in self._samples.get(name, ())]
        return sum(values) / len(values) if values else 0.0

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """Sums as ``total`` gives them, by the values of one more label."""
        sums: dict[str, float] = {}
        for found, value in self._samples.get(name, ()):
            if label in found and _has(found, labels):
                sums[found[label]] = sums.get(found[label], 0.0) + value
        return sums

    def event(self, name: str) -> float:
        """How often something has happened in the cache."""
        return self.total("sglang_ext:cache_events_total", event=name)


def _has(found: dict[str, str], labels: dict[str, str]) -> bool:
    return all(
        found.get(name, "0" if name in _RANKS else None) == value for name, value in labels.items()
    )


def fetch(address: str, key: str | None, timeout_s: float) -> Metrics:
    """What a server exports now.

    Raises:
        ScrapeError: nothing of ours.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    place = f"{address}/metrics"
    try:
        answer = httpx.get(place, headers=headers, timeout=timeout_s, follow_redirects=True)
    except httpx.HTTPError as error:
        raise ScrapeError(f"{place} did not answer: {error!r}") from error
    if answer.status_code != httpx.codes.OK:
        raise ScrapeError(
            f"{place} answered with status {answer.status_code}; the server needs --enable-metrics"
        )
    try:
        metrics = Metrics(answer.text)
    except ValueError as error:
        said = f"{place} answered with no metrics; the server needs --enable-metrics"
        raise ScrapeError(said) from error
    if "sglang_ext:kv_bytes" not in metrics:
        raise ScrapeError(
            f"{place} has no metrics of this cache; the server needs --enable-metrics and "
            "SGLANG_EXT_SWA_HICACHE=1"
        )
    return metrics
