"""What a server's metrics say."""


def metric(text: str, name: str, label: str = "") -> float:
    """Sum of a metric's samples; with a ``label``, of those that have it.

    Args:
        text: what the server answers to ``/metrics``.
    """
    lines = (line for line in text.splitlines() if line.startswith(name + "{") and label in line)
    return sum(float(line.rpartition(" ")[2]) for line in lines)
