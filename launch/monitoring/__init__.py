"""What operators look at: a dashboard, alerts, and the page of all metrics."""
