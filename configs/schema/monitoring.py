"""Where a run's events are shown."""

from pydantic import model_validator

from configs.schema.base import Settings


class MonitoringSettings(Settings):
    """Where a run's events are shown besides ``events.jsonl``."""

    tensorboard: bool = False
    """Write TensorBoard scalars to ``tensorboard/`` in the run's directory; needs the extra ``monitoring``."""
    mlflow: str = ""
    """MLflow tracking address (``https://HOST``, ``sqlite:///FILE``, ...); empty: none. Needs the extra ``mlflow``.
    Credentials belong in MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN."""
    mlflow_experiment: str = "siloweave"
    """MLflow experiment that holds the run."""
    ray_metrics: bool = True
    """Set Ray's Prometheus metrics (``ray_siloweave_...``, by run), at most once per second."""

    @model_validator(mode="after")
    def _no_secret(self) -> "MonitoringSettings":
        # Settings are stored beside the run, printed and reported: a password has no place in them.
        address, _, rest = self.mlflow.partition("://")
        if "@" in rest.split("/")[0] and ":" in rest.split("@")[0]:
            raise ValueError(
                "monitoring.mlflow holds a password: settings are stored and shown; give the address without it and "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        if self.mlflow and (not rest or address == "file"):
            raise ValueError(
                f"monitoring.mlflow is {self.mlflow!r}: give an address such as https://HOST or sqlite:////absolute/FILE"
            )
        return self
